"""Which of a list's items are one array job's own, without asking the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tilepipe.errors import UsageError


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` equal parts of a list."""

    number: int
    """From 1."""
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise UsageError(f"shard {self} is none; legal are 1/{self.count} to {self.count}/{self.count}")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def share(self, names: Iterable[str]) -> frozenset[str]:
        """The names that are this shard's: of the sorted names every count-th, so that like ones are spread.

        >>> sorted(Shard(2, 3).share(["e", "d", "c", "b", "a"]))
        ['b', 'e']
        """
        return frozenset(sorted(names)[self.number - 1 :: self.count])


@dataclass(frozen=True, slots=True)
class ArrayVariables:
    """The environment variables by which a scheduler tells a job which of an array it is."""

    index: str
    first: str | int = 0
    """Of the array's indices, or the variable that has it."""
    last: str | None = None
    step: str | None = None
    count: str | None = None


KNOWN = (
    ArrayVariables(
        "SLURM_ARRAY_TASK_ID",
        "SLURM_ARRAY_TASK_MIN",
        step="SLURM_ARRAY_TASK_STEP",
        count="SLURM_ARRAY_TASK_COUNT",
    ),
    ArrayVariables("SGE_TASK_ID", "SGE_TASK_FIRST", "SGE_TASK_LAST", "SGE_TASK_STEPSIZE"),
    ArrayVariables("LSB_JOBINDEX", 1, "LSB_JOBINDEX_END", "LSB_JOBINDEX_STEP"),
    ArrayVariables("AWS_BATCH_JOB_ARRAY_INDEX", count="AWS_BATCH_JOB_ARRAY_SIZE"),
    ArrayVariables("BATCH_TASK_INDEX", count="BATCH_TASK_COUNT"),
    ArrayVariables("CLOUD_RUN_TASK_INDEX", count="CLOUD_RUN_TASK_COUNT"),
    ArrayVariables("JOB_COMPLETION_INDEX"),
    ArrayVariables("PBS_ARRAY_INDEX"),
    ArrayVariables("PBS_ARRAYID"),
)
"""Of SLURM, Grid Engine, LSF, AWS Batch, Google Batch and Cloud Run, Kubernetes, PBS and Torque."""


def parse_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """The shard that "2/8", "auto" or "auto/8" names; UsageError in one line where it is not to be found out.

    "auto" reads index and count of the array job from the scheduler's variables; "auto/8" is for schedulers that do
    not tell the count, or jobs of an array that are run again alone: the index counts from 0 to 7.

    >>> parse_shard("auto/8", {"JOB_COMPLETION_INDEX": "3"})
    Shard(number=4, count=8)
    """
    match = re.fullmatch(r"(?:(\d+)/(\d+)|auto(?:/(\d+))?)", text.strip())
    if match is None:
        raise UsageError(f"shard {text!r} is not understood; write I/N such as 2/8, auto, or auto/N")
    if match[1] is not None:
        return Shard(int(match[1]), int(match[2]))
    found = array_job(environment)
    if found is None:
        names = ", ".join(each.index for each in KNOWN)
        raise UsageError(f"--shard {text}: this is no array job, since none of {names} is set; write I/N such as 2/8")
    if match[3] is None:
        return _told(found, environment)
    count, index = int(match[3]), int(environment[found.index])
    if index >= count:
        raise UsageError(f"--shard {text}: {found.index} is {index}, and counts from 0 to {count - 1} here")
    return Shard(index + 1, count)


def array_job(environment: Mapping[str, str]) -> ArrayVariables | None:
    """The variables of the array job that this process belongs to; None where it belongs to none."""
    return next((each for each in KNOWN if environment.get(each.index, "").isdecimal()), None)


def _told(names: ArrayVariables, environment: Mapping[str, str]) -> Shard:
    """The shard where the scheduler tells how many there are."""

    def value(name: str | int | None, otherwise: int) -> int:
        if isinstance(name, int):
            return name
        text = "" if name is None else environment.get(name, "")
        return int(text) if text.isdecimal() else otherwise

    index, first, step = value(names.index, 0), value(names.first, 0), max(1, value(names.step, 1))
    count = value(names.count, 0)
    if names.last is not None:
        count = (value(names.last, first - step) - first) // step + 1
    if count < 1:
        raise UsageError(f"--shard auto: {names.index} does not tell how many jobs there are; write auto/N")
    rank, rest = divmod(index - first, step)
    if rest or not 0 <= rank < count:
        raise UsageError(
            f"--shard auto: {names.index} is {index}, none of {count} indices from {first} in steps of {step}; "
            "number the array without gaps, or write I/N"
        )
    return Shard(rank + 1, count)
