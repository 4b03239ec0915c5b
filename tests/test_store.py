from __future__ import annotations

import errno
import os
import pickle
import random
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from stores import STATE, Maps, block_maps, contents, expected, make_spec, make_store, memory_folder, write_all

from tilepipe.errors import RunError, StoreBusyError, StoreError, TilepipeError
from tilepipe.store.output import create_or_resume, open_store, stored_spec
from tilepipe.store.records import parse
from tilepipe.store.spec import LabelClass, StoreSpec, differences
from tilepipe.store.status import label_counts


@st.composite
def specs(draw: st.DrawFn) -> StoreSpec:
    chunk = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    shard = (chunk[0] * draw(st.integers(1, 3)), chunk[1] * draw(st.integers(1, 3)))
    count = draw(st.sampled_from([1, 2, 255, 256, 300]))
    return make_spec(
        shape=(draw(st.integers(1, 2 * shard[0] + 3)), draw(st.integers(1, 2 * shard[1] + 3))),
        shard=shard,
        chunk=chunk,
        classes=[LabelClass(f"class {n}", (n % 256, 0, 0)) for n in range(count)],
        confidence=draw(st.booleans()),
        probabilities=draw(st.sampled_from([None, "uint8", "float16"])) if count < 3 else None,
        shards=draw(st.booleans()),
    )


@settings(max_examples=15, deadline=None)
@given(specs(), st.randoms(use_true_random=False))
def test_what_is_written_is_read_and_order_does_not_matter(spec: StoreSpec, order: random.Random) -> None:
    whole = expected(spec)
    blocks = list(spec.blocks())
    order.shuffle(blocks)
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        one, two = Path(folder, "one"), Path(folder, "two")
        with create_or_resume(one, spec) as store:
            write_all(store, whole)
        with create_or_resume(two, spec) as store:
            write_all(store, whole, blocks)
        assert contents(one) == contents(two)
        found = open_store(one)
        assert found.spec == spec
        assert found.done() == set(blocks)
        assert list(found.verify()) == []
        for name, values in whole.items():
            np.testing.assert_array_equal(found.array(name)[...], values)
        status = found.status()
        counts = np.bincount(whole["labels"].ravel(), minlength=spec.nodata + 1)
        assert status.counts == tuple(counts[: len(spec.classes)])
        assert status.nodata == counts[spec.nodata]


def test_key_order_and_types_of_settings_do_not_matter(tmp_path: Path) -> None:
    make_store(tmp_path / "a", make_spec(settings={"a": 1, "b": (1, 2)}, fingerprint={"x": 1, "y": 2}))
    make_store(tmp_path / "b", make_spec(settings={"b": [1, 2], "a": 1}, fingerprint={"y": 2, "x": 1}))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_threads_may_write_different_blocks_at_once(tmp_path: Path) -> None:
    spec = make_spec(shape=(200, 200), confidence=True)
    whole = make_store(tmp_path / "a", spec)
    with create_or_resume(tmp_path / "b", spec) as store, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: store.write_block(index, block_maps(spec, whole, index), {}), spec.blocks()))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert os.listdir(tmp_path / "b" / STATE / "tmp") == []


def test_a_resumed_store_says_what_is_left(tmp_path: Path) -> None:
    spec = make_spec()
    whole = expected(spec)
    with create_or_resume(tmp_path / "o", spec) as store:
        write_all(store, whole, [(0, 1), (1, 2)])
    with create_or_resume(tmp_path / "o", spec) as store:
        assert store.done() == {(0, 1), (1, 2)}
        assert store.status().done == 2
        assert store.status().seconds == {"compute": 1.0}
        write_all(store, whole)
        assert store.done() == set(spec.blocks())
    make_store(tmp_path / "whole", spec)
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")


def test_disagreement_is_summed(tmp_path: Path) -> None:
    spec = make_spec()
    whole = expected(spec)
    with create_or_resume(tmp_path / "o", spec) as store:
        for index in spec.blocks():
            store.write_block(index, block_maps(spec, whole, index), {"disagreement": [2, 100]})
        assert (store.status().differing, store.status().compared) == (12, 600)


