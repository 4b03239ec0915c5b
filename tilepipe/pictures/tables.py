"""What a map holds, as HTML tables: every number beside its exact value."""

from __future__ import annotations

from html import escape

from tilepipe.pictures.colors import web_color
from tilepipe.stats import ClassStatistics, MapStatistics
from tilepipe.store.spec import StoreSpec
from tilepipe.store.status import Status

EMPTY = "<td></td>"
HECTARE = 1e4


def class_table(spec: StoreSpec, found: MapStatistics) -> str:
    """A section with a line for each class, and what all take."""
    area = found.area_m2 is not None
    trust = any(each.confidence is not None for each in found.classes)
    head = ["Class", "Pixels", "Share"] + ["Area, m²", "Area, ha"] * area + ["Mean confidence"] * trust
    lines = [_class_row(spec, each, area, trust) for each in found.classes]
    areas = _areas(found.area_m2) if area else ""
    ends = [
        _name("All") + _count(found.pixels) + EMPTY + areas + EMPTY * trust,
        _name("No data") + _count(found.nodata) + EMPTY * (1 + 2 * area + trust),
    ]
    said = _of(found.done, found.blocks) + ("; areas are those on the ground" if area else "")
    return _section("Classes", f"{said}.", head, lines, ends)


def channel_table(spec: StoreSpec, found: Status) -> str:
    """A section with a line for each channel of values."""
    head = ["Channel", "Pixels", "Minimum", "Mean", "Maximum"]
    lines = []
    for name, channel in zip(spec.outputs, found.channels, strict=True):
        told = channel.describe()
        numbers = "".join(_cell(told[key], "{:.6g}") for key in ("min", "mean", "max"))
        lines.append(_name(name) + _count(told["pixels"]) + numbers)
    ends = [_name("No data") + _count(found.nodata) + EMPTY * 3]
    return _section("Values", f"{_of(found.done, found.blocks)}.", head, lines, ends)


def _of(done: int, blocks: int) -> str:
    return "Of the whole map" if done == blocks else f"Of the {done} of {blocks} blocks that are done"


def _class_row(spec: StoreSpec, each: ClassStatistics, area: bool, trust: bool) -> str:
    part = "" if each.share is None else f' class="share" style="--part: {each.share:.4f}"'
    found = [
        _name(each.name, web_color(spec.classes[each.number].color)),
        _count(each.pixels),
        _cell(each.share, "{:.2%}", part),
        _areas(each.area_m2) if area else "",
        _cell(each.confidence, "{:.3f}") if trust else "",
    ]
    return "".join(found)


def _name(text: str, color: str | None = None) -> str:
    swatch = "" if color is None else f'<span class="swatch" style="--color: {color}"></span>'
    return f'<th scope="row">{swatch}{escape(text)}</th>'


def _areas(square_metres: float | None) -> str:
    found = square_metres or 0.0
    return _cell(found, "{:,.0f}" if found >= 1000 else "{:,.1f}") + _cell(found / HECTARE, "{:,.2f}")


def _count(pixels: int) -> str:
    return _cell(pixels, "{:,}")


def _cell(value: float | None, form: str, attributes: str = "") -> str:
    """A cell with a number in a form for people, and the number itself for programs; a dash where there is none."""
    if value is None:
        return f"<td{attributes}>&ndash;</td>"
    return f'<td{attributes}><data value="{value!r}">{form.format(value)}</data></td>'


def _section(title: str, caption: str, head: list[str], lines: list[str], ends: list[str]) -> str:
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    foot = "\n".join(f"<tr>{line}</tr>" for line in ends)
    return f"""<section aria-labelledby="statistics">
<h2 id="statistics">{title}</h2>
<div class="wide">
<table>
<caption>{escape(caption)}</caption>
<thead><tr>{columns}</tr></thead>
<tbody>
{body}
</tbody>
<tfoot>
{foot}
</tfoot>
</table>
</div>
</section>"""
