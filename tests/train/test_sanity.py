"""What is said about the first loss, and that looking at it changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from restomod.train import sanity
from restomod.train.sanity import initial_loss_verdict, time_micro_batch
from restomod.train.step import Compute, batch_loss
from tests.models import CPU
from tests.train.trainee import assert_identical, make_trainee

EXPECTED = math.log(50257)  # 10.82


@pytest.mark.parametrize("loss", [EXPECTED, EXPECTED - 0.29, EXPECTED + 0.29])
def test_a_loss_near_that_of_guessing_is_as_it_should_be(loss: float) -> None:
    verdict = initial_loss_verdict(loss, 50257)
    assert verdict.startswith(f"initial loss {loss:.2f}")
    assert "ln(50257) = 10.82" in verdict
    assert "as it should be" in verdict


@pytest.mark.parametrize("loss", [EXPECTED - 0.31, EXPECTED + 0.31, 3.0, 400.0, math.inf, math.nan])
def test_any_other_loss_is_warned_of(loss: float) -> None:
    assert initial_loss_verdict(loss, 50257).startswith("warning")


def test_the_verdict_knows_the_size_of_the_vocabulary() -> None:
    assert "as it should be" in initial_loss_verdict(math.log(97), 97)
    assert "warning" in initial_loss_verdict(math.log(97), 50257)


def test_timing_a_micro_batch_changes_nothing() -> None:
    trainee = make_trainee()
    tokens, targets = trainee.batches.load(trainee.batches.windows(0)[:2])
    before, random_state = trainee.tensors(), torch.get_rng_state()
    compute = Compute(CPU, torch.float32, 2)
    seconds = time_micro_batch(trainee.model, lambda: batch_loss(trainee.model, tokens, targets, compute))
    assert 0 < seconds < 60
    assert all(p.grad is None for p in trainee.model.parameters())
    assert_identical(trainee.tensors(), before)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(("quick_below", "looks"), [(60.0, 2), (0.0, 1)])
def test_a_quick_micro_batch_is_timed_twice(quick_below: float, looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanity, "REPEAT_BELOW_SECONDS", quick_below)
    model, calls = torch.nn.Linear(2, 1), []

    def loss() -> Tensor:
        calls.append(1)
        return model(torch.ones(2)).sum()

    time_micro_batch(model, loss)
    assert len(calls) == looks
