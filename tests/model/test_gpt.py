"""The model: causality, initialisation, padded vocabulary, key/value cache, and the residual stream's dtype."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from restomod.checks.device_parity import random_model
from restomod.checks.model_quick import loss_gradients
from restomod.config.presets import preset
from restomod.config.run import ModelConfig, OptimConfig
from restomod.engine.optimizer import build_optimizer
from restomod.engine.step import ComputeConfig, batch_loss
from restomod.model.gpt import GPT, KVCache, build_model
from tests.models import CPU, random_tokens

FP32 = ComputeConfig(CPU, torch.float32, micro_batch=1)
TINY = ModelConfig(n_layer=3, n_head=4, n_embd=48, n_positions=24, vocab_size=211)  # padded to 256 rows


# --- causality -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 1, 11, 23])
def test_a_token_changes_only_its_own_and_later_logits(t: int) -> None:
    model = random_model(TINY)
    tokens = random_tokens(TINY, 1, TINY.n_positions)
    changed = tokens.clone()
    changed[0, t] = (changed[0, t] + 1) % TINY.vocab_size
    with torch.no_grad():
        difference = (model(tokens) - model(changed))[0].abs().amax(-1)  # (T,)
    assert difference[:t].sum() < 1e-6
    assert difference[t:].min() > 1e-4


# --- initialisation ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh() -> GPT:
    """Build a model with GPT-2's width and vocabulary and two layers, as initialised."""
    return build_model(ModelConfig(n_layer=2, n_positions=64), 1337, CPU)


def test_the_loss_of_an_untrained_model_is_that_of_a_uniform_prediction(fresh: GPT) -> None:
    tokens = random_tokens(fresh.config, 2, 64)
    with torch.no_grad():
        loss = F.cross_entropy(fresh(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss - math.log(50257)) < 0.3


def test_initial_weights_are_gpt2s(fresh: GPT) -> None:
    """The standard deviation is 0.02; for projections into the residual stream, 0.02 / sqrt(number of projections)."""
    for name, parameter in fresh.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
        else:
            std = 0.02 / math.sqrt(4) if "c_proj" in name else 0.02
            assert parameter[:50257].std().item() == pytest.approx(std, rel=0.02), name
            assert abs(parameter[:50257].mean().item()) < 0.001, name


def test_same_seed_gives_the_same_weights() -> None:
    first, second = (build_model(TINY, 7, CPU).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_other_weights_everywhere() -> None:
    first, second = (build_model(TINY, seed, CPU).state_dict() for seed in (7, 8))
    assert all(not torch.equal(first[name], second[name]) for name in first if first[name].ndim == 2)


def test_building_a_model_does_not_change_the_global_random_state() -> None:
    before = torch.get_rng_state()
    build_model(TINY, 7, CPU)
    assert torch.equal(torch.get_rng_state(), before)


# --- the padded vocabulary -----------------------------------------------------------------------------------


def test_gpt2s_vocabulary_is_padded_to_50304_rows_of_zeros(fresh: GPT) -> None:
    assert fresh.head.shape == (50304, 768)
    assert (fresh.head[50257:] == 0).all()


@pytest.mark.parametrize(("vocab_size", "rows"), [(64, 64), (65, 128), (129, 192)])
def test_the_vocabulary_is_padded_to_the_next_multiple_of_64(vocab_size: int, rows: int) -> None:
    config = dataclasses.replace(TINY, vocab_size=vocab_size)
    assert build_model(config, 0, CPU).head.shape == (rows, 48)


def test_logits_have_a_column_per_real_token_only() -> None:
    assert random_model(TINY)(random_tokens(TINY, 2, 5)).shape == (2, 5, 211)


def test_padded_rows_get_a_gradient_of_exactly_zero() -> None:
    model = random_model(TINY)
    tokens = random_tokens(TINY, 2, 9)
    batch_loss(model, tokens[:, :-1], tokens[:, 1:], FP32).backward()
    assert (model.head.grad[211:] == 0).all()
    assert (model.head.grad[:211] != 0).all()


def test_padded_rows_are_exactly_zero_after_optimizer_steps() -> None:
    model = build_model(TINY, 0, CPU)
    optimizer = build_optimizer(model, OptimConfig(lr=0.01))
    for step in range(5):
        tokens = random_tokens(TINY, 2, 9, seed=step)
        batch_loss(model, tokens[:, :-1], tokens[:, 1:], FP32).backward()
        optimizer.update(1.0, torch.tensor(1.0), torch.tensor(False))
    assert (model.head[211:] == 0).all()


# --- key/value cache -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "passes",
    [[24], [1] * 24, [7] + [1] * 17, [5, 4, 1, 12, 2]],
    ids=["one pass", "one token per pass", "prefill, then single tokens", "prefill, then several tokens"],
)
def test_logits_with_a_cache_equal_the_full_forward_pass(passes: list[int]) -> None:
    model = random_model(TINY)
    tokens = random_tokens(TINY, 2, 24)
    cache = KVCache(TINY, 2, CPU, torch.float32)
    logits = []
    with torch.no_grad():
        for part in tokens.split(passes, dim=1):
            logits.append(model(part, cache))
            cache.length += part.shape[1]
        torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens), atol=1e-5, rtol=0)


# --- the residual stream --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2-124m", "modern-124m", "speedrun-124m"])
def test_the_residual_stream_of_training_can_be_bf16(name: str) -> None:
    config = dataclasses.replace(preset(name).model, n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=97)
    model = random_model(config)
    tokens, targets = random_tokens(config, 2, 16), random_tokens(config, 2, 16, seed=1)
    compute = ComputeConfig(CPU, torch.bfloat16, 2)
    exact_loss, exact = loss_and_gradients(model, tokens, targets, ComputeConfig(CPU, torch.float32, 2))
    seen: list[torch.dtype] = []
    for block in model.transformer.h:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    model.transformer.residual_dtype = torch.bfloat16
    loss, gradients = loss_and_gradients(model, tokens, targets, compute)
    assert seen == [torch.bfloat16] * 2
    assert loss == pytest.approx(exact_loss, rel=5e-3)
    assert gradients.keys() == exact.keys()
    for key, gradient in gradients.items():
        assert (gradient - exact[key]).norm() < 0.1 * exact[key].norm(), key


def test_evaluation_ignores_the_bf16_residual_stream() -> None:
    model = random_model(ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=97))
    tokens = random_tokens(model.config, 2, 16)
    with torch.no_grad():
        expected = model(tokens)
        model.transformer.residual_dtype = torch.bfloat16
        assert torch.equal(model(tokens), expected)


def loss_and_gradients(
    model: GPT, tokens: Tensor, targets: Tensor, compute: ComputeConfig
) -> tuple[float, dict[str, Tensor]]:
    loss = batch_loss(model, tokens, targets, compute)
    return loss.item(), loss_gradients(model, loss)
