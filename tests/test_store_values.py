"""Stores of values: what a regression wrote is read back, counted, resumed, and never mixed with labels."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from stores import (
    OUTPUTS,
    STATE,
    VALUE_STATE,
    Maps,
    block_maps,
    contents,
    expected,
    make_spec,
    make_store,
    memory_folder,
    value_spec,
    write_all,
)

from tilepipe.errors import StoreBusyError, StoreError
from tilepipe.store import output
from tilepipe.store.output import create_or_resume, open_store, stored_spec
from tilepipe.store.records import ChannelSummary, parse
from tilepipe.store.spec import StoreSpec


@st.composite
def specs(draw: st.DrawFn) -> StoreSpec:
    chunk = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    shard = (chunk[0] * draw(st.integers(1, 3)), chunk[1] * draw(st.integers(1, 3)))
    return value_spec(
        shape=(draw(st.integers(1, 2 * shard[0] + 3)), draw(st.integers(1, 2 * shard[1] + 3))),
        shard=shard,
        chunk=chunk,
        values=draw(st.sampled_from(["float16", "float32"])),
        outputs=[f"channel {n}" for n in range(draw(st.integers(1, 4)))],
        shards=draw(st.booleans()),
    )


@settings(max_examples=15, deadline=None)
@given(specs(), st.randoms(use_true_random=False))
def test_what_is_written_is_read_and_order_does_not_matter(spec: StoreSpec, order: random.Random) -> None:
    values = expected(spec)["values"]
    blocks = list(spec.blocks())
    order.shuffle(blocks)
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        one, two = Path(folder, "one"), Path(folder, "two")
        with create_or_resume(one, spec) as store:
            write_all(store, {"values": values})
        with create_or_resume(two, spec) as store:
            write_all(store, {"values": values}, blocks)
        assert contents(one) == contents(two)
        found = open_store(one)
        assert found.spec == stored_spec(one) == spec
        assert found.done() == set(blocks)
        assert list(found.verify()) == []
        assert found.array().dtype == np.dtype(spec.values)
        np.testing.assert_array_equal(found.array()[...], values)
        check_status(found.status(), values)


def check_status(status: Any, values: NDArray[Any]) -> None:
    assert status.counts == ()
    assert status.nodata == np.isnan(values[0]).sum()
    assert len(status.channels) == len(values)
    for found, channel in zip(status.channels, values.astype(np.float64), strict=True):
        real = channel[~np.isnan(channel)]
        assert found.count == real.size
        if real.size:
            assert (found.minimum, found.maximum) == (real.min(), real.max())
            assert found.mean == pytest.approx(real.mean())
        else:
            assert found.mean is None


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=4), max_size=5))
def test_summaries_of_parts_make_that_of_the_whole(parts: list[list[float]]) -> None:
    found = ChannelSummary()
    for part in parts:
        if part:
            found = found.merged(ChannelSummary(len(part), min(part), max(part), sum(part)))
        else:
            found = ChannelSummary().merged(found).merged(ChannelSummary())
    whole = [value for part in parts for value in part]
    assert found.count == len(whole)
    if whole:
        assert (found.minimum, found.maximum) == (min(whole), max(whole))
        assert found.total == pytest.approx(sum(whole), abs=1e-6)


def test_a_resumed_store_is_the_one_that_was_never_stopped(tmp_path: Path) -> None:
    spec = value_spec(values="float16")
    whole = expected(spec)
    with create_or_resume(tmp_path / "o", spec) as store:
        write_all(store, whole, [(0, 1), (1, 2)])
    records = tmp_path / "o" / VALUE_STATE
    assert sorted(os.listdir(records)) == ["0", "1", "lease.lock", "tmp"]
    record = parse((records / "0" / "1.json").read_bytes())
    assert record is not None
    assert parse(record.to_bytes()) == record
    (records / "1" / "2.json").write_bytes(b"torn")
    (records / "tmp" / "0123").write_bytes(b"torn")
    with create_or_resume(tmp_path / "o", spec) as store:
        assert store.done() == {(0, 1)}
        assert os.listdir(records / "tmp") == []
        write_all(store, whole)
        check_status(store.status(), whole["values"])
    make_store(tmp_path / "whole", spec)
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "o")) == ["spatial_ref", "values", "x", "y", "zarr.json"]


@pytest.mark.parametrize("shards", [True, False])
def test_a_block_without_data_has_no_files(tmp_path: Path, shards: bool) -> None:
    spec = value_spec(shards=shards)
    whole = expected(spec)
    with create_or_resume(tmp_path / "o", spec) as store:
        store.write_block((0, 0), block_maps(spec, whole, (0, 0)), {})
        store.forget((0, 0))
        assert store.done() == set()
        record = store.write_nodata((0, 0), {})
        assert set(record.files.values()) == {"empty"}
        assert record.nodata == 32 * 32
        assert list(store.verify()) == []
        assert store.status().channels == (ChannelSummary(),) * 2
    assert not [p for p in (tmp_path / "o" / "values" / "c").rglob("*") if p.is_file()]
    assert np.isnan(open_store(tmp_path / "o").array()[...]).all()


def block(*changes: tuple[Any, float]) -> NDArray[Any]:
    values = np.zeros((2, 32, 32), np.float32)
    for place, value in changes:
        values[place] = value
    return values


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (Maps(np.zeros((32, 32), np.uint8)), "values of a block is nothing"),
        (
            Maps(values=block().astype(np.float16)),
            r"values of a block is float16 \(2, 32, 32\); the store needs float32",
        ),
        (Maps(values=block()[:1]), r"\(1, 32, 32\)"),
        (Maps(values=block(((0, 3, 4), np.nan))), "NaN in some channels only, as 'slope' shows"),
        (Maps(values=block(((1, 3, 4), np.inf))), "infinite values in channel 'slope'"),
        (Maps(values=block(((0, 3, 4), np.inf), ((0, 3, 5), -np.inf))), "infinite values in channel 'height"),
    ],
)
def test_a_block_that_does_not_fit_is_refused(tmp_path: Path, maps: Maps, message: str) -> None:
    with create_or_resume(tmp_path / "o", value_spec()) as store:
        with pytest.raises(StoreError, match=message) as caught:
            store.write_block((0, 0), maps, {})
        assert len(str(caught.value).splitlines()) == 1
        assert store.done() == set()


@pytest.mark.parametrize(
    "changes",
    [
        {"values": "float64"},
        {"outputs": ()},
        {"outputs": ("a", "")},
        {"outputs": ("a", "a")},
        {"classes": make_spec().classes},
        {"confidence": True},
        {"probabilities": "uint8"},
        {"values": None, "classes": make_spec().classes},
        {"values": None, "outputs": ()},
    ],
)
def test_specs_that_cannot_be_stored_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(StoreError):
        value_spec(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"values": "float16"}, 'values: "float32" -> "float16"'), ({"outputs": ("a", "b")}, "outputs: ")],
)
def test_another_output_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    make_store(tmp_path / "o", value_spec())
    with pytest.raises(StoreError, match=named):
        create_or_resume(tmp_path / "o", value_spec(**changes))


PAIRS = [(make_spec(), value_spec()), (value_spec(), make_spec())]


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_labels_and_values_replace_each_other_only_when_told(tmp_path: Path, old: StoreSpec, new: StoreSpec) -> None:
    make_store(tmp_path / "o", old)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match="was made by another job"):
        create_or_resume(tmp_path / "o", new)
    assert sorted(tmp_path.rglob("*")) == before
    with create_or_resume(tmp_path / "o", new, overwrite=True) as store:
        assert store.done() == set()
        write_all(store, expected(new))
    make_store(tmp_path / "new", new)
    assert contents(tmp_path / "o") == contents(tmp_path / "new")
    assert sorted(os.listdir(tmp_path / "o")) == sorted(os.listdir(tmp_path / "new"))


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_a_store_that_is_written_is_not_replaced_by_one_of_another_kind(
    tmp_path: Path, old: StoreSpec, new: StoreSpec
) -> None:
    with create_or_resume(tmp_path / "o", old) as store:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(StoreBusyError, match=f"process {os.getpid()}"):
            create_or_resume(tmp_path / "o", new, overwrite=True)
        assert sorted(tmp_path.rglob("*")) == before
        write_all(store, expected(old))


def test_of_two_kinds_that_start_in_one_instant_none_goes_on_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other job comes between this one's look at its lease and this one's own lease."""
    acquire, begun = output.acquire, []

    def late(files: Any) -> Any:
        monkeypatch.setattr(output, "acquire", acquire)
        begun.append(create_or_resume(tmp_path / "o", make_spec()))
        return acquire(files)

    monkeypatch.setattr(output, "acquire", late)
    with pytest.raises(StoreBusyError):
        create_or_resume(tmp_path / "o", value_spec())
    with begun[0] as store:
        write_all(store, expected(make_spec()))
    make_store(tmp_path / "whole")
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")


