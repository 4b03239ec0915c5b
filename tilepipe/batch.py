"""Many rasters, one after another: what is finished stays, what is bad is reported, and no two runners do one at once.

    each scene   segment_raster, which resumes -> done, resumed, already done, failed, or busy elsewhere
    the busy     again at the end

Runners of one list share nothing but the outputs, each of which is leased to one process at a time and says itself
what is done. Workers, their networks, models and derivations serve from one scene to the next.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from tilepipe.checkpoint import Model
from tilepipe.describe import describe
from tilepipe.errors import ModelError, StoppedError, StoreBusyError, TilepipeError, UsageError
from tilepipe.job import Job
from tilepipe.machine import device_of, resources_of
from tilepipe.member import Models, references_of
from tilepipe.options import SegmentOptions
from tilepipe.pipeline import Workshop, prepare_for, segment_raster
from tilepipe.progress import Progress
from tilepipe.projection import Resources
from tilepipe.schedule import Stop
from tilepipe.sharding import Shard
from tilepipe.shelf import Shelf
from tilepipe.store.output import store_to_resume, stored_spec

POLL = 5.0
"""Seconds between two looks at scenes that others are busy with."""
BAD_INPUT = 3
"""The exit code of what no retry mends."""

State = Literal["done", "resumed", "already done", "failed", "busy", "stopped", "other shard"]
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """One raster to segment."""

    inputs: tuple[str, ...]
    """As `segment_raster` takes them: several are one mosaic."""
    output: str
    model: Models = None
    options: SegmentOptions = field(default_factory=SegmentOptions)
    place: str = ""
    """Where a list names it, such as "jobs.csv line 3"; nothing where none does."""

    @property
    def name(self) -> str:
        """What it is called: its first input."""
        more = len(self.inputs) - 1
        return self.inputs[0] + (f" and {more} more" if more else "")

    def to_json(self) -> dict[str, Any]:
        """What it is called and where it lies, as JSON values."""
        place = self.place or None
        return {"scene": self.name, "inputs": list(self.inputs), "output": self.output, "place": place}


@dataclass(frozen=True, slots=True)
class SceneResult:
    """What became of one scene in this run."""

    scene: Scene
    state: State
    reason: str | None = None
    """Why it is not done; None where it is."""
    exit_code: int = 0
    """Of a run of this scene alone: 0 done, 1 a retry may help, 3 bad input."""
    blocks: int = 0
    computed: int = 0
    """Blocks of this run."""
    resumed: int = 0
    """Blocks of earlier runs."""
    pixels: int = 0
    """Outputs of this run."""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        names = ("state", "reason", "exit_code", "blocks", "computed", "resumed", "pixels", "seconds")
        told = {name: getattr(self, name) for name in names}
        return {**self.scene.to_json(), **told, "notes": list(self.notes)}


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """What became of a list of scenes."""

    results: tuple[SceneResult, ...]
    """In the list's order; without the scenes that were not begun when the run was stopped."""
    scenes: int
    """On the list, those of other shards included."""
    seconds: float
    stopped: int | None = None
    """The exit code where a request to stop ended the run; None where it came to its end."""

    def count(self, state: State) -> int:
        """How many scenes are in this state."""
        return sum(result.state == state for result in self.results)

    @property
    def exit_code(self) -> int:
        """0 all is done; 1 a retry may help; 3 only bad inputs are left; 75 or 130 stopped."""
        if self.stopped is not None:
            return self.stopped
        codes = {result.exit_code for result in self.results} - {0}
        if not codes:
            return 0
        return 1 if 1 in codes else BAD_INPUT

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON values."""
        counts = Counter(result.state for result in self.results)
        return {
            "scenes": self.scenes,
            "states": {state: counts[state] for state in STATES},
            "blocks": sum(result.blocks for result in self.results),
            "computed": sum(result.computed for result in self.results),
            "pixels": sum(result.pixels for result in self.results),
            "seconds": self.seconds,
            "exit_code": self.exit_code,
            "results": [result.to_json() for result in self.results],
        }


class Watch:
    """Whoever wants to hear of a running batch; hears nothing of it unless a method is overridden."""

    def begin(self, scene: Scene, number: int, total: int) -> None:
        """A scene is begun, or tried again: `number` of `total`."""

    def announce(self, job: Job) -> None:
        """Its job is planned, and about to run."""

    def progress(self, state: Progress) -> None:
        """A block of it is finished."""

    def end(self, result: SceneResult) -> None:
        """It has ended, or is busy for the first time."""


def segment_batch(
    scenes: Sequence[Scene],
    *,
    shard: Shard | None = None,
    wait: bool = False,
    watch: Watch | None = None,
    stop: Stop | None = None,
) -> BatchSummary:
    """What became of each scene, when all that can be done is done.

    `shard` leaves the scenes of other shards to others. A scene that another process works at is tried again at the
    end, once, or with `wait` until it is free or done. Raises UsageError where two scenes have one output, and
    ModelError where a model cannot be loaded, both before anything runs; after that, faults are of scenes, and are
    in the results. After a request to stop the scene under way ends as `segment_raster` does, and no other begins.
    """
    check_outputs(scenes)
    started = time.perf_counter()
    own = _own(scenes, shard)
    mine = [scene for scene, is_own in zip(scenes, own, strict=True) if is_own]
    with closing(Workshop()) as workshop:
        _load_models(mine, workshop)
        run = _Run(workshop, watch or Watch(), stop or Stop())
        run.all(mine, wait)
    found = {result.scene: result for result in run.results}
    found |= {scene: SceneResult(scene, "other shard") for scene in set(scenes).difference(mine)}
    results = tuple(found[scene] for scene in scenes if scene in found)
    return BatchSummary(results, len(scenes), time.perf_counter() - started, run.stopped)


@dataclass(frozen=True, slots=True)
class ScenePlan:
    """What `segment_batch` would make of a scene."""

    scene: Scene
    state: Literal["new", "resumes", "replaces", "already done", "busy", "failed", "other shard"]
    reason: str | None = None
    """Why it would fail or is busy."""
    job: Job | None = None
    """None where it would fail, or is another shard's."""
    done: int = 0
    """Blocks of earlier runs."""

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        names = {**self.scene.to_json(), "state": self.state, "reason": self.reason, "done": self.done}
        return {**names, "plan": None if self.job is None else describe(self.job)}


