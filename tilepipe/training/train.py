"""From a data set to a model file: `train` puts a run together and sees it through."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from tilepipe.machine import versions
from tilepipe.options import Precision, SegmentOptions
from tilepipe.schedule import Stop
from tilepipe.training.curves import Board, write_curves
from tilepipe.training.dataset import Augmentation, WindowDataset
from tilepipe.training.loop import Run, Told, Trainer
from tilepipe.training.model_file import card_of, model_path, scores_of, write_model
from tilepipe.training.objects import CandidateDraws, ObjectDraws, find_objects
from tilepipe.training.options import Kind, TrainOptions
from tilepipe.training.pairs import Pair
from tilepipe.training.plan import RunPlan, named_classes, plan_run
from tilepipe.training.samples import DataSet
from tilepipe.training.state import STATISTICS, Progress, RunFolder
from tilepipe.training.statistics import Statistics, statistics_of
from tilepipe.training.team import Team, joined
from tilepipe.training.validation import Validation
from tilepipe.training.windows import Draws, UniformDraws


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    model: str
    """What to give to `--model`."""
    mean_iou: float | None
    """Of that model on the validation images; None where there are none."""
    iou: dict[str, float | None]
    """Of each class."""
    best_step: int
    """The step that the model is of."""
    steps: int
    seconds: float
    resumed_from: int


def train(
    data: DataSet,
    folder: str | Path,
    options: TrainOptions | None = None,
    *,
    tell: Callable[[Told], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
    stop: Stop | None = None,
    overwrite: bool = False,
) -> Outcome:
    """Trains a network and leaves the best, or last, in `folder`; the same call continues a run that was stopped.

    The folder then holds model.safetensors (for a network of the caller's own also model.toml, which names its
    code), the state, settings, curves. Equal arguments, threads and libraries give equal weights on a CPU. Raises
    TilepipeError for whatever does not fit together, before the first step.
    """
    options, began, files = options or TrainOptions(), time.monotonic(), RunFolder(folder)
    classes = named_classes(data)
    with joined(options.device) as team, _held(files, team, overwrite), _arithmetic(options):
        options = replace(options, device=team.device(options.device))
        trainer = _trainer(data, options, files, team, overwrite, note if team.leads else _silent)
        resumed = trainer.progress.step
        if resumed < options.steps:
            trainer.train(tell if team.leads else _silent, stop)
        with team.leader_first():
            progress = trainer.progress if team.leads else files.load(torch.device("cpu"))[0]
    best = next(row for row in progress.history if row["step"] == progress.best_step)
    names = [each.name for each in classes]
    return Outcome(
        model=model_path(files, options),
        mean_iou=best["mean_iou"],
        iou=dict(zip(names, best["iou"], strict=True)),
        best_step=progress.best_step,
        steps=options.steps,
        seconds=time.monotonic() - began,
        resumed_from=resumed,
    )


def _silent(_told: Any) -> None:
    """Tells nobody."""


def _held(files: RunFolder, team: Team, overwrite: bool) -> AbstractContextManager[None]:
    """The folder, for this team alone."""
    return files.held(overwrite) if team.leads else nullcontext()


def _trainer(
    data: DataSet, options: TrainOptions, files: RunFolder, team: Team, overwrite: bool, note: Callable[[str], None]
) -> Trainer:
    """A new run, or one that goes on from the state that the folder has."""
    classes = len(named_classes(data))
    team.passes(options)
    with team.leader_first():
        if team.leads:
            files.begin(_settings(data, options), overwrite)
        plan = plan_run(data, options, lambda pairs: _statistics(files, pairs, classes, data.void))
        trainer = Trainer(_run(plan, files, team, note))
    if files.has_state:
        trainer.resume()
        if trainer.progress.step:
            note(f"{files.path} goes on from step {trainer.progress.step} of {options.steps}")
    return trainer


def _settings(data: DataSet, options: TrainOptions) -> dict[str, Any]:
    """What a run that goes on must share with the one that began, as JSON values."""
    return {
        **options.meaning(),
        "data": [[each.split, each.image, each.label, *map(_stamp, (each.image, each.label))] for each in data.samples],
        "classes": [[each.name, list(each.color)] for each in data.classes or ()],
        "void": list(data.void),
        "threads": torch.get_num_threads() if options.threads is None else options.threads,
        "versions": versions(),
    }


def _stamp(path: str) -> list[int] | None:
    """A file's size and time of modification; None for what is no file."""
    try:
        told = Path(path).stat()
    except OSError:
        return None
    return [told.st_size, told.st_mtime_ns]


@contextmanager
def _arithmetic(options: TrainOptions) -> Iterator[None]:
    """Threads, reproducible kernels and random numbers of a run; afterwards all is as it was."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    cudnn, decided = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.manual_seed(options.seed)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn, decided


def _run(plan: RunPlan, files: RunFolder, team: Team, note: Callable[[str], None]) -> Run:
    data, options, classes, device, precision = plan.data, plan.options, plan.classes, plan.device, plan.precision
    for line in plan.subject.notes:
        note(line)
    card = card_of(data, options, plan.subject.arguments, plan.training, plan.statistics)
    judged_in: Precision = "bf16" if precision == "bf16" and device.type == "cuda" else "float32"
    judging_options = SegmentOptions(device=options.device, precision=judged_in, threads=options.threads)
    augmentation = Augmentation(options.crop, options.flips, options.rotate, options.scales, options.jitter)

    def windows(kind: Kind) -> WindowDataset:
        draws = _draws(kind, plan.training, len(classes), data.void, augmentation, options.seed)
        return WindowDataset(plan.training, draws, augmentation, plan.statistics, data.void)

    names = [each.name for each in classes]
    board = Board(files, names)

    def keep(network: nn.Module | None, progress: Progress) -> None:
        if network is not None:
            told = {**card.provenance, **scores_of(progress, classes)}
            write_model(files, network, replace(card, provenance=told), options)
        write_curves(files, progress.history, names)
        board.add(progress.history[-1])

    validation = None
    if plan.judging and team.leads:
        validation = Validation(plan.judging, card, data.void, judging_options)
        validation.check()
    return Run(
        network=plan.subject.network,
        classes=len(classes),
        weights=None if options.class_weights == "none" else plan.weights,
        options=options,
        device=device,
        precision=precision,
        folder=files,
        windows=windows,
        validate=validation,
        team=team,
        keep=keep,
    )


def _draws(
    kind: Kind,
    pairs: Sequence[Pair],
    classes: int,
    void: Sequence[int],
    augmentation: Augmentation,
    seed: int,
) -> Draws:
    """The rule that draws a stage's windows."""
    shapes = tuple(pair.shape for pair in pairs)
    if kind == "uniform":
        return UniformDraws(shapes, augmentation, seed)
    objects = find_objects(pairs, classes, void)
    return (ObjectDraws if kind == "objects" else CandidateDraws)(objects, shapes, augmentation, seed)


def _statistics(files: RunFolder, pairs: Sequence[Pair], classes: int, void: Sequence[int]) -> Statistics:
    """The statistics of the training samples, computed once for a run."""
    path = files.path / STATISTICS
    if path.exists():
        return Statistics.from_json(path.read_text())
    found = statistics_of(pairs, classes, void)
    files.write(STATISTICS, lambda file: _put(file, found.to_json().encode()))
    return found


def _put(file: BinaryIO, data: bytes) -> None:
    file.write(data)
