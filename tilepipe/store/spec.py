"""What decides an output store's bytes: grid, classes or outputs, arrays, settings, fingerprint of what made it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from tilepipe.errors import StoreError
from tilepipe.window import Window

FORMAT = 1
"""Version of the store's own layout; a store of another one is refused."""

Kind = Literal["labels", "values"]
KINDS: tuple[Kind, ...] = ("labels", "values")
"""What a store holds, by its first array's name: a class for each pixel, or the network's own output."""
ARRAYS = ("labels", "confidence", "probabilities", "values")


class ClassLike(Protocol):
    """A class of the label map, as models declare them."""

    @property
    def name(self) -> str:
        """Any text."""

    @property
    def color(self) -> tuple[int, int, int]:
        """(red, green, blue), 0 to 255 each."""


class LabelClass(NamedTuple):
    """A class as a store records it."""

    name: str
    color: tuple[int, int, int]


class ControlPoint(NamedTuple):
    """A ground control point: pixel (row, col) lies at (x, y, z) of the store's CRS."""

    row: float
    col: float
    x: float
    y: float
    z: float = 0.0


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of blocks: its shape and how it is cut. The last two axes are (y, x)."""

    name: str
    dtype: np.dtype[Any]
    fill: int | float
    """What a pixel without data holds; NaN for floats."""
    shape: tuple[int, ...]
    shard: tuple[int, ...]
    """The unit of writing: what one block fills."""
    chunk: tuple[int, ...]
    """The unit of reading."""
    dims: tuple[str, ...]
    sharded: bool
    """False: each chunk is a file of its own, and a block is several files."""


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """All that decides an output store's layout and metadata.

    A store holds labels, and then has `classes`, or values, and then has `outputs`. Labels are uint8 with nodata
    255 for up to 255 classes, else uint16 with nodata 65535; values are (channel, y, x) with NaN for nodata. A
    block is a shard; the grid of blocks starts at the output's first pixel.
    """

    shape: tuple[int, int]
    """(rows, columns) of the output, in its own pixels."""
    shard: tuple[int, int]
    """Pixels of a block, a multiple of `chunk`; the last blocks of an axis may be cut short."""
    chunk: tuple[int, int]
    classes: Sequence[ClassLike] = ()
    crs_wkt: str | None = None
    transform: tuple[float, float, float, float, float, float] | None = None
    """(a, b, c, d, e, f) of the OUTPUT grid: x = a * col + b * row + c, y = d * col + e * row + f."""
    gcps: Sequence[ControlPoint] | None = None
    """Control points in `crs_wkt`, for outputs without a transform."""
    confidence: bool = False
    probabilities: Literal["uint8", "float16"] | None = None
    shards: bool = True
    """False writes each chunk as a file of its own, for readers that know no shards."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The resolved plan, settings, model card and versions, as JSON values; kept for readers, never compared."""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    """Named parts (raster, model, plan, precision ...), as JSON values: a resume must have equal ones."""
    values: Literal["float16", "float32"] | None = None
    """The type of the network's own output, in place of labels; None for labels."""
    outputs: Sequence[str] = ()
    """The name of each channel of `values`, no two alike."""

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise StoreError(f"output shape {self.shape} is empty; both sides must be at least 1")
        if min(self.chunk) < 1 or any(s < 1 or s % c for s, c in zip(self.shard, self.chunk, strict=True)):
            raise StoreError(f"shard {self.shard} is not a multiple of chunk {self.chunk}; choose one that is")
        if self.kind == "values":
            self._check_values()
        else:
            self._check_labels()
        if self.transform is not None:
            a, b, _, d, e, _ = self.transform
            if not all(map(math.isfinite, self.transform)) or a * e == b * d:
                raise StoreError(f"geotransform {self.transform} maps no area; give finite, independent axes")
        # Plain JSON values: equal specs are then equal text, whatever types and key order they came in.
        object.__setattr__(self, "settings", _plain(self.settings, "settings"))
        object.__setattr__(self, "fingerprint", _plain(self.fingerprint, "fingerprint"))
        classes = tuple(LabelClass(c.name, _color(c.color)) for c in self.classes)
        object.__setattr__(self, "classes", classes)
        object.__setattr__(self, "outputs", tuple(str(name) for name in self.outputs))
        if self.gcps is not None:
            object.__setattr__(self, "gcps", tuple(ControlPoint(*map(float, p)) for p in self.gcps))

    def _check_labels(self) -> None:
        if not 1 <= len(self.classes) <= 65535:
            raise StoreError(f"{len(self.classes)} classes cannot be stored; 1 to 65535 can")
        if self.probabilities not in (None, "uint8", "float16"):
            raise StoreError(f"probabilities as {self.probabilities!r}; use uint8 or float16")
        if self.outputs:
            raise StoreError(f"outputs {', '.join(self.outputs)} are of values; labels have classes")

    def _check_values(self) -> None:
        if self.values not in ("float16", "float32"):
            raise StoreError(f"values as {self.values!r}; use float16 or float32")
        if self.classes or self.confidence or self.probabilities:
            raise StoreError("a store of values has no classes, confidence or probabilities; leave them out")
        if not self.outputs or not all(self.outputs) or len(set(self.outputs)) != len(self.outputs):
            raise StoreError(f"outputs {list(self.outputs)} do not name the channels; give each a name of its own")

    @property
    def kind(self) -> Kind:
        """What the store holds, and its first array's name."""
        return "labels" if self.values is None else "values"

    @property
    def label_dtype(self) -> np.dtype[Any]:
        """uint8 up to 255 classes, else uint16."""
        return np.dtype(np.uint8 if len(self.classes) <= 255 else np.uint16)

    @property
    def nodata(self) -> int:
        """The label of a pixel without data: the dtype's largest value."""
        return int(np.iinfo(self.label_dtype).max)

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks along (rows, columns)."""
        return -(-self.shape[0] // self.shard[0]), -(-self.shape[1] // self.shard[1])

    @property
    def rotated(self) -> bool:
        """Whether the grid's axes are not those of its CRS, so that no 1-D x and y describe it."""
        return self.transform is not None and (self.transform[1] != 0 or self.transform[3] != 0)

    @property
    def digest(self) -> str:
        """SHA-256 of fingerprint and layout, in hexadecimal: what a block's record must carry to count."""
        return hashlib.sha256(_canonical([self.fingerprint, self.layout()]).encode()).hexdigest()

    def block_window(self, index: tuple[int, int]) -> Window:
        """The output pixels of a block; StoreError where the grid has no such block."""
        (row, col), (height, width) = index, self.shard
        if not (0 <= row < self.grid[0] and 0 <= col < self.grid[1]):
            raise StoreError(f"no block ({row}, {col}); blocks are (0, 0) to {self.grid[0] - 1, self.grid[1] - 1}")
        whole = Window.whole(self.shape)
        return Window.of(row * height, (row + 1) * height, col * width, (col + 1) * width).intersect(whole)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Every block's (row, column), row by row."""
        return ((row, col) for row in range(self.grid[0]) for col in range(self.grid[1]))

    def arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays of blocks, in the order in which a block's parts are written."""
        if self.values is not None:
            return (self._array("values", np.dtype(self.values), math.nan),)
        found = [self._array("labels", self.label_dtype, self.nodata)]
        if self.confidence:
            found.append(self._array("confidence", np.dtype(np.uint8), 255))
        if self.probabilities == "uint8":
            found.append(self._array("probabilities", np.dtype(np.uint8), 255))
        if self.probabilities == "float16":
            found.append(self._array("probabilities", np.dtype(np.float16), math.nan))
        return tuple(found)

    def _array(self, name: str, dtype: np.dtype[Any], fill: int | float) -> ArraySpec:
        shape, shard, chunk, dims = self.shape, self.shard, self.chunk, ("y", "x")
        layers = {"probabilities": ("class", len(self.classes)), "values": ("channel", len(self.outputs))}
        if name not in layers:
            return ArraySpec(name, dtype, fill, shape, shard, chunk, dims, self.shards)
        axis, count = layers[name]
        files = (count, *shard) if self.shards else (1, *shard)
        return ArraySpec(name, dtype, fill, (count, *shape), files, (1, *chunk), (axis, *dims), self.shards)

    def layout(self) -> dict[str, Any]:
        """Everything but settings and fingerprint, as JSON values; `from_json` reads it back."""
        # Labels are told as before there were values, so that stores of then can be resumed.
        values = {} if self.values is None else {"values": self.values, "outputs": list(self.outputs)}
        return {
            **values,
            "shape": list(self.shape),
            "shard": list(self.shard),
            "chunk": list(self.chunk),
            "shards": self.shards,
            "classes": [{"name": c.name, "color": list(c.color)} for c in self.classes],
            "crs_wkt": self.crs_wkt,
            "transform": None if self.transform is None else [float(v) for v in self.transform],
            "gcps": None if self.gcps is None else [list(p) for p in self.gcps],
            "confidence": self.confidence,
            "probabilities": self.probabilities,
        }

    def to_json(self) -> dict[str, Any]:
        """What the store's group keeps under `tilepipe`."""
        return {
            "format": FORMAT,
            "digest": self.digest,
            "fingerprint": self.fingerprint,
            "layout": self.layout(),
            "settings": self.settings,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], where: str) -> StoreSpec:
        """The spec that `to_json` gave; StoreError, naming `where`, for anything else."""
        if stored.get("format") != FORMAT:
            raise StoreError(
                f"{where} has store format {stored.get('format')!r}, this version reads {FORMAT}; "
                "use the version that wrote it, or --overwrite"
            )
        try:
            layout = dict(stored["layout"])
            for pair in ("shape", "shard", "chunk"):
                layout[pair] = (int(layout[pair][0]), int(layout[pair][1]))
            layout["classes"] = [LabelClass(c["name"], _color(c["color"])) for c in layout["classes"]]
            if layout["transform"] is not None:
                layout["transform"] = tuple(layout["transform"])
            if layout["gcps"] is not None:
                layout["gcps"] = [ControlPoint(*p) for p in layout["gcps"]]
            return cls(settings=stored["settings"], fingerprint=stored["fingerprint"], **layout)
        except (KeyError, TypeError, IndexError) as error:
            raise StoreError(f"{where} has damaged tilepipe attributes ({error!r}); use --overwrite") from error


