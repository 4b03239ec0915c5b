"""Running one function over many items on dask workers: where they are, what they hold, how many items wait.

Knows nothing of rasters or networks. Three ideas:

- one code path: an in-process cluster of threads by default, processes, one worker per GPU, or a cluster that runs
  already;
- a *resident*: an object that every worker builds once from a small recipe and keeps, so that items stay small;
- bounded work in flight: a million items cost the scheduler no more than a hundred.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from types import FrameType
from typing import Any, Protocol, TypeVar
from uuid import uuid4

import dask
from distributed import Client, Future, LocalCluster, Nanny, Scheduler, SpecCluster, Worker, WorkerPlugin, get_worker
from distributed.scheduler import KilledWorker

from tilepipe.allocator import worker_environment
from tilepipe.errors import RunError, TilepipeError, UsageError

T = TypeVar("T")
R = TypeVar("R")

GRACE_SECONDS = 20.0
"""How long blocks in flight may take to finish after a request to stop; schedulers give about 30 s in all."""

LOOK_SECONDS = 2.0
"""How often a cluster that may grow or shrink is asked for its workers."""

ANSWER_SECONDS = 2.0
"""How long workers may take to say what they run, of the time that is left after a request to stop."""

SETTINGS = {
    # The plan bounds memory; dask's own spilling and pausing would only slow a job that fits.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.worker.profile.enabled": False,
    # Whatever is submitted begins at once or soon: there is nothing to move from worker to worker.
    "distributed.scheduler.work-stealing": False,
    # Event loops that look at themselves every 20 ms take 5 % of a core from the network.
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.tick.limit": "60s",
    "distributed.admin.system-monitor.interval": "5s",
    # Workers start afresh: compiled kernels' threads do not survive a fork.
    "distributed.worker.multiprocessing-method": "spawn",
    "distributed.scheduler.active-memory-manager.start": False,
}

ENVIRONMENT = "distributed.nanny.pre-spawn-environ"
"""dask's setting of what worker processes find in their environment."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Where the work runs."""

    scheduler: str | None = None
    """Address of a running scheduler; None starts workers here."""
    workers: int = 1
    """Worker processes; 1 means threads of this process."""
    threads: int = 2
    """Items in flight in each worker."""
    gpus: tuple[int, ...] = ()
    """Devices, one worker process each; empty for none, or for the one that this process uses."""


