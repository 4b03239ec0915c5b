from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from pyramids import LEVELS, add, mean, most_frequent
from stores import STATE, Maps, contents, make_spec, make_store, value_spec

from tilepipe.errors import ReadError, StoppedError, StoreBusyError, StoreError
from tilepipe.overviews import make_overviews
from tilepipe.raster.source import open_raster
from tilepipe.schedule import Stop
from tilepipe.store.output import create_or_resume, open_store
from tilepipe.store.overviews import write_overviews
from tilepipe.store.pyramid import Pyramid
from tilepipe.store.spec import LabelClass, StoreSpec

FULL = make_spec(confidence=True, probabilities="uint8")
MANY = make_spec(classes=[LabelClass(f"c{n}", (n % 256, 0, 0)) for n in range(300)])


@pytest.mark.parametrize(
    ("spec", "levels"),
    [
        (FULL, 5),
        (make_spec(shape=(33, 129), transform=None, crs_wkt=None), 6),
        (make_spec(shape=(1, 65)), 5),
        (MANY, 5),
        (value_spec(values="float16", shards=False), 5),
    ],
)
def test_each_level_is_what_all_pixels_say(memory_path: Path, spec: StoreSpec, levels: int) -> None:
    whole = make_store(memory_path / "o.zarr", spec)
    pyramid = add(memory_path / "o.zarr")
    assert pyramid.levels == levels
    group = zarr.open_group(memory_path / "o.zarr", mode="r")
    reduced = {"labels", "confidence", "values"} & whole.keys()
    for factor in (1 << level for level in range(1, levels + 1)):
        found = group[f"ovr_{factor}x"]
        axes = {f"x_{factor}x", f"y_{factor}x"} | ({"spatial_ref"} if spec.transform is not None else set())
        assert set(found.array_keys()) == reduced | axes
        for name in reduced:
            if name == "labels":
                wanted = most_frequent(whole[name], factor, spec.nodata)
            elif name == "confidence":
                wanted = mean(whole[name], factor, 255)
            else:
                wanted = np.stack([mean(layer, factor, np.nan) for layer in whole[name]])
            assert found[name].dtype == wanted.dtype
            np.testing.assert_allclose(found[name][:], wanted, rtol=0 if wanted.dtype.kind == "u" else 1e-3)


def test_levels_end_where_the_map_fits_a_picture() -> None:
    assert [Pyramid.of(make_spec(shape=shape)).levels for shape in ((512, 512), (513, 9), (20000, 9000))] == [0, 1, 6]
    large = Pyramid.of(make_spec(shape=(1 << 23, 1 << 23)))
    assert large.square >= 1 << large.levels
    assert max(large.shape(large.levels)) == 512


@pytest.mark.parametrize("spec", [FULL, value_spec(shards=False)])
def test_the_cut_does_not_change_the_pixels(memory_path: Path, spec: StoreSpec) -> None:
    def levels(path: Path) -> dict[str, Any]:
        group = zarr.open_group(path, mode="r")
        return {f"{n}/{a}": group[f"{n}/{a}"][...] for n in group.group_keys() for a in group[n].array_keys()}

    make_store(memory_path / "a.zarr", spec)
    for name, how in {"b": {"square": 64, "chunk": 32}, "c": {"square": 128, "chunk": 4}, "d": {}}.items():
        shutil.copytree(memory_path / "a.zarr", memory_path / f"{name}.zarr")
        add(memory_path / f"{name}.zarr", **how)
    add(memory_path / "a.zarr")
    wanted = levels(memory_path / "a.zarr")
    for name in ("b", "c"):
        found = levels(memory_path / f"{name}.zarr")
        assert found.keys() == wanted.keys()
        for key, values in wanted.items():
            np.testing.assert_array_equal(found[key], values, key)
    assert contents(memory_path / "d.zarr") == contents(memory_path / "a.zarr")


def test_overviews_that_are_there_stay_until_the_map_changes(memory_path: Path) -> None:
    path, spec = memory_path / "o.zarr", make_spec()
    whole = make_store(path, spec)
    add(path)
    before, made = contents(path), os.stat(path / "ovr_2x" / "labels" / "c" / "0" / "0").st_mtime_ns
    add(path)
    assert os.stat(path / "ovr_2x" / "labels" / "c" / "0" / "0").st_mtime_ns == made
    assert contents(path) == before
    assert not list((path / STATE / "overviews").glob("*/*"))
    # A block that is made anew with other pixels: the overviews no longer fit, and are made anew, too.
    with create_or_resume(path, spec) as store:
        store.forget((0, 0))
        changed = whole["labels"][:32, :32].copy()
        changed[:] = 2
        store.write_block((0, 0), Maps(changed), {})
    add(path)
    whole["labels"][:32, :32] = 2
    found = zarr.open_group(path, mode="r")["ovr_8x/labels"][:]
    np.testing.assert_array_equal(found, most_frequent(whole["labels"], 8, 255))