def plan_batch(scenes: Sequence[Scene], shard: Shard | None = None) -> Iterator[ScenePlan]:
    """What `segment_batch` would make of each scene; nothing runs, and nothing is written."""
    check_outputs(scenes)
    shelf = Shelf()
    for scene, own in zip(scenes, _own(scenes, shard), strict=True):
        yield _planned(scene, shelf) if own else ScenePlan(scene, "other shard")


def _planned(scene: Scene, shelf: Shelf) -> ScenePlan:
    try:
        job, replaced = prepare_for(scene.inputs, scene.output, scene.model, scene.options, shelf)
        store = store_to_resume(scene.output, job.spec(), replaced)
    except StoreBusyError as error:
        return ScenePlan(scene, "busy", str(error))
    except (TilepipeError, OSError) as error:
        return ScenePlan(scene, "failed", " ".join(str(error).split()))
    if store is None:
        return ScenePlan(scene, "replaces" if replaced and stored_spec(scene.output) else "new", None, job)
    done = len(store.done())
    return ScenePlan(scene, "already done" if done == job.plan.block_count else "resumes", None, job, done)


def _own(scenes: Sequence[Scene], shard: Shard | None) -> list[bool]:
    """Which scenes are the shard's."""
    share = None if shard is None else shard.share(scene.output for scene in scenes)
    return [share is None or scene.output in share for scene in scenes]


def check_outputs(scenes: Sequence[Scene]) -> None:
    """Nothing where each scene has an output of its own; else UsageError."""
    taken: dict[str, Scene] = {}
    for scene in scenes:
        key = scene.output.rstrip("/") if "://" in scene.output else os.path.realpath(scene.output)
        if key in taken:
            both = f"{_where(taken[key])} and {_where(scene)}"
            raise UsageError(f"{both} would both be written to {scene.output}; give each an output of its own")
        taken[key] = scene


def _where(scene: Scene) -> str:
    return f"{scene.name} ({scene.place})" if scene.place else scene.name


