"""Workflows on real data: zones against plain numpy, the incremental map against one run over the whole mosaic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import geopandas
import incremental
import numpy as np
import pandas
import pytest
import shapely
import xarray
import zones
from affine import Affine
from commands import run
from rasterio.features import rasterize
from rasters import GRID, UTM, noise, write
from reference import model_of, settled
from runs import pixel_labels, pixel_model, saved, segment

from tilepipe.checkpoint import Model
from tilepipe.models import build
from tilepipe.raster.mosaic import Piece, mosaic_xml
from tilepipe.raster.source import open_raster


def test_zones_get_the_areas_and_means_of_plain_numpy(tmp_path: Path) -> None:
    values = noise((4, 150, 170)) // 2
    values[:, 30:60, 20:90] = 0
    scene = write(tmp_path / "in.tif", values, nodata=0)
    saved(pixel_model(4), tmp_path / "m.safetensors")
    left, top = GRID.c, GRID.f
    shapes = [
        shapely.box(left + 11, top - 97, left + 203, top - 5),
        shapely.Point(left + 250, top - 200).buffer(70),
        shapely.box(left - 900, top, left - 800, top + 50),
    ]
    frame = geopandas.GeoDataFrame({"name": ["field", "pond", "elsewhere"]}, geometry=shapes, crs=UTM)
    frame.to_crs(4326).to_file(tmp_path / "zones.gpkg")
    words = [str(scene), str(tmp_path / "zones.gpkg"), str(tmp_path / "table.csv")]
    found = zones.main([*words, "--model", str(tmp_path / "m.safetensors"), "--chunk", "64"])

    again = geopandas.read_file(tmp_path / "zones.gpkg").to_crs(UTM).geometry
    valid = (values != 0).all(axis=0)
    labels = pixel_labels(pixel_model(4), values, valid)
    red, nir = values[0].astype(np.float32), values[3].astype(np.float32)
    with np.errstate(invalid="ignore"):
        index = (nir - red) / (nir + red)
    for number, shape in enumerate(again):
        inside = rasterize([shape], labels.shape, transform=GRID).astype(bool)
        for label in range(5):
            chosen = inside & (labels == label)
            assert found.pixels.values[number, label] == chosen.sum()
            if chosen.any():
                assert found.ndvi.values[number, label] == pytest.approx(index[chosen].mean(dtype=np.float64))
    assert found.pixels.sum() > 5000
    assert found.pixels[2].sum() == 0
    np.testing.assert_array_equal(found.area_m2, found.pixels * 4.0)
    table = pandas.read_csv(tmp_path / "table.csv")
    assert table.pixels.sum() == found.pixels.sum()


# ---- the incremental map -----------------------------------------------------------------------------------------

SIDE, COLS = 100, 4


def image(folder: Path, col: int, seed: int) -> Path:
    """One image of the mosaic, which is a row of them."""
    place = GRID * Affine.translation(SIDE * col, 0)
    path = folder / "images" / f"{col}.tif"
    return write(path, noise((3, SIDE, SIDE), seed=seed), transform=place, photometric="rgb")


@pytest.fixture
def mosaic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """mosaic.vrt of four images, which it names from its own folder; model.safetensors, whose reach is 54 pixels."""
    (tmp_path / "images").mkdir()
    paths = [image(tmp_path, col, seed=col) for col in range(COLS)]
    tree = ElementTree.fromstring(mosaic_xml([Piece(str(path), open_raster(path).info) for path in paths]))
    for name in tree.iter("SourceFilename"):
        name.set("relativeToVRT", "1")
        name.text = str(Path(name.text or "").relative_to(tmp_path))
    ElementTree.ElementTree(tree).write(tmp_path / "mosaic.vrt")
    arguments = {"classes": 5, "bands": 3, "width": 0.1}
    network = settled(build("dilated-fcn", **arguments))
    card = replace(model_of(network, 5).card, architecture="dilated-fcn", arguments=arguments)
    saved(Model.of(network, card), tmp_path / "m.safetensors")

    def here(command: list[str], check: bool) -> Any:
        """In this process: starting another one takes longer than the job."""
        result = run(*command[3:])
        (tmp_path / "said").write_text(result.output)
        return SimpleNamespace(returncode=result.exit_code)

    monkeypatch.setattr(incremental, "run", here)
    return tmp_path / "mosaic.vrt"


def update(mosaic: Path) -> dict[str, str]:
    """Runs the workflow; what became of each sheet."""
    words = ["--sheet", str(SIDE), "--model", str(mosaic.parent / "m.safetensors"), "--tile", "208"]
    more = ["--device", "cpu", "--precision", "float64", "--threads", "1", "--no-overviews", "--stage", "never"]
    summary = mosaic.parent / "summary.json"
    code = incremental.main([str(mosaic), str(mosaic.parent / "maps"), *words, *more, "--summary", str(summary)])
    assert code == 0, (mosaic.parent / "said").read_text()
    results = json.loads(summary.read_text())["results"]
    return {Path(result["output"]).stem: result["state"] for result in results}


@pytest.mark.slow
def test_only_sheets_near_a_changed_image_are_made_anew(mosaic: Path) -> None:
    folder = mosaic.parent
    assert set(update(mosaic).values()) == {"done"}
    assert set(update(mosaic).values()) == {"already done"}
    image(folder, 0, seed=99)
    # The tiles of sheet 1 look 54 pixels into image 0, those of sheet 2 not at all.
    assert update(mosaic) == {
        "r000c000": "done",
        "r000c001": "done",
        "r000c002": "already done",
        "r000c003": "already done",
    }
    whole, _ = segment(mosaic, folder / "whole.zarr", folder / "m.safetensors", tile=(208, 208), overviews=False)
    sheets = sorted(folder.glob("maps/*.zarr"))
    joined = xarray.open_mfdataset(sheets, engine="zarr", consolidated=False).labels
    np.testing.assert_array_equal(joined, whole)
