"""Processes that train one network together, as torchrun starts them: who they are, and what they agree on.

Each process makes its share of a step's passes, whose gradients are then added over all of them. So the run is that
of one process which makes all passes itself, but for the order of sums, and may be continued by any number that
divides its passes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import overload

import torch
import torch.distributed as dist
from torch import Tensor

from tilepipe.checkpoint import one_line
from tilepipe.errors import RunError, UsageError
from tilepipe.training.options import TrainOptions

PATIENCE = timedelta(days=1)
"""For the others: while the first process validates, they wait."""
MODESTY = 5.0
"""Seconds until a process that lost another ends: torchrun stops all once one ends, and the other has more to say."""


@dataclass(frozen=True, slots=True)
class Team:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that validates, writes and tells."""
        return self.rank == 0

    def passes(self, options: TrainOptions) -> int:
        """How many of a step's passes each process makes; UsageError where they cannot be shared evenly."""
        if options.accumulate % self.size:
            each = max(1, options.windows // self.size)
            raise UsageError(
                f"{options.accumulate} passes of a step cannot be shared by {self.size} processes; "
                f"use --accumulate {self.size}, and --batch {each} for steps of about as many windows"
            )
        return options.accumulate // self.size

    def items(self, options: TrainOptions, first: int, end: int) -> Sequence[int]:
        """Numbers of the windows that this process shows in the steps first..end-1."""
        length = self.passes(options) * options.batch
        return _Share(first, end, options.windows, self.rank * length, length)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Puts the sum over all processes in place of each tensor; they have the same shapes and types in all."""
        several = list(tensors)
        if self.size == 1 or not several:
            return
        # One exchange, of elements in an order that no tensor's memory format changes.
        together = torch.cat([tensor.reshape(-1) for tensor in several])
        dist.all_reduce(together)
        parts = torch.split(together, [tensor.numel() for tensor in several])
        for tensor, part in zip(several, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Puts the mean over all processes in place of each tensor."""
        several = list(tensors)
        self.add(several)
        for tensor in several:
            tensor.div_(self.size)

    def device(self, asked: str | None) -> str | None:
        """The device of this process: of several GPUs on a machine its own, else the one that was asked for."""
        if self.size == 1 or asked not in (None, "cuda") or not torch.cuda.is_available():
            return asked
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"

    def any(self, here: bool, device: torch.device) -> bool:
        """Whether it is so in some process."""
        if self.size == 1:
            return here
        flag = torch.tensor(float(here), device=device)
        dist.all_reduce(flag)
        return bool(flag.item())

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """What is done within, the first process does before all others, which then find what it left."""
        if self.size == 1:
            yield
            return
        if not self.leads:
            dist.barrier()
        yield
        if self.leads:
            dist.barrier()


class _Share(Sequence[int]):
    """Of the windows of each step, `length` from the `begin`-th on."""

    def __init__(self, first: int, end: int, windows: int, begin: int, length: int) -> None:
        self._first, self._steps, self._windows, self._begin, self._length = first, end - first, windows, begin, length

    def __len__(self) -> int:
        return self._steps * self._length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, place = divmod(index, self._length)
        return (self._first + step) * self._windows + self._begin + place


def leads() -> bool:
    """Whether this process is alone, or the first of those that torchrun started."""
    return not _launched() or os.environ.get("RANK", "0") == "0"


def _launched() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(device: str | None) -> Iterator[Team]:
    """This process's team: those that torchrun started, or itself alone; it is left at the end.

    Raises RunError in those that lose another.
    """
    if not _launched():
        yield Team()
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    team = Team(dist.get_rank(), dist.get_world_size())
    try:
        yield team
    except RuntimeError as error:
        if team.leads:
            raise
        time.sleep(MODESTY)
        raise RunError(f"process {team.rank} of the run lost another one: {one_line(error)}") from None
    finally:
        dist.destroy_process_group()
