"""Several models, refinement, values, flips and stride 1 through the whole path: tiles equal one pass over it all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import networks
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import MEAN, STD, model_of, scene, settled, whole_scores, write_raster
from scipy import ndimage
from scipy.special import softmax
from torch import nn

from tilepipe.checkpoint import ClassInfo, Model
from tilepipe.crf.parameters import parse_crf
from tilepipe.crf.refine import refine
from tilepipe.errors import ModelError, PlanError, UsageError
from tilepipe.job import prepare
from tilepipe.models import build
from tilepipe.options import SegmentOptions
from tilepipe.pipeline import predict_raster, segment_raster
from tilepipe.predict import scores
from tilepipe.trace import geometry_of
from tilepipe.variants.augment import Augmented
from tilepipe.variants.dense import dilated

CRF = "crf:iterations=2,radius=3"
EXACT = SegmentOptions(stitch="exact", device="cpu", precision="float64", threads=2)


def small_cores(monkeypatch: pytest.MonkeyPatch, core: int = 64) -> None:
    monkeypatch.setattr("tilepipe.planner.CORES", {"cpu": (core,)})


def unet(seed: int = 0) -> Model:
    return model_of(settled(networks.SkipNet(), 2, 64, seed), 3, 2)


def basic(seed: int = 1) -> Model:
    return model_of(settled(build("segnet-basic", classes=3, bands=2, width=0.1), 2, 64, seed), 3, 2)


def shares_of(model: Model, values: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """Probabilities of one pass over the whole raster, float64."""
    found = whole_scores(model, geometry_of(model.network, len(values)), values, valid, "float64")
    return softmax(found[:, : values.shape[1], : values.shape[2]], axis=0)


def reordered(model: Model, order: tuple[int, ...]) -> Model:
    """The same model with its classes in another order."""
    classes = tuple(model.card.classes[n] for n in order)
    last = [module for module in model.network.modules() if isinstance(module, nn.Conv2d)][-1]
    last.weight.data, last.bias.data = last.weight.data[list(order)], last.bias.data[list(order)]
    return Model.of(model.network, replace(model.card, classes=classes))


def masked(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    blobs = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 6)
    return blobs < np.quantile(blobs, 0.9)


def written(tmp_path: Path, values: np.ndarray, valid: np.ndarray | None) -> Path:
    if valid is None:
        return write_raster(tmp_path / "in.tif", values)
    values[:, ~valid] = 0
    values[:, valid] = np.maximum(values[:, valid], 1)
    return write_raster(tmp_path / "in.tif", values, nodata=0)


@pytest.mark.parametrize(("how", "crf"), [("mean", None), ("max", CRF)])
@pytest.mark.parametrize("holes", [False, True])
def test_an_ensemble_is_that_of_whole_passes(how, crf, holes, tmp_path, monkeypatch):
    small_cores(monkeypatch)
    values = scene((170, 219), 2)
    valid = masked((170, 219)) if holes else None
    raster = written(tmp_path, values, valid)
    one, two = unet(), basic()
    shares = [shares_of(one, values, valid), shares_of(two, values, valid)]
    options = replace(EXACT, combine=how, refine=crf, confidence=True, probabilities="float16", block=(128, 128))
    out = tmp_path / "out.zarr"
    segment_raster(raster, out, [one, reordered(two, (2, 0, 1))], options)

    expected = np.mean(shares, axis=0) if how == "mean" else np.max(shares, axis=0)
    expected = expected / expected.sum(axis=0)
    if crf is not None:
        colors = scores.normalised(values, valid, (MEAN,) * 2, (STD,) * 2, "float64")
        expected = refine(expected, colors, valid, parse_crf(crf))
    labels = expected.argmax(0)
    if valid is not None:
        labels[~valid] = 255
    store = zarr.open_group(out, mode="r")
    assert len(np.unique(labels)) > 2, "something to tell apart"
    np.testing.assert_array_equal(store["labels"][:], labels)
    seen = labels < 255
    np.testing.assert_allclose(store["confidence"][:][seen], expected.max(0)[seen] * 254, atol=0.51)
    np.testing.assert_allclose(store["probabilities"][:][:, seen], expected[:, seen], atol=1e-3)
    assert np.isnan(store["probabilities"][:][:, ~seen]).all()


@settings(max_examples=5, deadline=None)
@given(
    shape=st.tuples(st.integers(20, 200), st.integers(20, 200)),
    core=st.sampled_from([16, 48, 64]),
    block=st.tuples(st.integers(30, 210), st.integers(30, 210)),
    crf=st.sampled_from([None, CRF]),
    seed=st.integers(0, 9),
)
def test_any_cut_gives_the_whole(shape, core, block, crf, seed, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch:
        small_cores(patch, core)
        values, valid = scene(shape, 2, seed), masked(shape, seed)
        raster = written(tmp_path, values, valid)
        one, two = unet(seed), basic(seed + 1)
        segment_raster(raster, tmp_path / "out.zarr", [one, two], replace(EXACT, refine=crf, block=block))
    expected = (shares_of(one, values, valid) + shares_of(two, values, valid)) / 2
    if crf is not None:
        colors = scores.normalised(values, valid, (MEAN,) * 2, (STD,) * 2, "float64")
        expected = refine(expected, colors, valid, parse_crf(crf))
    labels = np.where(valid, expected.argmax(0), 255)
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "out.zarr", mode="r")["labels"][:], labels)


def test_members_share_cores_and_each_has_its_own_tiles(tmp_path):
    raster = write_raster(tmp_path / "in.tif", scene((6000, 9000), 2))
    job = prepare(raster, [unet(), basic()], replace(EXACT, refine=CRF))
    cores = {made.core for made in job.plans}
    assert len(cores) == 1
    assert len({made.block for made in job.plans}) == 1
    assert job.plans[0].tile != job.plans[1].tile
    alone = prepare(raster, basic(), EXACT).plan
    assert job.plans[1].tile[0] - alone.tile[0] >= 2 * parse_crf(CRF).reach // 16 * 16
    assert job.plan.projection.host > alone.projection.host
    assert job.plans[0].projection == job.plans[1].projection, "one projection, of the whole job"


@pytest.mark.parametrize("options", [replace(EXACT, refine=CRF), replace(EXACT, stitch="blend", tile=None, refine=CRF)])
def test_blocks_do_not_show_in_the_map(options, tmp_path, monkeypatch):
    small_cores(monkeypatch)
    values = scene((150, 260), 2)
    raster = written(tmp_path, values, masked((150, 260)))
    maps = []
    for number, block in enumerate([(64, 64), (128, 192), (100, 90)]):
        out = tmp_path / f"{number}.zarr"
        segment_raster(raster, out, [unet(), basic()], replace(options, block=block, precision="float32"))
        maps.append(zarr.open_group(out, mode="r")["labels"][:])
    np.testing.assert_array_equal(maps[0], maps[1])
    np.testing.assert_array_equal(maps[0], maps[2])


def test_a_region_and_a_mask_show_the_same_labels(tmp_path, monkeypatch):
    small_cores(monkeypatch)
    raster = written(tmp_path, scene((200, 240), 2), masked((200, 240)))
    area = np.zeros((1, 200, 240), np.uint8)
    area[:, 40:150, 90:220] = 1
    mask = write_raster(tmp_path / "mask.tif", area)
    options = replace(EXACT, refine=CRF, block=(64, 128))
    for name, more in (("whole", {}), ("region", {"region": "33:170,50:201"}), ("mask", {"mask": str(mask)})):
        segment_raster(raster, tmp_path / f"{name}.zarr", [unet(), basic()], replace(options, **more))
    whole, region, inside = (
        zarr.open_group(tmp_path / f"{name}.zarr", mode="r")["labels"][:] for name in ("whole", "region", "mask")
    )
    np.testing.assert_array_equal(region, whole[33:170, 50:201])
    np.testing.assert_array_equal(inside, np.where(area[0] > 0, whole, 255))


@pytest.mark.parametrize("tta", ["flips", "d4"])
def test_augmented_tiles_are_the_augmented_whole(tta, tmp_path, monkeypatch):
    small_cores(monkeypatch)
    values = scene((130, 171), 2)
    model = basic()
    segment_raster(write_raster(tmp_path / "in.tif", values), tmp_path / "out.zarr", model, replace(EXACT, tta=tta))
    turned = Model.of(Augmented(model.network, tta), model.card)
    found = whole_scores(turned, geometry_of(model.network, 2), values, None, "float64")[:, :130, :171]
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "out.zarr", mode="r")["labels"][:], found.argmax(0))


@pytest.mark.parametrize("dense", ["dilate", "stitch"])
def test_a_classifier_at_stride_1_labels_every_pixel(dense, tmp_path, monkeypatch):
    small_cores(monkeypatch)
    values = scene((90, 120), 1)
    model = model_of(settled(build("lenet", classes=4), 1, 28), 4, 1)
    raster = write_raster(tmp_path / "in.tif", values)
    assert segment_raster(raster, tmp_path / "coarse.zarr", model, EXACT).classes
    segment_raster(raster, tmp_path / "out.zarr", model, replace(EXACT, stride=1, dense=dense))
    slid = Model.of(dilated(model.network), model.card)
    found = whole_scores(slid, geometry_of(slid.network, 1), values, None, "float64")
    coarse, fine = (zarr.open_group(tmp_path / f"{n}.zarr", mode="r")["labels"] for n in ("coarse", "out"))
    np.testing.assert_array_equal(fine[:], found.argmax(0)[:90, :120])
    assert coarse.shape < fine.shape == (90, 120)
    assert fine.attrs["spatial:transform"] == [0.5, 0.0, 500000.0, 0.0, -0.5, 5400000.0]


@pytest.mark.parametrize(("stitch", "kind"), [("exact", "float32"), ("exact", "float16"), ("blend", "float32")])
def test_values_are_the_networks_own(stitch, kind, tmp_path, monkeypatch):
    small_cores(monkeypatch)
    values, valid = scene((150, 190), 2), masked((150, 190))
    raster, model = written(tmp_path, values, valid), unet()
    options = replace(EXACT, stitch=stitch, values=kind, block=(128, 64))
    done = predict_raster(raster, tmp_path / "out.zarr", model, options)
    found = zarr.open_group(tmp_path / "out.zarr", mode="r")["values"][:]
    assert found.dtype == kind
    np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(~valid, found.shape))
    assert done.channels["class0"]["pixels"] == valid.sum()
    assert not done.classes
    expected = whole_scores(model, geometry_of(model.network, 2), values, valid, "float64")[:, :150, :190]
    if stitch == "exact":
        np.testing.assert_allclose(found[:, valid], expected[:, valid], rtol=1e-3 if kind == "float16" else 1e-6, atol=1e-3 if kind == "float16" else 1e-6)  # fmt: skip  # noqa: E501
    else:
        close = np.abs(found - expected)[:, valid] < 0.05 * expected.std()
        assert close.mean() > 0.9
    again = predict_raster(raster, tmp_path / "out.zarr", model, options)
    assert again.computed == 0


def test_what_does_not_fit_together_is_said(tmp_path):
    raster = write_raster(tmp_path / "in.tif", scene((200, 200), 2))
    other = model_of(settled(networks.SkipNet(), 2, 64), 3, 2)
    renamed = tuple(ClassInfo(f"other{n}", (0, 0, n)) for n in range(3))
    other = Model.of(other.network, replace(other.card, classes=renamed))
    with pytest.raises(ModelError, match='model 2 lacks "class0"'):
        prepare(raster, [unet(), other], EXACT)
    with pytest.raises(PlanError, match=r"--tile cannot serve several models, which take 4n and 16n"):
        prepare(raster, [unet(), basic()], replace(EXACT, tile=(64, 64)))
    with pytest.raises(UsageError, match="values are predicted by one"):
        prepare(raster, [unet(), basic()], replace(EXACT, values="float32"))
    with pytest.raises(UsageError, match="of classes, and values have none"):
        SegmentOptions(values="float32", refine="crf")
    with pytest.raises(UsageError, match="stride is 2"):
        SegmentOptions(stride=2)
    with pytest.raises(UsageError, match=r"refinement 'fuzzy' is not known"):
        prepare(raster, unet(), replace(EXACT, refine="fuzzy"))
    lenet = model_of(build("lenet", classes=4).eval(), 4, 1)
    grey = write_raster(tmp_path / "grey.tif", scene((99, 99), 1))
    with pytest.raises(UsageError, match="add --stride 1"):
        prepare(grey, lenet, replace(EXACT, refine="crf"))
    with pytest.raises(PlanError, match=r"1 x 1 and 4 x 4 pixels; --stride 1"):
        prepare(grey, [lenet, model_of(nn.Conv2d(1, 4, 3, padding=1).eval(), 4, 1)], EXACT)
    regression = Model.of(unet().network, replace(unet().card, task="regression", classes=()))
    with pytest.raises(UsageError, match="use `tilepipe predict`"):
        prepare(raster, regression, EXACT)
    with pytest.raises(UsageError, match="no bundled model predicts values"):
        prepare(raster, None, replace(EXACT, values="float32"))
