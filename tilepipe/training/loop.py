"""The training loop: steps, validations, kept states; a run that was killed goes on from the last one.

Every window is a pure function of the seed and its number, and all else that a step depends on (weights, optimiser,
random numbers) is in the kept state, so a run that was killed anywhere ends with the weights of an undisturbed one.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tilepipe.errors import RunError, StoppedError
from tilepipe.metrics import Confusion
from tilepipe.schedule import Stop
from tilepipe.training.dataset import loader, worker_deaths
from tilepipe.training.losses import Hints, cross_entropy
from tilepipe.training.options import Kind, TrainOptions
from tilepipe.training.rates import rate_at
from tilepipe.training.state import Progress, RunFolder
from tilepipe.training.team import Team

CHECKED = 20
"""Steps from one look at the loss, for which a GPU has to be waited for, to the next."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Batch = tuple[Tensor, Tensor]
"""Windows (N, bands, h, w), normalised, and their labels (N, h, w)."""


class Told(NamedTuple):
    """How far a run is, for whoever watches."""

    step: int
    steps: int
    loss: float
    """The mean since the last validation."""
    rate: float
    done: int
    """Steps of this process."""
    windows: int
    """That it has trained on."""
    seconds: float
    """Since its first step."""
    best: float
    """The mean IoU of the network that is saved so far; negative where it has none."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What a training run is made of."""

    network: nn.Module
    classes: int
    weights: Sequence[float] | None
    """Of the classes; None for equal ones."""
    options: TrainOptions
    device: torch.device
    precision: str
    folder: RunFolder
    windows: Callable[[Kind], Any]
    """The data set of a kind of stage."""
    validate: Callable[[nn.Module], Confusion] | None
    """None where no image is for validation."""
    team: Team
    keep: Callable[[nn.Module | None, Progress], None]
    """Writes the history, and the network where it is the one to save."""