def _load_models(scenes: Sequence[Scene], workshop: Workshop) -> None:
    """Puts the models that are named on the shelf; ModelError, with the scene's place, for one that cannot be."""
    seen = set()
    for scene in scenes:
        for reference in references_of(scene.model):
            if isinstance(reference, Model) or repr(reference) in seen:
                continue
            seen.add(repr(reference))
            try:
                workshop.shelf.model(reference)
            except ModelError as error:
                raise ModelError(f"{scene.place}: {error}" if scene.place else str(error)) from error


class _Run:
    """One process's way through its scenes."""

    def __init__(self, workshop: Workshop, watch: Watch, stop: Stop) -> None:
        self.workshop, self.watch, self.stop = workshop, watch, stop
        self._found: dict[int, SceneResult] = {}
        self._limits: dict[str, Resources] = {}
        self.stopped: int | None = None

    @property
    def results(self) -> list[SceneResult]:
        """What became of the scenes that were begun, by their number."""
        return list(self._found.values())

    def all(self, scenes: Sequence[Scene], wait: bool) -> None:
        """Every scene, and those that others are busy with again."""
        busy = self._each(list(enumerate(scenes, 1)), len(scenes))
        busy = self._each(busy, len(scenes))
        if wait and busy:
            # Who waits leaves the device to those at work.
            self.workshop.crew.close()
        while wait and busy and self.stopped is None:
            end = time.monotonic() + POLL
            while time.monotonic() < end and not self.stop.asked:
                time.sleep(min(0.2, POLL))
            busy = self._each(busy, len(scenes))

    def _each(self, scenes: Sequence[tuple[int, Scene]], total: int) -> list[tuple[int, Scene]]:
        """Those of some numbered scenes that are busy when all were tried."""
        busy = []
        for number, scene in scenes:
            if self.stopped is None and self.stop.asked:
                self.stopped = self.stop.exit_code
            if self.stopped is not None:
                break
            self.watch.begin(scene, number, total)
            former, result = self._found.get(number), self._one(scene)
            self._found[number] = result
            if result.state == "busy":
                busy.append((number, scene))
            if result.state == "stopped":
                self.stopped = result.exit_code
            if former is None or former.state != result.state:
                self.watch.end(result)
        return busy

    def _limited(self, options: SegmentOptions) -> SegmentOptions:
        """The options with the memory that was free for the first scene: later, this process holds a part of it."""
        device = device_of(options)
        if device not in self._limits:
            self._limits[device] = resources_of(replace(options, memory=None, device_memory=None), device)
        free = self._limits[device]
        host, own = options.memory or free.host_bytes, options.device_memory or free.device_bytes
        return replace(options, memory=host, device_memory=own)

    def _one(self, scene: Scene) -> SceneResult:
        """What became of one scene; whatever is wrong with it is in the result."""
        started, state, notes = time.perf_counter(), Progress(0, 0, 0, 0, 0, 0.0), list[str]()

        def progress(now: Progress) -> None:
            nonlocal state
            # Overviews have progress of their own.
            state = state if now.work else now
            self.watch.progress(now)

        def announce(job: Job) -> None:
            notes.extend(job.notes)
            self.watch.announce(job)

        def result(became: State, reason: str | None = None, exit_code: int = 0) -> SceneResult:
            reason = None if reason is None else " ".join(reason.split())
            counts = (state.total, state.done - state.resumed, state.resumed, state.pixels)
            seconds = time.perf_counter() - started
            return SceneResult(scene, became, reason, exit_code, *counts, seconds, tuple(notes))

        try:
            summary = segment_raster(
                *(scene.inputs, scene.output, scene.model, self._limited(scene.options)),
                progress=progress,
                announce=announce,
                stop=self.stop,
                workshop=self.workshop,
            )
        except StoppedError as error:
            return result("stopped", str(error), error.exit_code)
        except StoreBusyError as error:
            return result("busy", str(error), error.exit_code)
        except TilepipeError as error:
            return result("failed", str(error), 1 if error.exit_code == 1 else BAD_INPUT)
        except Exception as error:  # a fault that nobody foresaw, of one scene, leaves the others to be done
            return result("failed", f"{type(error).__name__}: {error}", 1)
        notes[:] = summary.notes
        if summary.computed == 0:
            return result("already done")
        return result("resumed" if summary.resumed else "done")
