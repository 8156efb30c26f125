from __future__ import annotations

import math
import random
from typing import Any

import pytest

from restomod.config.run import RunConfig
from restomod.engine.step import StepResult
from restomod.train.spike_guard import MAX_HALVINGS, MIN_LOSSES, WINDOW, SpikeGuard


def guard(policy: str = "rollback", sigmas: float = 10.0, records: list[dict[str, Any]] | None = None) -> SpikeGuard:
    config = RunConfig(steps=1, batch_tokens=8, sequence_length=8, on_spike=policy, spike_sigmas=sigmas)  # type: ignore[arg-type]
    return SpikeGuard(config, records or [])


def healthy(n: int, mean: float = 4.0, deviation: float = 0.1) -> list[float]:
    chance = random.Random(0)
    return [chance.gauss(mean, deviation) for _ in range(n)]


def run(subject: SpikeGuard, losses: list[float]) -> list[str]:
    """Decisions of the spike guard."""
    return [subject.decide(made(subject, loss)) for loss in losses]


def made(subject: SpikeGuard, loss: float, grad_norm: float = 1.0) -> StepResult:
    """Return the result of a training step under this guard."""
    refused = not (math.isfinite(loss) and math.isfinite(grad_norm)) or loss > subject.loss_limit()
    return StepResult(loss, grad_norm, refused)


def problem(subject: SpikeGuard, loss: float, grad_norm: float = 1.0) -> str | None:
    return subject.problem(made(subject, loss, grad_norm))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_a_loss_that_is_not_finite_is_never_an_update(loss: float, policy: str) -> None:
    for where in ((loss, 1.0), (1.0, loss)):
        subject = guard(policy)
        said = problem(subject, *where)
        assert said is not None
        assert "nan" in said or "inf" in said
        assert subject.decide(made(subject, *where)) != "update"


def test_each_policy_acts_after_its_number_of_skipped_steps() -> None:
    nan = math.nan
    assert run(guard("stop"), [1.0, nan]) == ["update", "stop"]
    assert run(guard("skip"), [nan] * 10) == ["skip"] * 9 + ["stop"]
    assert run(guard("skip"), [nan] * 9 + [1.0] + [nan] * 9) == ["skip"] * 9 + ["update"] + ["skip"] * 9
    assert run(guard("rollback"), [nan, 1.0, nan, nan, nan]) == ["skip", "update", "skip", "skip", "rollback"]


def test_a_spike_is_a_loss_far_above_the_recent_mean() -> None:
    losses = healthy(WINDOW)
    mean = sum(losses) / WINDOW
    deviation = math.sqrt(sum((x - mean) ** 2 for x in losses) / WINDOW)
    subject = guard()
    assert run(subject, losses) == ["update"] * WINDOW
    assert problem(subject, mean + 9.9 * deviation) is None
    assert problem(subject, mean - 50 * deviation) is None  # a lower loss is not a spike
    said = problem(subject, mean + 10.1 * deviation)
    assert said == f"the loss is {mean + 10.1 * deviation:.4f}, 10 standard deviations above the recent mean"


def test_a_spike_is_excluded_from_the_recent_losses() -> None:
    subject = guard("skip")
    run(subject, healthy(WINDOW))
    assert run(subject, [9.0] * 9 + [4.0, 9.0]) == ["skip"] * 9 + ["update", "skip"]


def test_too_few_losses_give_no_limit() -> None:
    subject = guard()
    run(subject, healthy(MIN_LOSSES - 1))
    assert problem(subject, 100.0) is None
    run(subject, [4.0])
    assert problem(subject, 100.0) is not None


def test_zero_sigmas_detect_only_losses_that_are_not_finite() -> None:
    subject = guard(sigmas=0.0)
    run(subject, healthy(WINDOW))
    assert problem(subject, 1e6) is None
    assert problem(subject, math.nan) is not None


def test_almost_constant_losses_have_a_minimum_deviation() -> None:
    subject = guard()
    run(subject, [0.05] * WINDOW)
    assert problem(subject, 0.2) is None
    assert problem(subject, 0.3) is not None


def test_a_fall_at_the_start_of_training_is_no_spike() -> None:
    chance = random.Random(1)
    losses = [3 + 8 * math.exp(-i / 40) + chance.gauss(0, 0.05) for i in range(600)]
    assert set(run(guard(), losses)) == {"update"}


def test_a_resumed_run_makes_the_same_decisions() -> None:
    losses = [*healthy(200), math.nan, 4.1, *healthy(30), math.nan, math.nan]
    whole = guard()
    records = []
    for step, loss in enumerate(losses):
        said = problem(whole, loss)
        whole.decide(made(whole, loss))
        record = {"kind": "train", "step": step, "loss": loss if math.isfinite(loss) else None}
        records.append(record | ({"skipped": said} if said else {}))
        records.append({"kind": "val", "step": step, "loss": 99.0})
    resumed = guard(records=records)
    assert (resumed.losses, resumed.skipped) == (whole.losses, whole.skipped)
    assert whole.skipped == 2


def test_a_run_rolls_back_three_times_to_the_same_checkpoint() -> None:
    subject = guard()
    run(subject, [math.nan] * 2)
    for expected in (True, True, True, False):
        assert subject.rolled_back(4, [{"kind": "train", "step": 3, "loss": 5.0}]) is expected
        assert (list(subject.losses), subject.skipped) == ([5.0], 0)
    assert subject.rolled_back(8, [])


# --- fp16 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_fp16_overflows_are_skipped_until_the_loss_scale_fits(policy: str) -> None:
    config = RunConfig(steps=1, batch_tokens=8, sequence_length=8, on_spike=policy)  # type: ignore[arg-type]
    subject = SpikeGuard(config, fp16=True)
    overflow = StepResult(10.9, math.inf, refused=True)
    assert "fp16" in (subject.problem(overflow) or "")
    assert [subject.decide(overflow) for _ in range(MAX_HALVINGS)] == ["skip"] * MAX_HALVINGS
    assert subject.decide(overflow) == ("rollback" if policy == "rollback" else "stop")


def test_a_loss_that_is_not_finite_is_a_failure_in_fp16_too() -> None:
    config = RunConfig(steps=1, batch_tokens=8, sequence_length=8, on_spike="stop")
    assert SpikeGuard(config, fp16=True).decide(StepResult(math.nan, math.nan, refused=True)) == "stop"
