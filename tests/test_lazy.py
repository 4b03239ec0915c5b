"""Lazy maps of arrays: the command's map, whatever the chunks, the slice and the scheduler."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import rioxarray
import torch
import xarray
from distributed import Client, LocalCluster, Scheduler, SpecCluster, Worker, get_worker
from hypothesis import given, settings
from hypothesis import strategies as st
from rasters import GRID, UTM, write
from reference import model_of, scene, settled
from runs import pixel_model, saved, segment

import tilepipe
from tilepipe import lazy
from tilepipe.block import BlockRunner
from tilepipe.checkpoint import Model
from tilepipe.errors import InputError, UsageError
from tilepipe.lazy import lazy_maps
from tilepipe.models import build
from tilepipe.options import SegmentOptions
from tilepipe.raster.source import open_raster
from tilepipe.store.output import open_store

SHAPE = (150, 190)
VALUES = scene(SHAPE)
OPTIONS = SegmentOptions(tile=(64, 64), device="cpu", threads=1)


class Pooled(torch.nn.Sequential):
    """Convolutions around a pooling; 2n."""

    def __init__(self) -> None:
        layers = [torch.nn.Conv2d(3, 6, 5, padding=2), torch.nn.MaxPool2d(2), torch.nn.Conv2d(6, 6, 3, padding=1)]
        super().__init__(*layers, torch.nn.ReLU(), torch.nn.Upsample(scale_factor=2), torch.nn.Conv2d(6, 5, 1))


@pytest.fixture(scope="module")
def model() -> Model:
    """A network with a reach, so that blocks need their neighbours' pixels."""
    torch.manual_seed(0)
    return model_of(settled(Pooled()), 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """in.tif, the scene with nodata 7 in all bands of some pixels."""
    folder = tmp_path_factory.mktemp("lazy")
    VALUES[:, 40:70, 30:90] = 7
    VALUES[:, :, 180:] = 7
    write(folder / "in.tif", VALUES, photometric="rgb", nodata=7)
    return folder


@pytest.fixture(scope="module")
def labels(folder: Path, model: Model) -> np.ndarray:
    """The command's map."""
    return segment(folder / "in.tif", folder / "labels.zarr", model, tile=(64, 64), threads=1)[0]


def chunks(draw: Any, length: int) -> tuple[int, ...]:
    """Some cut of an axis."""
    cuts = draw(st.lists(st.integers(1, length - 1), unique=True, max_size=5)) if length > 1 else []
    edges = [0, *sorted(cuts), length]
    return tuple(np.diff(edges).tolist())


def part(draw: Any, length: int) -> slice:
    start, stop = sorted(draw(st.lists(st.integers(0, length), min_size=2, max_size=2, unique=True)))
    return slice(start, stop)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_slice_is_that_of_the_commands_map_for_any_chunks(
    folder: Path, model: Model, labels: np.ndarray, data: st.DataObject
) -> None:
    info = open_raster(folder / "in.tif").info
    array = da.from_array(VALUES, chunks=tuple(chunks(data.draw, n) for n in VALUES.shape))
    job, maps = lazy_maps(array, info, model, OPTIONS)
    assert job.plan.exact
    found = maps["labels"]
    assert (found.shape, found.dtype) == (labels.shape, labels.dtype)
    window = part(data.draw, SHAPE[0]), part(data.draw, SHAPE[1])
    np.testing.assert_array_equal(found[window].compute(scheduler="threads"), labels[window])


def test_only_the_blocks_of_a_slice_are_computed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    maps = BlockRunner.maps
    monkeypatch.setattr(BlockRunner, "maps", lambda self, *given: seen.append(given[0]) or maps(self, *given))
    found = tilepipe.segment(da.from_array(VALUES, chunks=50), model, OPTIONS)
    assert not seen
    rows, cols = (np.cumsum((0, *axis)) for axis in found.chunks)
    assert len(rows) > 3
    assert len(cols) > 3
    found[rows[1] : rows[1] + 1, cols[1] - 1 : cols[1] + 1].compute(scheduler="synchronous")
    assert sorted(window.origin for window in seen) == [(rows[1], cols[0]), (rows[1], cols[1])]
    blocks = found.npartitions
    graph = dict(found.dask)
    assert len(graph) <= 2 * blocks + 1 + len(da.from_array(VALUES, chunks=50).dask)


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """A model file; pixels of some tiles; and their labels by the command."""
    folder = tmp_path_factory.mktemp("preset")
    network = settled(build("segnet-basic", classes=5, bands=3, width=0.1))
    card = replace(model_of(network, 5).card, architecture="segnet-basic")
    arguments = {"classes": 5, "bands": 3, "width": 0.1}
    path = saved(Model.of(network, replace(card, arguments=arguments)), folder / "net.safetensors")
    values = scene((230, 250))
    raster = write(folder / "bare.tif", values, photometric="rgb")
    return path, values, segment(raster, folder / "out.zarr", path, tile=(224, 224), threads=1)[0]


AWKWARD = ((1, 2), (1, 70, 9, 150), (249, 1))
"""Chunks of (3, 230, 250) pixels."""
PART = np.s_[60:229, 31:250]


@pytest.mark.parametrize("scheduler", ["synchronous", "threads", "processes"])
def test_every_scheduler_gives_the_same(preset: tuple[Path, np.ndarray, np.ndarray], scheduler: str) -> None:
    """With the model by its file's name, which each process loads by itself."""
    path, values, wanted = preset
    found = tilepipe.segment(da.from_array(values, chunks=AWKWARD), path, replace(OPTIONS, tile=(224, 224)))
    assert found.npartitions > 1
    with dask.config.set(scheduler=scheduler, num_workers=2):
        np.testing.assert_array_equal(found[PART].compute(), wanted[PART])
        if scheduler != "processes":
            np.testing.assert_array_equal(found.compute(), wanted)


def test_workers_of_a_cluster_give_the_same(preset: tuple[Path, np.ndarray, np.ndarray]) -> None:
    """Threads here; `test_cluster` has processes."""
    path, values, wanted = preset
    found = tilepipe.segment(da.from_array(values, chunks=AWKWARD), path, replace(OPTIONS, tile=(224, 224)))
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        np.testing.assert_array_equal(found.compute(), wanted)


def test_annotated_blocks_run_where_the_resource_is(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where other tasks come before and after; without the setting that this takes, the user hears of it."""
    where, runner = set(), lazy._runner

    def noting(recipe: lazy.LazyRecipe) -> BlockRunner:
        where.add(get_worker().name)
        return runner(recipe)

    monkeypatch.setattr(lazy, "_runner", noting)
    options = {"nthreads": 1, "dashboard": False}
    workers = {
        "plain": {"cls": Worker, "options": options},
        "device": {"cls": Worker, "options": {**options, "resources": {"GPU": 1}}},
    }
    scheduler = {"cls": Scheduler, "options": {"dashboard": False, "dashboard_address": ":0"}}
    before = da.from_array(VALUES, chunks=(1, 50, 60)) + 0
    with (
        dask.config.set({"optimization.fuse.active": False}),
        SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.CRITICAL) as cluster,
        Client(cluster),
    ):
        with dask.annotate(resources={"GPU": 1}):
            found = tilepipe.segment(before, model, OPTIONS)
        assert found.npartitions > 4
        (found == 2).sum().compute()
    assert where == {"device"}
    assert "fuse" not in caplog.text
    with dask.annotate(resources={"GPU": 1}):
        tilepipe.segment(before, model, OPTIONS)
    assert "optimization.fuse.active" in caplog.text


# ---- xarray --------------------------------------------------------------------------------------------------------


def opened(folder: Path, **options: Any) -> xarray.DataArray:
    return rioxarray.open_rasterio(folder / "in.tif", chunks={"x": 83, "y": 41}, **options)


def test_a_data_array_keeps_its_place(folder: Path, model: Model, labels: np.ndarray) -> None:
    given = opened(folder)
    found = tilepipe.segment(given, model, OPTIONS)
    assert isinstance(found.data, da.Array)
    np.testing.assert_array_equal(found, labels)
    assert found.dims == ("y", "x")
    assert found.rio.crs == UTM
    assert found.rio.transform() == GRID
    xarray.testing.assert_equal(found.x, given.x)
    store = xarray.open_zarr(folder / "labels.zarr", consolidated=False).labels
    assert {name: found.attrs[name] for name in ("flag_values", "flag_meanings", "class_colors", "nodata")} == {
        name: store.attrs[name] for name in ("flag_values", "flag_meanings", "class_colors", "nodata")
    }
    small = found[10:20, 5:40]
    np.testing.assert_array_equal(small, labels[10:20, 5:40])
    assert small.rio.crs == UTM


def test_any_order_of_axes_and_masked_floats(folder: Path, model: Model, labels: np.ndarray) -> None:
    masked = opened(folder, masked=True).transpose("y", "band", "x")
    assert masked.dtype == np.float32
    np.testing.assert_array_equal(tilepipe.segment(masked, model, OPTIONS), labels)


def test_the_variables_of_a_data_set_are_the_bands(folder: Path, model: Model, labels: np.ndarray) -> None:
    """By their names, whatever their order."""
    given = opened(folder)
    named = replace(model.card, bands=("red", "green", "blue"))
    both = xarray.Dataset(
        {name: given[band].drop_vars("band") for name, band in (("blue", 2), ("red", 0), ("green", 1))}
    )
    found = tilepipe.segment(both, Model.of(model.network, named), OPTIONS)
    np.testing.assert_array_equal(found, labels)
    assert found.rio.crs == UTM


def test_several_maps_come_together(folder: Path, model: Model) -> None:
    options = replace(OPTIONS, confidence=True, probabilities="uint8", precision="float64")
    found = tilepipe.segment(opened(folder), model, options)
    assert set(found.data_vars) == {"labels", "confidence", "probabilities"}
    segment(folder / "in.tif", folder / "all.zarr", model, tile=(64, 64), confidence=True, probabilities="uint8")
    store = open_store(folder / "all.zarr")
    with dask.config.set(scheduler="threads"):
        for name, array in found.compute().data_vars.items():
            np.testing.assert_array_equal(array, store.array(name)[:], err_msg=name)
    assert list(found["class"].values) == [each.name for each in model.card.classes]


def test_values_come_in_place_of_labels(model: Model) -> None:
    found = tilepipe.segment(VALUES, model, replace(OPTIONS, values="float32"))
    assert (found.shape, found.dtype) == ((5, *SHAPE), np.float32)
    assert found.name != tilepipe.segment(VALUES, model, OPTIONS).name
    np.testing.assert_array_equal(found.compute().argmax(0), tilepipe.segment(VALUES, model, OPTIONS).compute())


def test_what_comes_before_and_after_joins_the_graph(model: Model) -> None:
    brightened = da.from_array(VALUES // 2, chunks=(1, 64, 64)) * 2
    counts = da.bincount(tilepipe.segment(brightened.astype("uint8"), model, OPTIONS).ravel(), minlength=256)
    wanted = tilepipe.segment(VALUES // 2 * 2, model, OPTIONS).compute()
    np.testing.assert_array_equal(counts.compute(), np.bincount(wanted.ravel(), minlength=256))


def test_what_is_no_raster_is_refused(model: Model) -> None:
    for odd in (np.zeros((2, 3, 9, 9)), np.zeros(9), np.zeros((3, 0, 9))):
        with pytest.raises(InputError, match="a raster is"):
            tilepipe.segment(odd, model)
    with pytest.raises(InputError, match="holds complex128 values"):
        tilepipe.segment(np.zeros((3, 9, 9), complex), model)
    cube = xarray.DataArray(np.zeros((2, 3, 9, 9)), dims=("time", "band", "y", "x"))
    with pytest.raises(InputError, match="select one place along the others"):
        tilepipe.segment(cube, model)
    with pytest.raises(UsageError, match="arrays are not resampled"):
        tilepipe.segment(VALUES, pixel_model(resolution=3.0), SegmentOptions(resample=True))
    with pytest.raises(InputError, match="the model wants 3"):
        tilepipe.segment(VALUES[:2], model)