def test_an_interrupted_run_goes_on_where_it_was(memory_path: Path) -> None:
    make_store(memory_path / "calm.zarr", FULL)
    shutil.copytree(memory_path / "calm.zarr", memory_path / "o.zarr")
    add(memory_path / "calm.zarr")
    pyramid = Pyramid.of(FULL, **LEVELS)
    said: list[tuple[int, int, int]] = []

    def stop(done: int, total: int, pixels: int) -> None:
        said.append((done, total, pixels))
        if done == 3:
            raise StoppedError("enough", 75)

    with create_or_resume(memory_path / "o.zarr", FULL) as store:
        with pytest.raises(StoppedError):
            write_overviews(store, pyramid, progress=stop)
        # Nothing of what is not whole can be found.
        tree = zarr.open_group(memory_path / "o.zarr", mode="r")
        assert [level["asset"] for level in tree.attrs["multiscales"]["layout"]] == ["labels"]
        assert list((memory_path / "o.zarr").glob("ovr_2x/labels/c/*/*"))
        assert not list((memory_path / "o.zarr").glob("ovr_*/*/zarr.json"))
        write_overviews(store, pyramid, progress=lambda *state: said.append(state))
    assert said[0] == (0, 6, 0)
    again = said[4:]
    assert again[0][0] >= 3
    assert again[0][2] == 0
    assert again[-1][:2] == (6, 6)
    assert again[-1][2] < 50 * 70
    assert contents(memory_path / "o.zarr") == contents(memory_path / "calm.zarr")


def test_an_unfinished_map_has_none(memory_path: Path) -> None:
    make_store(memory_path / "o.zarr")
    (memory_path / "o.zarr" / STATE / "1" / "0.json").unlink()
    before = contents(memory_path / "o.zarr")
    with pytest.raises(StoreError, match="5 of 6 blocks"):
        make_overviews(memory_path / "o.zarr")
    assert contents(memory_path / "o.zarr") == before
    with pytest.raises(StoreError, match="not a tilepipe store"):
        make_overviews(memory_path / "nothing.zarr")


def test_one_process_at_a_time_and_only_its_owner(memory_path: Path) -> None:
    make_store(memory_path / "o.zarr")
    with create_or_resume(memory_path / "o.zarr", make_spec()), pytest.raises(StoreBusyError, match="being written"):
        make_overviews(memory_path / "o.zarr")
    with pytest.raises(StoreError, match="opened for reading"):
        write_overviews(open_store(memory_path / "o.zarr"), Pyramid.of(make_spec(), **LEVELS))
    assert not list((memory_path / "o.zarr").glob("ovr_*"))


def test_a_damaged_map_is_told_in_one_line(memory_path: Path) -> None:
    make_store(memory_path / "o.zarr")
    shard = memory_path / "o.zarr" / "labels" / "c" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(ReadError, match="labels cannot be read at rows 0:32") as caught:
        add(memory_path / "o.zarr")
    assert "\n" not in str(caught.value)


def test_a_request_to_stop_is_heard(memory_path: Path) -> None:
    make_store(memory_path / "o.zarr", make_spec(shape=(600, 700), shard=(512, 512), chunk=(256, 256)))
    with pytest.raises(StoppedError, match="0 of 1 parts") as caught:
        make_overviews(memory_path / "o.zarr", stop=Stop(asked=True))
    assert caught.value.exit_code == 75
    seen: list[Any] = []
    assert make_overviews(memory_path / "o.zarr", progress=seen.append) == [2]
    assert (seen[-1].done, seen[-1].total, seen[-1].pixels, seen[-1].work) == (1, 1, 420_000, "overviews")


def test_overviews_on_an_object_store(memory_path: Path) -> None:
    url = f"memory://{memory_path.name}/o.zarr"
    whole = make_store(url, FULL)  # type: ignore[arg-type]
    add(url)
    found = zarr.open_group(url, mode="r")["ovr_4x/labels"][:]
    np.testing.assert_array_equal(found, most_frequent(whole["labels"], 4, 255))


def test_the_store_is_what_it_was_for_all_else(memory_path: Path) -> None:
    path = memory_path / "o.zarr"
    whole = make_store(path, FULL)
    before = open_store(path).status()
    add(path)
    store = open_store(path)
    assert store.status() == before
    assert list(store.verify()) == []
    np.testing.assert_array_equal(store.array()[:], whole["labels"])
    with pytest.raises(StoreError, match="no array 'ovr_2x/labels'"):
        store.array("ovr_2x/labels")
    with create_or_resume(path, FULL) as again:
        assert len(again.done()) == 6
    bare = memory_path / "bare.zarr"
    make_store(bare)
    add(bare)
    assert open_raster(bare).info.name == open_raster(bare / "labels").info.name == str(bare / "labels")


@pytest.mark.parametrize("new", [make_spec(), value_spec(), make_spec(shape=(20, 20))])
def test_overwriting_removes_them(memory_path: Path, new: StoreSpec) -> None:
    path = memory_path / "o.zarr"
    make_store(path)
    add(path)
    with create_or_resume(path, new, overwrite=True):
        assert not list(path.glob("ovr_*"))
        assert not (path / STATE / "overviews").exists()


def test_they_are_made_anew_on_request(memory_path: Path) -> None:
    path = memory_path / "o.zarr"
    make_store(path, make_spec(shape=(600, 700), shard=(512, 512), chunk=(256, 256)))
    make_overviews(path)
    before = contents(path)
    shard = path / "ovr_2x" / "labels" / "c" / "0" / "0"
    shard.write_bytes(b"-")
    make_overviews(path)
    assert shard.read_bytes() == b"-"
    make_overviews(path, overwrite=True)
    assert contents(path) == before
