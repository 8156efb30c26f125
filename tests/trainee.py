"""Tiny run in memory whose steps take milliseconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from restomod.checks.model_quick import CheckedModel
from restomod.config.run import ModelConfig, OptimConfig, RunConfig
from restomod.data.batches import Batches
from restomod.data.dataset import TokenStream
from restomod.engine.distributed import SINGLE
from restomod.engine.optimizer import Optimizers, build_optimizer, optimizer_tensors
from restomod.engine.step import BatchLoss, ComputeConfig, train_step
from restomod.model.gpt import GPT, build_model
from restomod.runs.checkpoint import write_checkpoint
from restomod.utils.console import CheckResult
from tests.models import CPU


@dataclasses.dataclass
class Trainee:
    """Run in memory, without a folder."""

    config: RunConfig
    batches: Batches
    model: GPT
    optimizer: Optimizers

    def train(self, first: int, end: int, micro_batch: int | None = None) -> list[tuple[float, float]]:
        """Make steps [first, end) and return the loss and gradient norm of each."""
        compute = ComputeConfig(CPU, torch.float32, micro_batch or self.config.batch_sequences)
        loss_of, made = BatchLoss(self.model, compute), []
        for step in range(first, end):
            micro = self.batches.micro_batches(step, compute.micro_batch)
            made.append(train_step(loss_of, self.optimizer, micro, self.config, step, SINGLE).wait())
        return [(outcome.loss, outcome.grad_norm) for outcome in made]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return copies of all weights and of the optimizer state."""
        copies = {}
        for name, parameter in self.model.named_parameters():
            copies[name] = parameter.detach().clone()
            for part in self.optimizer.parts:
                for key, value in part.state.get(parameter, {}).items():
                    copies[f"{name} {key}"] = value.clone()
        return copies


def make_trainee(seed: int = 1, **changes: object) -> Trainee:
    """Return a two-layer GPT-2 with a vocabulary of 97 tokens, batches of 8 × 16 tokens, and 512 random tokens."""
    config = RunConfig(
        steps=20,
        batch_tokens=128,
        sequence_length=16,
        model=ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=97),
        optim=OptimConfig(lr=3e-3, warmup_steps=3),
    )
    config = dataclasses.replace(config, seed=seed, **changes)
    text = np.random.default_rng(0).integers(config.model.vocab_size, size=512).astype(np.uint16)
    batches = Batches(TokenStream([text]), config.sequence_length, config.batch_sequences, seed)
    model = build_model(config.model, seed, CPU)
    return Trainee(config, batches, model, build_optimizer(model, config.optim))


def set_optimizer_tensors(trainee: Trainee, tensors: dict[str, torch.Tensor]) -> None:
    """Copy the optimizer state of another trainee, as returned by `optimizer_tensors`."""
    here = optimizer_tensors(trainee.model, trainee.optimizer)
    assert here.keys() == tensors.keys()
    for name, value in tensors.items():
        here[name].copy_(value)


def save_checkpoint(run: Path, step: int, model: GPT, optimizer: Optimizers) -> Path:
    """Write a checkpoint synchronously."""
    return write_checkpoint(run, step, model, optimizer_tensors(model, optimizer) if step > 0 else {})


def make_subject(
    fresh: bool = True, dtype: torch.dtype = torch.float32, text: np.ndarray | None = None, **changes: object
) -> CheckedModel:
    """Return a model to be checked, with micro-batches of two; ``text`` (n,) replaces the random tokens."""
    trainee = make_trainee(**changes)
    batches = trainee.batches
    if text is not None:
        batches = Batches(TokenStream([text.astype(np.uint16)]), batches.T, batches.batch_sequences, batches.seed)
    return CheckedModel(trainee.model, batches, ComputeConfig(CPU, dtype, 2), trainee.optimizer, fresh)


def state_of(model: GPT) -> dict[str, object]:
    """Return all state of a model that a check could change, and the random state, for comparison by ==."""
    modules = list(model.modules())
    hooks = [(m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks) for m in modules]
    state: dict[str, object] = {
        "training": [m.training for m in modules],
        "hooks": [len(kind) for module in hooks for kind in module],
        "random": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index, union-attr]
        "grad mode": torch.is_grad_enabled(),
    }
    for name, p in model.named_parameters():
        bits = [x.detach().clone().view(torch.int32) for x in (p, p.grad) if x is not None]
        state[name] = (id(p), p.data_ptr(), id(p.grad), p.requires_grad, [x.flatten().tolist() for x in bits])
    return state


def assert_identical(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Assert that names and bits of two sets of tensors are equal."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name].view(torch.int32), theirs[name].view(torch.int32)), name


def assert_leaves_no_trace(check: Callable[[CheckedModel], CheckResult], training: bool) -> None:
    """Assert that a check changes no weights, gradients, modes or frozen parameters."""
    subject = make_subject()
    model = subject.model.train(training)
    model.transformer.h[0].train(not training)
    model.transformer.wpe.weight.requires_grad_(False)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, i) if i % 2 else None
    before = state_of(model)
    check(subject)
    assert state_of(model) == before
    assert not any(part.state for part in subject.optimizer.parts)
