"""The whole path, from raster file to store: the same labels as one pass over the whole raster, however it is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import MEAN, STD, ArraySource, model_of, scene, settled, whole_labels, whole_scores, write_raster
from tiling import planned, some_tile, tiled_labels
from torch import nn

from tilepipe.checkpoint import Model
from tilepipe.errors import PlanError
from tilepipe.geometry.network import Geometry
from tilepipe.models import build
from tilepipe.options import SegmentOptions
from tilepipe.pipeline import segment_raster
from tilepipe.plan import PlanRequest, TilePlan
from tilepipe.predict import cpu as predict_cpu
from tilepipe.predict.blend import window_weights
from tilepipe.predict.prepare import prepare
from tilepipe.store.output import open_store
from tilepipe.trace import geometry_of
from tilepipe.window import Window

CLASSES = 5


def autoencoder() -> nn.Module:
    """Four 5x5 convolutions of stride 2 without padding, mirrored: 61 + 16n."""
    body = list(networks.autoencoder(width=6))[:-2]
    return nn.Sequential(*body, nn.ConvTranspose2d(6, CLASSES, 5, 2))


@dataclass(frozen=True)
class Case:
    """A network, the bands it takes and the classes it tells apart."""

    make: Callable[[], nn.Module]
    bands: int
    classes: int


CASES = {
    "segnet": Case(lambda: build("segnet", classes=CLASSES, width=0.06), 3, CLASSES),
    "segnet-basic": Case(lambda: build("segnet-basic", classes=CLASSES, width=0.15), 3, CLASSES),
    "autoencoder": Case(autoencoder, 1, CLASSES),
    "skips": Case(networks.SkipNet, 2, 3),
    "ceil-mode": Case(networks.CeilMode, 1, 2),
    "oblong": Case(networks.Oblong, 2, 3),
    "in-place": Case(networks.InPlace, 2, 4),
    "gaps": Case(networks.Gaps, 1, 2),
    "self-padding": Case(networks.SelfPadding, 1, 2),
    "parallel": Case(networks.Parallel, 1, 2),
    "unpadded": Case(networks.ValidUNet, 1, 2),
    "shuffle": Case(networks.Shuffle, 2, 2),
}

Made = dict[str, tuple[Model, Geometry]]


@pytest.fixture(scope="module")
def made() -> Made:
    """Each network with settled normalisation, and its geometry."""
    found = {}
    for name, case in CASES.items():
        torch.manual_seed(3)
        model = model_of(
            settled(case.make(), case.bands, 93 if name == "autoencoder" else 96), case.classes, case.bands
        )
        found[name] = model, geometry_of(model.network, case.bands)
    return found


def check_random_cut(made: Made, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(made)))
    model, geometry = made[name]
    shape = (data.draw(st.integers(1, 620), "rows"), data.draw(st.integers(1, 620), "columns"))
    tile = some_tile(geometry, shape, data.draw(st.tuples(st.integers(0, 4), st.integers(0, 4)), "more"))
    block = data.draw(st.tuples(st.integers(90, 400), st.integers(90, 400)), "block")
    values = scene(shape, CASES[name].bands, seed=data.draw(st.integers(0, 9), "seed"))
    valid = None
    if data.draw(st.booleans(), "hole"):
        valid = np.ones(shape, bool)
        valid[shape[0] // 3 : shape[0] // 2, shape[1] // 4 :] = False
    cut = planned(geometry, shape, PlanRequest("exact", tile=tile, block=block))
    expected = whole_labels(model, geometry, values, valid)
    found = tiled_labels(model, cut, values, valid, "float64")
    assert (found == expected).all(), f"{name}: {(found != expected).sum()} of {found.size} labels differ"


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_float64_labels_equal_the_whole_image_pass(made: Made, data: st.DataObject) -> None:
    check_random_cut(made, data)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_float64_labels_equal_the_whole_image_pass_500_times(made: Made, data: st.DataObject) -> None:
    check_random_cut(made, data)


@pytest.mark.parametrize("name", sorted(CASES))
def test_float32_labels_are_within_the_stated_bound(made: Made, name: str) -> None:
    model, geometry = made[name]
    values = scene((700, 800), CASES[name].bands, seed=4)
    tile = some_tile(geometry, (700, 800), (6, 6))
    cut = planned(geometry, (700, 800), PlanRequest("exact", tile=tile, block=(300, 300)))
    found = tiled_labels(model, cut, values, None, "float32")
    expected = whole_labels(model, geometry, values, None, "float32")
    assert len(np.unique(expected)) > 1
    assert (found != expected).mean() <= 1e-5


@pytest.mark.parametrize("name", sorted(CASES))
def test_float32_scores_are_within_the_stated_bound(made: Made, name: str) -> None:
    model, geometry = made[name]
    values = scene((500, 460), CASES[name].bands, seed=11)
    cut = planned(geometry, (500, 460), PlanRequest("exact", tile=some_tile(geometry, (500, 460), (4, 4))))
    network, expected = prepare(model.network, "float32"), whole_scores(model, geometry, values, None, "float32")
    hull, places = cut.placements(cut.region)
    pixels = (ArraySource(values).read(hull).values.astype(np.float32) - MEAN) / STD
    far = 0
    for place in places:
        rows, cols = place.source.within(Window.whole(hull.shape))
        with torch.inference_mode():
            scores = network(torch.from_numpy(pixels[:, rows, cols].copy())[None])[0].numpy()
        found = scores[(slice(None), *place.crop.within(Window.whole(cut.tile_output)))]
        there = expected[(slice(None), *place.target.within(Window.whole(expected.shape[1:])))]
        far += int((np.abs(found - there).max(0) > 1e-4 * np.abs(expected).max()).sum())
    # Behind max-unpooling near-ties may fall the other way; everywhere else there is nothing to excuse.
    unpools = name.startswith("segnet") or name == "ceil-mode"
    assert far <= (0.01 * cut.region.area if unpools else 0)


@pytest.mark.parametrize("name", ["segnet", "autoencoder", "skips"])
def test_command_path_equals_the_whole_image_pass(made: Made, name: str, tmp_path: Path) -> None:
    model, geometry = made[name]
    values = scene((483, 541), CASES[name].bands, seed=5)
    raster = write_raster(tmp_path / "in.tif", values, tiled=True, blockxsize=256, blockysize=256)
    tile = some_tile(geometry, (483, 541))
    options = SegmentOptions(precision="float64", tile=tile, block=(256, 256), stitch="exact", device="cpu")
    summary = segment_raster(raster, tmp_path / "out.zarr", model, options)
    labels = open_store(tmp_path / "out.zarr").array()[:]
    assert (labels == whole_labels(model, geometry, values)).all()
    assert summary.stitch == "exact"
    assert sum(summary.classes.values()) + summary.nodata == values[0].size


@pytest.mark.parametrize("stitch", ["exact", "blend"])
def test_same_labels_whatever_the_block_size(made: Made, stitch: str) -> None:
    model, geometry = made["segnet-basic"]
    values = scene((450, 530), seed=7)
    maps = []
    for block in ((450, 530), (100, 170), (256, 64)):
        request = PlanRequest(stitch, tile=(256, 256), overlap=None if stitch == "exact" else 64, block=block)  # type: ignore[arg-type]
        maps.append(tiled_labels(model, planned(geometry, (450, 530), request), values, None, "float32"))
    assert all((other == maps[0]).all() for other in maps[1:])


def test_region_is_a_crop_of_the_full_run(made: Made, tmp_path: Path) -> None:
    model, _ = made["skips"]
    raster = write_raster(tmp_path / "in.tif", scene((500, 620), 2, seed=8))
    base = SegmentOptions(tile=(256, 256), block=(128, 128), device="cpu")
    segment_raster(raster, tmp_path / "all.zarr", model, base)
    segment_raster(raster, tmp_path / "part.zarr", model, replace(base, region="131:409,77:501"))
    whole, part = open_store(tmp_path / "all.zarr").array(), open_store(tmp_path / "part.zarr").array()
    assert (part[:] == whole[131:409, 77:501]).all()
    transform = open_store(tmp_path / "part.zarr").spec.transform
    assert transform == (0.5, 0.0, 500000 + 77 * 0.5, 0.0, -0.5, 5400000 - 131 * 0.5)


def test_network_that_gives_coarser_outputs_is_placed_right(tmp_path: Path) -> None:
    class Coarse(nn.Module):
        """LeNet's geometry: 28 + 4n pixels to one output per 4 pixels."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(3, 6, 5),
                nn.MaxPool2d(2),
                nn.ReLU(),
                nn.Conv2d(6, 8, 5),
                nn.MaxPool2d(2),
                nn.Conv2d(8, 4, 4),
            )

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.body(pixels)

    torch.manual_seed(0)
    model = model_of(Coarse().eval(), 4)
    geometry = geometry_of(model.network, 3)
    values = scene((303, 402), seed=9)
    raster = write_raster(tmp_path / "in.tif", values)
    options = SegmentOptions(precision="float64", tile=(60, 60), block=(32, 32), device="cpu")
    segment_raster(raster, tmp_path / "out.zarr", model, options)
    store = open_store(tmp_path / "out.zarr")
    labels = store.array()[:]
    expected = whole_scores(model, geometry, values, None, "float64").argmax(0)
    assert (labels == expected[: labels.shape[0], : labels.shape[1]]).all()
    # Output 0 looks at pixels 0..27, so its centre is at 14 and its cell is 12..16.
    assert store.spec.transform == (2.0, 0.0, 500000 + 12 * 0.5, 0.0, -2.0, 5400000 - 12 * 0.5)
    assert labels.shape == (70, 95)  # of 304 and 404 pixels


