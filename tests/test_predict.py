"""Tiles against the whole image, blending against plain numpy."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from encoder import CLASSES, Encoder, fitted
from torch import nn

from tilepipe.errors import ModelError, RunError, UsageError
from tilepipe.predict import cpu as predict_cpu
from tilepipe.predict.blend import window_weights
from tilepipe.predict.predictor import BlockMaps, Predictor, Wanted
from tilepipe.predict.prepare import prepare
from tilepipe.predict.scores import Array, normalised
from tilepipe.window import Placement, Window

MEAN, STD = (110.0, 95.0, 80.0), (60.0, 55.0, 50.0)


def pixels(shape: tuple[int, int], seed: int = 0) -> Array:
    """Noise with a flat rectangle, where the network's poolings meet ties."""
    values = np.random.default_rng(seed).integers(0, 256, (3, *shape)).astype(np.uint8)
    values[:, 20:60, 10:70] = [[[90]], [[130]], [[7]]]
    return values


def cores(shape: tuple[int, int], core: int, halo: int) -> tuple[tuple[int, int], list[Placement]]:
    """A tile's shape, and the placements of cores over a block whose pixels reach `halo` beyond it."""
    places = []
    for row in range(0, shape[0], core):
        for col in range(0, shape[1], core):
            target = Window.of(row, row + core, col, col + core).clip(shape)
            source = Window.of(row, row + core + 2 * halo, col, col + core + 2 * halo)
            places.append(Placement(source, target.shift(halo - row, halo - col), target))
    return (core + 2 * halo,) * 2, places


def whole(network: nn.Module, values: Array, valid: Array | None, precision: str) -> Array:
    """Scores (classes, rows, columns) of one pass over all pixels."""
    entered = torch.from_numpy(normalised(values, valid, MEAN, STD, precision))
    with torch.inference_mode():
        scores = prepare(network, precision)(entered[None])[0]
    return scores.double().contiguous().numpy()


def predictor(network: nn.Module, tile: tuple[int, int], **others: Any) -> Predictor:
    return Predictor(network, mean=MEAN, std=STD, tile=tile, **{"classes": CLASSES, "threads": 2, **others})


def inner(array: Array, halo: int) -> Array:
    return array[..., halo:-halo, halo:-halo]


def same(ours: BlockMaps, theirs: BlockMaps) -> None:
    """Equal bytes in every map."""
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


