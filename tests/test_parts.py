"""Rasters put together from files, read file by file: what GDAL makes of the same VRT, without its turn."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasters import GRID, noise, write

from tilepipe.errors import ReadError
from tilepipe.raster import pool
from tilepipe.raster.dataset import COMPOSED_TURN, rasterio_window
from tilepipe.raster.gdal import GdalRecipe
from tilepipe.raster.part_reader import PartReader
from tilepipe.raster.parts import DTYPES, parts_of
from tilepipe.raster.source import open_raster
from tilepipe.window import Window

ROWS, COLS = 120, 150
TILED: dict[str, Any] = {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate"}
GDAL_NAMES = {name: theirs for theirs, name in DTYPES.items()}


def vrt_of(bands: list[str], dtype: str = "uint8", of_band: str = "") -> str:
    """A VRT of these sources for each band."""
    text = "".join(
        f'<VRTRasterBand dataType="{GDAL_NAMES[dtype]}" band="{n}">{of_band}{sources}</VRTRasterBand>'
        for n, sources in enumerate(bands, 1)
    )
    place = "<GeoTransform>5, 1, 0, 7, 0, -1</GeoTransform>"
    return f'<VRTDataset rasterXSize="{COLS}" rasterYSize="{ROWS}">{place}{text}</VRTDataset>'


def source(path: Path, band: int, here: Window, there: tuple[int, int] = (0, 0), inside: str = "") -> str:
    kind, (rows, cols) = ("ComplexSource" if inside else "SimpleSource"), here.shape
    return (
        f"<{kind}><SourceFilename>{path}</SourceFilename><SourceBand>{band}</SourceBand>"
        f'<SrcRect xOff="{there[1]}" yOff="{there[0]}" xSize="{cols}" ySize="{rows}"/>'
        f'<DstRect xOff="{here.cols.start}" yOff="{here.rows.start}" xSize="{cols}" ySize="{rows}"/>{inside}</{kind}>'
    )


def by_gdal(target: Path | str, window: Window, bands: tuple[int, ...] = (1, 2)) -> NDArray[Any]:
    with rasterio.open(target, sharing=False) as dataset:
        return dataset.read(list(bands), window=rasterio_window(window))


def by_parts(target: str, window: Window, bands: tuple[int, ...] = (1, 2)) -> NDArray[Any] | None:
    """The window as it is put together from files; None where it is left to GDAL."""
    parts = parts_of(target)
    if parts is None:
        return None
    reader, out = PartReader(parts, 1 << 20), np.empty((len(bands), *window.shape), parts.dtypes[0])
    done = reader.fetch(bands, window, out)
    reader.close()
    return out if done else None


def windows(rows: int, cols: int, least: int = 1) -> st.SearchStrategy[Window]:
    def side(length: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.integers(0, length - least), st.integers(least, length)).map(
            lambda s: (s[0], min(length, s[0] + s[1]))
        )

    return st.builds(lambda r, c: Window.of(*r, *c), side(rows), side(cols))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Three files of two bands of each type, with many equal values."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    for dtype in ("uint8", "int16", "float32"):
        paths = []
        for n in range(3):
            values = np.round(noise((2, 80, 90), dtype, seed=n) / (40 if dtype != "float32" else 0.3))
            paths.append(write(folder / f"{dtype}{n}.tif", values.astype(dtype), **TILED))
        found[dtype] = paths
    return found


HOLES = st.sampled_from([None, "0", "3", "-2", "1e9", "2.5", "nan"])


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), dtype=st.sampled_from(["uint8", "int16", "float32"]))
def test_windows_are_what_gdal_makes_of_the_vrt(files: dict[str, list[Path]], data: st.DataObject, dtype: str) -> None:
    """Any number of overlapping rectangles, with values that let files below show, and a background."""
    hole, background = data.draw(HOLES), data.draw(st.sampled_from([None, "0", "3", "77"]))
    if dtype == "float32":
        hole = None if hole is None else background
    bands = ["", ""]
    for _ in range(data.draw(st.integers(0, 4))):
        there = data.draw(windows(80, 90))
        rows, cols = there.shape
        row, col = data.draw(st.integers(0, ROWS - 1)), data.draw(st.integers(0, COLS - 1))
        path = data.draw(st.sampled_from(files[dtype]))
        for band in (1, 2):
            inside = "" if hole is None else f"<NODATA>{hole}</NODATA>"
            bands[band - 1] += source(path, band, Window.of(row, row + rows, col, col + cols), there.origin, inside)
    declared = "" if background is None else f"<NoDataValue>{background}</NoDataValue>"
    target, window = vrt_of(bands, dtype, of_band=declared), data.draw(windows(ROWS, COLS))
    chosen = data.draw(st.sampled_from([(1, 2), (2,), (2, 1)]))
    found = by_parts(target, window, chosen)
    if found is None:
        odd = hole in {"2.5", "nan", "1e9"} or (hole == "-2" and dtype == "uint8")
        assert odd or (dtype == "float32" and hole is not None), "whole numbers never need GDAL"
    else:
        np.testing.assert_array_equal(found, by_gdal(target, window, chosen))


A_PART = Window.of(10, 90, 20, 110)


def plain(path: Path) -> str:
    return vrt_of([source(path, 1, A_PART), source(path, 2, A_PART)])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('xSize="90" ySize="80"/></Simple', 'xSize="45" ySize="40"/></Simple'),
        ('<SrcRect xOff="0"', '<SrcRect xOff="0.5"'),
        ("<SourceBand>1<", "<SourceBand>2<"),
        ('<DstRect xOff="20"', '<DstRect xOff="21"'),
        ('dataType="Byte"', 'dataType="UInt16"'),
        ("SimpleSource>", "AveragedSource>"),
        ("<SimpleSource>", '<SimpleSource resampling="cubic"><OpenOptions/>'),
        ("<NODATA>3</NODATA>", "<NODATA>3</NODATA><ScaleRatio>2</ScaleRatio>"),
        ("<NODATA>3</NODATA>", "<NODATA>3</NODATA><UseMaskBand>true</UseMaskBand>"),
        ('band="2">', 'band="2"><NoDataValue>5</NoDataValue><HideNoDataValue>1</HideNoDataValue>'),
        ("</GeoTransform>", "</GeoTransform><BlockXSize>64</BlockXSize>"),
    ],
)
def test_what_does_more_than_show_files_is_left_to_gdal(files: dict[str, list[Path]], old: str, new: str) -> None:
    text = plain(files["uint8"][0])
    if "NODATA" in old:
        text = text.replace("SimpleSource", "ComplexSource").replace("</Complex", "<NODATA>3</NODATA></Complex")
    assert by_parts(text, A_PART) is not None
    changed = text.replace(old, new) if "Averaged" in new or "dataType" in new else text.replace(old, new, 1)
    assert changed != text
    assert by_parts(changed, A_PART) is None
    expected = by_gdal(changed, A_PART)
    np.testing.assert_array_equal(by_a_job(changed, A_PART, expected.dtype), expected)


def by_a_job(target: str, window: Window, dtype: Any) -> NDArray[Any]:
    """Both bands of a window of a VRT, as jobs read it."""
    out = np.full((2, *window.shape), 99, dtype)
    files = (target,) if target.endswith(".vrt") else ()
    GdalRecipe("a.vrt", target, files, composed=True, parts=parts_of(target)).backend().fetch((1, 2), window, out)
    return out


@pytest.mark.parametrize("how", ["smaller", "another type", "one band", "strips", "a VRT"])
def test_a_file_that_is_not_what_the_vrt_says_is_left_to_gdal(tmp_path: Path, how: str) -> None:
    values = noise((2, 80, 90))
    path = write(tmp_path / "a.tif", values, **TILED)
    text = plain(path)
    np.testing.assert_array_equal(by_parts(text, A_PART), values)
    if how == "smaller":
        write(path, values[:, :70], **TILED)
    elif how == "another type":
        write(path, values.astype("uint16") * 3, **TILED)
    elif how == "one band":
        write(path, values[:1], **TILED)
    elif how == "strips":
        write(path, values, blockysize=4)
    else:
        path = write(tmp_path / "b.tif", values, **TILED)
        rasterio.shutil.copy(path, tmp_path / "a.vrt", driver="VRT")
        text = plain(tmp_path / "a.vrt")
    assert by_parts(text, A_PART) is None
    outer = tmp_path / "outer.vrt"
    outer.write_text(text)
    try:
        expected = by_gdal(outer, A_PART)
    except rasterio.errors.RasterioError:
        with pytest.raises(ReadError, match=r"^a\.vrt: cannot read"):
            by_a_job(str(outer), A_PART, "uint8")
    else:
        np.testing.assert_array_equal(by_a_job(str(outer), A_PART, "uint8"), expected)


def grid_of_files(folder: Path, values: NDArray[Any], side: int = 48) -> list[Path]:
    """The raster cut into tiled files."""
    found = []
    for row in range(0, values.shape[1], side):
        for col in range(0, values.shape[2], side):
            part, place = values[:, row : row + side, col : col + side], GRID * Affine.translation(col, row)
            found.append(write(folder / f"{row}_{col}.tif", part, transform=place, **TILED))
    return found


@pytest.mark.parametrize("through", ["files", "a VRT beside them"])
def test_many_threads_read_a_mosaic_without_gdals_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through: str
) -> None:
    """More files than stay open, read at random while another thread keeps GDAL's turn."""
    monkeypatch.setattr(pool, "IDLE", 3)
    values = noise((2, 190, 240))
    inputs: Any = grid_of_files(tmp_path, values)
    if through != "files":
        text = str(open_raster(inputs).recipe.target).replace(f"{tmp_path}/", "")  # type: ignore[union-attr]
        inputs = tmp_path / "in.vrt"
        inputs.write_text(text.replace('relativeToVRT="0"', 'relativeToVRT="1"'))
    random = np.random.default_rng(3)
    corners = [(int(random.integers(0, 150)), int(random.integers(0, 200))) for _ in range(200)]
    reader = open_raster(inputs).open()
    # What the files are is looked up under the turn, once.
    reader.read(Window.of(0, 190, 0, 240))

    def right(corner: tuple[int, int]) -> bool:
        row, col = corner
        window = Window.of(row, row + 40, col, col + 40)
        return bool((reader.read(window).values == values[:, *window.within(Window.whole((190, 240)))]).all())

    kept, done = threading.Event(), threading.Event()

    def keep_turn() -> None:
        with COMPOSED_TURN:
            kept.set()
            done.wait(60)

    keeper = threading.Thread(target=keep_turn)
    keeper.start()
    kept.wait(60)
    try:
        with ThreadPoolExecutor(6) as threads:
            assert all(threads.map(right, corners, timeout=60))
    finally:
        done.set()
        keeper.join()
        reader.close()
    # Closed files are opened again.
    assert right((10, 20))
    reader.close()
