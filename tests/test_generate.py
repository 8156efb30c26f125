"""Sampling against full forward passes, against `transformers`, and against the distribution it should draw from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from restomod.config import ModelConfig, OptimConfig, SamplingConfig
from restomod.data.tokenizer import END_OF_TEXT, Tokenizer
from restomod.errors import UserError
from restomod.generate import continuations, generate, next_tokens, sample
from restomod.model.gpt import GPT, build_model
from restomod.train.optimizer import build_optimizer
from restomod.train.parity import random_model
from tests.models import CPU, to_transformers
from tests.train.trainee import save_checkpoint

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=24, vocab_size=97)
PROMPTS = [[5], [96, 0, 41], [7] * 10, list(range(20, 36))]


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model(CONFIG)


def generated(model: GPT, prompt: list[int], max_tokens: int, n_samples: int = 1, **how: Any) -> Tensor:
    """New tokens, (n_samples, max_tokens); greedy unless told otherwise."""
    how = {"temperature": 0.0, "top_k": 0, "seed": 0, **how}
    return torch.stack(list(generate(model, prompt, n_samples, max_tokens, **how)), dim=1)


@torch.no_grad()
def greedy_by_full_passes(model: GPT, prompt: list[int], max_tokens: int) -> list[int]:
    """Without a cache: a context that is longer than the positions is cut to its newest half."""
    context, new = list(prompt), []
    for _ in range(max_tokens):
        if len(context) > model.config.n_positions:
            context = context[-(model.config.n_positions // 2) :]
        new.append(int(model(torch.tensor([context]))[0, -1].argmax()))
        context.append(new[-1])
    return new


# --- greedy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_those_of_full_forward_passes(prompt: list[int], model: GPT) -> None:
    n = CONFIG.n_positions - len(prompt)
    assert generated(model, prompt, n)[0].tolist() == greedy_by_full_passes(model, prompt, n)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_those_of_transformers(prompt: list[int], model: GPT) -> None:
    theirs = to_transformers(model)
    theirs.generation_config.eos_token_id = None
    n = CONFIG.n_positions - len(prompt)
    ids = torch.tensor([prompt])
    text = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n, pad_token_id=0)
    assert generated(model, prompt, n)[0].tolist() == text[0, len(prompt) :].tolist()


@pytest.mark.parametrize("length", [1, 23, 24, 25, 100])
def test_text_goes_on_past_the_models_positions(length: int, model: GPT) -> None:
    prompt = [(7 * i) % 97 for i in range(length)]
    new = generated(model, prompt, 3 * CONFIG.n_positions)[0]
    assert ((new >= 0) & (new < 97)).all()
    assert new.tolist() == greedy_by_full_passes(model, prompt, 3 * CONFIG.n_positions)


def test_all_greedy_samples_are_equal(model: GPT) -> None:
    rows = generated(model, [5], 10, n_samples=3)
    assert rows.shape == (3, 10)
    assert (rows == rows[0]).all()


# --- random --------------------------------------------------------------------------------------------------


def test_top_1_is_greedy_at_any_temperature(model: GPT) -> None:
    assert torch.equal(generated(model, [5], 15, temperature=5.0, top_k=1), generated(model, [5], 15))


def test_a_seed_repeats(model: GPT) -> None:
    first, second = (generated(model, [5], 30, n_samples=2, temperature=1.0, seed=3) for _ in range(2))
    assert torch.equal(first, second)


def test_another_seed_differs(model: GPT) -> None:
    first, second = (generated(model, [5], 30, temperature=1.0, seed=seed) for seed in (3, 4))
    assert not torch.equal(first, second)


def test_samples_of_one_call_differ(model: GPT) -> None:
    first, second = generated(model, [5], 30, n_samples=2, temperature=1.0)
    assert not torch.equal(first, second)


def test_global_random_state_is_neither_used_nor_changed(model: GPT) -> None:
    texts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        texts.append(generated(model, [5], 10, temperature=1.0))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(texts[0], texts[1])


def test_the_model_is_not_changed() -> None:
    model = random_model(CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generated(model, [5], 30, temperature=1.0)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_nothing_is_kept_for_a_backward_pass(model: GPT) -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        generated(model, [5], 5)
    assert not kept


def test_bf16_products_work(model: GPT) -> None:
    rows = generated(model, [5], 60, n_samples=2, temperature=1.0, dtype=torch.bfloat16)
    assert ((rows >= 0) & (rows < 97)).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_padded_rows_are_never_drawn_even_where_they_are_huge(temperature: float) -> None:
    model = build_model(ModelConfig(n_layer=1, n_head=1, n_embd=16, n_positions=16), 0, CPU)
    with torch.no_grad():
        model.head[50257:] = 1000.0 * torch.randn(47, 16, generator=torch.Generator().manual_seed(0))
    rows = generated(model, [END_OF_TEXT], 4, n_samples=4, temperature=temperature)
    assert (rows < 50257).all()


# --- one draw ------------------------------------------------------------------------------------------------


def draws(logits: list[float], temperature: float, top_k: int, n: int = 20_000) -> Tensor:
    """How often each token is drawn."""
    tokens = next_tokens(torch.tensor([logits] * n), temperature, top_k, torch.Generator().manual_seed(0))
    return torch.bincount(tokens, minlength=len(logits))


LOGITS = [0.3, -1.0, 2.0, 0.0, 1.1, -0.4, 0.9, 0.25]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 3, 8, 1000])
def test_draws_follow_the_softmax_of_the_likeliest_tokens(temperature: float, top_k: int) -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    likeliest = logits.argsort(descending=True)[: top_k or None]
    weights = torch.zeros(8, dtype=torch.float64)
    weights[likeliest] = (logits[likeliest] / temperature).exp()
    expected = 20_000 * weights / weights.sum()
    counts = draws(LOGITS, temperature, top_k)
    assert (counts[expected == 0] == 0).all()
    drawn = expected > 0
    chi_square = ((counts - expected)[drawn] ** 2 / expected[drawn]).sum()
    assert chi_square < 24.3  # exceeded once in 1000 at 7 degrees of freedom, more rarely at fewer


def test_temperature_0_takes_the_likeliest() -> None:
    assert draws(LOGITS, 0.0, 0, n=10).tolist() == [0, 0, 10, 0, 0, 0, 0, 0]


def test_each_row_is_drawn_from_its_own_logits() -> None:
    logits = torch.full((5, 9), -1e9)
    logits[range(5), [8, 0, 3, 3, 1]] = 1e9
    assert next_tokens(logits, 1.0, 0, torch.Generator().manual_seed(0)).tolist() == [8, 0, 3, 3, 1]


# --- text ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def babbler() -> GPT:
    """A model that says " the" (262) or "<|endoftext|>", each half of the time, whatever it reads."""
    model = build_model(ModelConfig(n_layer=1, n_head=1, n_embd=8, n_positions=16), 0, CPU)
    with torch.no_grad():
        model.head.zero_()
        model.head[[262, END_OF_TEXT]] = 50.0
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
    return model


def test_a_text_stops_at_endoftext(babbler: GPT, tokenizer: Tokenizer) -> None:
    sampling = SamplingConfig(max_tokens=30, temperature=1.0, top_k=2)
    texts = continuations(babbler, tokenizer, "once", 50, sampling, seed=0, dtype=torch.float32)
    lengths = [text.count(" the") for text in texts]
    assert all(text == " the" * n for text, n in zip(texts, lengths, strict=True))
    assert lengths.count(0) in range(13, 38)  # half of 50, within 3.5 standard deviations
    assert 1 < max(lengths) < 30


def test_a_text_without_endoftext_has_the_length_asked_for(babbler: GPT, tokenizer: Tokenizer) -> None:
    model = build_model(babbler.config, 0, CPU)
    model.load_state_dict(babbler.state_dict())
    with torch.no_grad():
        model.head[END_OF_TEXT] = 0.0
    sampling = SamplingConfig(max_tokens=30)
    assert continuations(model, tokenizer, "once", 1, sampling, seed=0, dtype=torch.float32) == [" the" * 30]


def test_an_empty_prompt_starts_a_document(tokenizer: Tokenizer) -> None:
    model = random_model(ModelConfig(n_layer=1, n_head=1, n_embd=16, n_positions=16))
    greedy = SamplingConfig(max_tokens=5, temperature=0)
    ids = generated(model, [END_OF_TEXT], 5)[0].tolist()
    assert END_OF_TEXT not in ids
    assert continuations(model, tokenizer, "", 1, greedy, 0, torch.float32) == [tokenizer.decode(ids)]


def test_sampling_from_a_run_uses_its_newest_checkpoint(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config, sampling = ModelConfig(n_layer=1, n_head=1, n_embd=16, n_positions=16), SamplingConfig(max_tokens=8)
    for step, seed in ((0, 1), (5, 2)):
        model = random_model(config, seed)
        optimizer = build_optimizer(model, OptimConfig())
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step()
        save_checkpoint(tmp_path, step, model, optimizer)
    expected = continuations(model, tokenizer, "def ", 2, sampling, 3, torch.float32)
    assert sample(tmp_path, "def ", 2, sampling, 3, "cpu", "fp32") == expected
    assert sample(tmp_path / "checkpoints" / "step_000000", "def ", 2, sampling, 3, "cpu", "fp32") != expected


def test_sampling_from_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    model = random_model(CONFIG)
    folder = save_checkpoint(tmp_path, 0, model, build_optimizer(model, OptimConfig()))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # still a safetensors file
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        sample(tmp_path, "def ", 1, SamplingConfig(), 0, "cpu", "fp32")
