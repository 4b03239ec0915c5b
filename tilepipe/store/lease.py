"""One owner at a time: a lease on a store, made exclusively, kept alive by a heartbeat, taken over when stale.

A lease is stale when its process is gone (same machine: no such process, or another one under its number), or
when its heartbeat stopped a minute ago (other machines). A process that is alive on this machine is never
robbed. On object stores no lock guards a takeover: two processes that find one stale lease in the same instant
may both believe that they have it, until the next check, which comes before each block's record, stops one.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass

import psutil

from tilepipe.errors import StoreBusyError, TilepipeError
from tilepipe.store.durable import Files

BEAT = 10.0
"""Seconds between heartbeats."""
STALE = 60.0
"""Seconds without a heartbeat after which a lease on another machine is stale."""
CLOCK_SLACK = 2.0
"""Seconds by which two readings of one process's start may differ."""


def lease_key(files: Files) -> str:
    """Where the store's lease is kept."""
    return f"{files.state}/lease.json"


def _lock_key(files: Files) -> str:
    return f"{files.state}/lease.lock"


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a lease."""

    host: str
    machine: str
    """The boot and the process-number space: equal where process numbers mean the same processes."""
    pid: int
    started: float
    """When the process started, in seconds of the epoch."""
    token: str
    """Of this lease alone."""

    def to_bytes(self) -> bytes:
        """The owner as JSON text."""
        return (json.dumps(asdict(self)) + "\n").encode()

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host} (started {since})"


def _this_process() -> Owner:
    process = psutil.Process()
    return Owner(socket.gethostname(), _machine(), process.pid, process.create_time(), uuid.uuid4().hex)


def _machine() -> str:
    parts = []
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        parts.append(file.read().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _owner(data: bytes) -> Owner | None:
    try:
        return Owner(**json.loads(data))
    except (ValueError, TypeError):
        return None


def stale_reason(files: Files, data: bytes) -> str | None:
    """Why the lease with these bytes no longer counts, in words; None where it does."""
    owner = _owner(data)
    if owner is not None and (owner.host, owner.machine) == (socket.gethostname(), _machine()):
        return None if _alive(owner) else "which is gone"
    age = files.age(lease_key(files))
    if age is not None and age > STALE:
        return f"which was last heard of {age:.0f} s ago"
    return None


def _alive(owner: Owner) -> bool:
    try:
        process = psutil.Process(owner.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return abs(process.create_time() - owner.started) < CLOCK_SLACK
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


class Lease:
    """The right to write to a store, held by this process until `release`."""

    def __init__(self, files: Files, owner: Owner, notice: str | None) -> None:
        self._files = files
        self.owner = owner
        self.notice = notice
        """Whose stale lease was taken over, in a sentence; None where there was none."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="tilepipe-lease", daemon=True)
        self._thread.start()
        atexit.register(self.release)

    def release(self) -> None:
        """Give the lease up; nothing where it was lost, released before, or inherited by a fork."""
        if self._stop.is_set() or os.getpid() != self.owner.pid:
            return
        self._stop.set()
        self._thread.join(timeout=BEAT)
        atexit.unregister(self.release)
        with contextlib.suppress(TilepipeError):
            # Looking first keeps the lock from bringing a deleted store's folder back.
            if held_by(self._files, self.owner.token):
                with self._files.locked(_lock_key(self._files)):
                    if held_by(self._files, self.owner.token):
                        self._files.delete(lease_key(self._files))

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            # A failed beat is retried at the next; a lost lease stops the job at its next block.
            with contextlib.suppress(TilepipeError):
                if not held_by(self._files, self.owner.token):
                    return
                self._files.touch(lease_key(self._files), self.owner.to_bytes())


def acquire(files: Files) -> Lease:
    """The store's lease, for this process; StoreBusyError, naming the owner, where another process holds it."""
    notice = None
    mine, key = _this_process(), lease_key(files)
    with files.locked(_lock_key(files)):
        held = files.read(key)
        if held is not None:
            why = stale_reason(files, held)
            if why is None:
                raise _busy(files, held)
            # Without a lock, another process may have taken it over since: then it is no longer what was judged.
            if files.read(key) != held:
                raise _busy(files, files.read(key))
            files.delete(key)
            notice = f"took over the output's lease from {_owner(held) or 'an unknown process'}, {why}"
        if not files.create(key, mine.to_bytes()):
            raise _busy(files, files.read(key))
    return Lease(files, mine, notice)


def refuse_held(files: Files) -> None:
    """Nothing where no process holds the lease; else StoreBusyError, naming the owner."""
    held = files.read(lease_key(files))
    if held is not None and stale_reason(files, held) is None:
        raise _busy(files, held)


def held_by(files: Files, token: str) -> bool:
    """Whether the lease with this token is in force."""
    data = files.read(lease_key(files))
    owner = None if data is None else _owner(data)
    return owner is not None and owner.token == token


def check(files: Files, token: str) -> None:
    """Nothing where the lease with this token is in force; else StoreBusyError."""
    if not held_by(files, token):
        raise StoreBusyError(
            f"{files.root}: this job no longer owns the output, since another took it over or deleted its lease; "
            "finished blocks are kept, and the same command resumes once the other has ended"
        )


def _busy(files: Files, data: bytes | None) -> StoreBusyError:
    owner = None if data is None else _owner(data)
    return StoreBusyError(
        f"{files.root} is being written by {owner or 'another process'}; wait for it to end, stop it, "
        f"or choose another output (a lease of a lost machine expires {STALE:.0f} s after its last sign of life)"
    )