# --- exact ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float64", "float32", "bf16"])
@pytest.mark.parametrize("masked", [False, True])
def test_tiles_give_the_whole_image(precision: str, masked: bool) -> None:
    network, halo, shape = fitted(Encoder()), 12, (72, 96)
    values = pixels((shape[0] + 2 * halo, shape[1] + 2 * halo))
    valid = None
    if masked:
        valid = np.random.default_rng(3).random(values.shape[1:]) < 0.9
        valid[:50, :60] = False
    scores = inner(whole(network, values, valid, precision), halo)
    expected = scores.argmax(axis=0).astype(np.uint8)
    keep = None if valid is None else inner(valid, halo)
    if keep is not None:
        expected[~keep] = 255
    tile, places = cores(shape, 32, halo)
    with predictor(network, tile, precision=precision) as ready:
        maps = ready.exact(values, valid, places, shape, Wanted(True, "float32"), keep)
        assert ready.network.folded == 4
    agreed = float((maps.labels == expected).mean())
    assert agreed == 1 if precision == "float64" else agreed > (0.999 if precision == "float32" else 0.9)
    if precision == "float64":
        powers = np.exp(scores - scores.max(axis=0))
        share = powers / powers.sum(axis=0)
        kept = np.ones(shape, bool) if keep is None else keep
        assert maps.confidence is not None
        assert maps.probabilities is not None
        np.testing.assert_allclose(maps.probabilities[:, kept], share[:, kept], atol=1e-6)
        np.testing.assert_allclose(maps.confidence[kept], share.max(axis=0)[kept] * 254, atol=0.501)
        assert (maps.confidence[~kept] == 255).all()
        assert np.isnan(maps.probabilities[:, ~kept]).all()


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_poolings_agree_on_flat_ground(precision: str) -> None:
    """Where all pixels are equal, a pooling's choice must not depend on where the tile begins."""
    network = prepare(fitted(Encoder()), precision)
    entered = normalised(np.full((3, 104, 152), 77, np.uint8), None, MEAN, STD, precision)
    entered[:, 60:, 100:] = normalised(pixels((44, 52)), None, MEAN, STD, precision)
    with torch.inference_mode():
        full = network(torch.from_numpy(entered)[None]).numpy()[0]
        for row, col, height, width in ((0, 0, 64, 72), (24, 36, 72, 100), (40, 80, 64, 68)):
            tile = entered[:, row : row + height, col : col + width].copy()
            part = network(torch.from_numpy(tile)[None]).numpy()[0]
            theirs = inner(full[:, row : row + height, col : col + width], 12)
            np.testing.assert_array_equal(inner(part, 12).argmax(axis=0), theirs.argmax(axis=0))


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(confidence=True), Wanted(True, "uint8"), Wanted(False, "float16")])
def test_maps_have_the_types_and_fills_wanted(wanted: Wanted) -> None:
    network = fitted(nn.Conv2d(3, CLASSES, 3, padding=1))
    tile, places = cores((32, 32), 16, 1)
    keep = np.ones((32, 32), bool)
    keep[3:20, 5:9] = False
    with predictor(network, tile) as ready:
        maps = ready.exact(pixels((34, 34)), None, places, (32, 32), wanted, keep)
    assert maps.labels.dtype == np.uint8
    assert ((maps.labels == 255) == ~keep).all()
    assert (maps.confidence is not None) == wanted.confidence
    if maps.confidence is not None:
        assert maps.confidence.dtype == np.uint8
        assert ((maps.confidence == 255) == ~keep).all()
    if wanted.probabilities is None:
        assert maps.probabilities is None
    else:
        assert maps.probabilities is not None
        assert maps.probabilities.dtype == wanted.probabilities
        assert maps.probabilities.shape == (CLASSES, 32, 32)
        gone = maps.probabilities == 255 if wanted.probabilities == "uint8" else np.isnan(maps.probabilities)
        assert (gone == ~keep).all()
        total = maps.probabilities.astype(float).sum(axis=0)[keep]
        one = 254 if wanted.probabilities == "uint8" else 1
        np.testing.assert_allclose(total, one, atol=one * 0.02)


def test_ties_go_to_the_lowest_class() -> None:
    network = nn.Conv2d(3, 300, 1)
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    network.bias.data[[7, 8, 299]] = 1
    tile, places = cores((16, 16), 8, 0)
    with predictor(network, tile, classes=300) as ready:
        for wanted in (Wanted(), Wanted(confidence=True)):
            maps = ready.exact(pixels((16, 16)), None, places, (16, 16), wanted)
            assert maps.labels.dtype == np.uint16
            assert (maps.labels == 7).all()
        maps = ready.blend(pixels((16, 16)), None, places, (16, 16), np.ones(tile, np.float32))
        assert (maps.labels == 7).all()


def test_tiles_without_kept_outputs_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Window] = []
    original = predict_cpu.CpuEngine.scores

    def counted(self: predict_cpu.CpuEngine, job: Any, tile: Placement) -> Any:
        ran.append(tile.target)
        return original(self, job, tile)

    monkeypatch.setattr(predict_cpu.CpuEngine, "scores", counted)
    keep = np.zeros((32, 32), bool)
    keep[20, 3] = keep[20, 20] = True
    tile, places = cores((32, 32), 16, 0)
    with predictor(fitted(nn.Conv2d(3, CLASSES, 1)), tile) as ready:
        labels = ready.exact(pixels((32, 32)), None, places, (32, 32), keep=keep).labels
    assert sorted(ran) == [Window.of(16, 32, 0, 16), Window.of(16, 32, 16, 32)]
    assert ((labels != 255) == keep).all()


