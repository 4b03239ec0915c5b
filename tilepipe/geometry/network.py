"""What a network asks of its input: which sizes it accepts without loss, how far it looks, where tiles may begin.

`Layer` records describe a network at one input size (a `Trace`); `fold` carries an interval of outputs back to the
inputs that it needs. `Geometry` is what tiling needs to know of the network, and all that it needs to know:

    raster  0 |--------------------------------------------------------------| E, legal, E = T modulo the alignment
    tile            |<--- halo --->|<------- core ------->|<--- halo --->|     T, a legal size
                    o, a multiple of the alignment

Tuples are (rows, columns), or (before, after) along one axis. Plain integers: this module knows no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from tilepipe.errors import GeometryError
from tilepipe.geometry.steps import Mixing, Slide, Step
from tilepipe.window import Interval


@dataclass(frozen=True, slots=True)
class Layer:
    """One operator of a network, at one input size."""

    name: str
    """The module that ran it and its class: "decoder.3 (MaxUnpool2d)"."""
    operator: str
    """The operator, with the numbers it computes with."""
    inputs: tuple[int, ...]
    """The layers it reads, as indices into the trace."""
    rows: Step
    cols: Step
    size: tuple[int, int]
    """(rows, columns) of its output."""
    expected: tuple[int, int] | None = None
    """The size that the output has to have, where the layer undoes another (unpooling: its pool's input)."""

    def step(self, axis: int) -> Step:
        """What the layer does to axis 0 (rows) or 1 (columns)."""
        return self.cols if axis else self.rows


@dataclass(frozen=True, slots=True)
class Trace:
    """A network at one input size: its layers in order of execution, the input first and the output last.

    Holds only layers that the output depends on.
    """

    layers: tuple[Layer, ...]
    channels_in: int
    channels_out: int

    @property
    def mixing(self) -> Layer | None:
        """The first layer whose reach has no bound, if any."""
        return next((layer for layer in self.layers if _is_mixing(layer)), None)


def _is_mixing(layer: Layer) -> bool:
    return isinstance(layer.rows, Mixing) or isinstance(layer.cols, Mixing)


def describe(layer: Layer, reason: str) -> str:
    """A sentence that blames a layer: its name, what it does, its operator."""
    return f"{layer.name} {reason} ({layer.operator})"


def fold(
    trace: Trace, axis: int, outputs: Interval, at_start: bool = False, at_end: bool = False
) -> list[Interval | None]:
    """What each layer has to deliver along an axis, so that the last one delivers `outputs`; None: nothing.

    Indices are unclipped unless `at_start` (the layers' first pixels are at the raster's border) or `at_end`
    (their last pixels are): there, padding needs no input, except that reflection reads back inwards. The first
    element is the interval of network inputs. Raises GeometryError where the reach has no bound.
    """
    needs: list[Interval | None] = [None] * len(trace.layers)
    needs[-1] = outputs
    for index in range(len(trace.layers) - 1, 0, -1):
        layer, need = trace.layers[index], needs[index]
        if need is None or len(need) == 0:
            continue
        step = layer.step(axis)
        if isinstance(step, Mixing):
            raise GeometryError(describe(layer, step.reason))
        size = trace.layers[layer.inputs[0]].size[axis]
        read = _at_border(step.reads(need), step, size, at_start, at_end)
        for source in layer.inputs:
            known = needs[source]
            needs[source] = read if known is None else known.hull(read)
    return needs


def _at_border(read: Interval, step: Step, size: int, at_start: bool, at_end: bool) -> Interval:
    """The pixels of 0..size-1 behind an interval that may reach into the padding at one or both ends."""
    start, stop = read.start, read.stop
    mirror = isinstance(step, Slide) and step.mirror
    if at_start and start < 0:
        stop = max(stop, 1 - start if mirror else 1)
        start = 0
    if at_end and stop > size:
        start = min(start, 2 * size - 1 - stop if mirror else size - 1)
        stop = size
    return Interval(start, max(start, stop))


def round_up(value: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least `value`.

    >>> round_up(186, 32)
    192
    """
    return -(-value // unit) * unit


@dataclass(frozen=True, slots=True)
class Sizes:
    """The legal input sizes of one axis: any of `minimums` plus a multiple of `step`; step 0: only these.

    >>> print(Sizes((61,), 16), Sizes((32,), 32), Sizes((224,), 0), sep=", ")
    61 + 16n, 32n, 224 only
    """

    minimums: tuple[int, ...]
    step: int

    def __post_init__(self) -> None:
        if not self.minimums or min(self.minimums) < 1 or self.step < 0:
            raise GeometryError(f"sizes {self.minimums} + {self.step}n: need a smallest size of at least 1")
        object.__setattr__(self, "minimums", tuple(sorted(set(self.minimums))))

    def legal(self, n: int) -> bool:
        """Whether an axis of n pixels passes through the network without loss."""
        if self.step == 0:
            return n in self.minimums
        return any(n >= least and (n - least) % self.step == 0 for least in self.minimums)

    def ceil(self, n: int, residue_of: int | None = None) -> int:
        """The smallest legal size of at least n; with `residue_of`, one that is congruent to it modulo the step.

        >>> Sizes((61,), 16).ceil(62), Sizes((4, 5), 2).ceil(10, residue_of=33)
        (77, 11)
        """
        found = [size for least in self.minimums if (size := self._above(n, least, residue_of)) is not None]
        if not found:
            alike = "" if residue_of is None else f" congruent to {residue_of}"
            raise GeometryError(f"no legal size of at least {n}{alike}; legal: {self}")
        return min(found)

    def _above(self, n: int, least: int, residue_of: int | None) -> int | None:
        if self.step == 0:
            return least if n <= least and residue_of in {None, least} else None
        if residue_of is not None and (residue_of - least) % self.step:
            return None
        return least + round_up(max(n - least, 0), self.step)

    def nearest(self, n: int) -> tuple[int, ...]:
        """The nearest legal sizes at or below n and at or above it, where there are such."""
        if self.legal(n):
            return (n,)
        below = [size for least in self.minimums if (size := self._below(n, least)) is not None]
        above = [size for least in self.minimums if (size := self._above(n, least, None)) is not None]
        return tuple(([max(below)] if below else []) + ([min(above)] if above else []))

    def _below(self, n: int, least: int) -> int | None:
        if n < least:
            return None
        return least + (n - least) // self.step * self.step if self.step else least

    def __str__(self) -> str:
        if self.step == 0:
            return " or ".join(str(size) for size in self.minimums) + " only"
        stride = _spacing(self.minimums, self.step)
        if stride is None:
            return " or ".join(str(size) for size in self.minimums) + f", each + {self.step}n"
        least = max(self.minimums) - self.step + stride
        if stride == 1:
            return f"any size from {least}"
        return f"{stride}n" if least == stride else f"{least} + {stride}n"


def _spacing(minimums: Sequence[int], step: int) -> int | None:
    """The d of "from some size on, every d-th": where the residues are evenly spaced; None where they are not."""
    residues = sorted({least % step for least in minimums})
    spacing, rest = divmod(step, len(residues))
    even = all(b - a == spacing for a, b in pairwise(residues))
    return spacing if rest == 0 and even else None


@dataclass(frozen=True, slots=True)
class AxisGeometry:
    """What a network asks of one axis."""

    sizes: Sizes
    alignment: int
    """The period, in input pixels, at which tile origins are legal; a multiple of `scale`."""
    reach: tuple[int, int] | None
    """(L, R): outputs [a, b), aligned, need inputs [scale*a - L, scale*b + R); None: without a bound."""
    scale: int
    """Input pixels per output pixel."""
    trim: tuple[int, int] = (0, 0)
    """Input pixels without an output at either end, for a network of scale 1 that does not pad."""
    offset: Fraction = Fraction(0)
    """Where output pixel 0's cell starts, in input pixels; output j's starts j*scale further."""
    shortfall: int = 0
    """Input pixels beyond scale times the output's size, for a network of scale above 1."""

    def __post_init__(self) -> None:
        if self.scale < 1 or self.alignment < 1 or self.alignment % self.scale:
            raise GeometryError(f"alignment {self.alignment} has to be a positive multiple of scale {self.scale}")
        if self.reach is not None and min(self.reach) < 0:
            raise GeometryError(f"reach {self.reach} has to be at least 0 at both ends")

    @property
    def halo(self) -> tuple[int, int]:
        """The reach rounded up to the alignment, (before, after); raises GeometryError where it has no bound."""
        if self.reach is None:
            raise GeometryError("a network whose reach has no bound has no halo; use blended stitching")
        return round_up(self.reach[0], self.alignment), round_up(self.reach[1], self.alignment)

    def output_size(self, n: int) -> int:
        """The output's size for a legal input size n; raises GeometryError for another."""
        if not self.sizes.legal(n):
            near = " or ".join(str(size) for size in self.sizes.nearest(n))
            raise GeometryError(f"{n} pixels do not pass through the network; legal: {self.sizes}; nearest: {near}")
        return (n - sum(self.trim) - self.shortfall) // self.scale

    def tile(self, core: int, residue_of: int | None = None) -> int:
        """The smallest legal tile for a core of `core` outputs, the halo before it and the reach behind it.

        With `residue_of`, the extended raster's size, the tile is congruent to it modulo the sizes' step.
        """
        reach = self.reach or (0, 0)
        return self.sizes.ceil(self.scale * core + self.halo[0] + reach[1], residue_of)

    def valid(self, origin: int, tile: int, extent: int) -> Interval:
        """The outputs, counted from the raster's first, that a tile at input `origin` computes exactly.

        The raster is `extent` input pixels long; its two sizes are legal and congruent modulo the alignment. The
        result is aligned, except that it goes to the raster's end where the tile does. Raises GeometryError for an
        origin off the alignment grid.
        """
        if self.reach is None or origin % self.alignment or not 0 <= origin <= extent - tile:
            raise GeometryError(
                f"a tile of {tile} pixels at {origin} of {extent} has no exact outputs; "
                f"origins are multiples of {self.alignment} from 0 to {extent - tile}"
            )
        start = origin + self.halo[0] if origin else 0
        last = self.output_size(extent)
        stop = (origin + tile - self.reach[1]) // self.alignment * self.alignment // self.scale
        stop = last if origin + tile == extent else min(stop, last)
        return Interval(start // self.scale, max(start // self.scale, stop))


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a network asks of its input, per axis, and why it cannot be tiled exactly where it cannot."""

    rows: AxisGeometry
    cols: AxisGeometry
    channels_in: int
    channels_out: int
    obstacle: str | None = None
    """Why exact stitching is impossible, naming the layer; None where it is possible."""

    @property
    def exact(self) -> bool:
        """Whether tiles can give the reference result."""
        return self.obstacle is None and self.rows.reach is not None and self.cols.reach is not None

    @property
    def axes(self) -> tuple[AxisGeometry, AxisGeometry]:
        """(rows, columns)."""
        return self.rows, self.cols

    @property
    def scale(self) -> tuple[int, int]:
        """Input pixels per output pixel, (rows, columns)."""
        return self.rows.scale, self.cols.scale
