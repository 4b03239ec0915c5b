"""How one layer moves pixels along one axis: which inputs an output reads, and where it lies among them.

A layer has one step for its rows and one for its columns. All indices are pixels of the layer's own input and
output, counted from their first pixel; they may lie in the padding, so below 0 or beyond the end.

    Slide    output o reads inputs  [o*stride - before, o*stride - before + extent)     convolution, pooling, crop
    Spread   output o reads inputs  i  with  i*stride - before <= o < i*stride - before + extent
    Resample output o reads inputs around o*ratio                                       nearest, linear, cubic
    Same     output o reads input o                                                     element-wise, joins
    Mixing   an output reads inputs without a bound, or reads its own position          global pooling, attention

The arithmetic is that of Dumoulin and Visin, "A guide to convolution arithmetic" (arXiv 1603.07285), turned
around: from outputs to the inputs they need (Araujo, Norris and Sim, Distill, 2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import Literal

from tilepipe.window import Interval

Affine = tuple[Fraction, Fraction]
"""(factor, shift): an output's edge coordinate y lies at input coordinate factor*y + shift."""


@dataclass(frozen=True, slots=True)
class Slide:
    """A window that moves over the input: convolution, pooling, padding, cropping, strided slicing.

    >>> Slide(stride=2, before=1, extent=3, after=1).reads(Interval(0, 4))
    Interval(start=-1, stop=8)
    """

    stride: int = 1
    before: int = 0
    """Padding before the first input; negative: a crop."""
    extent: int = 1
    """Inputs from a window's first to its last, with dilation."""
    after: int = 0
    """Padding behind the last input; negative: a crop."""
    mirror: bool = False
    """Whether the padding repeats the input in reverse (reflection), and so reads back inwards."""

    @property
    def place(self) -> Affine:
        """Where an output lies: its centre is its window's centre."""
        return Fraction(self.stride), Fraction(self.extent - self.stride, 2) - self.before

    def size(self, size_in: int, ceil_mode: bool = False) -> int:
        """The number of windows over `size_in` inputs: floor((i + 2p - d(k - 1) - 1) / s) + 1.

        With `ceil_mode` the ceiling, except that no window starts behind the last input (in the padding after it).

        >>> Slide(stride=2, extent=5).size(61), Slide(stride=2, extent=2).size(33, ceil_mode=True)
        (29, 17)
        """
        room = size_in + self.before + self.after - self.extent
        if not ceil_mode:
            return room // self.stride + 1
        count = -(-room // self.stride) + 1
        return count - 1 if (count - 1) * self.stride >= size_in + self.before else count

    def reads(self, outputs: Interval) -> Interval:
        """The inputs that a non-empty interval of outputs reads, padding included."""
        first = outputs.start * self.stride - self.before
        return Interval(first, (outputs.stop - 1) * self.stride - self.before + self.extent)

    def dropped(self, size_in: int, size_out: int) -> int:
        """Inputs at the end that are lost: no window reads them, though no gap between windows lies there.

        The remainder r of (input + padding - extent) / stride is a loss where it exceeds both the padding behind
        and stride - extent.

        >>> Slide(stride=2, extent=2).dropped(33, 16), Slide(stride=2, before=1, extent=3, after=1).dropped(32, 16)
        (1, 0)
        """
        unread = size_in - ((size_out - 1) * self.stride - self.before + self.extent)
        return unread if unread > 0 and unread + self.after > self.stride - self.extent else 0


@dataclass(frozen=True, slots=True)
class Spread:
    """Inputs stamped onto the output: transposed convolution, max-unpooling, pixel shuffle.

    >>> Spread(stride=2, before=1, extent=4).reads(Interval(0, 2))
    Interval(start=-1, stop=2)
    """

    stride: int
    before: int
    """Outputs cut off the first stamp: the padding of a transposed convolution."""
    extent: int
    """Outputs from a stamp's first to its last."""

    @property
    def place(self) -> Affine:
        """Where an output lies: an input's centre is its stamp's centre."""
        return Fraction(1, self.stride), Fraction(2 * self.before - self.extent + self.stride, 2 * self.stride)

    def size(self, size_in: int, extra: int = 0) -> int:
        """The number of outputs of `size_in` inputs: s(i - 1) + a + d(k - 1) + 1 - 2p.

        `extra` is a, torch's output padding: of the s sizes that a convolution takes to `size_in`, which one.

        >>> Spread(stride=2, before=0, extent=5).size(29), Spread(stride=2, before=1, extent=3).size(16, extra=1)
        (61, 32)
        """
        return self.stride * (size_in - 1) + extra + self.extent - 2 * self.before

    def reads(self, outputs: Interval) -> Interval:
        """The inputs whose stamps touch the outputs; empty where stamps leave gaps."""
        first = (outputs.start + self.before - self.extent) // self.stride + 1
        stop = (outputs.stop - 1 + self.before) // self.stride + 1
        return Interval(first, max(first, stop))


Filter = Literal["nearest", "nearest-exact", "linear", "cubic"]


@dataclass(frozen=True, slots=True)
class Resample:
    """Resizing by interpolation, as torch.nn.functional.interpolate computes it.

    >>> Resample(Fraction(1, 2), "linear").reads(Interval(0, 4))
    Interval(start=-1, stop=3)
    """

    ratio: Fraction
    """Input pixels per output pixel; with aligned corners (input - 1) / (output - 1)."""
    filter: Filter
    aligned: bool = False
    """Whether the centres of the first and last pixels coincide, instead of the edges."""
    antialias: bool = False

    @property
    def place(self) -> Affine:
        """Where an output lies among the inputs."""
        return self.ratio, (1 - self.ratio) / 2 if self.aligned else Fraction(0)

    def reads(self, outputs: Interval) -> Interval:
        """The inputs that a non-empty interval of outputs reads, those with weight zero included."""
        return Interval(self._reads(outputs.start).start, self._reads(outputs.stop - 1).stop)

    def _reads(self, output: int) -> Interval:
        if self.filter == "nearest":
            source = floor(output * self.ratio)
            return Interval(source, source + 1)
        if self.filter == "nearest-exact":
            source = floor((output + Fraction(1, 2)) * self.ratio)
            return Interval(source, source + 1)
        taps = 1 if self.filter == "linear" else 2
        if self.antialias:
            centre, support = (output + Fraction(1, 2)) * self.ratio, taps * max(self.ratio, Fraction(1))
            return Interval(ceil(centre - support - Fraction(1, 2)), floor(centre + support + Fraction(1, 2)))
        centre = output * self.ratio if self.aligned else (output + Fraction(1, 2)) * self.ratio - Fraction(1, 2)
        return Interval(floor(centre) - taps + 1, floor(centre) + taps + 1)


@dataclass(frozen=True, slots=True)
class Same:
    """Every output reads the input at its own index: element-wise operators, joins, and an axis left alone."""

    @property
    def place(self) -> Affine:
        """An output lies where its input lies."""
        return Fraction(1), Fraction(0)

    def reads(self, outputs: Interval) -> Interval:
        """The same interval."""
        return outputs


@dataclass(frozen=True, slots=True)
class Mixing:
    """An output that depends on all inputs of the axis, or on where it lies: its reach has no bound."""

    reason: str
    """What the layer does, as the end of a sentence that begins with its name."""


Step = Slide | Spread | Resample | Same | Mixing
"""What a layer does to one axis."""