def differences(old: StoreSpec, new: StoreSpec) -> list[str]:
    """What stands in the way of resuming `old` as `new`, each as "part: old -> new"; empty where nothing does.

    >>> a = StoreSpec((9, 9), (8, 8), (4, 4), [LabelClass("a", (0, 0, 0))], fingerprint={"model": {"sha": "1"}})
    >>> b = StoreSpec((9, 9), (8, 8), (4, 4), [LabelClass("a", (0, 0, 0))], fingerprint={"model": {"sha": "2"}})
    >>> differences(a, b)
    ['model.sha: "1" -> "2"']
    >>> from dataclasses import replace
    >>> c, d = (replace(a, fingerprint={"raster": [{"path": "/a.tif", "size": size}]}) for size in (10, 20))
    >>> differences(c, d)
    ['raster[a.tif].size: 10 -> 20']
    """
    return [*_differ("", old.fingerprint, new.fingerprint), *_differ("", old.layout(), new.layout())]


def _differ(name: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from _differ(f"{name}.{key}" if name else key, old.get(key), new.get(key))
    elif _parts(old) and _parts(new) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            # A file's facts are told under its name, as long as it is the same file.
            label = one.get("path") if one.get("path") == other.get("path") else None
            yield from _differ(f"{name}[{number if label is None else _file_name(label)}]", one, other)
    elif old != new:
        yield f"{name}: {_short(old)} -> {_short(new)}"


def _parts(value: Any) -> bool:
    """Whether a value is a list of mappings, such as a raster's files."""
    return isinstance(value, list) and bool(value) and all(isinstance(part, Mapping) for part in value)


def _file_name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _short(value: Any, limit: int = 60) -> str:
    text = "none" if value is None else _canonical(value)
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 3 :]}"


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _plain(value: Any, what: str) -> Any:
    try:
        return json.loads(json.dumps(value, sort_keys=True, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(f"{what} must be JSON values, without NaN or infinity: {error}") from error


def _color(color: Sequence[int]) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in color)
    if not all(0 <= v <= 255 for v in (red, green, blue)):
        raise StoreError(f"class colour {tuple(color)}; red, green and blue are 0 to 255")
    return red, green, blue