def test_outputs_coarser_than_the_input() -> None:
    network = nn.Sequential(nn.Conv2d(3, CLASSES, 4, stride=4), nn.ReLU())
    values = pixels((64, 96))
    expected = whole(network, values, None, "float64").argmax(axis=0)
    half = Window.whole((64, 48))
    places = [
        Placement(half.shift(0, col * 4), Window.whole((16, 12)), Window.of(0, 16, col, col + 12)) for col in (0, 12)
    ]
    with predictor(network, (64, 48), precision="float64") as ready:
        labels = ready.exact(values, None, places, (16, 24)).labels
        assert ready.warm_up().output == (16, 12)
    np.testing.assert_array_equal(labels, expected)


# --- blending -------------------------------------------------------------------------------------------------


def overlapping(length: int, tile: int, step: int) -> list[int]:
    return [*range(0, length - tile, step), length - tile]


def blended_places(region: Window, shape: tuple[int, int], tile: int, step: int) -> list[Placement]:
    """Every tile of a raster that touches `region`, in row-major order; the block holds the whole raster."""
    places = []
    for row in overlapping(shape[0], tile, step):
        for col in overlapping(shape[1], tile, step):
            source = Window.of(row, row + tile, col, col + tile)
            part = source.intersect(region)
            if part.area:
                up, left = region.origin
                places.append(Placement(source, part.shift(-row, -col), part.shift(-up, -left)))
    return places


def test_blending_is_the_weighted_mean_of_probabilities() -> None:
    network, shape, tile = fitted(Encoder()), (70, 90), 32
    values, weights = pixels(shape), window_weights("hann", (tile, tile))
    keep = np.random.default_rng(8).random(shape) < 0.9
    keep[:35, :30] = False
    places = blended_places(Window.whole(shape), shape, tile, 19)
    sums, total = np.zeros((CLASSES, *shape)), np.zeros(shape)
    votes = np.full((len(places), *shape), -1)
    for n, place in enumerate(places):
        where = slice(*vars_of(place.source.rows)), slice(*vars_of(place.source.cols))
        scores = whole(network, values[:, *where], None, "float64")
        powers = np.exp(scores - scores.max(axis=0))
        sums[:, *where] += powers / powers.sum(axis=0) * weights
        total[where] += weights
        votes[n][where] = scores.argmax(axis=0)
    mean = sums / total
    count, lowest = (votes >= 0).sum(axis=0), np.where(votes < 0, CLASSES, votes).min(axis=0)
    with predictor(network, (tile, tile), precision="float64") as ready:
        maps = ready.blend(values, None, places, shape, weights, Wanted(True, "float32"), keep)
    assert maps.confidence is not None
    assert maps.probabilities is not None
    np.testing.assert_array_equal(maps.labels[keep], mean.argmax(axis=0)[keep])
    assert (maps.labels[~keep] == 255).all()
    np.testing.assert_allclose(maps.probabilities[:, keep], mean[:, keep], atol=1e-5)
    np.testing.assert_allclose(maps.confidence[keep], mean.max(axis=0)[keep] * 254, atol=0.51)
    assert maps.overlapped == ((count >= 2) & keep).sum()
    assert maps.disagreed == ((count >= 2) & (votes.max(axis=0) != lowest) & keep).sum() > 0


def vars_of(interval: Any) -> tuple[int, int]:
    return interval.start, interval.stop


