"""What a user can ask of a job, as one frozen value: options of the command, keys of a file, arguments of a call."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from tilepipe.errors import UsageError

Precision = Literal["float64", "float32", "bf16"]
Stage = Literal["auto", "always", "never"]

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(frozen=True, slots=True)
class SegmentOptions:
    """How to segment a raster; every None lets tilepipe decide.

    Sizes are (rows, columns) in pixels, memory is in bytes, names are as on the command line.
    """

    stitch: Literal["auto", "exact", "blend"] = "auto"
    tile: tuple[int, int] | None = None
    overlap: int | None = None
    window: str = "hann"
    block: tuple[int, int] | None = None
    bands: tuple[int, ...] | None = None
    """Band numbers from 1, in the model's order."""
    nodata: float | Literal["none"] | None = None
    """Stands for the raster's own nodata value; "none" lets it have none."""
    region: str | None = None
    """"row0:row1,col0:col1", or "left,bottom,right,top" in the raster's CRS."""
    mask: str | None = None
    """A vector file or raster; pixels outside are nodata in the output."""
    resample: bool = False
    """Whether to read at the model's ground resolution."""
    confidence: bool = False
    probabilities: Literal["uint8", "float16"] | None = None
    values: Literal["float16", "float32"] | None = None
    """The network's own output in this type, in place of labels."""
    stride: Literal[1] | None = None
    """1 slides a classifier whose outputs lie several pixels apart over every pixel."""
    dense: Literal["dilate", "stitch"] = "dilate"
    """How it slides: strides become dilations in one pass, or the passes at all offsets are interleaved."""
    tta: Literal["flips", "d4"] | None = None
    """Average over flipped images, or over flipped and turned ones."""
    combine: Literal["mean", "max"] = "mean"
    """How several models' class probabilities become one."""
    refine: str | None = None
    """"crf", or "crf:iterations=3,radius=4,...": refine the probabilities by a conditional random field."""
    precision: Precision | None = None
    device: str | None = None
    memory: int | None = None
    device_memory: int | None = None
    workers: int | None = None
    threads: int | None = None
    gpus: tuple[int, ...] | None = None
    scheduler: str | None = None
    stage: Stage = "auto"
    shards: bool = True
    overviews: bool = True
    """Whether coarser maps for viewers are made, too."""
    overwrite: bool | Literal["changed"] = False
    """Whether an output that is there is replaced; "changed": only one that another job made."""

    def __post_init__(self) -> None:
        for name, legal in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in legal:
                raise UsageError(f"{name} is {value!r}; legal are {', '.join(legal)}")
        for name in ("overlap", "memory", "device_memory", "workers", "threads"):
            value = getattr(self, name)
            if value is not None and value < (0 if name == "overlap" else 1):
                raise UsageError(f"{name} is {value}; it has to be positive")
        for name in ("tile", "block"):
            pair = getattr(self, name)
            if pair is not None and min(pair) < 1:
                raise UsageError(f"{name} is {pair[0]} x {pair[1]}; both have to be positive")
        if self.overwrite not in (False, True, "changed"):
            raise UsageError(f"overwrite is {self.overwrite!r}; legal are true, false and changed")
        if self.stride not in (None, 1):
            raise UsageError(f"stride is {self.stride}; legal is 1, an output for each pixel")
        unfit = [name for name in ("confidence", "probabilities", "refine") if self.values and getattr(self, name)]
        if unfit:
            raise UsageError(f"{unfit[0]} is of classes, and values have none; leave it out")

    def meaning(self) -> dict[str, Any]:
        """The options that the map's bytes depend on, as JSON values: what a resumed job must share."""
        return {name: _plain(getattr(self, name)) for name in _MEANING}


_CHOICES: dict[str, tuple[str, ...]] = {
    "stitch": ("auto", "exact", "blend"),
    "probabilities": ("uint8", "float16"),
    "values": ("float16", "float32"),
    "dense": ("dilate", "stitch"),
    "tta": ("flips", "d4"),
    "combine": ("mean", "max"),
    "precision": get_args(Precision),
    "stage": get_args(Stage),
}

_MEANING = (
    "stitch",
    "tile",
    "overlap",
    "window",
    "block",
    "bands",
    "nodata",
    "region",
    "resample",
    "confidence",
    "probabilities",
    "values",
    "stride",
    "dense",
    "tta",
    "combine",
    "refine",
    "shards",
)

OPTION_NAMES = tuple(field.name for field in fields(SegmentOptions))


def parse_bytes(text: str) -> int:
    """Bytes from a size such as "8G", "512 MiB" or "1000000"; units are powers of 1024.

    >>> parse_bytes("1.5G")
    1610612736
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if match is None:
        raise UsageError(f"size {text!r} is not understood; write bytes, or a number with K, M, G or T such as 8G")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_pair(text: str, name: str) -> tuple[int, int]:
    """(rows, columns) from "1408" or "1408x1024".

    >>> parse_pair("640x512", "tile")
    (640, 512)
    """
    match = re.fullmatch(r"\s*(\d+)\s*(?:[x,]\s*(\d+)\s*)?", text.lower())
    if match is None:
        raise UsageError(
            f"{name} {text!r} is not understood; write pixels such as 1408, or rows x columns as 1408x1024"
        )
    return int(match[1]), int(match[2] or match[1])


def parse_numbers(text: str, name: str) -> tuple[int, ...]:
    """Whole numbers from "4,3,2".

    >>> parse_numbers("4, 3,2", "bands")
    (4, 3, 2)
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{name} {text!r} is not understood; write whole numbers such as 1,2,3") from None


def parse_nodata(text: str) -> float | Literal["none"]:
    """A pixel value from "0", "-9999.5" or "nan"; or "none". Whole numbers stay whole, as 64-bit pixels need.

    >>> parse_nodata("18446744073709551615"), parse_nodata("-0.5"), parse_nodata("none")
    (18446744073709551615, -0.5, 'none')
    """
    if text.strip().lower() == "none":
        return "none"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    raise UsageError(f"nodata {text!r} is not understood; write a number, nan, or none for no value at all")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # JSON has neither NaN nor infinity
    return list(value) if isinstance(value, tuple) else value
