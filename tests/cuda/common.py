"""Device under test, models and runs of suitable size, and exact fp64 references."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from restomod.checks.model_quick import loss_gradients
from restomod.config.presets import preset
from restomod.config.run import ModelConfig, OptimConfig, RunConfig
from restomod.data.batches import Batches, MicroBatches
from restomod.data.dataset import TokenStream
from restomod.data.tokenizer import END_OF_TEXT
from restomod.engine.device import compile_module
from restomod.engine.distributed import SINGLE
from restomod.engine.optimizer import Optimizers, build_optimizer, optimizer_tensors
from restomod.engine.step import BatchLoss, ComputeConfig, StepResult, train_step
from restomod.model.gpt import GPT, build_model

REAL = torch.cuda.is_available()
SMOKE = os.environ.get("RESTOMOD_SMOKE") == "cpu"
CPU, DEVICE = torch.device("cpu"), torch.device("cuda" if REAL else "cpu")
WORDS = ("the", "a", "cat", "dog", "house", "tree", "runs", "sleeps", "eats", "sees", "green", "old", "never", "and")
FAMILIES = ("gpt2-124m", "llama-124m", "modern-124m", "speedrun-124m")


def compile_transformer(model: GPT) -> None:
    """Compile with torch.compile; on a CPU without Inductor, whose C++ code takes a minute to compile."""
    if REAL:
        compile_module(model.transformer, DEVICE)
    else:
        model.transformer.compile(backend="aot_eager", dynamic=False)


def small(family: str, **changes: Any) -> ModelConfig:
    """Return a preset's model with two layers, two heads of 64 channels and 1,009 tokens."""
    shape: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 128, "n_positions": 128, "vocab_size": 1009}
    return dataclasses.replace(preset(family).model, **(shape | changes))


def wide(family: str, n_layer: int = 2) -> ModelConfig:
    """Return a preset's model at full width with fewer layers; on a CPU a tiny model."""
    if not REAL:
        return small(family, n_layer=n_layer, n_head=1, n_embd=64, n_positions=32)
    return dataclasses.replace(preset(family).model, n_layer=n_layer)


def random_text(config: ModelConfig, rows: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random tokens and targets, (rows, length) int64 each, on the CPU."""
    text = torch.randint(config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def exact(model: GPT, tokens: Tensor, targets: Tensor, by_document: bool = False) -> tuple[float, dict[str, Tensor]]:
    """Compute loss and gradients by name in fp64 on the CPU, with plain attention and full logits.

    Args:
        model: model on any device; it is copied.
        tokens, targets: (B, T) int64 on the CPU.
        by_document: compute each document separately, at the positions in its window. This is equal to a document mask.
    """
    model = copy.deepcopy(model).to(CPU).double()
    config = model.config
    with sdpa_kernel(SDPBackend.MATH):
        if by_document:
            spans = [(row, span) for row in tokens for span in document_spans(row)]
            parts = [
                model.transformer.forward(row[None, s], positions=torch.arange(s.start, s.stop)) for row, s in spans
            ]
            hidden = torch.cat(parts, 1)[0]  # (B T, D)
        else:
            hidden = model.transformer.forward(tokens).flatten(0, 1)
        logits = F.linear(hidden, model.head[: config.vocab_size])
        if config.softcap is not None:
            logits = config.softcap * torch.tanh(logits / config.softcap)
        loss = F.cross_entropy(logits, targets.flatten())
        return loss.item(), loss_gradients(model, loss)


def document_spans(tokens: Tensor) -> list[slice]:
    """Return the slices of the documents in a window (T,). All but the first one begin with <|endoftext|>."""
    starts = sorted({0, *(tokens == END_OF_TEXT).nonzero().flatten().tolist()})
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True)]


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative error of each tensor, norm(found - expected) / norm(expected); infinity for NaN."""
    assert found.keys() == expected.keys()
    errors = {}
    for name, value in expected.items():
        reference = value.double().cpu()
        error = float((found[name].double().cpu() - reference).norm() / (reference.norm() + 1e-30))
        errors[name] = error if error == error else float("inf")
    return errors


def worst(errors: dict[str, float]) -> tuple[str, float]:
    """Return the name and value of the largest error."""
    return max(errors.items(), key=lambda item: item[1])


def write_text(folder: Path) -> Path:
    """Write eight documents of about 900 tokens each into a new folder."""
    chance = random.Random(0)
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_text(" ".join(chance.choices(WORDS, k=800)))
    return folder


@dataclasses.dataclass
class Trainee:
    """Small run in memory, on the device under test."""

    config: RunConfig
    batches: Batches
    model: GPT
    optimizer: Optimizers
    compute: ComputeConfig
    loss_of: nn.Module

    def micro_batches(self, step: int) -> MicroBatches:
        return self.batches.micro_batches(step, self.compute.micro_batch)

    def train(self, first: int, end: int) -> list[StepResult]:
        """Train steps [first, end) and return their results."""
        return [
            train_step(self.loss_of, self.optimizer, self.micro_batches(step), self.config, step, SINGLE).wait()
            for step in range(first, end)
        ]

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of all weights and optimizer state, on the device."""
        state = dict(self.model.named_parameters()) | optimizer_tensors(self.model, self.optimizer)
        return {name: value.detach().clone() for name, value in state.items()}


def make_trainee(
    optimizer: str = "adamw",
    seed: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    family: str = "gpt2-124m",
    document_mask: bool = False,
    rows: int = 128 if REAL else 8,
) -> Trainee:
    """Build a run of two layers on 25,600 random tokens, with ``rows`` sequences of 64 per step in two micro-batches.

    On a GPU a micro-batch has 4,096 tokens, because the embedding gradient uses another kernel from 3,072 tokens on.
    """
    shape = small(family, n_positions=64, vocab_size=50257 if document_mask else 1009)
    optim = OptimConfig(optimizer=optimizer, lr=1e-3, warmup_steps=2)  # type: ignore[arg-type]
    config = RunConfig(steps=40, batch_tokens=rows * 64, sequence_length=64, model=shape, optim=optim)
    text = np.random.default_rng(0).integers(1009, size=64 * 400 + 1).astype(np.uint16)
    if document_mask:
        text[::23] = END_OF_TEXT
    batches = Batches(TokenStream([text]), 64, config.batch_sequences, seed)
    model = build_model(shape, seed, DEVICE)
    compute = ComputeConfig(DEVICE, dtype, rows // 2, document_mask=document_mask)
    return Trainee(config, batches, model, build_optimizer(model, optim, dtype), compute, BatchLoss(model, compute))


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Allow deterministic kernels only, within the context."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that names and bits are equal."""
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name].cpu(), value.cpu())]
    assert not different, different
