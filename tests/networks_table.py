"""The tables of docs/networks.md, from derived geometry: `python tests/networks_table.py --write` rewrites them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from tilepipe.geometry.network import AxisGeometry, Geometry
from tilepipe.models import MODELS, build
from tilepipe.trace import geometry_of

DOCUMENT = Path(__file__).parents[1] / "docs" / "networks.md"
CORE = 2048
HEADER = (
    "| network | legal sizes | alignment | reach | halo | cost of a 2048 core | exact |",
    "|-|-|-|-|-|-|-|",
)

SMP = (
    *(("Unet", encoder) for encoder in ("resnet18", "resnet34", "mobilenet_v2", "efficientnet-b0")),
    *(("Unet", encoder) for encoder in ("tu-resnet18", "tu-convnext_atto", "tu-mobilenetv3_small_050")),
    *((name, encoder) for name in ("UnetPlusPlus", "Linknet") for encoder in ("resnet18", "mobilenet_v2")),
    *((name, encoder) for name in ("FPN", "DeepLabV3Plus") for encoder in ("resnet18", "resnet34", "mobilenet_v2")),
    *((name, encoder) for name in ("FPN", "DeepLabV3Plus") for encoder in ("efficientnet-b0", "tu-convnext_atto")),
    *((name, "resnet18") for name in ("PAN", "MAnet", "PSPNet", "DeepLabV3", "UPerNet", "Segformer")),
)
TORCHVISION = ("fcn_resnet50", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large")


def _smp(name: str, encoder: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import segmentation_models_pytorch as smp

        return getattr(smp, name)(encoder, encoder_weights=None, in_channels=3, classes=4)

    return make


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision.models import segmentation

        return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=4)

    return make


FOREIGN: dict[str, Callable[[], nn.Module]] = {
    **{f"smp.{name} {encoder}": _smp(name, encoder) for name, encoder in SMP},
    **{f"torchvision {name}": _torchvision(name) for name in TORCHVISION},
}
"""Networks of other libraries with random weights, three bands and four classes."""


def preset_line(name: str) -> str:
    """The line of an architecture of ours, at full width."""
    with torch.device("meta"):
        network = build(name)
    first = next(each for each in network.modules() if isinstance(each, nn.Conv2d))
    return line(name, geometry_of(network, first.in_channels))


def foreign_line(name: str) -> str:
    """The line of another library's network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return line(name, geometry_of(FOREIGN[name](), 3))


def line(name: str, geometry: Geometry) -> str:
    """A row of the table."""
    axes = (geometry.rows,) if geometry.rows == geometry.cols else geometry.axes
    cells = [
        " x ".join(str(axis.sizes) for axis in axes) + _scaled(geometry.rows),
        " x ".join(str(axis.alignment) for axis in axes),
        " x ".join("unbounded" if axis.reach is None else _pair(axis.reach) for axis in axes),
        " x ".join("" if axis.reach is None else _pair(axis.halo) for axis in axes),
        _cost(geometry),
        "yes" if geometry.exact else f"no: {geometry.obstacle}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _scaled(axis: AxisGeometry) -> str:
    return f", one output per {axis.scale}" if axis.scale > 1 else ""


def _pair(values: tuple[int, int]) -> str:
    return str(values[0]) if values[0] == values[1] else f"{values[0]}, {values[1]}"


def _cost(geometry: Geometry) -> str:
    """The area of the tile of a core of about 2048 input pixels, as a multiple of the core's."""
    if not geometry.exact:
        return ""
    cost = 1.0
    for axis in geometry.axes:
        core = -(-CORE // axis.alignment) * axis.alignment
        cost *= axis.tile(core // axis.scale) / core
    return f"{cost:.2f}"


def tables() -> Iterator[tuple[str, list[str]]]:
    """(the table's mark in the document, its lines)."""
    yield "presets", [*HEADER, *(preset_line(name) for name in sorted(MODELS))]
    yield "foreign", [*HEADER, *(foreign_line(name) for name in FOREIGN)]


def written(mark: str) -> list[str]:
    """The lines of a table that stands in the document."""
    text = DOCUMENT.read_text()
    inside = text.partition(f"<!-- {mark} -->\n")[2].partition("\n<!-- end -->")[0]
    return inside.splitlines()


def rewrite() -> None:
    """Puts the tables into the document."""
    text = DOCUMENT.read_text()
    for mark, lines in tables():
        start, opening, rest = text.partition(f"<!-- {mark} -->\n")
        _, closing, after = rest.partition("\n<!-- end -->")
        text = start + opening + "\n".join(lines) + closing + after
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        rewrite()
    else:
        for _, rows in tables():
            print("\n".join(rows), end="\n\n")
