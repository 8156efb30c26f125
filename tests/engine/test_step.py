"""Training step: independence of the micro-batch size, learning, skipped updates, document mask, copies."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from restomod.checks.device_parity import random_model
from restomod.config.run import ModelConfig, OptimConfig
from restomod.data.tokenizer import END_OF_TEXT
from restomod.engine.distributed import SINGLE
from restomod.engine.step import BatchLoss, ComputeConfig, PendingStep, StepResult, batch_loss, train_step
from tests.models import CPU
from tests.trainee import assert_identical, make_trainee

# --- micro-batches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_losses_do_not_depend_on_the_micro_batch(micro_batch: int) -> None:
    whole, split = make_trainee(), make_trainee()
    expected, losses = whole.train(0, 20, micro_batch=8), split.train(0, 20, micro_batch=micro_batch)
    assert torch.tensor(losses).allclose(torch.tensor(expected), rtol=1e-4)  # losses and gradient norms
    assert expected[-1][0] < expected[0][0] - 0.1  # the loss has decreased


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_weights_do_not_depend_on_the_micro_batch(micro_batch: int) -> None:
    whole, split = make_trainee(), make_trainee()
    whole.train(0, 20, micro_batch=8)
    split.train(0, 20, micro_batch=micro_batch)
    for (name, a), b in zip(whole.model.named_parameters(), split.model.parameters(), strict=True):
        if name.endswith("c_attn.bias"):
            # Softmax is invariant to the key bias, so its true gradient is 0. AdamW turns rounding errors of this
            # gradient into full steps, which affect no output.
            D = len(a) // 3
            a, b = (torch.cat([x[:D], x[2 * D :]]) for x in (a, b))
        assert (a - b).norm() <= 1e-4 * a.norm(), name


# --- learning ------------------------------------------------------------------------------------------------


def test_memorises_one_batch() -> None:
    trainee = make_trainee(
        steps=100,
        batch_tokens=64,
        model=ModelConfig(n_layer=2, n_head=2, n_embd=64, n_positions=16, vocab_size=97),
        optim=OptimConfig(lr=1e-2, warmup_steps=5, weight_decay=0.0),
    )
    trainee.batches.source_windows = [4]  # four windows, in every step
    losses = [loss for loss, _ in trainee.train(0, 100)]
    assert losses[0] == pytest.approx(math.log(97), abs=0.3)
    assert losses[-1] < 0.05


def test_uses_the_learning_rate_of_the_step() -> None:
    trainee = make_trainee(steps=20, optim=OptimConfig(lr=1.0, warmup_steps=10))
    trainee.train(4, 5)
    assert [group["lr"] for group in trainee.optimizer.param_groups] == [0.5, 0.5]


def test_returns_the_loss_before_the_update_and_the_norm_before_clipping() -> None:
    trainee, twin = make_trainee(optim=OptimConfig(grad_clip=1e-3)), make_trainee()
    tokens, targets = twin.batches.load(twin.batches.windows(0))
    expected = F.cross_entropy(twin.model(tokens).flatten(0, 1), targets.flatten())
    expected.backward()
    norm = sum(p.grad.square().sum() for p in twin.model.parameters()).sqrt()
    ((loss, grad_norm),) = trainee.train(0, 1, micro_batch=2)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert grad_norm == pytest.approx(norm.item(), rel=1e-4)


def test_clips_the_gradient_before_the_update() -> None:
    trainee = make_trainee(optim=OptimConfig(grad_clip=1e-3, betas=(0.0, 0.95)))
    trainee.train(0, 1)
    means = [
        state["exp_avg"].norm() for state in trainee.optimizer.parts[0].state.values()
    ]  # beta 0: the gradient itself
    assert torch.stack(means).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_leaves_no_gradients() -> None:
    trainee = make_trainee()
    trainee.train(0, 1)
    assert all(p.grad is None for p in trainee.model.parameters())


# --- skipped updates -----------------------------------------------------------------------------------------


def test_nan_in_the_weights_skips_the_update() -> None:
    trainee = make_trainee()
    trainee.train(0, 2)
    with torch.no_grad():
        trainee.model.transformer.h[0].mlp.c_fc.weight[3, 4] = math.nan
    before = trainee.tensors()
    ((loss, norm),) = trainee.train(2, 3)
    assert math.isnan(loss)
    assert math.isnan(norm)
    assert_identical(trainee.tensors(), before)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_skips_the_update(value: float) -> None:
    trainee = make_trainee()
    trainee.train(0, 2)
    before = trainee.tensors()
    hook = trainee.model.transformer.ln_f.bias.register_hook(lambda gradient: torch.full_like(gradient, value))
    ((loss, norm),) = trainee.train(2, 3)
    hook.remove()
    assert math.isfinite(loss)
    assert not math.isfinite(norm)
    assert_identical(trainee.tensors(), before)


def test_training_continues_after_a_skipped_update() -> None:
    hit, spared = make_trainee(), make_trainee()
    hit.train(0, 2)
    spared.train(0, 2)
    hook = hit.model.transformer.ln_f.bias.register_hook(lambda gradient: gradient * math.inf)
    hit.train(2, 3)
    hook.remove()
    assert hit.train(2, 3) == spared.train(2, 3)
    assert_identical(hit.tensors(), spared.tensors())


def test_a_loss_above_the_limit_skips_the_update() -> None:
    trainee = make_trainee()
    trainee.train(0, 2)
    before = trainee.tensors()
    loss_of = BatchLoss(trainee.model, ComputeConfig(CPU, torch.float32, 8))

    def step(limit: float) -> StepResult:
        batches = trainee.batches.micro_batches(2, 8)
        return train_step(loss_of, trainee.optimizer, batches, trainee.config, 2, SINGLE, limit).wait()

    loss = step(limit=0.0).loss
    assert_identical(trainee.tensors(), before)
    assert step(limit=loss - 1e-3).refused
    assert_identical(trainee.tensors(), before)
    assert not step(limit=loss + 1e-3).refused
    assert not torch.equal(trainee.tensors()["transformer.wpe.weight"], before["transformer.wpe.weight"])


# --- documents -----------------------------------------------------------------------------------------------


def test_a_token_attends_to_its_own_document_only() -> None:
    """With relative positions, the losses of a document equal those of a window with this document only."""
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=64, norm="rmsnorm", positions="rope")
    model = random_model(config)
    first, second = (torch.randint(50256, (n,), generator=torch.Generator().manual_seed(n)) for n in (11, 20))
    end = torch.tensor([END_OF_TEXT])
    window = torch.cat([first, end, second])[None]
    sums = []
    for tokens, masked in ((window, True), (window, False), (first[None], False), (window[:, 11:], False)):
        compute = ComputeConfig(CPU, torch.float32, 1, document_mask=masked)
        sums.append(batch_loss(model, tokens[:, :-1], tokens[:, 1:], compute).item() * (tokens.shape[1] - 1))
    whole, unmasked, *apart = sums
    with torch.no_grad():  # the separator is predicted from the first document
        to_the_end = F.cross_entropy(model(first[None])[0, -1:], end).item()
    assert whole == pytest.approx(sum(apart) + to_the_end, rel=1e-5)
    assert whole != pytest.approx(unmasked, rel=1e-4)


# --- copies ---------------------------------------------------------------------------------------------------


class Copies(TorchFunctionMode):
    """Function mode that records for every copy whether it is asynchronous."""

    def __init__(self) -> None:
        super().__init__()
        self.asynchronous: list[bool] = []

    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(f, "__name__", "") == "to":
            self.asynchronous.append(bool((kwargs or {}).get("non_blocking")))
        return f(*args, **(kwargs or {}))


def test_only_copies_from_and_to_cuda_are_asynchronous() -> None:
    """On MPS an asynchronous copy may be read too early, and there is no event to wait for."""
    trainee = make_trainee()
    tokens, targets = trainee.batches.load(trainee.batches.windows(0)[:2])
    with Copies() as copies:
        loss = batch_loss(trainee.model, tokens, targets, ComputeConfig(CPU, torch.float32, 2)).detach()
        made = PendingStep(loss, loss, loss > 0)
    assert len(copies.asynchronous) >= 3  # tokens, targets and the result of the step
    assert not any(copies.asynchronous)
    assert made.wait() == StepResult(loss.item(), loss.item(), True)


def test_an_untied_lm_head_gets_its_gradient_once_per_step() -> None:
    trainee = make_trainee(model=dataclasses.replace(make_trainee().config.model, tied=False))
    head, grads = trainee.model.lm_head, []
    assert head is not None
    head.weight.register_post_accumulate_grad_hook(lambda p: grads.append(p.grad is not None))
    trainee.train(0, 1, micro_batch=2)
    assert grads == [False, False, False, True]