def test_blending_runs_the_numba_kernels(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"accumulate": 0, "finish": 0}

    def counted(name: str) -> Callable[..., Any]:
        kernel = getattr(predict_cpu, name)
        assert kernel.signatures is not None, "not a numba kernel"

        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return kernel(*arguments)

        return call

    for name in calls:
        monkeypatch.setattr(predict_cpu, name, counted(name))
    raster = write_raster(tmp_path / "in.tif", scene((300, 340), seed=10))
    options = SegmentOptions(stitch="blend", tile=(160, 160), overlap=64, block=(400, 400), device="cpu")
    segment_raster(raster, tmp_path / "out.zarr", made["segnet"][0], options)
    assert calls == {"accumulate": 3 * 3, "finish": 3}


def test_blended_map_equals_a_plain_average_of_tiles(made: Made) -> None:
    model, geometry = made["segnet"]
    values = scene((300, 340), seed=10)
    cut = planned(geometry, (300, 340), PlanRequest("blend", tile=(160, 160), overlap=64, block=(150, 150)))
    found = tiled_labels(model, cut, values, None, "float32")
    assert (found == plain_blend(model, cut, values)).mean() > 0.9999


def plain_blend(model: Model, cut: TilePlan, values: NDArray[Any]) -> NDArray[Any]:
    weights = window_weights(cut.window or "hann", cut.tile_output).astype(np.float64)
    network = prepare(model.network, "float32")
    hull, places = cut.placements(cut.region)
    pixels = (ArraySource(values).read(hull).values.astype(np.float32) - MEAN) / STD
    sums = np.zeros((CLASSES, *cut.shape))
    for place in places:
        rows, cols = place.source.within(Window.whole(hull.shape))
        with torch.inference_mode():
            scores = network(torch.from_numpy(pixels[:, rows, cols].copy())[None]).double().softmax(1)[0].numpy()
        inner = place.crop.within(Window.whole(cut.tile_output))
        sums[(slice(None), *place.target.within(Window.whole(cut.shape)))] += (scores * weights)[(slice(None), *inner)]
    return sums.argmax(0)


def test_exact_is_refused_by_name_where_the_network_cannot_be_tiled(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, CLASSES, 1))
    model = model_of(network.eval(), CLASSES)
    raster = write_raster(tmp_path / "in.tif", scene((200, 200)))
    with pytest.raises(PlanError, match="GroupNorm"):
        segment_raster(raster, tmp_path / "out.zarr", model, SegmentOptions(stitch="exact", device="cpu"))
    assert not (tmp_path / "out.zarr").exists()
    summary = segment_raster(raster, tmp_path / "out.zarr", model, SegmentOptions(device="cpu"))
    assert summary.stitch == "blend"
    assert any("GroupNorm" in note for note in summary.notes)
