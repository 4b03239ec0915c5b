"""Which part of a list is an array job's: parts partition the list, whatever the scheduler calls them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilepipe.errors import UsageError
from tilepipe.sharding import Shard, parse_shard


@given(st.sets(st.text(max_size=5), max_size=40), st.integers(1, 12), st.randoms())
def test_shards_partition_a_list_evenly_whatever_its_order(names: set[str], count: int, random) -> None:
    shares = []
    for number in range(1, count + 1):
        shuffled = list(names)
        random.shuffle(shuffled)
        shares.append(Shard(number, count).share(shuffled))
    assert sorted(name for share in shares for name in share) == sorted(names)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def slurm(task: int, first: int, count: int, step: int) -> dict[str, str]:
    names = {"ID": task, "MIN": first, "COUNT": count, "STEP": step, "MAX": first + (count - 1) * step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}


def grid_engine(task: int, first: int, count: int, step: int) -> dict[str, str]:
    names = {"ID": task, "FIRST": first, "LAST": first + (count - 1) * step, "STEPSIZE": step}
    return {f"SGE_TASK_{name}": str(value) for name, value in names.items()}


@pytest.mark.parametrize("scheduler", [slurm, grid_engine])
@pytest.mark.parametrize(("first", "count", "step"), [(0, 4, 1), (1, 5, 1), (10, 3, 7), (3, 1, 1)])
def test_an_array_is_numbered_without_gaps(scheduler, first: int, count: int, step: int) -> None:
    shards = [parse_shard("auto", scheduler(first + n * step, first, count, step)) for n in range(count)]
    assert shards == [Shard(n, count) for n in range(1, count + 1)]


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("2/8", {}, Shard(2, 8)),
        ("auto", {"LSB_JOBINDEX": "5", "LSB_JOBINDEX_END": "9", "LSB_JOBINDEX_STEP": "2"}, Shard(3, 5)),
        ("auto", {"AWS_BATCH_JOB_ARRAY_INDEX": "0", "AWS_BATCH_JOB_ARRAY_SIZE": "10"}, Shard(1, 10)),
        ("auto", {"BATCH_TASK_INDEX": "2", "BATCH_TASK_COUNT": "3"}, Shard(3, 3)),
        ("auto", {"CLOUD_RUN_TASK_INDEX": "1", "CLOUD_RUN_TASK_COUNT": "3"}, Shard(2, 3)),
        ("auto/6", {"JOB_COMPLETION_INDEX": "5"}, Shard(6, 6)),
        ("auto/6", {"PBS_ARRAY_INDEX": "0"}, Shard(1, 6)),
        ("auto/6", {"PBS_ARRAYID": "3"}, Shard(4, 6)),
        # One task of an array 0-9 that is run again alone.
        ("auto/10", slurm(7, 7, 1, 1), Shard(8, 10)),
        # Grid Engine says so where a job is no array.
        ("auto/6", {"SGE_TASK_ID": "undefined", "JOB_COMPLETION_INDEX": "1"}, Shard(2, 6)),
    ],
)
def test_a_scheduler_tells_which_part_is_a_jobs(text: str, environment: dict[str, str], expected: Shard) -> None:
    assert parse_shard(text, environment) == expected


@pytest.mark.parametrize(
    ("text", "environment", "said"),
    [
        ("0/4", {}, "1/4 to 4/4"),
        ("5/4", {}, "1/4 to 4/4"),
        ("1/0", {}, "shard"),
        ("third", {}, "auto/N"),
        ("auto", {}, "no array job"),
        ("auto", {"JOB_COMPLETION_INDEX": "3"}, "auto/N"),
        ("auto", {"PBS_ARRAY_INDEX": "3"}, "auto/N"),
        ("auto/3", {"JOB_COMPLETION_INDEX": "3"}, "counts from 0 to 2"),
        # sbatch --array=1,2,7
        ("auto", slurm(7, 1, 3, 1), "without gaps"),
        ("auto", slurm(4, 1, 3, 2), "without gaps"),
        ("auto", {"LSB_JOBINDEX": "0"}, "auto/N"),
    ],
)
def test_what_is_no_part_of_a_list_is_wrong_usage(text: str, environment: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_shard(text, environment)
    assert "\n" not in str(caught.value)
