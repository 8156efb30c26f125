"""Norms and activations: every name has a file, and a new part needs no other edit."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import restomod.model
from restomod.checks.device_parity import random_model
from restomod.config import model as config_model
from restomod.config.model import Activation, ModelConfig, Norm
from restomod.config.run import OptimConfig
from restomod.engine.memory import activation_bytes
from restomod.engine.optimizer import build_optimizer
from restomod.engine.step import ComputeConfig, batch_loss
from restomod.model.flops import embedding_parameters, flops_per_token, padded_parameters, parameter_count
from restomod.model.gpt import build_model
from restomod.model.hf_format import is_exportable
from restomod.model.hf_io import load_model, read_model_config, save_model
from tests.engine.test_memory import a_run, saved_bytes
from tests.models import CPU, random_tokens


class DynamicTanh(nn.Module):
    """weight * tanh(alpha * x) + bias. Source: Zhu et al., "Transformers without Normalization", 2025."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1))
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.alpha, 0.5)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.tanh(self.alpha * x) + self.bias


class GeGLU(nn.Module):
    """gelu(gate) * up. Source: Shazeer, "GLU Variants Improve Transformer", 2020."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.gelu(gate) * up


@pytest.mark.parametrize(("folder", "names"), [("norms", Norm), ("activations", Activation)])
def test_every_name_has_a_file_and_every_file_a_name(folder: str, names: Any) -> None:
    files = Path(restomod.model.__file__).parent.joinpath(folder).glob("[!_]*.py")
    assert sorted(get_args(names)) == sorted(file.stem for file in files)


@pytest.fixture
def add_part(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Callable[[ModelConfig], nn.Module]], None]:
    """Return a function that adds a part, with the effect of a new file and a new name in a Literal."""

    def add(folder: str, name: str, build: Callable[[ModelConfig], nn.Module]) -> None:
        module = types.ModuleType(name)
        module.build = build  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"restomod.model.{folder}.{name}", module)
        literal = {"norms": "Norm", "activations": "Activation"}[folder]
        monkeypatch.setattr(config_model, literal, Literal[(*get_args(getattr(config_model, literal)), name)])

    return add


@pytest.fixture
def config(add_part: Any) -> ModelConfig:
    """Return a small configuration with a norm and an activation that the package lacks."""
    add_part("norms", "dyt", lambda config: DynamicTanh(config.n_embd))
    add_part("activations", "geglu", lambda config: GeGLU())
    return ModelConfig(n_layer=3, n_head=2, n_embd=48, n_positions=32, vocab_size=101, norm="dyt", mlp="geglu")  # type: ignore[arg-type]


def test_parameter_counts_of_a_new_part_match_the_closed_form(config: ModelConfig) -> None:
    D, V, L, I = 48, 101, 3, 128  # noqa: E741
    norm = 2 * D + 1
    block = 2 * norm + (D + 1) * 3 * D + (D + 1) * D + (D + 1) * 2 * I + (I + 1) * D
    assert parameter_count(config) == (V + 32) * D + L * block + norm
    assert padded_parameters(config) == parameter_count(config) + 27 * D
    assert embedding_parameters(config) == (V + 32) * D
    assert flops_per_token(config, 32) == 6 * (L * block + norm + V * D) + 12 * L * D * 32


def test_a_new_part_has_its_own_initial_values(config: ModelConfig) -> None:
    model = build_model(config, 0, CPU)
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):
            assert parameter.item() == 0.5, name
        elif name.endswith(".ln_1.weight"):
            assert (parameter == 1).all()
    assert model.transformer.h[0].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_activation_memory_of_a_new_part_is_estimated(config: ModelConfig, dtype: torch.dtype, itemsize: int) -> None:
    saved = saved_bytes(build_model(config, 0, CPU), 32, dtype) - 4 * config.padded_vocab_size * config.n_embd
    assert activation_bytes(a_run(config, 32), 2 * 32, itemsize, "cpu") == pytest.approx(saved, rel=0.03)


def test_a_part_without_reset_parameters_is_an_error(add_part: Any) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.empty(1))

    add_part("norms", "scale", lambda config: Scale())
    with pytest.raises(TypeError, match=r"transformer\.h\.0\.ln_1 \(Scale\) needs a method reset_parameters"):
        build_model(ModelConfig(n_layer=1, n_head=1, n_embd=8, norm="scale"), 0, CPU)  # type: ignore[arg-type]


def test_a_new_part_learns(config: ModelConfig) -> None:
    model = build_model(config, 0, CPU)
    optimizer = build_optimizer(model, OptimConfig(lr=0.01))
    tokens, before = random_tokens(config, 2, 33), [p.detach().clone() for p in model.parameters()]
    losses = []
    for _ in range(20):
        loss = batch_loss(model, tokens[:, :-1], tokens[:, 1:], ComputeConfig(CPU, torch.float32, micro_batch=2))
        loss.backward()
        optimizer.update(1.0, torch.tensor(1.0), torch.tensor(False))
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_new_part_is_saved_and_loaded(config: ModelConfig, tmp_path: Path) -> None:
    model, tokens = random_model(config), random_tokens(config, 1, 20)
    save_model(model, tmp_path)
    assert read_model_config(tmp_path) == config
    assert not is_exportable(config)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path, CPU)(tokens), model(tokens))