class Trainer:
    """A run at work."""

    def __init__(self, run: Run) -> None:
        self.run, options = run, run.options
        self.judged = copy.deepcopy(run.network).to(run.device)
        """The network that is validated: without hints, with averaged weights where they are."""
        self.network = run.network.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.class_weights = None if run.weights is None else torch.tensor(run.weights).float().to(run.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.hints = Hints(self.network, run.classes).to(run.device) if options.hints else None
        self.parameters = [*self.network.parameters(), *(self.hints.parameters() if self.hints else ())]
        self.optimiser = _optimiser(self.parameters, options)
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision == "fp16")
        self.progress = Progress()
        self.losses = torch.zeros((), device=run.device)
        """Their sum over the steps since the last validation."""

    def train(self, tell: Callable[[Told], None], stop: Stop | None = None) -> Progress:
        """How the run ended; raises StoppedError once a request to stop was met and the state kept."""
        with worker_deaths():
            return self._train(tell, stop)

    def _train(self, tell: Callable[[Told], None], stop: Stop | None) -> Progress:
        options, leads = self.run.options, self.run.team.leads
        began, first = time.monotonic(), self.progress.step
        for batches in self._steps():
            self.step(batches)
            step = self.progress.step = self.progress.step + 1
            validating = step % options.every == 0 or step == options.steps
            looking = step % CHECKED == 0 or validating
            stopping = step < options.steps and self._stop_asked(stop, looking)
            if looking or stopping:
                done, loss, spent = step - first, self._mean_loss(), time.monotonic() - began
                rate, windows = self._rate(step - 1), done * options.windows
                tell(Told(step, options.steps, loss, rate, done, windows, spent, self.progress.best))
            if validating:
                if leads:
                    self._validate()
                self.losses.zero_()
            if leads and (validating or stopping):
                self.keep()
            if stop is not None and stopping:
                raise StoppedError(
                    f"stopped at step {step} of {options.steps}; the same command goes on", stop.exit_code
                )
        return self.progress

    # ---- a step ----------------------------------------------------------------------------------------------

    def _steps(self) -> Iterator[list[Batch]]:
        """This process's batches of each step that is left."""
        options, team = self.run.options, self.run.team
        for kind, first, end in options.segments(self.progress.step):
            items = team.items(options, first, end)
            batches = iter(loader(self.run.windows(kind), items, options.batch, options.workers))
            for _ in range(first, end):
                yield list(islice(batches, team.passes(options)))

    def step(self, batches: Sequence[Batch]) -> None:
        """One optimiser step on some batches, whose gradients add up, in all processes together."""
        options, device, team = self.run.options, self.run.device, self.run.team
        passes, losses = len(batches) * team.size, torch.zeros((), device=device)
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate(self.progress.step)
        self.network.train()
        self.optimiser.zero_grad(set_to_none=True)
        for images, labels in batches:
            with _out_of_memory(options):
                shown = images.to(device, non_blocking=True, memory_format=torch.channels_last)
                loss, total = self._loss(shown, labels.to(device, non_blocking=True))
                self.scaler.scale(total / passes).backward()  # type: ignore[no-untyped-call]
            losses += loss.detach() / passes
        team.add([losses, *(each.grad for each in self.parameters if each.grad is not None)])
        self.losses += losses
        if options.clip is not None:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self.parameters, options.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        team.average(each for each in self.network.buffers() if each.is_floating_point())
        if options.average:
            self._average()

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(the loss at full size, all that is minimised)."""
        with self._autocast():
            scores = self.network(images)
            loss = cross_entropy(scores, labels, self.class_weights)
            if self.hints is None:
                return loss, loss
            return loss, loss + self.run.options.hints * self.hints(labels, self.class_weights)

    def _stop_asked(self, stop: Stop | None, looking: bool) -> bool:
        """Whether the run is to stop here: several processes agree on it only where they look at the loss anyway."""
        team = self.run.team
        if stop is None or not (looking or team.size == 1):
            return False
        return team.any(stop.asked, self.run.device)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = DTYPES.get(self.run.precision)
        return nullcontext() if dtype is None else torch.autocast(self.run.device.type, dtype)

    def _rate(self, step: int) -> float:
        options = self.run.options
        return rate_at(step, options.steps, options.rate, options.decay, options.warmup, options.power)

    def _mean_loss(self) -> float:
        """The mean loss since the last validation; raises RunError where it is not a number."""
        options, step = self.run.options, self.progress.step
        loss = self.losses.item() / ((step - 1) % options.every + 1)
        if not math.isfinite(loss):
            raise RunError(
                f"the loss is {loss} by step {step} at rate {self._rate(step - 1):.3g}; use a lower --rate, or "
                "--clip 1; the state of the last validation is kept, --overwrite starts anew"
            )
        return loss

    @torch.no_grad()
    def _average(self) -> None:
        """Moves the averaged weights towards the current ones, faster at first than the asked decay."""
        step = self.progress.step
        share = 1 - min(self.run.options.average, (1 + step) / (10 + step))
        for mean, now in zip(self.judged.state_dict().values(), self.network.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(now.to(mean.dtype), share)
            else:
                mean.copy_(now)

    # ---- validation and state --------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Scores the network where there are images for that, and adds a row to the history."""
        progress, options = self.progress, self.run.options
        if not options.average:
            self.judged.load_state_dict(self.network.state_dict())
        row: dict[str, Any] = {
            "step": progress.step,
            "rate": self._rate(progress.step - 1),
            "loss": self._mean_loss(),
            "mean_iou": None,
            "accuracy": None,
            "iou": [None] * self.run.classes,
        }
        mean = -1.0
        if self.run.validate is not None:
            scores = self.run.validate(self.judged)
            mean = scores.mean_iou
            iou = [None if math.isnan(each) else float(each) for each in scores.iou]
            row |= {"mean_iou": mean, "accuracy": scores.accuracy, "iou": iou}
        progress.history.append(row)
        saved = options.keep == "last" or mean > progress.best
        if saved:
            progress.best, progress.best_step = mean, progress.step
        self.run.keep(self.judged if saved else None, progress)

    def keep(self) -> None:
        """Keeps the state from which the run can go on."""
        tensors: dict[str, Any] = {
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "losses": self.losses,
            "random": torch.get_rng_state(),
        }
        if self.hints is not None:
            tensors["hints"] = self.hints.state_dict()
        if self.run.options.average:
            tensors["averaged"] = self.judged.state_dict()
        if self.run.device.type == "cuda":
            tensors["random_cuda"] = torch.cuda.get_rng_state(self.run.device)
        self.run.folder.save(self.progress, tensors)

    def resume(self) -> None:
        """Takes up the state that was kept last."""
        self.progress, tensors = self.run.folder.load(torch.device("cpu"))
        self.network.load_state_dict(tensors["network"])
        self.optimiser.load_state_dict(tensors["optimiser"])
        self.scaler.load_state_dict(tensors["scaler"])
        self.losses.copy_(tensors["losses"])
        torch.set_rng_state(tensors["random"])
        if self.hints is not None:
            self.hints.load_state_dict(tensors["hints"])
        if self.run.options.average:
            self.judged.load_state_dict(tensors["averaged"])
        if self.run.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random_cuda"], self.run.device)


def _optimiser(parameters: list[nn.Parameter], options: TrainOptions) -> torch.optim.Optimizer:
    """The optimiser; what normalises and biases (vectors) is not decayed."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if options.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=options.rate, momentum=options.momentum)
    return torch.optim.AdamW(groups, lr=options.rate, betas=(options.momentum, 0.999))


@contextmanager
def _out_of_memory(options: TrainOptions) -> Iterator[None]:
    """Turns a device's lack of memory into one line with a remedy."""
    try:
        yield
    except torch.OutOfMemoryError:
        less = max(1, options.batch // 2)
        raise RunError(
            f"the device has too little memory for {options.batch} windows of {options.crop[0]} x {options.crop[1]}; "
            f"use --batch {less} --accumulate {options.windows // less}, or a smaller --crop"
        ) from None
