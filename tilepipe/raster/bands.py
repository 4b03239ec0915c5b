"""Which of a raster's bands a network gets: by number, by declared colour, by name, or by order."""

from __future__ import annotations

from collections.abc import Sequence

from tilepipe.errors import InputError, UsageError
from tilepipe.raster.info import BandChoice, RasterInfo

RGB = ("red", "green", "blue")
AERIAL = (*RGB, "nir")
"""What the four bands of an aerial image are whose file does not say."""

_SPELLINGS = {
    "red": ("red", "r"),
    "green": ("green", "g"),
    "blue": ("blue", "b"),
    "nir": ("nir", "near infrared", "near-infrared", "nearinfrared"),
    "rededge": ("rededge", "red edge", "red-edge"),
    "gray": ("gray", "grey", "pan", "panchromatic"),
}


def select_bands(info: RasterInfo, wanted: Sequence[str], chosen: Sequence[int] | None = None) -> BandChoice:
    """The bands of `info` for a network that wants `wanted` (names such as "red", in its order).

    `chosen` (1-based numbers, repeats allowed) decides where given. Else a one-band raster with a colour table
    gives red, green and blue through it; else the bands that declare the wanted colours or names; else, where
    there are exactly as many bands without alpha as wanted, those in order; else four bands of bytes that declare
    nothing at all are those of an aerial image (`guess` says so). Anything else is an InputError.
    """
    if chosen is not None:
        return BandChoice(_checked(info, wanted, tuple(chosen)))
    colours = [band for band in range(1, info.bands + 1) if info.color_interp[band - 1] != "alpha"]
    if info.colormap is not None and len(colours) == 1 and len(wanted) > 1 and set(wanted) <= set(RGB):
        return BandChoice((colours[0],), tuple(RGB.index(name) for name in wanted))
    if len(colours) < len(wanted):
        raise InputError(
            f"{info.name} has {_count(len(colours))} ({_listing(info)}), the model wants {len(wanted)} "
            f"({', '.join(wanted)}): give a raster with these, or repeat bands with --bands"
        )
    declared = _declared(info, wanted, colours)
    if declared is not None:
        return BandChoice(declared)
    if len(colours) == len(wanted):
        return BandChoice(tuple(colours))
    if _aerial(info, wanted):
        return BandChoice(tuple(AERIAL.index(name) + 1 for name in wanted))
    raise InputError(
        f"{info.name} has {_count(len(colours))} ({_listing(info)}), the model wants {len(wanted)} "
        f"({', '.join(wanted)}), and their names do not say which: choose with --bands, e.g. "
        f"--bands {','.join(str(band) for band in colours[: len(wanted)])}"
    )


def guess(info: RasterInfo, wanted: Sequence[str]) -> str | None:
    """What `select_bands` takes for granted where nothing is chosen, in words; None where the bands say it."""
    if info.bands == len(wanted) or not _aerial(info, wanted):
        return None
    return f"{info.name} does not name its 4 bands, which are taken for {', '.join(AERIAL)}; --bands says otherwise"


def _aerial(info: RasterInfo, wanted: Sequence[str]) -> bool:
    unnamed = set(info.color_interp) <= {"gray", "undefined"} and not any(info.descriptions)
    return info.dtypes == ("uint8",) * len(AERIAL) and unnamed and set(wanted) <= set(AERIAL)


def check_numbers(info: RasterInfo, numbers: Sequence[int]) -> tuple[int, ...]:
    """`numbers` as a tuple, or a UsageError naming the one that is no band of the raster."""
    for band in numbers:
        if not 1 <= band <= info.bands:
            raise UsageError(f"band {band} is not in {info.name}, which has {_count(info.bands)} counted from 1")
    if not numbers:
        raise UsageError(f"no band is chosen; {info.name} has {_count(info.bands)} counted from 1")
    return tuple(int(band) for band in numbers)


def _checked(info: RasterInfo, wanted: Sequence[str], chosen: tuple[int, ...]) -> tuple[int, ...]:
    if len(chosen) != len(wanted):
        raise UsageError(
            f"--bands {','.join(map(str, chosen))} names {len(chosen)}, the model wants {len(wanted)} "
            f"({', '.join(wanted)})"
        )
    return check_numbers(info, chosen)


def _declared(info: RasterInfo, wanted: Sequence[str], colours: list[int]) -> tuple[int, ...] | None:
    """The one band that declares each wanted name, by colour or else description; None where one is missing."""
    found = []
    for name in wanted:
        spellings = _SPELLINGS.get(name.lower(), (name.lower(),))
        by_colour = [band for band in colours if info.color_interp[band - 1].lower() in spellings]
        by_name = [band for band in colours if (info.descriptions[band - 1] or "").strip().lower() in spellings]
        matches = by_colour if len(by_colour) == 1 else by_name
        if len(matches) != 1:
            return None
        found.append(matches[0])
    return tuple(found) if len(set(found)) == len(found) else None


def _listing(info: RasterInfo, most: int = 8) -> str:
    names = [
        f"{band} {info.descriptions[band - 1] or info.color_interp[band - 1]}"
        for band in range(1, min(info.bands, most) + 1)
    ]
    return ", ".join(names) + (", ..." if info.bands > most else "")


def _count(bands: int) -> str:
    return "1 band" if bands == 1 else f"{bands} bands"
