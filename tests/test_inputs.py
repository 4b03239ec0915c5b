"""Odd rasters through the whole path: each kind has one outcome, in the labels or in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from affine import Affine
from commands import assert_one_line, run
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasters import noise, read_whole, write
from reference import model_of, scene, settled, whole_labels
from runs import CLASSES, Seen, pixel_labels, pixel_model, saved, segment, words

from tilepipe.errors import InputError, UsageError
from tilepipe.models import build
from tilepipe.predict.predictor import Predictor
from tilepipe.store.output import open_store
from tilepipe.trace import geometry_of

RGB = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
RGBA = [*RGB, ColorInterp.alpha]


def holes(shape: tuple[int, int], seed: int = 5) -> NDArray[np.uint8]:
    """0 in a third of the pixels and in a whole corner, else 255."""
    flags = np.where(np.random.default_rng(seed).random(shape) < 0.3, 0, 255).astype("uint8")
    flags[: shape[0] // 3, : shape[1] // 3] = 0
    return flags


def with_nan(values: NDArray[Any]) -> NDArray[Any]:
    values[0, 3:6, 2:9] = np.nan
    values[-1, 40:44, 70:71] = np.inf
    return values


def with_alpha(values: NDArray[Any]) -> NDArray[Any]:
    values[-1] = holes(values.shape[1:]) * values.dtype.type(1)
    return values


SIZE = (97, 131)
KINDS: dict[str, tuple[NDArray[Any], dict[str, Any]]] = {
    "strips": (noise((3, *SIZE)), {"interleave": "pixel", "blockysize": 7}),
    "tiles": (noise((3, *SIZE)), {"tiled": True, "blockxsize": 16, "blockysize": 32, "compress": "deflate"}),
    "planar": (noise((3, *SIZE)), {"interleave": "band", "compress": "lzw"}),
    "bigtiff": (noise((3, *SIZE)), {"BIGTIFF": "YES", "compress": "zstd"}),
    "big-endian": (noise((2, *SIZE), "uint16"), {"ENDIANNESS": "BIG"}),
    "uint16": (noise((2, *SIZE), "uint16"), {}),
    "12 bits": (noise((2, *SIZE), "uint16") >> 4, {"NBITS": 12}),
    "int16 nodata": (noise((2, *SIZE), "int16") // 4096, {"nodata": -3}),
    "int8": (noise((1, *SIZE), "int8"), {}),
    "uint32": (noise((1, *SIZE), "uint32"), {}),
    "int64": (noise((1, *SIZE), "int64"), {}),
    "float32 with NaN": (with_nan(noise((2, *SIZE), "float32")), {}),
    "float64 nodata NaN": (with_nan(noise((2, *SIZE), "float64")), {"nodata": float("nan")}),
    "float nodata": (noise((2, *SIZE)).astype("float32") // 32, {"nodata": 3.0}),
    "nodata": (noise((3, *SIZE)) // 16, {"nodata": 3}),
    "mask": (noise((3, *SIZE)), {"mask": holes(SIZE)}),
    "alpha": (with_alpha(noise((4, *SIZE))), {"interp": RGBA}),
    "gray and alpha": (with_alpha(noise((2, *SIZE))), {"interp": [ColorInterp.gray, ColorInterp.alpha]}),
    "alpha uint16": (with_alpha(noise((4, *SIZE), "uint16")), {"interp": RGBA}),
    "palette": (noise((1, *SIZE)), {"colormap": {i: (i, 255 - i, i // 2, 255) for i in range(256)}}),
    "jpeg in tiff": (scene((96, 128)), {"compress": "jpeg", "photometric": "ycbcr", "interleave": "pixel"}),
    "one column": (noise((1, 150, 1)), {}),
    "one row": (noise((2, 1, 150)), {}),
    "one pixel": (noise((1, 1, 1)), {}),
    "PNG": (noise((3, *SIZE)), {"driver": "PNG", "crs": None, "transform": Affine.identity()}),
    "JPEG2000": (noise((3, *SIZE)), {"driver": "JP2OpenJPEG", "quality": 100, "reversible": "yes"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_pixel_gets_its_label_and_nodata_stays_nodata(tmp_path: Path, kind: str) -> None:
    values, options = KINDS[kind]
    path = write(tmp_path / "in.tif", values.copy(), **options)
    stored, valid = read_whole(path)
    colours = stored[: len(stored) - ("alpha" in kind)]
    model = pixel_model(len(colours))
    before = sorted(tmp_path.iterdir())
    labels, summary = segment(path, tmp_path / "out.zarr", model)
    np.testing.assert_array_equal(labels, pixel_labels(model, colours, valid))
    assert summary.nodata == (~valid).sum()
    assert sum(summary.classes.values()) == valid.sum()
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "out.zarr"])


# ---- sizes ----


def autoencoder() -> Any:
    """61 + 16n: four 5x5 convolutions of stride 2, mirrored."""
    from networks import autoencoder as make
    from torch import nn

    return nn.Sequential(*list(make(width=6))[:-2], nn.ConvTranspose2d(6, CLASSES, 5, 2))


@pytest.fixture(scope="module")
def networks_by_sizes() -> dict[str, Any]:
    return {
        "61 + 16n": model_of(settled(autoencoder(), 1, 93), CLASSES, 1),
        "32n": model_of(settled(build("segnet", classes=CLASSES, width=0.06)), CLASSES, 3),
    }


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        *(("61 + 16n", shape) for shape in [(1, 1), (1, 150), (150, 1), (2, 3), (60, 61), (97, 131)]),
        *(("32n", shape) for shape in [(1, 1), (31, 97)]),
    ],
)
def test_any_size_gives_the_labels_of_one_pass(
    tmp_path: Path, networks_by_sizes: dict[str, Any], sizes: str, shape: tuple[int, int]
) -> None:
    model = networks_by_sizes[sizes]
    bands = len(model.card.bands)
    geometry = geometry_of(model.network, bands)
    assert str(geometry.rows.sizes) == sizes
    path = write(tmp_path / "in.tif", scene(shape, bands, seed=4))
    labels, summary = segment(path, tmp_path / "out.zarr", model, tile=None, block=None, stitch="exact")
    assert summary.stitch == "exact"
    np.testing.assert_array_equal(labels, whole_labels(model, geometry, scene(shape, bands, seed=4)))


# ---- pixels without data ----


def test_a_raster_without_any_data_never_meets_the_network(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Predictor, "exact", lambda *_, **__: pytest.fail("a tile was run"))
    monkeypatch.setattr(Predictor, "blend", lambda *_, **__: pytest.fail("a tile was run"))
    path = write(tmp_path / "in.tif", np.full((3, 150, 130), 7, "uint8"), nodata=7)
    for stitch in ("exact", "blend"):
        out = tmp_path / f"{stitch}.zarr"
        labels, summary = segment(path, out, pixel_model(), stitch=stitch)
        assert (labels == 255).all()
        assert (summary.nodata, set(summary.classes.values())) == (150 * 130, {0})
        assert not (out / "labels" / "c").exists()


def test_only_blocks_with_data_meet_the_network(tmp_path: Path, monkeypatch) -> None:
    values = noise((3, 128, 192)) | 1
    values[:, :64, 64:] = 0
    path = write(tmp_path / "in.tif", values, nodata=0)
    seen = Seen(monkeypatch, (128, 192), 3)
    labels, _ = segment(path, tmp_path / "out.zarr", pixel_model())
    assert seen.calls == 4
    np.testing.assert_array_equal(seen.shown, np.kron([[1, 0, 0], [1, 1, 1]], np.ones((64, 64))))
    np.testing.assert_array_equal(labels == 255, values[0] == 0)


def test_what_is_not_valid_is_nodata_behind_a_network_with_reach(tmp_path: Path, networks_by_sizes) -> None:
    model = networks_by_sizes["32n"]
    values, valid = scene((100, 110), seed=2), holes((100, 110)) > 0
    path = write(tmp_path / "in.tif", values, mask=valid)
    labels, _ = segment(path, tmp_path / "out.zarr", model, tile=None, stitch="exact")
    geometry = geometry_of(model.network, 3)
    np.testing.assert_array_equal(labels, whole_labels(model, geometry, values, valid))
    # What lies under the mask is not seen, only that it is masked.
    changed = np.where(valid, values, 255 - values)
    path = write(tmp_path / "other.tif", changed, mask=valid)
    again, _ = segment(path, tmp_path / "again.zarr", model, tile=None, stitch="exact")
    np.testing.assert_array_equal(labels, again)


def test_blended_labels_are_nodata_exactly_where_the_input_is(tmp_path: Path) -> None:
    values, valid = scene((150, 170), seed=2), holes((150, 170)) > 0
    path = write(tmp_path / "in.tif", values, mask=valid)
    labels, summary = segment(path, tmp_path / "out.zarr", pixel_model(), stitch="blend", overlap=16)
    assert summary.stitch == "blend"
    np.testing.assert_array_equal(labels == 255, ~valid)


def test_nodata_given_or_taken_away(tmp_path: Path) -> None:
    values = noise((2, *SIZE)) // 32
    path = write(tmp_path / "in.tif", values, nodata=3)
    model = pixel_model(2)
    for number, (nodata, valid) in enumerate(
        [
            (None, (values != 3).all(axis=0)),
            (5.0, (values != 5).all(axis=0)),
            ("none", np.ones(SIZE, bool)),
        ]
    ):
        labels, _ = segment(path, tmp_path / f"{number}.zarr", model, nodata=nodata)
        np.testing.assert_array_equal(labels, pixel_labels(model, values, valid))
    with pytest.raises(UsageError, match="from 0 to 255"):
        segment(path, tmp_path / "no.zarr", model, nodata=256.0)


def test_nodata_by_command(tmp_path: Path) -> None:
    values, model = noise((3, *SIZE)) // 32, pixel_model()
    path, net = write(tmp_path / "in.tif", values, nodata=3), saved(model, tmp_path / "net.safetensors")
    for given, kept in (("none", values >= 0), ("5", values != 5)):
        result = run(*words(path, tmp_path / f"{given}.zarr", model=net), "--nodata", given)
        assert result.exit_code == 0, result.output
        labels = open_store(tmp_path / f"{given}.zarr").array()[:]
        np.testing.assert_array_equal(labels, pixel_labels(model, values, kept.all(axis=0)))
        assert run("ingest", path, tmp_path / f"{given}-in.zarr", "--nodata", given, "-q").exit_code == 0
        again, _ = segment(tmp_path / f"{given}-in.zarr", tmp_path / f"{given}-out.zarr", model)
        np.testing.assert_array_equal(again, labels)
    for wrong, said in (
        ("nothing", "write a number, nan, or none"),
        ("1.5", "from 0 to 255"),
        ("nan", "from 0 to 255"),
    ):
        assert_one_line(run(*words(path, tmp_path / "no.zarr", model=net), "--nodata", wrong), 2, said)


def test_nodata_of_floats_may_be_nan_or_infinite(tmp_path: Path) -> None:
    values = with_nan(noise((2, *SIZE), "float32"))
    values[0, 50, 50] = 7
    path = write(tmp_path / "in.tif", values, nodata=7)
    model = pixel_model(2)
    for number, nodata in enumerate((float("nan"), float("inf"))):
        labels, _ = segment(path, tmp_path / f"{number}.zarr", model, nodata=nodata)
        np.testing.assert_array_equal(labels, pixel_labels(model, values, np.isfinite(values).all(axis=0)))
        assert segment(path, tmp_path / f"{number}.zarr", model, nodata=nodata)[1].computed == 0


# ---- bands ----


def test_a_palette_is_colours_to_an_rgb_model_and_indices_to_another(tmp_path: Path) -> None:
    table = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    indices = noise((1, *SIZE))
    colormap = {i: (*map(int, colour), 255) for i, colour in enumerate(table)}
    path = write(tmp_path / "in.tif", indices, colormap=colormap, nodata=9)
    rgb, gray = pixel_model(3), pixel_model(1, ("gray",))
    labels, _ = segment(path, tmp_path / "rgb.zarr", rgb)
    np.testing.assert_array_equal(labels, pixel_labels(rgb, table[indices[0]].transpose(2, 0, 1), indices[0] != 9))
    labels, _ = segment(path, tmp_path / "gray.zarr", gray)
    np.testing.assert_array_equal(labels, pixel_labels(gray, indices, indices[0] != 9))


def test_fewer_bands_than_the_model_wants(tmp_path: Path) -> None:
    path = write(tmp_path / "in.tif", noise((2, *SIZE)))
    with pytest.raises(InputError, match=r"in\.tif has 2 bands .*, the model wants 3 \(red, green, blue\)"):
        segment(path, tmp_path / "out.zarr", pixel_model())
    assert not (tmp_path / "out.zarr").exists()
    model = pixel_model()
    labels, _ = segment(path, tmp_path / "out.zarr", model, bands=(1, 2, 2))
    np.testing.assert_array_equal(labels, pixel_labels(model, noise((2, *SIZE))[[0, 1, 1]]))


def test_more_bands_than_the_model_wants(tmp_path: Path) -> None:
    values, model = noise((5, *SIZE)), pixel_model()
    blue_first = [ColorInterp.blue, ColorInterp.undefined, ColorInterp.green, ColorInterp.red, ColorInterp.undefined]
    named = write(tmp_path / "named.tif", values, interp=blue_first)
    labels, _ = segment(named, tmp_path / "named.zarr", model)
    np.testing.assert_array_equal(labels, pixel_labels(model, values[[3, 2, 0]]))
    bare = write(tmp_path / "bare.tif", values, photometric="minisblack")
    with pytest.raises(InputError, match=r"bare\.tif has 5 bands .*choose with --bands, e\.g\. --bands 1,2,3"):
        segment(bare, tmp_path / "bare.zarr", model)
    labels, _ = segment(bare, tmp_path / "bare.zarr", model, bands=(5, 1, 3))
    np.testing.assert_array_equal(labels, pixel_labels(model, values[[4, 0, 2]]))


def test_complex_pixels_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "in.tif", np.ones((1, 9, 9), "complex64"))
    with pytest.raises(InputError, match=r"in\.tif holds complex64 pixels; convert") as caught:
        segment(path, tmp_path / "out.zarr", pixel_model(1))
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out.zarr").exists()


def test_the_store_says_what_was_read(tmp_path: Path) -> None:
    path = write(tmp_path / "in.tif", noise((4, *SIZE)), nodata=3)
    segment(path, tmp_path / "out.zarr", pixel_model(), bands=(4, 2, 1))
    grid = open_store(tmp_path / "out.zarr").spec.fingerprint["raster"][-1]
    assert (grid["bands"], grid["nodata"], grid["shape"]) == ([4, 2, 1], ["3.0", "3.0", "3.0"], list(SIZE))
