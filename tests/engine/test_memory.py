"""Memory estimate against the tensors that torch saves, and against measured processes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from restomod.config.run import ModelConfig, OptimConfig, Optimizer, RunConfig
from restomod.engine.memory import (
    activation_bytes,
    block_activation_bytes,
    estimate_memory,
    optimizer_bytes,
    state_bytes,
)
from restomod.engine.optimizer import build_optimizer, optimizer_tensors
from restomod.engine.step import ComputeConfig, batch_loss
from restomod.model.flops import padded_parameters
from restomod.model.gpt import GPT, build_model
from tests.models import CPU

MIB = 2**20
B = 2
NUMBER = {torch.float32: 4, torch.bfloat16: 2}
LLAMA: dict[str, Any] = {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "bias": False}
PARTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "rmsnorm": {"norm": "rmsnorm"},
    "rope": {"positions": "rope"},
    "swiglu": {"mlp": "swiglu"},
    "relu2": {"mlp": "relu2"},
    "qk_norm": {"qk_norm": True},
    "llama": LLAMA,
    "modern": LLAMA | {"qk_norm": True},
    "embedding skip": {"embedding_skip": True},
    "embedding norm": {"embedding_norm": True},
    "value embedding": {"value_embedding": True},
    "narrow mlp": {"n_inner": 96},
    "narrow heads": {"head_dim": 16},
    "untied": {"tied": False},
}


def a_run(model: ModelConfig, T: int, sequences: int = B, **settings: Any) -> RunConfig:
    return RunConfig(steps=10, batch_tokens=sequences * T, sequence_length=T, model=model, **settings)


def saved_bytes(model: GPT, T: int, dtype: torch.dtype, mask: bool = False) -> int:
    """Return the bytes of all tensors that autograd saves in a forward pass and the loss, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # keep the tensor, so that no address is reused
        return tensor

    tokens = torch.randint(0, model.config.vocab_size, (B, T))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        batch_loss(model, tokens, tokens, ComputeConfig(CPU, dtype, B, document_mask=mask))
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", NUMBER, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("T", [64, 320])  # plain attention in bf16; torch's kernel
def test_activation_bytes_equal_what_autograd_saves(name: str, dtype: torch.dtype, T: int) -> None:
    shape = ModelConfig(n_layer=3, n_head=2, n_embd=64, n_positions=512, vocab_size=128, **PARTS[name])
    saved = saved_bytes(build_model(shape, 0, CPU), T, dtype)
    head = 4 * shape.padded_vocab_size * shape.n_embd  # lm_head's gradient is counted with the loss
    assert activation_bytes(a_run(shape, T), B * T, NUMBER[dtype], "cpu") + head == pytest.approx(saved, rel=0.03)


def test_gradient_checkpointing_keeps_one_block_and_the_inputs_of_all() -> None:
    T, shape = 320, ModelConfig(n_layer=6, n_head=2, n_embd=64, n_positions=512, vocab_size=128)
    config, model = a_run(shape, T, gradient_checkpointing=True), build_model(shape, 0, CPU)
    model.transformer.gradient_checkpointing = True
    saved = saved_bytes(model, T, torch.float32) - 4 * shape.padded_vocab_size * shape.n_embd
    block = block_activation_bytes(config, 4, cpu=True) * B * T
    assert activation_bytes(config, B * T, 4, "cpu") - block == pytest.approx(saved, rel=0.03)


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
@pytest.mark.parametrize("name", ["gpt2", "modern", "untied", "value embedding", "embedding skip"])
def test_bytes_of_weights_and_optimizer_state_are_exact(name: str, optimizer: Any) -> None:
    shape = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=97, **PARTS[name])
    model, optim = build_model(shape, 0, CPU), OptimConfig(optimizer=optimizer)
    weights = sum(p.nbytes for p in model.parameters())
    assert 4 * padded_parameters(shape) == weights
    states = optimizer_tensors(model, build_optimizer(model, optim)).values()
    held = sum(state.nbytes for state in states if state.ndim)  # without step counts
    assert optimizer_bytes(shape, optim)[0] == held
    assert state_bytes(shape, optim) == 2 * weights + held


class OneMoment(torch.optim.Optimizer):
    """Optimizer that keeps one tensor per parameter and allocates two temporary ones."""

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["moment"] = p.grad.clone()
            p.data.sub_((p.grad * 2).sqrt())


