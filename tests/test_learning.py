"""The parts of learning against torch's own: rates, losses, weights of classes, averages of weights."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tilepipe.errors import ModelError, UsageError
from tilepipe.models import build
from tilepipe.training.losses import Hints, cross_entropy
from tilepipe.training.options import Stage, TrainOptions
from tilepipe.training.rates import rate_at
from tilepipe.training.statistics import IGNORE

# ---- rates -------------------------------------------------------------------------------------------------------


def torch_rates(make: Any, steps: int) -> list[float]:
    """The rates of a torch scheduler."""
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = make(optimiser)
    rates = []
    for _ in range(steps):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    return rates


@given(st.integers(1, 60), st.floats(0.1, 3))
def test_rates_fall_as_torch_schedules_them(steps: int, power: float) -> None:
    scheduler = torch.optim.lr_scheduler
    cosine = torch_rates(lambda optimiser: scheduler.CosineAnnealingLR(optimiser, steps), steps)
    assert [rate_at(n, steps, 0.3, "onecycle") for n in range(steps)] == pytest.approx(cosine)
    falling = torch_rates(lambda optimiser: scheduler.PolynomialLR(optimiser, steps, power), steps)
    assert [rate_at(n, steps, 0.3, "polynomial", power=power) for n in range(steps)] == pytest.approx(falling)
    assert {rate_at(n, steps, 0.3, "constant") for n in range(steps)} == {0.3}


@given(st.integers(1, 80), st.floats(0, 1), st.sampled_from(["onecycle", "polynomial", "constant"]))
def test_rates_rise_once_to_the_highest_and_stay_in_bounds(steps: int, warmup: float, decay: Any) -> None:
    rates = [rate_at(n, steps, 2.0, decay, warmup) for n in range(steps)]
    assert max(rates) == pytest.approx(2.0)
    assert min(rates) > 0
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


# ---- losses ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.booleans(), st.integers(0, 2**32))
def test_the_loss_is_torchs_mean(classes: int, weighted: bool, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, classes, 5, 7, generator=random)
    labels = torch.randint(0, classes, (2, 5, 7), generator=random)
    labels[torch.rand(labels.shape, generator=random) < 0.3] = IGNORE
    labels[0, 0, 0] = 0
    weights = torch.rand(classes, generator=random) + 0.1 if weighted else None
    torch.testing.assert_close(
        cross_entropy(scores, labels, weights), F.cross_entropy(scores, labels, weights, ignore_index=IGNORE)
    )


def test_windows_without_labels_teach_nothing() -> None:
    scores = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = cross_entropy(scores, torch.full((1, 4, 4), IGNORE), torch.ones(3))
    loss.backward()
    assert loss.item() == 0
    assert scores.grad is not None
    assert not scores.grad.any()


def test_hints_teach_the_inner_stages() -> None:
    """The first encoder stage learns from hints alone, though nothing is asked of the output."""
    torch.manual_seed(0)
    network = build("segnet", classes=3, bands=3, width=0.05)
    hints = Hints(network, 3)
    labels = torch.randint(0, 3, (2, 64, 64))
    network(torch.randn(2, 3, 64, 64))
    sides = [features.shape[-1] for features in hints.features]
    assert sides == [32, 16, 8, 4, 4, 8, 16, 32]
    loss = hints(labels, None)
    by_hand = math.log(3)
    assert loss.item() == pytest.approx(by_hand, rel=0.3), "about chance at first"
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.encoder[1].parameters() if parameter.ndim > 1)
    with torch.no_grad():
        network(torch.randn(2, 3, 64, 64))
    assert hints.features == [], "validation leaves nothing behind"


def test_hints_are_refused_where_there_are_no_stages() -> None:
    with pytest.raises(ModelError, match="has no stages for hints"):
        Hints(nn.Sequential(nn.Conv2d(3, 3, 1)), 3)


# ---- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimiser": "lion"}, "optimiser is 'lion'; legal are adamw, sgd"),
        ({"batch": 0}, "batch is 0; legal: 1 or more"),
        ({"jitter": 1.5}, "jitter is 1.5; legal: 0 to 1"),
        ({"scales": (2.0, 1.0)}, "scales 2,1 are not legal"),
        ({"class_weights": "inverse"}, "class_weights is 'inverse'"),
        ({"stages": ()}, "at least one"),
        ({"crop": (0, 5)}, "crop is 0 x 5"),
    ],
)
def test_options_that_are_not_legal(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as error:
        replace(TrainOptions(), **changes)
    assert said in str(error.value)


def test_a_stage_has_a_known_kind_and_steps() -> None:
    with pytest.raises(UsageError, match="legal are uniform, objects, candidates"):
        Stage("objekte", 5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="steps of a stage is 0"):
        Stage("uniform", 0)


def test_what_a_run_means_leaves_out_what_changes_nothing() -> None:
    options = TrainOptions()
    assert options.meaning() == replace(options, workers=7, device="cpu").meaning()
    assert options.meaning() != replace(options, threads=3).meaning()
    assert {"seed", "stages", "crop", "rate", "bands"} <= options.meaning().keys()