def test_reading_leaves_nothing_behind(tmp_path: Path) -> None:
    make_store(tmp_path / "o", value_spec())
    before = sorted(tmp_path.rglob("*"))
    store = open_store(tmp_path / "o")
    store.status()
    list(store.verify())
    assert sorted(tmp_path.rglob("*")) == before
    assert not (tmp_path / "o" / STATE).exists()
    with pytest.raises(StoreError, match="has no array 'labels'; it has values"):
        store.array("labels")
    assert store.spec.outputs == OUTPUTS


def test_stores_of_labels_have_the_digests_they_always_had() -> None:
    """Computed before there were stores of values: another digest would make finished blocks count as none."""
    assert make_spec(crs_wkt=None).digest == "99715689be6f031cec64ff2c6247e48bcd691d19acb4c630ecd40f7b731dfb55"
    points = make_spec(
        crs_wkt=None, confidence=True, probabilities="float16", transform=None, gcps=[(0, 0, 9.5, 47.5, 0)]
    )
    assert points.digest == "2d2c58b5d86db5ee86438c19108c0cdb213ee8995e70b29cb25aae6a645a86ae"


def test_a_store_of_values_in_an_object_store(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/o.zarr"
    spec = value_spec()
    whole = expected(spec)
    with create_or_resume(url, spec) as store:
        write_all(store, whole, [(0, 0), (1, 1)])
        with pytest.raises(StoreBusyError):
            create_or_resume(url, make_spec(), overwrite=True)
    with create_or_resume(url, spec) as store:
        assert store.done() == {(0, 0), (1, 1)}
        write_all(store, whole)
        assert list(store.verify()) == []
        np.testing.assert_array_equal(store.array()[...], whole["values"])
        assert store.files.names(STATE) == []
