"""Output and input on a real S3-compatible server, over HTTP: the same map, the same safety, few requests."""

from __future__ import annotations

import importlib
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import rasterio
import rioxarray  # noqa: F401 - gives xarray its .rio
import xarray
import zarr
from buckets import (
    Answer,
    Request,
    Rule,
    Server,
    bucket_contents,
    forget_connections,
    new_bucket,
    s3_process,
    s3_server,
)
from commands import assert_one_line, run
from rasters import GRID, UTM, noise, write
from runs import pixel_labels, pixel_model, saved, segment, words
from stores import block_maps, contents, expected, make_spec, write_all

import tilepipe
from tilepipe.errors import StoppedError, StoreBusyError, StoreError
from tilepipe.options import SegmentOptions
from tilepipe.pipeline import segment_raster
from tilepipe.schedule import Stop
from tilepipe.store.lease import acquire, held_by
from tilepipe.store.objects import files_at
from tilepipe.store.output import create_or_resume, open_store

VALUES = noise((3, 90, 530))
OPTIONS = SegmentOptions(
    device="cpu", precision="float64", threads=1, tile=(64, 64), block=(64, 128), confidence=True, overviews=False
)
BLOCKS = 10


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as found:
        yield found


@pytest.fixture
def bucket(server: Server, request: pytest.FixtureRequest) -> str:
    """The URL of a bucket of the test's own."""
    return new_bucket(f"maps-{zlib.crc32(request.node.name.encode())}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """in.tif; model.safetensors; and out.zarr, what a run on local files makes of them."""
    folder = tmp_path_factory.mktemp("s3")
    write(folder / "in.tif", VALUES, photometric="rgb")
    saved(pixel_model(), folder / "model.safetensors")
    segment_raster(folder / "in.tif", folder / "out.zarr", folder / "model.safetensors", OPTIONS)
    return folder


def put(key: str) -> Any:
    """Whether a request writes an object whose key has `key` in it."""
    return lambda request: request.method == "PUT" and key in request.path


def later(matches: Any, number: int, answer: Answer) -> Rule:
    """Gives `answer` to matching requests from the one with this number on."""
    seen = count(1)
    return lambda request, _: answer if matches(request) and next(seen) >= number else None


# ---- the job ----


def test_a_stopped_and_refused_job_ends_with_the_bytes_of_a_local_one(
    server: Server, bucket: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, job = f"{bucket}/deep/out.zarr", (folder / "in.tif", f"{bucket}/deep/out.zarr", folder / "model.safetensors")
    stop = Stop()

    def tell(state: Any) -> None:
        stop.asked = state.done >= 3

    with pytest.raises(StoppedError, match=f"the same command resumes {url}"):
        segment_raster(*job, OPTIONS, progress=tell, stop=stop)
    first = open_store(url).done()
    assert 3 <= len(first) < BLOCKS
    forbidden = Answer("403 Forbidden", "ExpiredToken", "The provided token has expired.")
    with (
        server.obeying(later(put("labels/c/"), 4, forbidden)),
        pytest.raises(StoreError, match=r"labels/c/\d/\d: The provided token has expired\.; the credentials"),
    ):
        segment_raster(*job, OPTIONS)
    second = open_store(url).done()
    assert first < second
    assert len(second) < BLOCKS
    monkeypatch.chdir(tmp_path)
    summary = segment_raster(*job, replace(OPTIONS, stage="always"))
    assert list(tmp_path.iterdir()) == [], "the staged copy belongs to the temporary files"
    assert (summary.resumed, summary.computed) == (len(second), BLOCKS - len(second))
    assert bucket_contents(url) == contents(folder / "out.zarr")
    assert list(open_store(url).verify()) == []
    assert fsspec.filesystem("s3").find(f"{url}/labels/.tilepipe/tmp") == []
    with pytest.raises(StoreError, match="made by another job"):
        segment_raster(*job, replace(OPTIONS, confidence=False))


def test_all_commands_take_a_url(bucket: str, folder: Path, tmp_path: Path) -> None:
    url = f"{bucket}/out.zarr"
    command = (*job(folder, url), "--confidence", "--block", "256")
    result = run(*command)
    assert result.exit_code == 0, result.output
    wanted = pixel_labels(pixel_model(), VALUES)
    assert set(zarr.open_group(url, mode="r")) >= {"labels", "confidence", "ovr_2x", "x", "y", "spatial_ref"}
    for name in ("status", "stats", "overviews"):
        assert run(name, url).exit_code == 0
    assert "3 of 3" in run("status", url).stdout
    shown = run("stats", url).stdout.replace(",", "")
    for label in range(5):
        assert str(np.count_nonzero(wanted == label)) in shown
    assert run("export", url, tmp_path / "map.tif").exit_code == 0
    with rasterio.open(tmp_path / "map.tif") as found:
        np.testing.assert_array_equal(found.read(1), wanted)
    lazy = xarray.open_zarr(url, consolidated=False)
    assert lazy.rio.crs == UTM
    assert lazy.labels.rio.transform() == GRID
    np.testing.assert_array_equal(lazy.labels, wanted)
    assert run(*command).exit_code == 0


@pytest.mark.slow
def test_the_raster_may_be_in_a_bucket_too(server: Server, folder: Path, tmp_path: Path) -> None:
    model, wanted = pixel_model(), pixel_labels(pixel_model(), VALUES)
    with s3_process(tmp_path):
        bucket = new_bucket("rasters")
        fsspec.filesystem("s3").put(str(folder / "in.tif"), f"{bucket}/in.tif")
        labels, _ = segment(f"{bucket}/in.tif", f"{bucket}/out.zarr", model, block=(128, 320))
        np.testing.assert_array_equal(labels, wanted)
        fsspec.filesystem("s3").pipe(f"{bucket}/in.tif", (folder / "in.tif").read_bytes() + b"\n")
        with pytest.raises(StoreError, match=r"raster\[in\.tif\]\.ETag"):
            segment(f"{bucket}/in.tif", f"{bucket}/out.zarr", model, block=(128, 320))


@pytest.mark.slow
def test_zarr_in_a_bucket_is_a_raster_and_a_lazy_array(bucket: str) -> None:
    model, wanted = pixel_model(), pixel_labels(pixel_model(), VALUES)
    array = zarr.create_array(
        f"{bucket}/in.zarr", name="image", data=VALUES, chunks=(3, 64, 64), dimension_names=("band", "y", "x")
    )
    array.attrs.update({"proj:code": UTM, "spatial:transform": list(GRID)[:6]})
    labels, _ = segment(f"{bucket}/in.zarr/image", f"{bucket}/out.zarr", model, block=(128, 320))
    np.testing.assert_array_equal(labels, wanted)
    lazy = xarray.open_zarr(f"{bucket}/in.zarr", consolidated=False).image
    part = tilepipe.segment(lazy, model, OPTIONS).labels[20:90, 30:99]
    np.testing.assert_array_equal(part, wanted[20:90, 30:99])


# ---- requests ----


def test_opening_asks_as_little_of_many_shards_as_of_few(server: Server, bucket: str) -> None:
    few, many = make_spec(), make_spec(shape=(120, 190))
    for name, spec in (("few", few), ("many", many)):
        with create_or_resume(f"{bucket}/{name}", spec) as store:
            write_all(store, expected(spec))
    assert many.grid[0] * many.grid[1] == 4 * few.grid[0] * few.grid[1]

    def opened(name: str) -> list[Request]:
        with server.counted() as found:
            xarray.open_zarr(f"{bucket}/{name}", consolidated=False, chunks=None)
            assert open_store(f"{bucket}/{name}").array().shape
        return found

    few_requests, many_requests = opened("few"), opened("many")
    assert len(few_requests) == len(many_requests) < 80
    with server.counted() as told:
        open_store(f"{bucket}/many").status()
    # One request for each block's record, and a list for each row of blocks.
    assert len(told) <= many.grid[0] * many.grid[1] + 2 * many.grid[0] + 10
    assert not [request for request in many_requests + told if "labels/c" in request.path + request.query]


# ---- the lease ----


def ignoring(_: Request, environ: dict[str, Any]) -> None:
    """As servers do that know no conditional writes."""
    environ.pop("HTTP_IF_NONE_MATCH", None)


def unknown(_: Request, environ: dict[str, Any]) -> Answer | None:
    """As servers do that say so."""
    return Answer("501 Not Implemented", "NotImplemented") if "HTTP_IF_NONE_MATCH" in environ else None


@pytest.mark.parametrize("rule", [None, ignoring, unknown])
def test_of_many_that_start_at_once_one_writes(server: Server, bucket: str, rule: Rule | None) -> None:
    url, barrier, held = f"{bucket}/o.zarr", threading.Barrier(6), []

    def contend() -> None:
        files = files_at(url)
        files.names("")
        barrier.wait(60)
        with suppress(StoreBusyError):
            held.append(acquire(files))

    with server.obeying(rule or (lambda *_: None)):
        threads = [threading.Thread(target=contend) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert held
    assert [held_by(files_at(url), lease.owner.token) for lease in held].count(True) == 1
    if rule is None:
        assert len(held) == 1
        assert [request for request in server.requests if request.path.endswith("o.zarr/labels/.tilepipe/lease.json")]
    for lease in held:
        lease.release()
    assert files_at(url).names("labels/.tilepipe") == []


def test_a_lease_whose_answer_was_lost_is_held(server: Server, bucket: str) -> None:
    files, lost = files_at(f"{bucket}/o.zarr"), []

    def rule(request: Request, environ: dict[str, Any]) -> Answer | None:
        if not put("lease.json")(request) or lost:
            return None
        lost.extend(server.app(environ, lambda *_: None))
        return Answer("503 Service Unavailable", "SlowDown", "Please reduce your request rate.")

    with server.obeying(rule):
        lease = acquire(files)
    assert lost
    assert held_by(files, lease.owner.token)
    with pytest.raises(StoreBusyError, match="is being written by process"):
        acquire(files)
    lease.release()


def test_a_job_that_lost_its_lease_writes_no_more(bucket: str) -> None:
    spec = make_spec()
    with create_or_resume(f"{bucket}/o.zarr", spec) as store:
        store.write_block((0, 0), block_maps(spec, expected(spec), (0, 0)), {})
        store.files.delete("labels/.tilepipe/lease.json")
        other = acquire(files_at(f"{bucket}/o.zarr"))
        with pytest.raises(StoreBusyError, match="no longer owns"):
            store.write_block((0, 1), block_maps(spec, expected(spec), (0, 1)), {})
    assert held_by(store.files, other.owner.token)
    assert store.done() == {(0, 0)}
    other.release()


def test_deleting_one_key_leaves_those_that_begin_like_it(bucket: str) -> None:
    files = files_at(f"{bucket}/o.zarr")
    for key in ("labels/c/0/1", "labels/c/0/10", "labels/c/0/1x/2"):
        files.write(key, b"kept")
    files.delete("labels/c/0/1")
    assert files.names("labels/c/0") == ["10", "1x"]
    files.delete("labels/c/0")
    assert files.names("labels") == []


# ---- what goes wrong ----


def job(folder: Path, url: str) -> tuple[str | Path, ...]:
    return words(folder / "in.tif", url, model=folder / "model.safetensors")


def test_a_bucket_that_is_not_there_is_told(server: Server, folder: Path) -> None:
    assert_one_line(run(*job(folder, "s3://nowhere/out.zarr")), 3, "s3://nowhere/out.zarr", "bucket does not exist")
    assert_one_line(run("status", "s3://nowhere/out.zarr"), 3, "is not a tilepipe store")


def test_missing_credentials_are_told(
    server: Server, bucket: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    forget_connections()
    try:
        assert_one_line(run(*job(folder, f"{bucket}/out.zarr")), 3, "Unable to locate credentials", "set AWS_ACCESS")
    finally:
        forget_connections()


REFUSALS = {
    "region": (
        Answer("400 Bad Request", "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong; expecting 'eu'"),
        3,
        ("expecting 'eu'", "check AWS_DEFAULT_REGION"),
    ),
    "key": (Answer("403 Forbidden", "InvalidAccessKeyId", "No such key."), 3, ("No such key", "must allow it")),
    "full": (Answer("507 Insufficient Storage", "XStorageFull", "No room."), 1, ("No room", "to resume")),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_refusals_of_the_server_are_told(server: Server, bucket: str, folder: Path, reason: str) -> None:
    answer, code, said = REFUSALS[reason]
    with server.obeying(lambda request, _: answer if request.method == "PUT" else None):
        assert_one_line(run(*job(folder, f"{bucket}/out.zarr")), code, f"{bucket}/out.zarr", *said)


def test_a_missing_driver_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3")
    assert_one_line(run(*job(folder, "s3://maps/out.zarr")), 3, "pip install 'tilepipe[s3]'", "s3://maps/out.zarr")
    assert_one_line(run("status", "odd://maps/out.zarr"), 3, "Protocol not known: odd", "s3://bucket/out.zarr")


def test_a_server_that_fails_for_a_moment_is_asked_again(server: Server, bucket: str) -> None:
    spec, busy = make_spec(), count()

    def rule(request: Request, _: Any) -> Answer | None:
        slow = put("labels/c/")(request) and next(busy) % 2 == 0
        return Answer("503 Service Unavailable", "SlowDown", "Please reduce your request rate.") if slow else None

    with server.obeying(rule), create_or_resume(f"{bucket}/o.zarr", spec) as store:
        store.write_block((0, 0), block_maps(spec, expected(spec), (0, 0)), {})
    assert store.done() == {(0, 0)}
