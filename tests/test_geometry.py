"""Steps against torch's own arithmetic, sizes against enumeration, and the fold against hand-made networks."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tilepipe.errors import GeometryError
from tilepipe.geometry.network import AxisGeometry, Layer, Sizes, Trace, fold
from tilepipe.geometry.steps import Filter, Mixing, Resample, Same, Slide, Spread, Step
from tilepipe.window import Interval

few = settings(deadline=None, max_examples=60)


def influence(out: torch.Tensor, x: torch.Tensor, outputs: Interval) -> list[int]:
    """The inputs that some output of the interval depends on, by gradient."""
    (gradient,) = torch.autograd.grad(out[..., outputs.start : outputs.stop].sum(), x, retain_graph=True)
    return [int(i) for i in torch.nonzero(gradient.flatten()).flatten()]


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.5


# ---- steps ------------------------------------------------------------------------------------------------------


@few
@given(
    size=st.integers(8, 40),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 5),
    padding=st.integers(0, 4),
    dilation=st.integers(1, 3),
    data=st.data(),
)
def test_slide_reads_what_a_convolution_reads(size, kernel, stride, padding, dilation, data):
    extent = dilation * (kernel - 1) + 1
    assume(size + 2 * padding >= extent)
    x = positive(1, 1, size).requires_grad_()
    out = F.conv1d(x, positive(1, 1, kernel), stride=stride, padding=padding, dilation=dilation)
    start = data.draw(st.integers(0, out.shape[2] - 1))
    outputs = Interval(start, data.draw(st.integers(start + 1, out.shape[2])))
    step = Slide(stride, padding, extent, padding)
    read = step.reads(outputs)
    found = influence(out, x, outputs)
    assert all(read.start <= i < read.stop for i in found)
    if dilation == 1 and found and read.start >= 0 and read.stop <= size:
        assert (found[0], found[-1] + 1) == (read.start, read.stop)
    unread = size - 1 - max(influence(out, x, Interval(0, out.shape[2])), default=-1)
    remainder = (size + 2 * padding - extent) % stride
    lost = remainder > max(padding, stride - extent)
    assert step.dropped(size, out.shape[2]) == (unread if lost else 0)


@few
@given(
    size=st.integers(3, 12),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 5),
    padding=st.integers(0, 2),
    data=st.data(),
)
def test_spread_reads_what_a_transposed_convolution_reads(size, kernel, stride, padding, data):
    extra = data.draw(st.integers(0, stride - 1))
    assume((size - 1) * stride - 2 * padding + kernel + extra > 0)
    x = positive(1, 1, size).requires_grad_()
    out = F.conv_transpose1d(x, positive(1, 1, kernel), stride=stride, padding=padding, output_padding=extra)
    start = data.draw(st.integers(0, out.shape[2] - 1))
    outputs = Interval(start, data.draw(st.integers(start + 1, out.shape[2])))
    read = Spread(stride, padding, kernel).reads(outputs)
    found = influence(out, x, outputs)
    assert found == [i for i in range(read.start, read.stop) if 0 <= i < size]


@few
@given(
    size=st.integers(4, 30),
    factor=st.sampled_from(["1/2", "1/3", "2", "3", "4", "3/2", "5"]),
    mode=st.sampled_from(["nearest", "nearest-exact", "linear", "cubic"]),
    options=st.sampled_from(["", "aligned", "antialias"]),
    data=st.data(),
)
def test_resample_reads_at_least_what_interpolate_reads(size, factor, mode, options, data):
    out_size = int(size * Fraction(factor))
    filter_: Filter = mode
    exact = mode.startswith("nearest")
    aligned, antialias = options == "aligned" and not exact, options == "antialias" and not exact
    assume(out_size > 1 and (aligned or out_size == size * Fraction(factor)))
    x = positive(1, 1, size, 6).requires_grad_()
    name = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    out = F.interpolate(
        x, size=(out_size, 6), mode=name, align_corners=aligned if not exact else None, antialias=antialias
    )
    ratio = Fraction(size - 1, out_size - 1) if aligned else Fraction(size, out_size)
    start = data.draw(st.integers(0, out_size - 1))
    outputs = Interval(start, data.draw(st.integers(start + 1, out_size)))
    read = Resample(ratio, filter_, aligned, antialias).reads(outputs)
    (gradient,) = torch.autograd.grad(out[0, 0, outputs.start : outputs.stop].sum(), x)
    found = [int(i) for i in torch.nonzero(gradient[0, 0].abs().sum(1)).flatten()]
    border = read.start < 0 or read.stop > size
    assert all(max(read.start, 0) <= i < min(read.stop, size) or border for i in found)
    if exact:
        assert (found[0], found[-1] + 1) == (read.start, read.stop)


@pytest.mark.parametrize(
    ("step", "centre"),
    [
        (Slide(2, 0, 2, 0), Fraction(1)),  # pooling: the first output lies between the first two inputs
        (Slide(1, 1, 3, 1), Fraction(1, 2)),
        (Slide(1, 0, 5, 0), Fraction(5, 2)),
        (Spread(2, 0, 2), Fraction(1, 4)),
        (Resample(Fraction(1, 2), "linear"), Fraction(1, 4)),
        (Resample(Fraction(3, 7), "linear", aligned=True), Fraction(1, 2)),
        (Same(), Fraction(1, 2)),
    ],
)
def test_where_the_first_output_lies(step, centre):
    factor, shift = step.place
    assert factor / 2 + shift == centre


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size", "lost"),
    [
        (2, 2, 0, 32, 0),
        (2, 2, 0, 33, 1),  # an odd map loses its last pixel
        (3, 2, 1, 32, 0),  # the padding behind swallows the remainder
        (3, 2, 1, 33, 0),
        (3, 2, 0, 32, 1),
        (2, 3, 0, 33, 0),  # the gap between windows
        (2, 3, 0, 34, 2),
        (1, 2, 0, 33, 0),
        (5, 4, 2, 32, 1),
    ],
)
def test_what_a_strided_step_drops(kernel, stride, padding, size, lost):
    out = (size + 2 * padding - kernel) // stride + 1
    assert Slide(stride, padding, kernel, padding).dropped(size, out) == lost


# ---- sizes ------------------------------------------------------------------------------------------------------

sizes = st.builds(Sizes, st.lists(st.integers(1, 60), min_size=1, max_size=4).map(tuple), st.integers(0, 17))


@few
@given(sizes, st.integers(0, 150))
def test_sizes_agree_with_enumeration(one, n):
    upto = range(1, 400)
    legal = [m for m in upto if any(m == a or (one.step and m > a and (m - a) % one.step == 0) for a in one.minimums)]
    assert [m for m in upto if one.legal(m)] == legal
    above, below = [m for m in legal if m >= n], [m for m in legal if m <= n]
    if above:
        assert one.ceil(n) == above[0]
    else:
        with pytest.raises(GeometryError, match="no legal size"):
            one.ceil(n)
    assert set(one.nearest(n)) == set(above[:1] + below[-1:])


@few
@given(sizes, st.integers(1, 150), st.integers(0, 150))
def test_a_congruent_size_is_the_smallest_congruent_one(one, alike, n):
    assume(one.step and one.legal(alike))
    found = one.ceil(n, residue_of=alike)
    expected = next(m for m in range(n, 400) if one.legal(m) and (m - alike) % one.step == 0)
    assert found == expected


@pytest.mark.parametrize(
    ("minimums", "step", "text"),
    [
        ((61,), 16, "61 + 16n"),
        ((32,), 32, "32n"),
        ((28,), 4, "28 + 4n"),
        ((17,), 1, "any size from 17"),
        ((4, 1, 2, 3), 4, "any size from 1"),
        ((5, 2, 3, 8), 4, "any size from 5"),
        ((2, 4), 4, "2n"),
        ((1, 4), 8, "1 or 4, each + 8n"),
        ((224,), 0, "224 only"),
    ],
)
def test_sizes_in_words(minimums, step, text):
    assert str(Sizes(minimums, step)) == text


def test_output_sizes_and_their_refusal():
    axis = AxisGeometry(Sizes((28,), 4), 4, (0, 24), 4, offset=Fraction(12), shortfall=24)
    assert [axis.output_size(n) for n in (28, 32, 64)] == [1, 2, 10]
    with pytest.raises(GeometryError, match=r"30 pixels.*28 \+ 4n.*28 or 32"):
        axis.output_size(30)


def test_tiles_and_what_they_compute():
    axis = AxisGeometry(Sizes((32,), 32), 32, (186, 186), 1)
    assert axis.halo == (192, 192)
    assert (axis.tile(1024), axis.tile(2048), axis.tile(4096)) == (1408, 2432, 4480)
    assert axis.valid(0, 1408, 4096) == Interval(0, 1216)
    assert axis.valid(832, 1408, 4096) == Interval(1024, 2048)
    assert axis.valid(4096 - 1408, 1408, 4096) == Interval(2880, 4096)
    with pytest.raises(GeometryError, match="multiples of 32"):
        axis.valid(16, 1408, 4096)


def test_tiles_at_the_origins_of_a_plan_cover_their_cores():
    axis = AxisGeometry(Sizes((61,), 16), 16, (48, 45), 1)
    core, extent = 32, 61 + 16 * 20
    tile = axis.tile(core, residue_of=extent)
    for k in range(-(-extent // core)):
        origin = min(max(k * core - axis.halo[0], 0), extent - tile)
        valid = axis.valid(origin, tile, extent)
        assert valid.contains(Interval(k * core, min((k + 1) * core, extent)))


# ---- folding ----------------------------------------------------------------------------------------------------


def chain(*steps: Step, size: int = 64) -> Trace:
    layers = [Layer("input", "input", (), Same(), Same(), (size, size))]
    for index, step in enumerate(steps):
        layers.append(Layer(f"{index}", "op", (index,), step, step, (size, size)))
    return Trace(tuple(layers), 1, 1)


def test_fold_carries_an_interval_back():
    trace = chain(Slide(1, 1, 3, 1), Slide(2, 0, 2), Slide(1, 1, 3, 1), Spread(2, 0, 2))
    assert fold(trace, 0, Interval(0, 2))[0] == Interval(-3, 5)
    assert fold(trace, 0, Interval(20, 24))[0] == Interval(17, 27)


def test_fold_takes_the_hull_at_joins():
    same, narrow, wide = Same(), Slide(1, 1, 3, 1), Slide(1, 4, 9, 4)
    layers = (
        Layer("input", "input", (), same, same, (64, 64)),
        Layer("a", "conv", (0,), narrow, wide, (64, 64)),
        Layer("b", "conv", (0,), wide, narrow, (64, 64)),
        Layer("join", "add", (1, 2), same, same, (64, 64)),
    )
    trace = Trace(layers, 1, 1)
    assert fold(trace, 0, Interval(10, 12))[0] == Interval(6, 16)
    assert fold(trace, 0, Interval(10, 12))[1] == Interval(10, 12)


def test_fold_at_a_border_reflects():
    mirror = Slide(1, 5, 1, 5, mirror=True)
    assert fold(chain(mirror), 0, Interval(0, 2))[0] == Interval(-5, -3)
    assert fold(chain(mirror), 0, Interval(0, 2), at_start=True)[0] == Interval(0, 6)
    assert fold(chain(mirror), 0, Interval(72, 74), at_end=True)[0] == Interval(58, 64)
    assert fold(chain(Slide(1, 5, 1, 5)), 0, Interval(0, 8), at_start=True)[0] == Interval(0, 3)


def test_fold_refuses_an_unbounded_layer_by_name():
    layer = Layer("gate (Squeeze)", "mean", (0,), Mixing("combines all"), Mixing("combines all"), (1, 1))
    trace = Trace((Layer("input", "input", (), Same(), Same(), (64, 64)), layer), 1, 1)
    with pytest.raises(GeometryError, match=r"gate \(Squeeze\) combines all \(mean\)"):
        fold(trace, 0, Interval(0, 4))
    assert trace.mixing is layer