@pytest.mark.parametrize("size", [(17, 23), (40, 90), (70, 11)])
def test_blending_does_not_depend_on_blocks(size: tuple[int, int]) -> None:
    network, shape, tile, wanted = fitted(Encoder()), (70, 90), 32, Wanted(True, "float32")
    values, weights = pixels(shape), window_weights("gaussian", (tile, tile))
    with predictor(network, (tile, tile)) as ready:
        everything = blended_places(Window.whole(shape), shape, tile, 13)
        expected = ready.blend(values, None, everything, shape, weights, wanted)
        counted = np.zeros(2, int)
        for row in range(0, shape[0], size[0]):
            for col in range(0, shape[1], size[1]):
                region = Window.of(row, row + size[0], col, col + size[1]).clip(shape)
                places = blended_places(region, shape, tile, 13)
                maps = ready.blend(values, None, places, region.shape, weights, wanted)
                where = slice(*vars_of(region.rows)), slice(*vars_of(region.cols))
                same(maps, BlockMaps(*[a if a is None else a[..., *where] for a in expected[:3]]))
                counted += maps.overlapped, maps.disagreed
    assert tuple(counted) == (expected.overlapped, expected.disagreed)


# --- threads --------------------------------------------------------------------------------------------------


def test_callers_share_the_threads() -> None:
    network, shape = fitted(Encoder()), (96, 96)
    tile, places = cores(shape, 32, 4)
    blended = blended_places(Window.whole((104, 104)), (104, 104), 40, 16)
    weights = window_weights("hann", (40, 40))
    inputs = [pixels((104, 104), seed) for seed in range(6)]
    with predictor(network, tile, threads=1) as ready:
        alone = [ready.exact(values, None, places, shape) for values in inputs]
        mixed = [ready.blend(values, None, blended, (104, 104), weights) for values in inputs]
    before = set(threading.enumerate())  # lazy maps keep some
    with predictor(network, tile, threads=3) as ready, ThreadPoolExecutor(6) as callers:
        together = list(callers.map(lambda values: ready.exact(values, None, places, shape), inputs))
        blends = list(callers.map(lambda values: ready.blend(values, None, blended, (104, 104), weights), inputs))
        tiles = [t for t in set(threading.enumerate()) - before if t.name.startswith("tilepipe-tile")]
        assert len(tiles) == 3
    for ours, theirs in zip([*alone, *mixed], [*together, *blends], strict=True):
        same(ours, theirs)


def test_torch_threads_of_the_caller_stay() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    class Watched(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if isinstance(x, torch.Tensor):  # folding traces the network with symbols
                seen.append(torch.get_num_threads())
            return super().forward(x)

    torch.set_num_threads(2)
    try:
        with predictor(Watched(3, CLASSES, 1), (8, 8)) as ready:
            ready.warm_up()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


@pytest.mark.parametrize("mode", ["exact", "blend"])
def test_an_error_in_one_tile_reaches_the_caller(mode: str) -> None:
    class Fails(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.max() > 2:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 TB")
            return super().forward(x)

    values = np.full((3, 64, 64), 100, np.uint8)
    values[0, 40, 40] = 255
    tile, places = cores((64, 64), 16, 0)
    with predictor(Fails(3, CLASSES, 1), tile) as ready:
        for _ in range(5):  # slots and threads come back after each failure
            with pytest.raises(RunError, match="tile of 16 x 16 does not fit into memory; choose a smaller --tile"):
                run(ready, mode, values, places)
        values[0, 40, 40] = 100
        run(ready, mode, values, places)


def run(ready: Predictor, mode: str, values: Array, places: list[Placement]) -> BlockMaps:
    shape = values.shape[1], values.shape[2]
    if mode == "exact":
        return ready.exact(values, None, places, shape)
    return ready.blend(values, None, places, shape, np.ones(ready.tile, np.float32))


@pytest.mark.parametrize("mode", ["exact", "blend"])
def test_scores_that_are_not_finite_are_refused(mode: str) -> None:
    values = np.full((3, 32, 32), 10, np.float32)
    values[1, 20, 21] = -3e38
    tile, places = cores((32, 32), 16, 0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, CLASSES, 1))
    nn.init.constant_(network[0].weight, 1e3)
    with (
        predictor(network, tile) as ready,
        pytest.raises(ModelError, match=r"1 of 256 .*-3e\+38 and 10.*--nodata"),
    ):
        run(ready, mode, values, places)


# --- what a predictor refuses ---------------------------------------------------------------------------------


def test_refusals() -> None:
    network = nn.Conv2d(3, CLASSES, 1)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="torch sees no CUDA device; use --device cpu"):
            predictor(network, (8, 8), device="cuda")
    with pytest.raises(UsageError, match="use cpu, cuda or cuda:N"):
        predictor(network, (8, 8), device="gpu")
    with pytest.raises(UsageError, match="float32, float64, bf16"):
        predictor(network, (8, 8), precision="fp16")
    with pytest.raises(UsageError, match="threads 0"):
        predictor(network, (8, 8), threads=0)
    with pytest.raises(UsageError, match="uint8, float16, float32"):
        Wanted(probabilities="int8")  # type: ignore[arg-type]
    with predictor(network, (8, 8), classes=7) as ready, pytest.raises(ModelError, match="7 classes need"):
        ready.warm_up()
    with (
        predictor(nn.Conv2d(4, CLASSES, 1), (8, 8)) as ready,
        pytest.raises(ModelError, match="fails on a tile of 8"),
    ):
        ready.warm_up()
    with predictor(nn.Flatten(), (8, 8)) as ready, pytest.raises(ModelError, match=r"a tensor \(N, classes"):
        ready.warm_up()
    tile, places = cores((8, 8), 8, 0)
    with predictor(network, tile) as ready, pytest.raises(ModelError, match="choose the bands"):
        ready.exact(np.zeros((4, 8, 8), np.uint8), None, places, (8, 8))


