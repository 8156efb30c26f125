"""Loss scaling in fp16 against torch's GradScaler."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch

from restomod.engine import loss_scale as module
from restomod.engine.distributed import SINGLE
from restomod.engine.loss_scale import LossScale
from restomod.engine.optimizer import build_optimizer, optimizer_tensors
from restomod.engine.step import BatchLoss, ComputeConfig, StepResult, train_step
from tests.models import CPU
from tests.trainee import Trainee, assert_identical, make_trainee, set_optimizer_tensors

FP16 = torch.float16


def test_the_factor_equals_that_of_torchs_grad_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS_BEFORE_GROWTH", 5)
    ours = LossScale(FP16, CPU)
    factor, tracker = torch.tensor(module.START), torch.tensor(0, dtype=torch.int32)
    chance = random.Random(0)
    seen = set()
    for _ in range(200):
        overflowed = chance.random() < 0.1
        ours.update(torch.tensor(overflowed))
        torch._amp_update_scale_(factor, tracker, torch.tensor(float(overflowed)), 2.0, 0.5, 5)
        assert (ours.factor.item(), ours.finite_steps.item()) == (factor.item(), tracker.item())
        seen.add(factor.item())
    assert len(seen) > 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_have_a_constant_factor(dtype: torch.dtype) -> None:
    scale = LossScale(dtype, CPU)
    for overflowed in (True, False):
        scale.update(torch.tensor(overflowed))
    assert scale.factor.item() == 1.0
    assert scale.tensors() == {}


def in_fp16() -> Trainee:
    trainee = make_trainee()
    return dataclasses.replace(trainee, optimizer=build_optimizer(trainee.model, trainee.config.optim, FP16))


def train(trainee: Trainee, first: int, end: int) -> list[StepResult]:
    loss_of = BatchLoss(trainee.model, ComputeConfig(CPU, FP16, 4))
    batches = trainee.batches
    return [
        train_step(loss_of, trainee.optimizer, batches.micro_batches(s, 4), trainee.config, s, SINGLE).wait()
        for s in range(first, end)
    ]


def test_training_in_fp16_is_close_to_fp32() -> None:
    made, exact = train(in_fp16(), 0, 20), make_trainee().train(0, 20)
    assert not any(outcome.refused for outcome in made)
    assert [o.loss for o in made] == pytest.approx([loss for loss, _ in exact], rel=2e-3)
    assert [o.grad_norm for o in made] == pytest.approx([norm for _, norm in exact], rel=0.02)


def test_without_loss_scaling_small_gradients_underflow() -> None:
    """The loss is multiplied by 1e-6, so that many gradients are below the range of fp16."""
    norms = []
    for factor in (1.0, module.START):
        trainee = in_fp16()
        trainee.optimizer.loss_scale.factor.fill_(factor)
        trainee.optimizer.loss_scale.adapts = False
        with torch.no_grad():
            trainee.model.transformer.h[1].mlp.c_proj.weight *= 1e-3
        loss_of = BatchLoss(trainee.model, ComputeConfig(CPU, FP16, 8))
        tokens, targets = trainee.batches.load(trainee.batches.windows(0))
        loss = loss_of(tokens, targets) * 1e-6 * factor
        loss.backward()
        norms.append(trainee.model.transformer.h[0].mlp.c_fc.weight.grad.norm().item() / factor)
    assert norms[0] < 0.9 * norms[1]


def test_an_overflow_halves_the_factor_and_skips_the_update() -> None:
    trainee = in_fp16()
    train(trainee, 0, 2)
    trainee.optimizer.loss_scale.factor.fill_(2.0**40)
    before = trainee.tensors()
    (outcome,) = train(trainee, 2, 3)
    assert outcome.refused
    assert math.isfinite(outcome.loss)
    assert not math.isfinite(outcome.grad_norm)
    assert_identical(trainee.tensors(), before)
    assert trainee.optimizer.loss_scale.factor.item() == 2.0**39


def test_the_state_is_saved_and_restored() -> None:
    old, new = in_fp16(), in_fp16()
    old.optimizer.loss_scale.factor.fill_(2.0**10)
    train(old, 0, 3)
    tensors = {name: value.clone() for name, value in optimizer_tensors(old.model, old.optimizer).items()}
    set_optimizer_tensors(new, tensors)
    new.model.load_state_dict(old.model.state_dict())
    assert new.optimizer.loss_scale.factor.item() == 2.0**10
    assert new.optimizer.loss_scale.finite_steps.item() == 3
    assert train(new, 3, 5) == train(old, 3, 5)
