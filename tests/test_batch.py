"""Many rasters by one process: each as by itself, whatever is wrong with others, and what one leaves to the next."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import model_of, scene, write_raster
from runs import OPTIONS, pixel_model, saved
from test_kill import content
from torch import nn

import tilepipe.batch as batches
from tilepipe import schedule
from tilepipe.batch import Scene, SceneResult, Watch, plan_batch, segment_batch
from tilepipe.checkpoint import Model
from tilepipe.errors import ModelError, ReadError, StoreBusyError, UsageError
from tilepipe.job import Job
from tilepipe.loading.reference import ModelReference
from tilepipe.member import references_of
from tilepipe.models import build
from tilepipe.pipeline import segment_raster
from tilepipe.predict.predictor import Predictor
from tilepipe.progress import Progress
from tilepipe.schedule import Stop
from tilepipe.sharding import Shard
from tilepipe.store.lease import acquire
from tilepipe.store.objects import files_at
from tilepipe.store.output import create_or_resume, open_store, stored_spec
from tilepipe.variants import variation


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return saved(pixel_model(), tmp_path_factory.mktemp("model") / "m.safetensors")


def rasters(folder: Path, count: int, shape: tuple[int, int] = (100, 70)) -> list[Path]:
    return [write_raster(folder / f"s{n}.tif", scene(shape, seed=n)) for n in range(count)]


def scenes_of(paths: list[Path], model: Path | Model, **options) -> list[Scene]:
    chosen = replace(OPTIONS, **options)
    return [Scene((str(path),), str(path.with_suffix(".zarr")), model, chosen) for path in paths]


def states(results: tuple[SceneResult, ...]) -> list[str]:
    return [result.state for result in results]


class Listener(Watch):
    """Hears what a batch tells, and does something at each block, or when a scene ends."""

    def __init__(self, at_block: Callable[[Progress], None] = id, at_end: Callable[[SceneResult], None] = id) -> None:
        self.at_block, self.at_end = at_block, at_end
        self.begun: list[str] = []
        self.ended: list[str] = []

    def begin(self, scene: Scene, number: int, total: int) -> None:
        self.begun.append(scene.name)

    def progress(self, state: Progress) -> None:
        self.at_block(state)

    def end(self, result: SceneResult) -> None:
        self.ended.append(result.state)
        self.at_end(result)


def test_a_batch_does_each_scene_and_its_repetition_nothing(tmp_path: Path, model: Path) -> None:
    scenes = scenes_of(rasters(tmp_path, 3), model)
    first = segment_batch(scenes)
    assert (states(first.results), first.exit_code) == (["done"] * 3, 0)
    assert [result.computed for result in first.results] == [4, 4, 4]
    before = [content(Path(each.output)) for each in scenes]
    again = segment_batch(scenes)
    assert (states(again.results), again.exit_code) == (["already done"] * 3, 0)
    assert [content(Path(each.output)) for each in scenes] == before
    assert [each.state for each in plan_batch(scenes)] == ["already done"] * 3


def varied_scenes(folder: Path) -> list[Scene]:
    """Scenes that share some of their networks, each with the one before."""
    torch.manual_seed(1)
    one = model_of(nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval(), 3)
    two = model_of(build("linear", classes=3, bands=3).eval(), 3)
    together = {"tile": None}
    made = [
        (one, {}),
        (one, {"confidence": True}),
        ([one, two], together),
        ([two, one], {**together, "combine": "max"}),
        (one, {"stitch": "blend", "overlap": 32}),
    ]
    paths = rasters(folder, len(made))
    return [scenes_of([path], chosen, **more)[0] for path, (chosen, more) in zip(paths, made, strict=True)]


def test_what_a_scene_leaves_to_the_next_does_not_show_in_its_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes, made = varied_scenes(tmp_path), []
    init = Predictor.__init__

    def counted(self: Predictor, *words, **more) -> None:
        made.append(self)
        init(self, *words, **more)

    monkeypatch.setattr(Predictor, "__init__", counted)
    result = segment_batch(scenes)
    assert states(result.results) == ["done"] * len(scenes), [each.reason for each in result.results]
    shared = len(made)
    for each in scenes:
        other = Path(f"{each.output}.alone.zarr")
        segment_raster(each.inputs, other, each.model, each.options)
        assert content(other) == content(Path(each.output)), each.name
    # Alone each scene makes all of its networks, two for an ensemble of two.
    alone = sum(len(references_of(each.model)) for each in scenes)
    assert (len(made) - shared, shared) == (alone, 4)


@pytest.mark.slow
def test_worker_processes_serve_from_scene_to_scene(tmp_path: Path, model: Path) -> None:
    scenes = scenes_of(rasters(tmp_path, 3), model, workers=2)
    scenes[2] = replace(scenes[2], options=replace(scenes[2].options, workers=1))
    assert segment_batch(scenes).count("done") == 3
    for each in scenes:
        other = Path(f"{each.output}.alone.zarr")
        segment_raster(each.inputs, other, model, replace(each.options, workers=1))
        assert content(other) == content(Path(each.output))


def test_models_workers_and_derivations_are_made_once(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, int] = {}

    def counted(owner: object, name: str) -> None:
        former = getattr(owner, name)

        def call(*words, **more):
            calls[name] = calls.get(name, 0) + 1
            return former(*words, **more)

        monkeypatch.setattr(owner, name, call)

    counted(ModelReference, "load")
    counted(schedule, "LocalCluster")
    counted(variation, "geometry_of")
    assert segment_batch(scenes_of(rasters(tmp_path, 4), model)).exit_code == 0
    # Here, and by the worker.
    assert calls == {"load": 2, "LocalCluster": 1, "geometry_of": 1}


def test_all_scenes_have_the_memory_that_was_free_for_the_first(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a plan would depend on what the scene before left in memory."""
    free = itertools.count(8 << 30, -(1 << 28))
    monkeypatch.setattr("tilepipe.machine.free_memory", lambda: next(free))
    scenes, found = scenes_of(rasters(tmp_path, 3), model), []
    scenes[1] = replace(scenes[1], options=replace(scenes[1].options, memory=4 << 30))

    class Planned(Watch):
        def announce(self, job: Job) -> None:
            found.append(job.resources.host_bytes)

    assert segment_batch(scenes, watch=Planned()).exit_code == 0
    assert found == [int(0.8 * (8 << 30)), 4 << 30, int(0.8 * (8 << 30))]


