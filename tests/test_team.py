"""Several processes that train one network together: the same run as that of one process."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from commands import run
from hypothesis import given
from hypothesis import strategies as st
from rasters import write

from tilepipe.errors import UsageError
from tilepipe.training.options import TrainOptions
from tilepipe.training.team import Team


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(0, 7), st.integers(0, 6))
def test_shares_are_the_windows_of_each_step(size: int, each: int, batch: int, first: int, steps: int) -> None:
    options = TrainOptions(batch=batch, accumulate=size * each)
    shares = [Team(rank, size).items(options, first, first + steps) for rank in range(size)]
    assert [len(share) for share in shares] == [steps * each * batch] * size
    by_step = [
        [item for share in shares for item in share[step * each * batch : (step + 1) * each * batch]]
        for step in range(steps)
    ]
    every = range(first * options.windows, (first + steps) * options.windows)
    assert [item for step in by_step for item in step] == list(every)
    for share in shares:
        assert all(one < other for one, other in pairwise(share))
        with pytest.raises(IndexError):
            share[len(share)]
    assert list(Team().items(options, first, first + steps)) == list(every)


def test_passes_that_cannot_be_shared_are_refused() -> None:
    assert Team(1, 3).passes(TrainOptions(accumulate=6)) == 2
    with pytest.raises(UsageError, match=r"1 passes of a step .* 4 processes; use --accumulate 4, and --batch 2"):
        Team(0, 4).passes(TrainOptions(batch=8))


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    lines = ['classes = ["ground", "hill"]']
    for number, split in enumerate(("train", "train", "validation")):
        random = np.random.default_rng(number)
        labels = np.kron(random.random((5, 6)) < 0.5, np.ones((16, 16))).astype(np.uint8)
        image = 80 + 60 * labels + random.normal(0, 25, (3, *labels.shape))
        paths = tmp_path / f"{number}.tif", tmp_path / f"{number}_label.tif"
        write(paths[0], image.clip(0, 255).astype(np.uint8), photometric="rgb")
        write(paths[1], labels[None])
        lines += ["[[sample]]", f"image = '{paths[0]}'", f"label = '{paths[1]}'", f"split = '{split}'"]
    path = tmp_path / "data.toml"
    path.write_text("\n".join(lines))
    return path


WORDS = (
    *("--model", "segnet-basic", "--arg", "width=0.1", "--crop", "32x48", "--batch", "3", "--accumulate", "2"),
    *("--optimiser", "sgd", "--rate", "0.01", "--average", "0.9", "--every", "3"),
    *("--device", "cpu", "--threads", "1", "--workers", "0"),
)


def together(manifest: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in two processes, by torchrun."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "tilepipe",
    ]
    command = [*launcher, "train", str(manifest), str(folder), *WORDS, *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_train_as_one_does(manifest: Path, tmp_path: Path) -> None:
    """Sums are made in another order, and running statistics of batch normalisation are averaged: floats differ."""
    words = ("--steps", "6", "--json")
    both = together(manifest, tmp_path / "run2", *words)
    assert both.returncode == 0, both.stderr
    alone = run("train", manifest, tmp_path / "run1", *WORDS, *words)
    told = {1: json.loads(alone.stdout), 2: json.loads(both.stdout)}
    assert told[1].keys() == told[2].keys()
    assert told[2]["steps"] == 6
    one, two = (safetensors.torch.load_file(tmp_path / f"run{n}" / "model.safetensors") for n in (1, 2))
    states = {n: torch.load(tmp_path / f"run{n}" / "state.pt", weights_only=True) for n in (1, 2)}
    assert one.keys() == two.keys()
    for name, tensor in states[1]["network"].items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(tensor, states[2]["network"][name], rtol=1e-3, atol=1e-4, msg=name)
    losses = {}
    for n in (1, 2):
        with open(tmp_path / f"run{n}" / "curves.csv", newline="") as file:
            losses[n] = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses[1] == pytest.approx(losses[2], rel=1e-4)
    goes_on = run("train", manifest, tmp_path / "run2", *WORDS, *words)
    assert json.loads(goes_on.stdout)["resumed_from"] == 6, "by any number of processes"


@pytest.mark.slow
def test_what_does_not_fit_is_said_by_the_first_process(manifest: Path, tmp_path: Path) -> None:
    refused = together(manifest, tmp_path / "run", "--crop", "33")
    assert refused.returncode != 0
    assert refused.stderr.count("tilepipe: a crop of 33 rows is no legal size") == 1