@pytest.mark.parametrize("wrap", [lambda y: {"aux": y * 0, "out": y}, lambda y: (y, y * 0), lambda y: OrderedDict(a=y)])
def test_networks_that_return_several(wrap: Any) -> None:
    class Several(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> Any:
            return wrap(super().forward(x))

    network = fitted(Several(3, CLASSES, 1))
    plain = fitted(nn.Conv2d(3, CLASSES, 1))
    tile, places = cores((16, 16), 8, 0)
    with predictor(network, tile) as ours, predictor(plain, tile) as theirs:
        same(*(p.exact(pixels((16, 16)), None, places, (16, 16)) for p in (ours, theirs)))


def flat(start: int, row: int, spare: int) -> torch.Tensor:
    """Scores (1, 3, 4, 5), channels last, that begin so far in a buffer whose rows lie `row` numbers apart."""
    buffer = torch.arange(start + 4 * row + spare, dtype=torch.float32)
    return buffer.as_strided((1, 3, 4, 5), (0, 1, row, 3), start)


LARGER = torch.randn(1, 6, 9, 11).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("scores", "copied"),
    [
        (LARGER[:, :, 2:7, 3:9], False),
        (LARGER[:, :, 2:7], False),
        (LARGER[:, 1:4, 2:7, 3:9], True),
        (LARGER[:, :, ::2, ::2], True),
        (flat(0, 15, 0), False),
        (flat(24, 24, 0), False),
        (flat(27, 24, 27), False),
        (flat(28, 24, 24), True),
        (flat(36, 24, 24), True),
        (flat(9, 24, -9), False),
        (flat(3, 24, -9), True),
        (flat(0, 25, 0), True),
    ],
)
def test_scores_are_read_where_they_lie_if_they_are_a_part_of_rows(scores: torch.Tensor, copied: bool) -> None:
    array, last, origin = predict_cpu._channels_last(scores, (10, 20))
    row, col = 10 - origin[0], 20 - origin[1]
    rows, cols = scores.shape[2:]
    assert last
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array[row : row + rows, col : col + cols], scores[0].permute(1, 2, 0).numpy())
    assert np.shares_memory(array, scores.numpy()) != copied
