"""The arithmetic of sizes and intervals, for random parameters, against torch itself: sizes, Jacobians, gradients.

i inputs, o outputs, k kernel, s stride, p padding, d dilation, a output padding (0 to s - 1).
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.functional import jacobian, vjp
from torch.nn import functional as F

from tilepipe.geometry.network import Sizes, fold
from tilepipe.geometry.steps import Resample, Slide, Spread
from tilepipe.trace import geometry_of, trace_network
from tilepipe.window import Interval

few = settings(deadline=None, max_examples=50)

kernels, strides, paddings, dilations = st.integers(1, 6), st.integers(1, 5), st.integers(0, 4), st.integers(1, 4)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.5


def support(function: Any, size: int) -> list[set[int]]:
    """For each output of a function of one row of `size` pixels the inputs that it depends on."""
    matrix = jacobian(lambda x: function(x[None, None])[0, 0], positive(size))
    return [set(torch.nonzero(line).flatten().tolist()) for line in matrix]


def transposed(reads: list[set[int]], size: int) -> list[set[int]]:
    """For each input the outputs that depend on it."""
    return [{output for output, inputs in enumerate(reads) if i in inputs} for i in range(size)]


# ---- sizes ------------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 60), kernels, strides, paddings, dilations)
def test_convolution(i, k, s, p, d) -> None:
    assume(i + 2 * p >= d * (k - 1) + 1)
    out = F.conv1d(positive(1, 1, i), positive(1, 1, k), stride=s, padding=p, dilation=d)
    o = (i + 2 * p - d * (k - 1) - 1) // s + 1
    assert out.shape[2] == o == Slide(s, p, d * (k - 1) + 1, p).size(i)


@few
@given(st.integers(1, 20), kernels, strides, paddings, dilations, st.data())
def test_transposed_convolution(i, k, s, p, d, data) -> None:
    a = data.draw(st.integers(0, s - 1))
    o = s * (i - 1) + a + d * (k - 1) + 1 - 2 * p
    assume(o > 0)
    weight = positive(1, 1, k)
    out = F.conv_transpose1d(positive(1, 1, i), weight, stride=s, padding=p, output_padding=a, dilation=d)
    step = Spread(s, p, d * (k - 1) + 1)
    assert out.shape[2] == o == step.size(i, a)
    if d == 1:
        assert o == s * (i - 1) + a + k - 2 * p
    # The a from 0 to s - 1 are the sizes that the convolution of the same numbers takes to i, and no others are.
    back = Slide(s, p, d * (k - 1) + 1, p)
    assert [back.size(step.size(i, extra)) for extra in range(-1, s + 1)] == [i - 1, *[i] * s, i + 1]


@few
@given(st.integers(1, 60), kernels, strides, dilations, st.booleans(), st.data())
def test_pooling(i, k, s, d, ceil_mode, data) -> None:
    p = data.draw(st.integers(0, k // 2))
    assume(i + 2 * p >= d * (k - 1) + 1)
    step = Slide(s, p, d * (k - 1) + 1, p)
    out = F.max_pool1d(positive(1, 1, i), k, s, p, d, ceil_mode)
    assert out.shape[2] == step.size(i, ceil_mode)
    if d == 1:
        assert F.avg_pool1d(positive(1, 1, i), k, s, p, ceil_mode).shape[2] == step.size(i, ceil_mode)
    # A window more than the floor gives begins in the map or in the padding before it, and reads some of the map.
    more = step.size(i, ceil_mode) - step.size(i)
    assert more in ((0, 1) if ceil_mode else (0,))
    if more:
        last = step.reads(Interval(step.size(i), step.size(i) + 1))
        assert last.start < i < last.stop - p


@few
@given(st.integers(1, 60), kernels, strides, paddings)
def test_what_a_convolution_drops_is_what_no_output_depends_on(i, k, s, p) -> None:
    assume(i + 2 * p >= k)
    step = Slide(s, p, k, p)
    reads = support(lambda x: F.conv1d(x, positive(1, 1, k), stride=s, padding=p), i)
    last = max(set().union(*reads), default=-1)
    remainder = (i + 2 * p - k) % s
    unread = max(0, remainder - p)
    assert last < i - unread
    assert last == i - unread - 1 or k < s
    # Where s > k, as many as lie unread between two windows may lie behind the last one: they are no loss.
    assert step.dropped(i, step.size(i)) == (unread if remainder > s - k else 0)


@settings(deadline=None, max_examples=10)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=2))
def test_legal_sizes_are_those_that_lose_nothing(layers) -> None:
    """An encoder of unpadded convolutions, k >= s, and its mirror image: all and only legal sizes come back whole."""
    down = [nn.Conv2d(1, 1, s + more, s, bias=False) for more, s in layers]
    up = [nn.ConvTranspose2d(1, 1, s + more, s, bias=False) for more, s in reversed(layers)]
    network = nn.Sequential(*down, *up).double()
    for weight in network.parameters():
        nn.init.uniform_(weight, 0.5, 1.0)
    least, step = 1, 1
    for more, s in reversed(layers):
        least, step = s * (least - 1) + s + more, step * s
    sizes = geometry_of(network, 1).rows.sizes
    assert sizes == Sizes((least,), step)
    for size in range(least, least + 2 * step + 1):
        x = torch.rand(1, 1, size, size, dtype=torch.float64, requires_grad=True)
        y = network(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert (y.shape == x.shape) == sizes.legal(size)
        assert bool((gradient > 0).all()) == sizes.legal(size)


# ---- intervals --------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 30), kernels, strides, paddings)
def test_a_convolution_reads_and_reaches(i, k, s, p) -> None:
    assume(i + 2 * p >= k)
    reads = support(lambda x: F.conv1d(x, positive(1, 1, k), stride=s, padding=p), i)
    step, forward = Slide(s, p, k, p), Spread(s, p, k)
    for o, inputs in enumerate(reads):
        told = step.reads(Interval(o, o + 1))
        assert inputs == {j for j in range(told.start, told.stop) if 0 <= j < i}
    # The outputs that an input reaches are what the transposed step reads: o with o s - p <= j < o s - p + k.
    for j, outputs in enumerate(transposed(reads, i)):
        told = forward.reads(Interval(j, j + 1))
        assert outputs == {o for o in range(told.start, told.stop) if 0 <= o < len(reads)}


@few
@given(st.integers(1, 12), kernels, strides, paddings, st.data())
def test_a_transposed_convolution_reads_and_reaches(i, k, s, p, data) -> None:
    a = data.draw(st.integers(0, s - 1))
    assume(s * (i - 1) + a + k - 2 * p > 0)
    reads = support(
        lambda x: F.conv_transpose1d(x, positive(1, 1, k), stride=s, padding=p, output_padding=a), i
    )  # fmt: skip
    step, forward = Spread(s, p, k), Slide(s, p, k, p)
    for o, inputs in enumerate(reads):
        told = step.reads(Interval(o, o + 1))
        assert inputs == {j for j in range(told.start, told.stop) if 0 <= j < i}
    for j, outputs in enumerate(transposed(reads, i)):
        told = forward.reads(Interval(j, j + 1))
        assert outputs == {o for o in range(told.start, told.stop) if 0 <= o < len(reads)}


@few
@given(st.integers(2, 30), kernels, strides, dilations)
def test_dilation_leaves_holes_inside_the_interval(i, k, s, d) -> None:
    assume(i >= d * (k - 1) + 1)
    reads = support(lambda x: F.conv1d(x, positive(1, 1, k), stride=s, dilation=d), i)
    for o, inputs in enumerate(reads):
        told = Slide(s, 0, d * (k - 1) + 1, 0).reads(Interval(o, o + 1))
        assert inputs == set(range(told.start, told.stop, d))


@few
@given(st.integers(1, 30), st.integers(1, 40), st.booleans())
def test_nearest_and_bilinear_read_their_neighbours(i, o, bilinear) -> None:
    ratio = Fraction(i, o)
    if bilinear:
        reads = support(lambda x: F.interpolate(x, size=o, mode="linear"), i)
    else:
        reads = support(lambda x: F.interpolate(x, size=o, mode="nearest"), i)
    for output, inputs in enumerate(reads):
        told = Resample(ratio, "linear" if bilinear else "nearest").reads(Interval(output, output + 1))
        centre = (output + Fraction(1, 2)) * ratio - Fraction(1, 2)
        assert len(told) == (2 if bilinear else 1)
        # At the border and where the centres coincide one of the two has no weight.
        both = {min(max(j, 0), i - 1) for j in range(told.start, told.stop)}
        if bilinear and centre.denominator == 1 and centre >= 0:
            assert min(inputs) == told.start
            both = inputs
        assert inputs <= both
        assert inputs == both or abs(centre - round(centre)) < Fraction(1, 10**6)


layer = st.one_of(
    st.tuples(st.just("conv"), st.integers(1, 4), st.integers(1, 3), st.integers(0, 1), st.integers(1, 2)),
    st.tuples(st.just("pool"), st.integers(2, 3), st.integers(1, 3), st.integers(0, 1), st.booleans()),
    st.tuples(st.just("up"), st.integers(1, 4), st.integers(1, 3), st.integers(0, 1), st.integers(0, 2)),
)


def stack(layers: list[tuple[Any, ...]]) -> nn.Module:
    """Layers of positive weights, different in rows and columns."""
    made: list[nn.Module] = []
    for kind, k, s, p, more in layers:
        if kind == "conv":
            made.append(nn.Conv2d(1, 1, (k, k + 1), (s, 1), (p, p), (more, 1), bias=False))
        elif kind == "pool":
            made.append(nn.AvgPool2d((k, 2), (s, 2), (p, 0), ceil_mode=bool(more)))
        else:
            made.append(nn.ConvTranspose2d(1, 1, (k, 2), (s, 2), (p, 0), (min(more, s - 1), 1), bias=False))
    network = nn.Sequential(*made).double()
    for weight in network.parameters():
        nn.init.uniform_(weight, 0.5, 1.0)
    return network


@settings(deadline=None, max_examples=40)
@given(st.lists(layer, min_size=1, max_size=5), st.integers(8, 30), st.integers(8, 20), st.data())
def test_a_traced_stack_has_torchs_sizes_and_gradients(layers, rows, cols, data) -> None:
    network = stack(layers)
    x = torch.rand(1, 1, rows, cols, dtype=torch.float64, requires_grad=True)
    outs, y = [], x
    try:
        for module in network:
            y = module(y)
            outs.append(tuple(y.shape[2:]))
    except RuntimeError:
        assume(False)
    assume(min(outs[-1]) > 0)
    trace = trace_network(network, 1, (rows, cols))
    assert [one.size for one in trace.layers[1:]] == outs
    for index, (one, (kind, *_, more)) in enumerate(zip(trace.layers[1:], layers, strict=True)):
        for axis in (0, 1):
            step, size_in = one.step(axis), trace.layers[index].size[axis]
            if isinstance(step, Slide):
                assert one.size[axis] == step.size(size_in, kind == "pool" and bool(more))
            else:
                extra = 1 if axis else min(more, step.stride - 1)
                assert one.size[axis] == step.size(size_in, extra)
    for axis in (0, 1):
        start = data.draw(st.integers(0, outs[-1][axis] - 1))
        wanted = Interval(start, data.draw(st.integers(start + 1, outs[-1][axis])))
        chosen = y.narrow(2 + axis, wanted.start, len(wanted))
        (gradient,) = torch.autograd.grad(chosen.sum(), x, retain_graph=True)
        found = torch.nonzero(gradient[0, 0].sum(1 - axis)).flatten().tolist()
        needs = fold(trace, axis, wanted)
        need = needs[0]
        inside = need is not None and all(
            each is None or (each.start >= 0 and each.stop <= one.size[axis])
            for each, one in zip(needs, trace.layers, strict=True)
        )
        assert need is not None or not found
        assert need is None or all(need.start <= j < need.stop for j in found)
        if inside and need is not None and need and "up" not in {kind for kind, *_ in layers}:
            assert (found[0], found[-1] + 1) == (need.start, need.stop)


# ---- unpooling --------------------------------------------------------------------------------------------------


@few
@given(
    size=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    k=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    s=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    d=st.integers(1, 2),
    ceil_mode=st.booleans(),
    padded=st.booleans(),
)
def test_unpooling_is_the_vector_jacobian_product_of_pooling(size, k, s, d, ceil_mode, padded) -> None:
    """Exactly so where no input is the maximum of two windows; where one is, unpooling keeps one of the values.

    The product adds them up. Windows that do not overlap (s >= d (k - 1) + 1), which all presets have, never share.
    """
    p = (k[0] // 2, k[1] // 2) if padded else (0, 0)
    assume(all(n + 2 * q >= d * (each - 1) + 1 for n, q, each in zip(size, p, k, strict=True)))
    x = torch.randperm(2 * 3 * size[0] * size[1]).double().reshape(2, 3, *size)
    pooled, indices = F.max_pool2d(x, k, s, p, d, ceil_mode, return_indices=True)
    values = torch.rand_like(pooled) + 0.5
    product = vjp(lambda each: F.max_pool2d(each, k, s, p, d, ceil_mode), x, values)[1]
    back = torch.ops.aten.max_unpool2d(values, indices, list(size))
    times = torch.zeros_like(x).flatten(2)
    times.scatter_add_(2, indices.flatten(2), torch.ones_like(values).flatten(2))
    times = times.reshape(x.shape)
    assert torch.equal(back[times <= 1], product[times <= 1])
    assert bool((back[times > 1] < product[times > 1]).all())
    chosen = back.flatten(2).gather(2, indices.flatten(2)).reshape(values.shape)
    assert torch.isin(chosen, values).all()
    if all(stride >= d * (each - 1) + 1 for stride, each in zip(s, k, strict=True)):
        assert torch.equal(back, product)


@few
@given(st.integers(2, 20), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_unpooled_values_lie_in_the_stamp_of_their_pixel(i, k, s, ceil_mode) -> None:
    assume(i >= k)
    _, indices = F.max_pool2d(torch.rand(1, 1, i, 1), (k, 1), (s, 1), ceil_mode=ceil_mode, return_indices=True)
    step = Spread(s, 0, k)
    for o, index in enumerate(indices.flatten().tolist()):
        read = step.reads(Interval(index, index + 1))
        assert read.start <= o < read.stop


@pytest.mark.parametrize(("i", "k", "s", "sizes"), [(61, 5, 2, [29, 13, 5, 1]), (32, 2, 2, [16, 8, 4, 2, 1])])
def test_the_published_chains(i, k, s, sizes) -> None:
    found = [i]
    for _ in sizes:
        found.append(Slide(s, 0, k).size(found[-1]))
    assert found[1:] == sizes
    for size in reversed(found[:-1]):
        i = Spread(s, 0, k).size(found.pop())
        assert i == size
