"""Validation loss compared with a direct computation; the evaluation does not change the model."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from restomod.checks.device_parity import random_model
from restomod.config.run import ModelConfig
from restomod.data.dataset import Dataset, Part, TokenStream
from restomod.data.tokenizer import Tokenizer
from restomod.engine.distributed import join_processes
from restomod.evals.validation import ValidationLoss, dataset_loss, validation_loss, validation_windows
from restomod.model.gpt import GPT
from tests.models import CPU
from tests.processes import results

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=97)
T = 16
TEXT = np.random.default_rng(0).integers(97, size=10 * T + 7).astype(np.uint16)  # 10 windows and a shorter last one
STREAM = TokenStream([TEXT[:50], TEXT[50:]])  # windows cross shard boundaries


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model(CONFIG)


@torch.no_grad()
def plain_loss(model: GPT, windows: list[int]) -> float:
    """Compute the losses window by window from all logits; window 10 is the shorter last one."""
    losses = []
    for w in windows:
        tokens = torch.from_numpy(TEXT[w * T : w * T + T + 1].astype(np.int64))
        losses += F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="none").double().tolist()
    return sum(losses) / len(losses)


def test_equals_cross_entropy_over_all_windows(model: GPT) -> None:
    found = validation_loss(model, STREAM, T, CPU, torch.float32)
    assert found.loss == pytest.approx(plain_loss(model, list(range(11))), rel=1e-6)
    assert found.tokens == 10 * T + 6


@pytest.mark.parametrize("batch", [1, 3, 8, 10, 100])
def test_does_not_depend_on_the_batch(batch: int, model: GPT) -> None:
    found = validation_loss(model, STREAM, T, CPU, torch.float32, batch=batch)
    assert found.loss == pytest.approx(validation_loss(model, STREAM, T, CPU, torch.float32).loss, rel=1e-6)
    assert found.tokens == 10 * T + 6


def test_bf16_matmuls_are_close(model: GPT) -> None:
    found = validation_loss(model, STREAM, T, CPU, torch.bfloat16)
    assert found.loss == pytest.approx(plain_loss(model, list(range(11))), rel=0.01)


def by_three(batch: int) -> ValidationLoss:
    with join_processes() as processes:
        return validation_loss(random_model(CONFIG), STREAM, T, CPU, torch.float32, batch=batch, processes=processes)


@pytest.mark.parametrize("count", [2, 3])
def test_the_number_of_processes_changes_no_bit(count: int, model: GPT) -> None:
    alone = validation_loss(model, STREAM, T, CPU, torch.float32, batch=2)
    assert results(count, by_three, 2) == [alone] * count


@pytest.mark.parametrize("context", [1, 5, 8])
@torch.no_grad()
def test_other_sequence_lengths_also_cover_every_token(context: int, model: GPT) -> None:
    found = validation_loss(model, STREAM, context, CPU, torch.float32)
    tokens, losses = torch.from_numpy(TEXT.astype(np.int64)), []
    for start in range(0, len(TEXT) - 1, context):
        x = tokens[start : start + context][: len(TEXT) - 1 - start]
        y = tokens[start + 1 : start + 1 + len(x)]
        losses.append(F.cross_entropy(model(x[None])[0], y, reduction="none").double().tolist())
    assert found.tokens == len(TEXT) - 1 == sum(map(len, losses))
    assert found.loss == pytest.approx(sum(map(sum, losses)) / found.tokens, rel=1e-6)
    expected = [np.mean([row[t] for row in losses if t < len(row)]) for t in range(context)]
    assert found.by_position == pytest.approx(expected, rel=1e-6)


def test_perplexity_and_bits_per_byte_follow_from_the_loss(model: GPT, tokenizer: Tokenizer) -> None:
    found = validation_loss(model, STREAM, T, CPU, torch.float32, tokenizer=tokenizer)
    text = tokenizer._encoding.decode_bytes(TEXT[1:].tolist())  # targets
    assert found.bytes == len(text)
    assert found.perplexity == pytest.approx(np.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(found.loss * (len(TEXT) - 1) / np.log(2) / len(text))
    assert validation_loss(model, STREAM, T, CPU, torch.float32).bits_per_byte is None


def test_nan_losses_are_not_skipped() -> None:
    model = random_model(CONFIG)
    with torch.no_grad():
        model.head[3, 3] = torch.nan
    assert np.isnan(validation_loss(model, STREAM, T, CPU, torch.float32).loss)


def test_the_loss_of_a_mix_is_weighted_by_share(model: GPT) -> None:
    streams = {"a": STREAM, "b": TokenStream([TEXT[:40]]), "none": TokenStream([TEXT[:0]])}
    parts = tuple(
        Part(name, cast(Dataset, SimpleNamespace(val=stream)), Fraction(n, 8))
        for (name, stream), n in zip(streams.items(), (1, 3, 4), strict=True)
    )
    mixed = cast(Dataset, SimpleNamespace(sources=parts, parts=parts))
    a, b = (validation_loss(model, streams[name], T, CPU, torch.float32) for name in "ab")
    found = dataset_loss(model, mixed, T, CPU, torch.float32)
    assert found is not None
    assert found.sources == {"a": a.loss, "b": b.loss}
    assert found.loss == pytest.approx(a.loss / 4 + b.loss * 3 / 4)
    assert found.by_position[3] == pytest.approx(a.by_position[3] / 4 + b.by_position[3] * 3 / 4)
    assert found.tokens == a.tokens + b.tokens
    assert dataset_loss(model, cast(Dataset, SimpleNamespace(sources=parts[2:])), T, CPU, torch.float32) is None
    few = dataset_loss(model, mixed, T, CPU, torch.float32, max_tokens=8 * T)
    assert few is not None
    assert few.tokens == (2 + 2) * T  # 2 of 8 windows, and all 2 windows of the other source (limit: 6)


def test_bits_per_byte_of_a_mix_are_those_of_text_drawn_by_its_shares(model: GPT, tokenizer: Tokenizer) -> None:
    """Halves that are weighted alike: the same as of one text that holds the sources in the proportion of the shares.

    The sources differ in loss, in bytes per token and in size, and the shares differ from the sizes.
    """
    singles = np.resize(np.arange(40, 90, 7), 3 * T + 1).astype(np.uint16)  # tokens of one byte
    words = np.resize(TEXT, 9 * T + 1)
    many = np.where(words < 90, words + 400, words)  # tokens of several letters
    model = random_model(dataclasses.replace(CONFIG, vocab_size=500))
    streams = {"singles": TokenStream([singles]), "words": TokenStream([many.astype(np.uint16)])}
    a, b = (validation_loss(model, s, T, CPU, torch.float32, tokenizer=tokenizer) for s in streams.values())
    assert a.bits_per_byte is not None
    assert b.bits_per_byte is not None
    assert b.bytes / b.tokens > 1.5 * a.bytes / a.tokens
    for share in (Fraction(1, 2), Fraction(9, 10), Fraction(1, 4)):
        parts = tuple(
            Part(name, cast(Dataset, SimpleNamespace(val=stream)), part)
            for (name, stream), part in zip(streams.items(), (share, 1 - share), strict=True)
        )
        mixed = cast(Dataset, SimpleNamespace(sources=parts, parts=parts))
        found = dataset_loss(model, mixed, T, CPU, torch.float32, tokenizer=tokenizer)
        assert found is not None
        # N tokens of the first and M of the second source; N : M is the ratio of the shares
        N, M = float(share) * 1e6, float(1 - share) * 1e6
        nats, n_bytes = N * a.loss + M * b.loss, N * a.bytes / a.tokens + M * b.bytes / b.tokens
        assert found.bits_per_byte == pytest.approx(nats / np.log(2) / n_bytes)
        assert found.loss == pytest.approx(nats / (N + M))
        assert found.bytes_per_token == pytest.approx(n_bytes / (N + M))
        assert min(a.bits_per_byte, b.bits_per_byte) <= found.bits_per_byte <= max(a.bits_per_byte, b.bits_per_byte)
        # part of each split, in proportion to its share
        few = dataset_loss(model, mixed, T, CPU, torch.float32, max_tokens=4 * T, tokenizer=tokenizer)
        assert few is not None
        assert few.to_dict()["bits_per_byte"] == pytest.approx(few.loss / np.log(2) / few.bytes_per_token)


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
def test_max_tokens_selects_complete_windows_spread_over_the_split(
    max_tokens: int, windows: list[int], model: GPT
) -> None:
    found = validation_loss(model, STREAM, T, CPU, torch.float32, max_tokens=max_tokens)
    assert found.loss == pytest.approx(plain_loss(model, windows), rel=1e-6)
    assert found.tokens == len(windows) * T


@given(n=st.integers(1, 100_000), T=st.integers(1, 1024), extra=st.integers(0, 10_000_000))
def test_windows_are_distinct_and_evenly_spread(n: int, T: int, extra: int) -> None:
    windows = validation_windows(n, T, T + extra)
    gaps = np.diff([*windows, n])  # up to the end of the split
    assert len(windows) == min(n, (T + extra) // T)
    assert windows[0] == 0
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


# --- harmless ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_does_not_change_the_model(training: bool) -> None:
    """Weights, gradients, training mode and random states are unchanged, and no graph is kept for a backward pass."""
    model = random_model(CONFIG).train(training)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        validation_loss(model, STREAM, T, CPU, torch.float32, max_tokens=3 * T)
    assert not kept
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(module.training == training for module in model.modules())
    assert all(p.requires_grad and (p.grad == 1).all() for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (np.random.get_state()[1] == numpy_state).all()