@dataclass(slots=True)
class Stop:
    """A request to stop, made by a signal or by the caller."""

    signal: int | None = None
    asked: bool = False

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 75 (requeue) otherwise."""
        return 130 if self.signal == signal.SIGINT else 75


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """A Stop that SIGTERM and Ctrl-C ask; a second Ctrl-C ends the process at once. For the main thread."""
    stop = Stop()

    def ask(number: int, _frame: FrameType | None) -> None:
        if stop.asked and number == signal.SIGINT:
            os._exit(130)
        stop.signal, stop.asked = number, True

    previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def connect(pool: Pool) -> Iterator[Client]:
    """A client of the workers that `pool` describes; those that were started here end with the context."""
    environment = {f"{ENVIRONMENT}.{name}": value for name, value in worker_environment().items()}
    with dask.config.set({**SETTINGS, **environment}):
        if pool.scheduler is not None:
            with _join(pool.scheduler) as client:
                yield client
            return
        with _start(pool) as cluster, Client(cluster, set_as_default=False) as client:
            yield client


def _join(address: str) -> Client:
    try:
        return Client(address, set_as_default=False, timeout="15s")
    except (OSError, ValueError, TimeoutError) as error:
        raise UsageError(f"no dask scheduler answers at {address} ({error}); start one, or drop --scheduler") from error


def _start(pool: Pool) -> SpecCluster:
    if pool.gpus:
        return _gpu_cluster(pool)
    return LocalCluster(
        n_workers=pool.workers,
        threads_per_worker=pool.threads,
        processes=pool.workers > 1,
        memory_limit=0,
        dashboard_address=":0",  # any free port: None would ask for 8787 and warn where that is taken
        scheduler_kwargs={"dashboard": False},
        silence_logs=logging.CRITICAL,
    )


def _gpu_cluster(pool: Pool) -> SpecCluster:
    """One worker process for each device, which sees that device alone."""
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError:
        workers = {
            f"gpu-{device}": {
                "cls": Nanny,
                "options": {
                    "nthreads": pool.threads,
                    "memory_limit": 0,
                    "env": {"CUDA_VISIBLE_DEVICES": str(device)},
                    "dashboard": False,
                },
            }
            for device in pool.gpus
        }
        scheduler = {"cls": Scheduler, "options": {"dashboard": False, "dashboard_address": ":0"}}
        return SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.CRITICAL)
    return LocalCUDACluster(
        CUDA_VISIBLE_DEVICES=list(pool.gpus),
        threads_per_worker=pool.threads,
        memory_limit=0,
        dashboard_address=None,
    )


class Recipe(Protocol):
    """What a worker needs to build its resident; small and picklable."""

    def build(self, former: Any | None = None) -> Any:
        """The object that the worker keeps; of `former`, what it kept before, whatever serves on is taken over."""


class _Resident(WorkerPlugin):
    """Holds what a recipe builds, on one worker, and how many items may use it at once."""

    idempotent = True

    def __init__(self, name: str, recipe: Recipe, at_once: int | None = None, former: str | None = None) -> None:
        self.name, self.recipe, self.at_once, self.former = name, recipe, at_once, former
        self.built: Any = None
        self.turn: AbstractContextManager[Any] = nullcontext()

    def setup(self, worker: Any) -> None:
        former = worker.plugins.get(self.former)
        self.built = self.recipe.build() if former is None else self.recipe.build(former.built)
        if self.at_once is not None:
            self.turn = threading.Semaphore(self.at_once)

    def teardown(self, worker: Any) -> None:
        close = getattr(self.built, "close", None)
        if close is not None:
            close()
        self.built = None


def _call(name: str, function: Callable[[Any, T], R], item: T) -> R:
    plugin = get_worker().plugins[name]
    with plugin.turn:
        return function(plugin.built, item)


@contextmanager
def resident(client: Client, name: str, recipe: Recipe, at_once: int | None = None) -> Iterator[str]:
    """The name under which every worker, now or later joined, holds what `recipe` builds.

    At most `at_once` items use it at a time on a worker, however many threads that has; None for no limit.
    """
    _move_in(client, _Resident(name, recipe, at_once))
    try:
        yield name
    finally:
        _move_out(client, name)


def _move_in(client: Client, plugin: _Resident) -> None:
    try:
        client.register_plugin(plugin)
    except TilepipeError:
        raise
    except Exception as error:
        raise RunError(f"a worker could not be set up: {type(error).__name__}: {error}") from error


def _move_out(client: Client, name: str) -> None:
    if client.status == "running":
        client.unregister_worker_plugin(name)


class Crew:
    """Workers, and what each of them holds, kept from one job to the next; for one thread at a time.

    A job that wants other workers than the one before gets new ones, and so does one after a job that failed, of
    which blocks may still be under way.
    """

    def __init__(self) -> None:
        self._open = ExitStack()
        self._pool: Pool | None = None
        self._client: Client | None = None
        self._held: str | None = None

    def close(self) -> None:
        """Ends the workers that were started here; the next job starts new ones."""
        client, held, opened = self._client, self._held, self._open
        self._open, self._pool, self._client, self._held = ExitStack(), None, None, None
        with opened:
            if client is not None and held is not None:
                _move_out(client, held)

    @contextmanager
    def at_work(self, pool: Pool, recipe: Recipe) -> Iterator[tuple[Client, str]]:
        """A client of the pool's workers, and the name under which each of them holds what `recipe` builds."""
        try:
            client = self._joined(pool)
            name = f"tilepipe-{uuid4().hex}"
            # Workers that others started may have more threads than the plan has memory for.
            at_once = None if pool.scheduler is None else pool.threads
            _move_in(client, _Resident(name, recipe, at_once, self._held))
            former, self._held = self._held, name
            if former is not None:
                _move_out(client, former)
            yield client, name
        except BaseException:
            self.close()
            raise

    def _joined(self, pool: Pool) -> Client:
        if self._client is not None and (self._pool != pool or self._client.status != "running"):
            self.close()
        if self._client is None:
            self._pool, self._client = pool, self._open.enter_context(connect(pool))
        return self._client


