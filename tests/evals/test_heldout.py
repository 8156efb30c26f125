"""The held-out loss against the plain computation, and that taking it changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from restomod.config import ModelConfig
from restomod.data.shards import TokenStream
from restomod.evals.heldout import heldout_loss, heldout_windows
from restomod.model.gpt import GPT
from tests.models import CPU, random_model

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=97)
T = 16
TEXT = np.random.default_rng(0).integers(97, size=10 * T + 7).astype(np.uint16)  # 10 windows and a rest
STREAM = TokenStream([TEXT[:50], TEXT[50:]])  # windows cross from shard to shard


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model(CONFIG)


@torch.no_grad()
def plain_loss(model: GPT, windows: list[int]) -> float:
    """Window by window, from all logits; window 10 is the rest."""
    losses = []
    for w in windows:
        tokens = torch.from_numpy(TEXT[w * T : w * T + T + 1].astype(np.int64))
        losses += F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="none").double().tolist()
    return sum(losses) / len(losses)


def test_equals_cross_entropy_over_all_windows(model: GPT) -> None:
    held = heldout_loss(model, STREAM, T, CPU, torch.float32)
    assert held.loss == pytest.approx(plain_loss(model, list(range(11))), rel=1e-6)
    assert held.tokens == 10 * T + 6


@pytest.mark.parametrize("batch", [1, 3, 8, 10, 100])
def test_does_not_depend_on_the_batch(batch: int, model: GPT) -> None:
    held = heldout_loss(model, STREAM, T, CPU, torch.float32, batch=batch)
    assert held.loss == pytest.approx(heldout_loss(model, STREAM, T, CPU, torch.float32).loss, rel=1e-6)
    assert held.tokens == 10 * T + 6


def test_bf16_products_come_close(model: GPT) -> None:
    held = heldout_loss(model, STREAM, T, CPU, torch.bfloat16)
    assert held.loss == pytest.approx(plain_loss(model, list(range(11))), rel=0.01)


# --- a part of the split -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_tokens", "windows"),
    [
        (T, [0]),
        (3 * T, [0, 3, 6]),
        (4 * T + T - 1, [0, 2, 5, 7]),
        (10 * T, list(range(10))),
        (1000 * T, list(range(10))),
    ],
)
def test_max_tokens_takes_whole_windows_from_all_over_the_split(
    max_tokens: int, windows: list[int], model: GPT
) -> None:
    held = heldout_loss(model, STREAM, T, CPU, torch.float32, max_tokens=max_tokens)
    assert held.loss == pytest.approx(plain_loss(model, windows), rel=1e-6)
    assert held.tokens == len(windows) * T


@given(n=st.integers(1, 100_000), T=st.integers(1, 1024), extra=st.integers(0, 10_000_000))
def test_windows_are_distinct_and_evenly_spread(n: int, T: int, extra: int) -> None:
    windows = heldout_windows(n, T, T + extra)
    gaps = np.diff([*windows, n])  # up to the end of the split
    assert len(windows) == min(n, (T + extra) // T)
    assert windows[0] == 0
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_the_windows_are_always_the_same(model: GPT) -> None:
    torch.manual_seed(1)
    first = heldout_loss(model, STREAM, T, CPU, torch.float32, max_tokens=3 * T)
    torch.manual_seed(2)
    assert heldout_loss(model, STREAM, T, CPU, torch.float32, max_tokens=3 * T) == first


# --- harmless ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_changes_nothing(training: bool) -> None:
    model = random_model(CONFIG).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    heldout_loss(model, STREAM, T, CPU, torch.float32, max_tokens=3 * T)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(module.training == training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_leaves_gradients_that_are_there(model: GPT) -> None:
    model = random_model(CONFIG)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    heldout_loss(model, STREAM, T, CPU, torch.float32)
    assert all((p.grad == 1).all() for p in model.parameters())


def test_keeps_nothing_for_a_backward_pass(model: GPT) -> None:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        heldout_loss(model, STREAM, T, CPU, torch.float32)
    assert not kept