def test_bad_scenes_are_reported_and_the_others_done(tmp_path: Path, model: Path) -> None:
    good = rasters(tmp_path, 2)
    text = tmp_path / "text.tif"
    text.write_text("no raster")
    narrow = write_raster(tmp_path / "narrow.tif", scene((80, 80), bands=1))
    cut = write_raster(tmp_path / "cut.tif", scene((200, 64)))
    cut.write_bytes(cut.read_bytes()[:20_000])
    scenes = scenes_of([text, good[0], narrow, cut, good[1]], model)
    done = segment_batch(scenes)
    assert states(done.results) == ["failed", "done", "failed", "failed", "done"]
    assert done.exit_code == 3
    for number, said in ((0, "text.tif"), (2, "narrow.tif"), (3, "could not be read")):
        reason = done.results[number].reason
        assert reason is not None
        assert said in reason
        assert "\n" not in reason
    assert 0 < done.results[3].computed < done.results[3].blocks
    assert [each.state for each in plan_batch(scenes)] == [
        "failed",
        "already done",
        "failed",
        "resumes",
        "already done",
    ]


def test_a_fault_that_nobody_foresaw_is_its_scenes_alone_and_may_pass(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes, run = scenes_of(rasters(tmp_path, 3), model), batches.segment_raster

    def faulty(inputs, *words, **more):
        if "s1" in inputs[0]:
            raise ZeroDivisionError("division\nby zero")
        if "s2" in inputs[0]:
            raise ReadError("unreadable")
        return run(inputs, *words, **more)

    monkeypatch.setattr(batches, "segment_raster", faulty)
    done = segment_batch(scenes)
    assert (states(done.results), done.exit_code) == (["done", "failed", "failed"], 1)
    assert done.results[1].reason == "ZeroDivisionError: division by zero"
    assert done.to_json()["states"]["failed"] == 2


def test_the_scene_after_a_failed_one_gets_new_workers(tmp_path: Path, model: Path) -> None:
    first, second = rasters(tmp_path, 2)
    first.write_bytes(first.read_bytes()[:10_000])
    done = segment_batch(scenes_of([first, second], model))
    assert states(done.results) == ["failed", "done"]
    alone = tmp_path / "alone.zarr"
    segment_raster(second, alone, model, OPTIONS)
    assert content(alone) == content(tmp_path / "s1.zarr")


@pytest.mark.parametrize("wait", [False, True])
def test_what_another_runner_holds_is_tried_again_at_the_end(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, wait: bool
) -> None:
    monkeypatch.setattr(batches, "POLL", 0.01)
    scenes = scenes_of(rasters(tmp_path, 3), model)
    lease = acquire(files_at(scenes[1].output))
    assert [each.state for each in plan_batch(scenes)] == ["new", "busy", "new"]

    class Patient(Listener):
        def begin(self, scene: Scene, number: int, total: int) -> None:
            super().begin(scene, number, total)
            if len(self.begun) == 6:
                lease.release()

    listener = Patient()
    done = segment_batch(scenes, wait=wait, watch=listener)
    lease.release()
    names = [each.name for each in scenes]
    assert listener.begun[:4] == [*names, names[1]]
    if wait:
        assert listener.ended == ["done", "busy", "done", "done"]
        assert (states(done.results), done.exit_code) == (["done"] * 3, 0)
    else:
        assert listener.ended == ["done", "busy", "done"]
        assert (states(done.results), done.exit_code) == (["done", "busy", "done"], 1)
        assert f"process {os.getpid()}" in (done.results[1].reason or "")


def test_what_another_runner_finished_meanwhile_is_already_done(tmp_path: Path, model: Path) -> None:
    """Between this runner's look at a scene and its turn, another may have begun and ended it."""
    scenes = scenes_of(rasters(tmp_path, 2), model)

    def finish_next(result: SceneResult) -> None:
        if result.scene is scenes[0]:
            segment_raster(scenes[1].inputs, scenes[1].output, model, scenes[1].options)

    done = segment_batch(scenes, watch=Listener(at_end=finish_next))
    assert [(result.state, result.computed) for result in done.results] == [("done", 4), ("already done", 0)]


def test_a_stopped_batch_leaves_the_rest_untouched_and_resumes(tmp_path: Path, model: Path) -> None:
    scenes, stop = scenes_of(rasters(tmp_path, 3, (300, 200)), model), Stop()

    def ask(state: Progress) -> None:
        if state.done == 3 and not Path(scenes[2].output).exists() and Path(scenes[1].output).exists():
            stop.signal, stop.asked = signal.SIGINT, True

    done = segment_batch(scenes, watch=Listener(ask), stop=stop)
    assert (states(done.results), done.exit_code, done.scenes) == (["done", "stopped"], 130, 3)
    assert "resumes" in (done.results[1].reason or "")
    assert not Path(scenes[2].output).exists()
    kept = len(open_store(scenes[1].output).done())
    assert 3 <= kept < 20
    again = segment_batch(scenes)
    assert states(again.results) == ["already done", "resumed", "done"]
    assert (again.results[1].resumed, again.results[1].computed) == (kept, 20 - kept)


def test_shards_together_do_every_scene_once(tmp_path: Path, model: Path) -> None:
    scenes, done = scenes_of(rasters(tmp_path, 5), model), []
    for number in (1, 2):
        found = segment_batch(scenes, shard=Shard(number, 2))
        done += [result.scene for result in found.results if result.state == "done"]
        assert {result.state for result in found.results} == {"done", "other shard"}
    assert sorted(each.name for each in done) == [each.name for each in scenes]


def test_two_scenes_cannot_have_one_output(tmp_path: Path, model: Path) -> None:
    scenes = scenes_of(rasters(tmp_path, 2), model)
    other = replace(scenes[1], output=f"{tmp_path}/./s0.zarr/", place="jobs.csv line 3")
    for wrong in ([scenes[0], other], [scenes[0], scenes[0]]):
        with pytest.raises(UsageError, match="output of its own"):
            segment_batch(wrong)
    with pytest.raises(ModelError, match=r"jobs.csv line 3: .*no such model"):
        segment_batch([scenes[0], replace(scenes[1], model="nothing.safetensors", place="jobs.csv line 3")])
    assert not Path(scenes[0].output).exists()


# ---- outputs of other jobs ----


def test_only_what_changed_is_made_anew(tmp_path: Path, model: Path) -> None:
    paths = rasters(tmp_path, 3)
    scenes = scenes_of(paths, model, overwrite="changed")
    segment_batch(scenes)
    write_raster(paths[1], scene((90, 80), seed=7))
    other = scenes_of(paths, model)
    assert states(segment_batch(other).results) == ["already done", "failed", "already done"]
    assert [each.state for each in plan_batch(scenes)] == ["already done", "replaces", "already done"]
    assert states(segment_batch(scenes).results) == ["already done", "done", "already done"]
    assert open_store(scenes[1].output).array().shape == (90, 80)
    assert states(segment_batch(other).results) == ["already done"] * 3


def test_what_another_runner_made_anew_is_not_replaced(tmp_path: Path, model: Path) -> None:
    (path,) = rasters(tmp_path, 1)
    (old,), (new,) = scenes_of([path], model), scenes_of([path], model, confidence=True)
    segment_raster(old.inputs, old.output, model, old.options)
    judged = stored_spec(old.output)
    assert judged is not None
    segment_raster(new.inputs, new.output, model, replace(new.options, overwrite=True))
    spec = stored_spec(new.output)
    assert spec is not None
    with pytest.raises(StoreBusyError, match="made anew"):
        create_or_resume(new.output, spec, judged)
    assert len(open_store(new.output).done()) == 4


def test_another_number_of_models_is_another_job(tmp_path: Path) -> None:
    one = model_of(build("linear", classes=3, bands=3).eval(), 3)
    scenes = scenes_of(rasters(tmp_path, 1), one, tile=None)
    segment_batch(scenes)
    done = segment_batch([replace(scenes[0], model=[one, one])])
    assert "made by another job" in (done.results[0].reason or "")
    assert len(open_store(scenes[0].output).done()) == 4