@dataclass(slots=True)
class Bounded:
    """How a map is run: items in flight over all workers, and how often a failed item is tried again."""

    in_flight: int
    """At least."""
    each_thread: int = 0
    """For each thread of the workers, of those that join later, too, where that is more than `in_flight`."""
    retries: int = 2
    stop: Stop = field(default_factory=Stop)
    grace: float = GRACE_SECONDS


def map_bounded(
    client: Client, name: str, function: Callable[[Any, T], R], items: Iterable[T], how: Bounded
) -> Iterator[R]:
    """The results of function(resident, item), as they come, with a bounded number of items submitted.

    After a request to stop nothing more is submitted or begun; what runs may finish within the grace period, and
    then the iterator ends. Raises RunError for an item that failed beyond its retries.
    """
    waiting, finished = iter(items), queue.SimpleQueue[Future]()
    pending: set[Future] = set()
    deadline, limit, looked = float("inf"), how.in_flight, float("-inf")
    try:
        while True:
            if how.each_thread and time.monotonic() > looked + LOOK_SECONDS:
                limit, looked = max(how.in_flight, how.each_thread * _threads(client)), time.monotonic()
            if not how.stop.asked:
                # Together where several are due: each submission costs the scheduler as much as an item.
                due = list(islice(waiting, max(0, limit - len(pending))))
                call = partial(_call, name, function)
                futures = client.map(call, due, pure=False, retries=how.retries) if due else []
                pending.update(futures)
                for future in futures:
                    future.add_done_callback(finished.put)
            elif deadline == float("inf"):
                deadline = time.monotonic() + how.grace
                pending -= _dropped(client, pending)
            if not pending or time.monotonic() > deadline:
                return
            try:
                # A short wait, so that a signal's request is seen soon.
                done = [finished.get(timeout=0.2)]
            except queue.Empty:
                continue
            while not finished.empty():
                done.append(finished.get())
            done = [future for future in done if future in pending]
            pending.difference_update(done)
            yield from _results(client, done)
    finally:
        if pending:
            client.cancel(list(pending), force=True)


def _dropped(client: Client, pending: set[Future]) -> set[Future]:
    """Those of the futures that no worker has begun; they are cancelled. None where workers do not say in time."""

    async def ask() -> dict[str, list[str]]:
        found: dict[str, list[str]] = await client.run(_begun, on_error="ignore")
        return found

    try:
        begun = set(chain(*client.sync(ask, callback_timeout=ANSWER_SECONDS).values()))
    except (TimeoutError, OSError):
        return set()
    waiting = {future for future in pending if not future.done() and future.key not in begun}
    client.cancel(list(waiting), force=True)
    return waiting


def _begun(dask_worker: Worker) -> list[str]:
    """The keys of what runs on a worker."""
    return [str(task.key) for task in dask_worker.state.executing]


def _threads(client: Client) -> int:
    """Of all workers that are there."""
    return sum(client.nthreads().values())


def _results(client: Client, futures: list[Future]) -> Any:
    """What finished items gave, fetched at once."""
    try:
        return client.gather(futures)
    except TilepipeError:
        raise
    except KilledWorker as error:
        raise RunError(
            "a block's worker died several times in a row, most often for lack of memory; "
            "lower --memory, --workers or --tile and run the same command again to resume"
        ) from error
    except Exception as error:
        raise RunError(
            f"a block failed: {type(error).__name__}: {error}; run the same command again to resume"
        ) from error