def test_the_stored_spec_is_what_was_given(tmp_path: Path) -> None:
    spec = make_spec(gcps=[(0, 0, 9.5, 47.5, 0), (50, 70, 9.6, 47.4, 1)], transform=None)
    make_store(tmp_path / "o", spec)
    assert stored_spec(tmp_path / "o") == spec
    assert stored_spec(tmp_path / "other") is None
    assert open_store(tmp_path / "o").digest == spec.digest


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"\0" * len(data),
        lambda data: data.replace(b'"row": 0', b'"row": 1'),
        lambda data: data.replace(b'"digest": "', b'"digest": "0'),
        lambda data: b"[]",
    ],
)
def test_a_damaged_record_does_not_count(tmp_path: Path, damage: Any) -> None:
    make_store(tmp_path / "o")
    record = tmp_path / "o" / STATE / "0" / "1.json"
    record.write_bytes(damage(record.read_bytes()))
    assert open_store(tmp_path / "o").done() == set(make_spec().blocks()) - {(0, 1)}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fingerprint": {"raster": {"size": 10, "mtime": 6}, "model": "abc"}}, r"raster\.mtime: 5 -> 6"),
        ({"fingerprint": {"raster": {"size": 10, "mtime": 5}, "model": "abd"}}, 'model: "abc" -> "abd"'),
        ({"fingerprint": {"raster": {"size": 10, "mtime": 5}}}, 'model: "abc" -> none'),
        ({"shard": (16, 32)}, r"shard: \[32,32\] -> \[16,32\]"),
        ({"confidence": True}, "confidence: false -> true"),
    ],
)
def test_another_job_is_refused_by_name_of_the_part(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    make_store(tmp_path / "o")
    before = contents(tmp_path / "o")
    with pytest.raises(StoreError, match=named) as caught:
        create_or_resume(tmp_path / "o", make_spec(**changes))
    assert len(str(caught.value).splitlines()) == 1
    assert contents(tmp_path / "o") == before
    assert differences(make_spec(), make_spec(settings={"workers": 3})) == []
    with create_or_resume(tmp_path / "o", make_spec()) as store:
        assert len(store.done()) == 6


def test_overwrite_replaces_a_store_whole(tmp_path: Path) -> None:
    make_store(tmp_path / "o", make_spec(shape=(90, 90), confidence=True, probabilities="uint8"))
    (tmp_path / "o" / "ovr_2x").mkdir()
    spec = make_spec(crs_wkt=None, transform=None)
    with create_or_resume(tmp_path / "o", spec, overwrite=True) as store:
        assert store.done() == set()
        write_all(store, expected(spec))
    make_store(tmp_path / "new", spec)
    assert contents(tmp_path / "o") == contents(tmp_path / "new")
    assert sorted(os.listdir(tmp_path / "o")) == ["labels", "x", "y", "zarr.json"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder", "zarr"])
def test_what_is_not_ours_is_left_alone(tmp_path: Path, kind: str, overwrite: bool) -> None:
    path = tmp_path / "o"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("precious")
    else:
        zarr.create_array(path, name="labels", shape=(4,), chunks=(2,), dtype="u1")[...] = 1
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(StoreError) as caught:
        create_or_resume(path, make_spec(), overwrite)
    assert str(path) in str(caught.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    make_store(tmp_path / "o")
    assert len(open_store(tmp_path / "o").done()) == 6


def test_a_damaged_group_is_not_taken_for_an_unfinished_one(tmp_path: Path) -> None:
    make_store(tmp_path / "o")
    (tmp_path / "o" / "zarr.json").write_text('{"tilepipe"')
    with pytest.raises(StoreError, match="overwrite"):
        create_or_resume(tmp_path / "o", make_spec())
    assert (tmp_path / "o" / STATE / "0" / "0.json").exists()
    with create_or_resume(tmp_path / "o", make_spec(), overwrite=True) as store:
        assert store.done() == set()


def test_a_store_of_another_format_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "o")
    group = tmp_path / "o" / "zarr.json"
    group.write_text(group.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(StoreError, match="format 99"):
        create_or_resume(tmp_path / "o", make_spec())


def test_nothing_to_open_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a tilepipe store"):
        open_store(tmp_path / "missing")
    make_store(tmp_path / "o")
    store = open_store(tmp_path / "o")
    with pytest.raises(StoreError, match="has no array 'confidence'"):
        store.array("confidence")
    with pytest.raises(StoreError, match="for reading"):
        store.write_nodata((0, 0), {})


@pytest.mark.parametrize("shards", [True, False])
def test_a_block_without_data_has_no_files(tmp_path: Path, shards: bool) -> None:
    spec = make_spec(shards=shards, confidence=True)
    whole = expected(spec)
    with create_or_resume(tmp_path / "o", spec) as store:
        store.write_block((0, 0), block_maps(spec, whole, (0, 0)), {})
        # As a killed run of the same job might leave it, only that here the pixels differ.
        store.forget((0, 0))
        assert store.done() == set()
        record = store.write_nodata((0, 0), {})
        assert set(record.files.values()) == {"empty"}
        assert record.nodata == 32 * 32
        assert store.done() == {(0, 0)}
        assert list(store.verify()) == []
    assert not [p for p in (tmp_path / "o" / "labels" / "c").rglob("*") if p.is_file()]
    assert (open_store(tmp_path / "o").array()[...] == 255).all()


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (Maps(np.zeros((32, 31), np.uint8)), r"labels of a block is uint8 \(32, 31\)"),
        (Maps(np.zeros((32, 32), np.int64)), "labels of a block is int64"),
        (Maps(np.full((32, 32), 3, np.uint8), np.zeros((32, 32), np.uint8)), "labels beyond its 3 classes"),
        (Maps(np.zeros((32, 32), np.uint8)), "confidence of a block is nothing"),
        (Maps(np.zeros((32, 32), np.uint8), np.zeros((32, 32), np.float32)), "confidence of a block is float32"),
    ],
)
def test_a_block_that_does_not_fit_is_refused(tmp_path: Path, maps: Maps, message: str) -> None:
    with create_or_resume(tmp_path / "o", make_spec(confidence=True)) as store:
        with pytest.raises(StoreError, match=message):
            store.write_block((0, 0), maps, {})
        with pytest.raises(StoreError, match="no block"):
            store.write_block((2, 0), maps, {})
        assert store.done() == set()


def test_verify_names_what_was_changed(tmp_path: Path) -> None:
    make_store(tmp_path / "o")
    shard = tmp_path / "o" / "labels" / "c" / "0" / "1"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    (tmp_path / "o" / "labels" / "c" / "1" / "2").unlink()
    faults = sorted(open_store(tmp_path / "o").verify())
    assert [fault.split(":")[0] for fault in faults] == ["block (0, 1)", "block (1, 2)"]
    assert "changed" in faults[0]
    assert "missing" in faults[1]


@pytest.mark.parametrize(
    ("code", "kind", "exit_code"),
    [
        (errno.ENOSPC, RunError, 1),
        (errno.EIO, RunError, 1),
        (errno.EACCES, StoreError, 3),
        (errno.EROFS, StoreError, 3),
    ],
)
def test_a_failing_disk_keeps_finished_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[TilepipeError], exit_code: int
) -> None:
    spec = make_spec()
    whole = expected(spec)
    write, calls = os.write, iter(range(1000))

    def failing(handle: int, data: Any) -> int:
        # Half of the data arrives, then no more.
        if next(calls) == 0:
            return write(handle, bytes(data)[: len(data) // 2])
        raise OSError(code, os.strerror(code))

    with create_or_resume(tmp_path / "o", spec) as store:
        write_all(store, whole, [(0, 0)])
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", failing)
            with pytest.raises(kind) as caught:
                store.write_block((0, 1), block_maps(spec, whole, (0, 1)), {})
        assert caught.value.exit_code == exit_code
        assert str(tmp_path / "o" / "labels" / "c" / "0" / "1") in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert os.listdir(tmp_path / "o" / STATE / "tmp") == []
        assert store.done() == {(0, 0)}
        write_all(store, whole)
    make_store(tmp_path / "whole", spec)
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")


def test_an_output_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file/o\.zarr") as caught:
        create_or_resume(tmp_path / "file" / "o.zarr", make_spec())
    assert len(str(caught.value).splitlines()) == 1


def test_a_pickled_copy_writes_until_the_lease_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec()
    whole = expected(spec)
    monkeypatch.chdir(tmp_path)
    with create_or_resume("o", spec) as store:
        copy = pickle.loads(pickle.dumps(store))
        monkeypatch.chdir("/")
        copy.write_block((0, 0), block_maps(spec, whole, (0, 0)), {})
        copy.close()
        copy.write_block((0, 1), block_maps(spec, whole, (0, 1)), {})
        assert store.done() == {(0, 0), (0, 1)}
        np.testing.assert_array_equal(copy.array()[:32, :32], whole["labels"][:32, :32])
    with pytest.raises(StoreBusyError):
        copy.write_block((0, 2), block_maps(spec, whole, (0, 2)), {})
    assert (tmp_path / "o").exists()


def test_leftovers_of_killed_writes_are_removed_at_resume(tmp_path: Path) -> None:
    make_store(tmp_path / "o")
    (tmp_path / "o" / STATE / "tmp" / "0123").write_bytes(b"torn")
    with create_or_resume(tmp_path / "o", make_spec()):
        assert os.listdir(tmp_path / "o" / STATE / "tmp") == []


def test_files_are_flushed_before_they_are_named_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle: int) -> None:
        events.append(("flush", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def note_replace(source: Any, target: Any) -> None:
        events.append(("name", f"{source} {target}"))
        replace(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to see which file is flushed")
    spec = make_spec(shards=False, confidence=True)
    whole = expected(spec)
    with create_or_resume(tmp_path / "o", spec) as store:
        monkeypatch.setattr(os, "fsync", note_fsync)
        monkeypatch.setattr(os, "replace", note_replace)
        record = store.write_block((1, 1), block_maps(spec, whole, (1, 1)), {})
        monkeypatch.undo()
    named = {}
    for position, (what, path) in enumerate(events):
        if what == "name":
            source, target = path.split(" ")
            assert ("flush", source) in events[:position]
            named[target] = position
    last = named.pop(str(tmp_path / "o" / STATE / "1" / "1.json"))
    assert set(named) == {str(tmp_path / "o" / key) for key, sha in record.files.items() if sha != "empty"}
    for target, position in named.items():
        assert ("flush", str(Path(target).parent)) in events[position:last]
    assert ("flush", str(tmp_path / "o" / STATE / "1")) in events[last:]


def test_records_survive_a_round_trip_and_are_found_by_block(tmp_path: Path) -> None:
    make_store(tmp_path / "o")
    records = {(r.row, r.col): r for r in open_store(tmp_path / "o").records()}
    assert set(records) == set(make_spec().blocks())
    record = records[1, 2]
    assert parse(record.to_bytes()) == record
    assert sum(record.counts) + record.nodata == 18 * 6
    assert record.info == {"seconds": {"compute": 0.5}}


@given(arrays(st.sampled_from([np.uint8, np.uint16]), array_shapes(min_dims=2, max_dims=2, max_side=40)))
def test_labels_are_counted(labels: Any) -> None:
    wanted = tuple(np.bincount(labels.ravel(), minlength=np.iinfo(labels.dtype).max + 1))
    assert label_counts(labels) == label_counts(labels[:, ::-1]) == wanted


def test_a_store_in_an_object_store(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    url = f"memory://{tmp_path.name}/o.zarr"
    spec = make_spec(confidence=True)
    whole = expected(spec)
    with create_or_resume(url, spec) as store:
        with pytest.raises(StoreBusyError):
            create_or_resume(url, spec)
        write_all(pickle.loads(pickle.dumps(store)), whole, [(0, 0), (1, 1)])
    with pytest.raises(StoreError, match="model"):
        create_or_resume(url, make_spec(confidence=True, fingerprint={"model": "other"}))
    with create_or_resume(url, spec) as store:
        assert store.done() == {(0, 0), (1, 1)}
        write_all(store, whole)
        assert list(store.verify()) == []
        np.testing.assert_array_equal(store.array("confidence")[...], whole["confidence"])
    fs = fsspec.filesystem("memory")
    fs.get(f"/{tmp_path.name}/o.zarr", str(tmp_path / "copy"), recursive=True)
    make_store(tmp_path / "whole", spec)
    assert contents(tmp_path / "copy") == contents(tmp_path / "whole")
    with create_or_resume(url, make_spec(), overwrite=True) as store:
        assert store.done() == set()
    fs.pipe_file(f"/{tmp_path.name}/other/thesis.tex", b"precious")
    with pytest.raises(StoreError, match="something else"):
        create_or_resume(f"memory://{tmp_path.name}/other", spec, overwrite=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (0, 5)},
        {"chunk": (5, 8)},
        {"classes": ()},
        {"transform": (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)},
        {"transform": (1.0, 0.0, float("nan"), 0.0, 1.0, 0.0)},
        {"probabilities": "float32"},
        {"settings": {"now": float("nan")}},
        {"fingerprint": {"path": Path("a")}},
        {"classes": [LabelClass("a", (0, 0, 256))]},
    ],
)
def test_specs_that_cannot_be_stored_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(StoreError):
        make_spec(**changes)


def test_a_store_that_was_deleted_while_it_was_written_is_an_error(tmp_path: Path) -> None:
    spec = make_spec()
    with create_or_resume(tmp_path / "o", spec) as store:
        shutil.rmtree(tmp_path / "o")
        with pytest.raises(StoreBusyError, match="deleted its lease"):
            store.write_nodata((0, 0), {})
    assert not (tmp_path / "o").exists()
