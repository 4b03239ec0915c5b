from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import pytest
from stores import block_maps, expected, make_spec

import tilepipe.store.lease as leases
from tilepipe.errors import StoreBusyError
from tilepipe.store.durable import LocalFiles
from tilepipe.store.lease import Owner, acquire, check, held_by, lease_key
from tilepipe.store.objects import files_at
from tilepipe.store.output import create_or_resume

# Children are forked, since starting hundreds of them anew would take minutes; they use no library with threads.
context = multiprocessing.get_context("fork")


@pytest.fixture
def files(tmp_path: Path) -> LocalFiles:
    found = files_at(tmp_path / "o.zarr")
    assert isinstance(found, LocalFiles)
    return found


def plant(files: LocalFiles, age: float = 0.0, **changes: Any) -> Owner:
    """Leave a lease as another process would, `age` seconds after its last heartbeat."""
    owner = dataclasses.replace(leases._this_process(), **changes)
    assert files.create(lease_key(files), owner.to_bytes())
    when = time.time() - age
    os.utime(Path(files.location, lease_key(files)), (when, when))
    return owner


def hold(path: Path, held: Event, end: Event) -> None:
    with create_or_resume(path, make_spec()):
        held.set()
        end.wait(60)


def start_holder(path: Path) -> tuple[Any, Event]:
    held, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(path, held, end))
    process.start()
    assert held.wait(60)
    return process, end


def test_a_second_process_is_told_who_writes(tmp_path: Path) -> None:
    path = tmp_path / "o"
    process, end = start_holder(path)
    for overwrite in (False, True):
        with pytest.raises(StoreBusyError, match=f"process {process.pid} on ") as caught:
            create_or_resume(path, make_spec(), overwrite)
        assert caught.value.exit_code == 1
        assert len(str(caught.value).splitlines()) == 1
    end.set()
    process.join(60)
    with create_or_resume(path, make_spec()) as store:
        assert store.notice is None
    with create_or_resume(path, make_spec()) as store:
        assert store.notice is None


def test_a_killed_processs_lease_is_taken_over_and_said_so(tmp_path: Path) -> None:
    process, _ = start_holder(tmp_path / "o")
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    with create_or_resume(tmp_path / "o", make_spec()) as store:
        assert store.notice is not None
        assert f"process {process.pid} " in store.notice
        assert "gone" in store.notice


def test_a_process_that_waits_to_be_reaped_is_gone(tmp_path: Path, files: LocalFiles) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        deadline = time.time() + 10
        while leases.psutil.Process(pid).status() != leases.psutil.STATUS_ZOMBIE and time.time() < deadline:
            time.sleep(0.01)
        plant(files, pid=pid, started=leases.psutil.Process(pid).create_time())
        lease = acquire(files)
        assert lease.notice is not None
        lease.release()
    finally:
        os.waitpid(pid, 0)


def test_a_reused_process_number_is_not_the_owner(files: LocalFiles) -> None:
    plant(files, started=time.time() - 86400)
    lease = acquire(files)
    assert lease.notice is not None
    lease.release()


def test_a_live_process_on_this_machine_is_never_robbed(files: LocalFiles) -> None:
    plant(files, age=86400)
    with pytest.raises(StoreBusyError):
        acquire(files)


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"machine": "another boot"}])
def test_another_machines_lease_lasts_a_minute(files: LocalFiles, change: dict[str, str]) -> None:
    plant(files, age=50, pid=1, **change)
    with pytest.raises(StoreBusyError, match="process 1 on"):
        acquire(files)
    files.delete(lease_key(files))
    plant(files, age=70, pid=1, **change)
    lease = acquire(files)
    assert lease.notice is not None
    assert "last heard of 70 s ago" in lease.notice
    lease.release()


def test_a_lease_that_is_no_lease_expires(files: LocalFiles) -> None:
    files.create(lease_key(files), b"")
    with pytest.raises(StoreBusyError):
        acquire(files)
    os.utime(Path(files.location, lease_key(files)), (1, 1))
    acquire(files).release()


def test_the_heart_beats_until_release(files: LocalFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT", 0.02)
    lease = acquire(files)
    path = Path(files.location, lease_key(files))
    os.utime(path, (1, 1))
    deadline = time.time() + 10
    while path.stat().st_mtime < 2 and time.time() < deadline:
        time.sleep(0.01)
    age = files.age(lease_key(files))
    assert age is not None
    assert age < 10
    lease.release()
    lease.release()
    assert not path.exists()


def test_a_job_that_lost_its_lease_stops_and_leaves_the_others_alone(tmp_path: Path) -> None:
    spec = make_spec()
    whole = expected(spec)
    store = create_or_resume(tmp_path / "o", spec)
    store.write_block((0, 0), block_maps(spec, whole, (0, 0)), {})
    store.files.delete(lease_key(store.files))
    other = acquire(store.files)
    with pytest.raises(StoreBusyError, match="no longer owns"):
        store.write_block((0, 1), block_maps(spec, whole, (0, 1)), {})
    store.close()
    assert held_by(store.files, other.owner.token)
    assert store.done() == {(0, 0)}
    other.release()


def contend(path: str, ready: Barrier, done: Barrier, wins: Any) -> None:
    files = files_at(path)
    ready.wait(60)
    lease = None
    try:
        lease = acquire(files)
        with wins.get_lock():
            wins.value += 1
    except StoreBusyError:
        pass
    done.wait(60)
    if lease is not None:
        check(files, lease.owner.token)
        with wins.get_lock():
            wins.value += 100


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_processes_exactly_one_wins(files: LocalFiles, stale: bool) -> None:
    for _ in range(4):
        if stale:
            plant(files, started=0.0)
        count = 6
        ready, done, wins = context.Barrier(count), context.Barrier(count), context.Value("i", 0)
        processes = [context.Process(target=contend, args=(files.location, ready, done, wins)) for _ in range(count)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert wins.value == 101
        files.delete(lease_key(files))
