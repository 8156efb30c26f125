"""Parity with `transformers`' GPT-2 in fp32 on the CPU: logits, loss, gradients, names and shapes of all four sizes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from restomod.checks.device_parity import random_model
from restomod.config.run import ModelConfig
from restomod.engine.step import ComputeConfig, batch_loss
from restomod.model.gpt import GPT
from tests.models import CPU, paired, random_tokens, to_transformers

FP32 = ComputeConfig(CPU, torch.float32, micro_batch=1)
GPT2 = ModelConfig()  # 12 x 768, 12 heads, 1024 positions, 50257 tokens
DEEP = ModelConfig(n_layer=48, n_head=4, n_embd=64)
WIDE = ModelConfig(n_layer=2, n_head=25, n_embd=1600)  # GPT-2 XL's width

SIZES = {
    "gpt2": (GPT2, 124_439_808),
    "gpt2-medium": (ModelConfig(n_layer=24, n_head=16, n_embd=1024), 354_823_168),
    "gpt2-large": (ModelConfig(n_layer=36, n_head=20, n_embd=1280), 774_030_080),
    "gpt2-xl": (ModelConfig(n_layer=48, n_head=25, n_embd=1600), 1_557_611_200),
}


# --- logits, loss and gradients ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Computed:
    """Results of one model for the same weights and tokens; gradients in `transformers`' layout."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((DEEP, 128), id="48 thin layers"),
        pytest.param((GPT2, 128), id="gpt2"),
        pytest.param((WIDE, 128), id="2 layers of gpt2-xl", marks=pytest.mark.slow),
        pytest.param((GPT2, 1024), id="gpt2 with full context", marks=pytest.mark.slow),
    ],
)
def both(request: pytest.FixtureRequest) -> tuple[Computed, Computed]:
    """Compute logits, loss and gradients with this package and with `transformers`."""
    config, length = request.param
    model = random_model(config)
    reference = to_transformers(model)
    tokens = random_tokens(config, 1, length)
    with torch.no_grad():
        logits = model(tokens)
    loss = batch_loss(model, tokens[:, :-1], tokens[:, 1:], FP32)
    loss.backward()
    expected = reference(tokens, labels=tokens)
    expected.loss.backward()
    ours, theirs = {}, {}
    for name, parameter, other, transposed in paired(model, reference):
        gradient = parameter.grad.t() if transposed else parameter.grad
        ours[name], theirs[name] = gradient[: len(other)], other.grad
    return Computed(logits, loss.detach(), ours), Computed(expected.logits.detach(), expected.loss.detach(), theirs)


def test_logits_equal_those_of_transformers(both: tuple[Computed, Computed]) -> None:
    ours, theirs = both
    assert ours.logits.shape == theirs.logits.shape
    assert theirs.logits.std() > 0.5
    assert (ours.logits - theirs.logits).abs().max() < 1e-4


def test_loss_equals_that_of_transformers(both: tuple[Computed, Computed]) -> None:
    ours, theirs = both
    assert abs(ours.loss - theirs.loss) < 1e-4


def test_every_gradient_equals_that_of_transformers(both: tuple[Computed, Computed]) -> None:
    ours, theirs = both
    for name, expected in theirs.gradients.items():
        error = ours.gradients[name] - expected
        assert expected.abs().max() > 5e-4, name  # otherwise the next line would pass for wrong gradients
        assert error.abs().max() < 1e-4, name
        assert error.norm() < 2e-5 * expected.norm(), name  # fp32 rounding errors are at most 2e-6


@pytest.mark.parametrize("name", ["gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_logits_of_two_layers_of_every_larger_size_equal_those_of_transformers(name: str) -> None:
    size, _ = SIZES[name]
    config = ModelConfig(n_layer=2, n_head=size.n_head, n_embd=size.n_embd, vocab_size=1031)
    model = random_model(config)
    tokens = random_tokens(config, 1, 128)
    with torch.no_grad():
        ours, theirs = model(tokens), to_transformers(model)(tokens).logits
    assert theirs.std() > 0.5
    assert (ours - theirs).abs().max() < 1e-4


def test_every_layer_norm_has_the_epsilon_of_transformers() -> None:
    config = ModelConfig(n_layer=2, n_head=4, n_embd=64, vocab_size=1031)
    model = random_model(config)
    with torch.no_grad():  # the variance of the residual stream must be close to epsilon, 1e-5; usually it is about 1
        for name, parameter in model.named_parameters():
            if name.startswith(("transformer.wte", "transformer.wpe")):
                parameter.mul_(0.02)
            elif "c_proj" in name:
                parameter.mul_(0.002)
        tokens = random_tokens(config, 1, 128)
        ours, theirs = model(tokens), to_transformers(model)(tokens).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.std()


# --- parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_names_and_shapes_of_all_parameters_are_those_of_transformers(name: str) -> None:
    config, count = SIZES[name]
    with torch.device("meta"):
        model = GPT(config)
        reference = GPT2LMHeadModel(GPT2Config(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd))
    total = 0
    for path, ours, theirs, transposed in paired(model, reference):
        rows, *columns = (ours.t() if transposed else ours).shape
        if path == "transformer.wte.weight":
            assert rows == 50304
            rows = 50257
        assert (rows, *columns) == theirs.shape, path
        total += theirs.numel()
    assert total == count
