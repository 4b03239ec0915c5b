"""Models that are none, and outputs that are something else, elsewhere or full: one line, and nothing lost."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from commands import assert_one_line, run
from numpy.typing import NDArray
from rasters import noise, write
from runs import pixel_labels, pixel_model, saved, segment, words

from tilepipe.errors import RunError, StoreError, TilepipeError
from tilepipe.raster.ingest import ingest
from tilepipe.raster.source import open_raster
from tilepipe.store.durable import LocalFiles
from tilepipe.store.output import open_store

SIZE = (128, 192)
VALUES = noise((3, *SIZE))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return saved(pixel_model(), tmp_path_factory.mktemp("model") / "net.safetensors")


# ---- models ----


def no_card(path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros((3, 3), "float32")}, path)


MODELS: dict[str, Callable[[Path], object]] = {
    "nothing.safetensors": lambda path: None,
    "empty.safetensors": lambda path: path.touch(),
    "text.safetensors": lambda path: path.write_text("weights"),
    "folder.safetensors": lambda path: path.mkdir(),
    "no card.safetensors": no_card,
    "raster.tif": lambda path: write(path, VALUES),
    "pickle.pt": lambda path: path.write_bytes(b"\x80\x04N."),
    "program.pt2": lambda path: path.write_bytes(b"PK\x03\x04"),
    "no.module:factory": lambda path: None,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_none(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    MODELS[name](path)
    raster = write(tmp_path / "in.tif", VALUES)
    given = name if ":" in name else path
    result = run(*words(raster, tmp_path / "out.zarr", model=given))
    assert_one_line(result, 3, name)
    assert not (tmp_path / "out.zarr").exists()


def test_a_truncated_model(tmp_path: Path, model: Path) -> None:
    broken = tmp_path / "net.safetensors"
    broken.write_bytes(model.read_bytes()[:-10])
    raster = write(tmp_path / "in.tif", VALUES)
    assert_one_line(run(*words(raster, tmp_path / "out.zarr", model=broken)), 3, "net.safetensors")


# ---- outputs ----


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def a_folder(out: Path, raster: Path) -> None:
    (out / "thesis").mkdir(parents=True)
    (out / "thesis" / "chapter.txt").write_text("the only copy")


def a_zarr_group(out: Path, raster: Path) -> None:
    zarr.create_group(out).create_array("labels", shape=(9, 9), dtype="u1")[...] = 3


def an_ingested_raster(out: Path, raster: Path) -> None:
    ingest(open_raster(raster), out)


@pytest.mark.parametrize("make", [a_folder, a_zarr_group, an_ingested_raster])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_something_else_is_left_alone(
    tmp_path: Path, model: Path, make: Callable[[Path, Path], None], overwrite: bool
) -> None:
    raster, out = write(tmp_path / "in.tif", VALUES), tmp_path / "out.zarr"
    make(out, raster)
    before = contents(out)
    more = ["--overwrite"] if overwrite else []
    assert_one_line(run(*words(raster, out, model=model), *more), 3, "out.zarr", "choose another output path")
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.tif", "out.zarr"]


def test_the_input_is_never_the_output(tmp_path: Path, model: Path) -> None:
    ingest(open_raster(write(tmp_path / "in.tif", VALUES)), tmp_path / "in.zarr")
    before = contents(tmp_path)
    assert_one_line(run(*words(tmp_path / "in.zarr", tmp_path / "in.zarr", model=model), "--overwrite"), 2, "in.zarr")
    assert contents(tmp_path) == before


def test_labels_are_a_raster_but_not_to_be_written_over_while_they_are_read(tmp_path: Path) -> None:
    raster = write(tmp_path / "in.tif", VALUES)
    labels, _ = segment(raster, tmp_path / "one.zarr", pixel_model())
    model = pixel_model(1)
    again, _ = segment(tmp_path / "one.zarr", tmp_path / "two.zarr", model)
    np.testing.assert_array_equal(again, pixel_labels(model, labels[None]))
    with pytest.raises(TilepipeError, match=r"one\.zarr/labels is read by this job"):
        segment(tmp_path / "one.zarr", tmp_path / "one.zarr", model, overwrite=True)
    np.testing.assert_array_equal(open_store(tmp_path / "one.zarr").array()[:], labels)


def test_an_output_where_nothing_can_be(tmp_path: Path, model: Path) -> None:
    raster = write(tmp_path / "in.tif", VALUES)
    assert_one_line(run(*words(raster, raster / "out.zarr", model=model)), 3, "Not a directory", "written to")
    (tmp_path / "file.zarr").write_text("a file")
    assert_one_line(run(*words(raster, tmp_path / "file.zarr", model=model)), 2, "would be a file")
    with pytest.raises(StoreError, match="Not a directory"):
        segment(raster, tmp_path / "file.zarr", pixel_model())
    assert (tmp_path / "file.zarr").read_text() == "a file"


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Callable[[str], None]]:
    """A file system in memory at `folder`, and how to change its options; a skip where none may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here; run as root")
    try:
        yield lambda text: subprocess.run(["mount", "-o", f"remount,{text}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_an_output_on_a_read_only_file_system(tmp_path: Path, model: Path) -> None:
    raster = write(tmp_path / "in.tif", VALUES)
    with mounted(tmp_path / "disk", "size=1m", "ro"):
        result = run(*words(raster, tmp_path / "disk" / "out.zarr", model=model))
    assert_one_line(result, 3, "Read-only file system", "out.zarr")


LARGE = noise((3, 512, 512))


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path, model: Path) -> None:
    raster = write(tmp_path / "in.tif", LARGE)
    with mounted(tmp_path / "disk", "size=300k") as remount:
        command = words(raster, tmp_path / "disk" / "out.zarr", model=model)
        result = run(*command)
        assert_one_line(result, 1, "No space left on device", "free some space", "finished blocks are kept")
        done = len(open_store(tmp_path / "disk" / "out.zarr").done())
        assert 0 < done < 64
        remount("size=4m")
        result = run(*command)
        assert result.exit_code == 0, result.output
        assert f"{done} of them done before" in result.output
        labels = open_store(tmp_path / "disk" / "out.zarr").array()[:]
        assert list(open_store(tmp_path / "disk" / "out.zarr").verify()) == []
    np.testing.assert_array_equal(labels, pixel_labels(pixel_model(), LARGE))


def full_after(monkeypatch, writes: int) -> None:
    """Let the disk be full after so many files."""
    left = [writes]
    make = LocalFiles._temporary

    def temporary(files: LocalFiles, data: bytes) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return make(files, data)

    monkeypatch.setattr(LocalFiles, "_temporary", temporary)


@pytest.mark.parametrize("writes", [0, 1, 3, 7, 14, 15])
def test_a_disk_that_fills_at_any_write_keeps_what_is_finished(tmp_path: Path, monkeypatch, writes: int) -> None:
    raster, out = write(tmp_path / "in.tif", VALUES), tmp_path / "out.zarr"
    with monkeypatch.context() as patch:
        full_after(patch, writes)
        with pytest.raises(RunError, match="No space left on device; free some space") as caught:
            segment(raster, out, pixel_model())
        assert caught.value.exit_code == 1
    labels, summary = segment(raster, out, pixel_model())
    np.testing.assert_array_equal(labels, pixel_labels(pixel_model(), VALUES))
    assert summary.resumed + summary.computed == 6
    assert list(open_store(out).verify()) == []


def test_a_disk_that_fills_while_staging(tmp_path: Path) -> None:
    raster = write(tmp_path / "in.tif", LARGE)
    with mounted(tmp_path / "disk", "size=300k") as remount:
        out = tmp_path / "disk" / "out.zarr"
        with pytest.raises(RunError, match=r"cannot stage .*in\.tif.*No space left on device; free some space"):
            segment(raster, out, pixel_model(), stage="always")
        assert not list((tmp_path / "disk").glob("*.partial-*"))
        remount("size=8m")
        labels: NDArray[Any] = segment(raster, out, pixel_model(), stage="always")[0]
    np.testing.assert_array_equal(labels, pixel_labels(pixel_model(), LARGE))