@pytest.mark.parametrize("layers", [12, 48])
def test_memory_of_any_optimizer_is_measured(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(model: GPT, *_: Any) -> list[torch.optim.Optimizer]:
        return [OneMoment(model.parameters(), {"lr": 1.0})]

    monkeypatch.setattr("restomod.engine.optimizers.adamw.build", build)
    shape, optim = ModelConfig(n_layer=layers, n_embd=1600, n_head=25), OptimConfig(lr=0.123)  # not in the cache
    largest = 4 * shape.padded_vocab_size * shape.n_embd
    assert optimizer_bytes(shape, optim) == (4 * padded_parameters(shape), 2 * largest)


@pytest.mark.parametrize("kind", ["Adafactor", "ASGD", "NAdam", "SGD"])
def test_memory_of_an_optimizer_that_reads_values_of_tensors_is_measured(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(model: GPT, config: OptimConfig, *_: Any) -> list[torch.optim.Optimizer]:
        return [getattr(torch.optim, kind)(model.parameters(), lr=config.lr)]

    monkeypatch.setattr("restomod.engine.optimizers.adamw.build", build)
    optimizer_bytes.cache_clear()
    shape = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=97)
    model = build_model(shape, 0, CPU)
    states = optimizer_tensors(model, build_optimizer(model, OptimConfig())).values()
    assert optimizer_bytes(shape, OptimConfig())[0] == sum(state.nbytes for state in states if state.ndim)
    optimizer_bytes.cache_clear()


def test_temporary_memory_of_muon_follows_from_its_largest_stack_of_matrices() -> None:
    shape, largest = ModelConfig(), 12 * 768 * 4 * 768  # numbers in the MLP's first matrices of all layers
    _, fp32 = optimizer_bytes(shape, OptimConfig(optimizer="muon"))
    _, bf16 = optimizer_bytes(shape, OptimConfig(optimizer="muon"), 2)
    assert 2 * 4 * largest < bf16 < fp32 < 6 * 4 * largest  # directions and their stack in fp32; the matmuls' operands
    assert optimizer_bytes(shape, OptimConfig())[1] == 0, "AdamW's kernel updates in place"


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_memory_grows_with_the_micro_batch_by_the_activations(number: int, device_type: str) -> None:
    config = a_run(ModelConfig(), 1024, sequences=512)
    small, large = (estimate_memory(config, n, number, device_type) for n in (8, 16))
    kept = activation_bytes(config, 8192, number, device_type)
    copies = 2 * kept - activation_bytes(config, 2 * 8192, number, device_type)
    assert large.activations - small.activations == kept - copies > 0
    assert copies == (12 * 12 * 768**2 * 2 if number == 2 else 0)  # the blocks' matrices in bf16
    assert (large.weights, large.optimizer) == (small.weights, small.optimizer)
    assert small.total == sum(dataclasses.astuple(small))


def test_gradients_are_kept_for_accumulation_and_averaging() -> None:
    one, shape = 4 * padded_parameters(ModelConfig()), ModelConfig()
    assert estimate_memory(a_run(shape, 1024, 16), 16, 2, "cuda").gradients == 0
    assert estimate_memory(a_run(shape, 1024, 16), 8, 2, "cuda").gradients == one
    assert estimate_memory(a_run(shape, 1024, 16), 8, 2, "cuda", processes=2).gradients == one


def test_fsdp_shares_weights_gradients_and_state() -> None:
    alone = estimate_memory(a_run(ModelConfig(), 1024, 32), 8, 2, "cuda")
    shared = estimate_memory(a_run(ModelConfig(), 1024, 32, parallel="fsdp"), 8, 2, "cuda", processes=2)
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(shared, part) == getattr(alone, part) / 2


# layers, width, heads, T, micro-batch, micro-batches of a step, precision: peak MiB of `restomod bench step`, that is
# VmHWM, on an AMD EPYC with one thread and torch 2.13, 2026-11-26
MEASURED = (
    (2, 128, 2, 256, 4, 1, "fp32", 795),
    (2, 128, 2, 256, 4, 2, "fp32", 796),
    (4, 256, 4, 256, 4, 1, "fp32", 958),
    (4, 256, 4, 256, 4, 2, "fp32", 931),
    (6, 384, 6, 256, 4, 2, "fp32", 1297),
    (6, 384, 6, 256, 8, 1, "fp32", 1526),
    (6, 384, 6, 256, 8, 2, "fp32", 1729),
    (2, 128, 2, 256, 4, 2, "bf16", 646),
    (4, 256, 4, 512, 4, 2, "bf16", 1010),
    (12, 768, 12, 1024, 1, 1, "bf16", 2922),
    (12, 768, 12, 1024, 3, 1, "bf16", 3960),
    (12, 768, 12, 1024, 1, 1, "fp32", 2949),
    (12, 768, 12, 1024, 3, 1, "fp32", 4447),
    (12, 768, 12, 1024, 1, 2, "fp32", 3557),
)


def predicted(layers: int, width: int, heads: int, T: int, micro_batch: int, count: int, precision: str) -> int:
    shape = ModelConfig(n_layer=layers, n_embd=width, n_head=heads, n_positions=T)
    config = a_run(shape, T, sequences=micro_batch * count)
    return estimate_memory(config, micro_batch, 4 if precision == "fp32" else 2, "cpu").total


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_measured_memory_is_predicted_within_15_percent(case: Any) -> None:
    *what, measured = case
    assert predicted(*what) / MIB == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("what", [(2, 128, 2, 256, 4, 2), (4, 256, 4, 256, 4, 2), (6, 384, 6, 256, 4, 2)], ids=str)
def test_memory_of_a_training_process_is_predicted(what: Any, tmp_path: Path) -> None:
    layers, width, heads, T, micro_batch, count = what
    model = ("--model.n-layer", layers, "--model.n-embd", width, "--model.n-head", heads, "--model.n-positions", T)
    batch = ("--sequence-length", T, "--micro-batch", micro_batch, "--batch-tokens", micro_batch * count * T)
    how = ("--device", "cpu", "--precision", "fp32", "--warmup", 1, "--timed", 1, "--json", tmp_path / "r.json")
    command = [sys.executable, "-m", "restomod", "bench", "step", "quickstart", *map(str, (*model, *batch, *how))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True)
    measured = json.loads((tmp_path / "r.json").read_text())["peak_memory_bytes"]
    assert predicted(*what, "fp32") == pytest.approx(measured, rel=0.15)
