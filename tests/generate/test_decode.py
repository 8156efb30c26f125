"""Generation compared with full forward passes and with `transformers`, for single rows and batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from restomod.checks.device_parity import random_model
from restomod.config.run import ModelConfig, SamplingConfig
from restomod.data.tokenizer import END_OF_TEXT
from restomod.engine.device import autocast
from restomod.generate.decode import CACHE_BYTES, Decoder, Prompt, RowCache, generate, max_rows
from restomod.model.gpt import GPT, KVCache, build_model
from restomod.model.hf_io import save_model
from restomod.utils.errors import UserError
from tests.models import CPU, random_tokens
from tests.properties import examples

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=24, vocab_size=97)
PROMPTS = [[5], [96, 0, 41], [7] * 10, list(range(20, 36))]


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model(CONFIG)


def generated(
    model: GPT,
    prompts: list[list[int]],
    max_tokens: int,
    numbers: list[int] | None = None,
    stop: int | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    **how: Any,
) -> list[list[int]]:
    """New tokens of each prompt; by default greedy, without a stop token, in the dtype of the model."""
    sampling = SamplingConfig(max_tokens=max_tokens, **{"temperature": 0.0, "top_k": 0, **how})
    requests = [Prompt(prompt, number) for prompt, number in zip(prompts, numbers or [0] * len(prompts), strict=True)]
    texts: list[list[int]] = [[] for _ in prompts]
    for new in generate(model, requests, sampling, seed, dtype or model.head.dtype, stop):
        for i, token in new.items():
            texts[i].append(token)
    return texts


@torch.no_grad()
def by_full_passes(
    model: GPT, prompt: list[int], max_tokens: int, stop: int | None = None, dtype: torch.dtype | None = None
) -> list[int]:
    """Greedy generation without a cache; a context that exceeds the context length is truncated to its newest half."""
    context, new = list(prompt), []
    while len(new) < max_tokens and (not new or new[-1] != stop):
        if len(context) > model.config.n_positions:
            context = context[-(model.config.n_positions // 2) :]
        with autocast(CPU, dtype or model.head.dtype):
            new.append(int(model(torch.tensor([context]))[0, -1].argmax()))
        context.append(new[-1])
    return new


def lively(config: ModelConfig, seed: int = 0) -> GPT:
    """A model with large weights in its blocks; a small random model only repeats its last token.

    In fp64, where no two logits are so near each other that the order of a sum decides between them.
    """
    model = random_model(config, seed)
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            parameter.mul_(4.0)
    return model.double()


# --- greedy --------------------------------------------------------------------------------------------------


@examples(25)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    max_tokens=st.integers(1, 60),
    stop=st.none() | st.integers(0, 96),
    seed=st.integers(0, 3),
)
def test_a_batch_gives_the_texts_of_its_rows(lengths: list[int], max_tokens: int, stop: int | None, seed: int) -> None:
    """Texts beyond the context length, with truncated rows and rows that end at different times."""
    model = lively(CONFIG, seed)
    prompts = [random_tokens(CONFIG, 1, length, seed=i)[0].tolist() for i, length in enumerate(lengths)]
    expected = [by_full_passes(model, prompt, max_tokens, stop) for prompt in prompts]
    assert generated(model, prompts, max_tokens, stop=stop) == expected


def check_against_transformers(config: ModelConfig, lengths: list[int], max_tokens: int, folder: Path) -> None:
    """Compares a batch with `generate` of `transformers` on the exported folder: left-padded, and row by row."""
    model = lively(config)
    prompts = [random_tokens(config, 1, length, seed=i)[0].tolist() for i, length in enumerate(lengths)]
    ours = generated(model, prompts, max_tokens)
    assert len(set(ours[0])) > max_tokens // 4, "it goes round in circles"
    save_model(model, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    theirs.generation_config.eos_token_id = None
    longest = max(lengths)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    how: Any = {"do_sample": False, "max_new_tokens": max_tokens, "pad_token_id": 0}
    assert ours == theirs.generate(ids, attention_mask=mask, **how)[:, longest:].tolist()
    for prompt, text in zip(prompts, ours, strict=True):
        alone = torch.tensor([prompt])
        assert text == theirs.generate(alone, attention_mask=torch.ones_like(alone), **how)[0, len(prompt) :].tolist()


def test_a_batch_equals_transformers(tmp_path: Path) -> None:
    config = ModelConfig(n_layer=3, n_head=4, n_embd=64, n_positions=128, vocab_size=1031)
    check_against_transformers(config, [1, 40, 7, 64, 7], 64, tmp_path)


@pytest.mark.slow
def test_a_batch_equals_transformers_at_the_shape_of_124m(tmp_path: Path) -> None:
    check_against_transformers(ModelConfig(), [3, 50, 17], 40, tmp_path)


@pytest.mark.parametrize("length", [1, 23, 24, 25, 100])
def test_texts_can_exceed_the_context_length(length: int, model: GPT) -> None:
    prompt = [(7 * i) % 97 for i in range(length)]
    (new,) = generated(model, [prompt], 3 * CONFIG.n_positions)
    assert new == by_full_passes(model, prompt, 3 * CONFIG.n_positions)


def test_a_context_length_of_one_works() -> None:
    model = random_model(ModelConfig(n_layer=1, n_head=1, n_embd=16, n_positions=1, vocab_size=97))
    prompts, context = [[3], [4, 5]], 5
    expected = []
    for _ in range(6):
        context = int(model(torch.tensor([[context]]))[0, -1].argmax())
        expected.append(context)
    assert generated(model, prompts, 6)[1] == expected


# --- what is computed ----------------------------------------------------------------------------------------


class Watched:
    """Records the shapes of the inputs of a model's transformer and lm_head."""

    def __init__(self, model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.heads: list[tuple[int, ...]] = []
        forward, linear = model.transformer.forward, torch.nn.functional.linear

        def watched_forward(tokens: Tensor, *rest: Any) -> Tensor:
            self.shapes.append(tuple(tokens.shape))
            return forward(tokens, *rest)

        def watched_linear(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
            if weight.data_ptr() == model.head.data_ptr():
                self.heads.append(tuple(x.shape))
            return linear(x, weight, *rest)

        monkeypatch.setattr(model.transformer, "forward", watched_forward)
        monkeypatch.setattr("torch.nn.functional.linear", watched_linear)


def test_prefill_runs_once_then_one_position_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIG)
    watched = Watched(model, monkeypatch)
    generated(model, [PROMPTS[1], PROMPTS[3], PROMPTS[3]], 4, numbers=[0, 0, 1])
    assert watched.shapes == [(2, 15), *[(3, 1)] * 4]  # two prompts without their last tokens, then three rows
    assert watched.heads == [(3, 32)] * 4  # last positions only


def test_finished_rows_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(CONFIG)
    texts = generated(model, PROMPTS, 8)
    stop = texts[0][2]
    lengths = [text.index(stop) + 1 if stop in text else 8 for text in texts]
    assert min(lengths) < max(lengths)
    watched = Watched(model, monkeypatch)
    assert generated(model, PROMPTS, 8, stop=stop) == [t[:n] for t, n in zip(texts, lengths, strict=True)]
    assert watched.shapes[1:] == [(sum(n > i for n in lengths), 1) for i in range(max(lengths))]
    (first,) = generated(model, [PROMPTS[0]], 1)[0]
    watched.shapes.clear()
    assert generated(model, [PROMPTS[0]], 1000, stop=first) == [[first]]
    assert watched.shapes == [(1, 1)]


def test_the_cache_is_not_larger_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = RowCache.__init__
    monkeypatch.setattr(RowCache, "__init__", lambda self, *a: (made.append(a), make(self, *a))[1])
    model = random_model(CONFIG)
    generated(model, [[1, 2, 3], [4]], 5)
    generated(model, [[1, 2, 3], [4]], 50)
    assert [a[-1] for a in made] == [8, 24]


def test_the_number_of_rows_fits_into_the_cache_size() -> None:
    config = ModelConfig()
    row = 2 * 12 * 768 * 1024 * 4
    assert KVCache(config, 1, torch.device("meta"), torch.float32).keys.nbytes * 2 == row
    assert max_rows(config, 1000, 1000, torch.float32) == CACHE_BYTES // row
    assert max_rows(config, 5, 5, torch.bfloat16) == CACHE_BYTES // (row // 1024 * 10 // 2)
    assert max_rows(ModelConfig(n_layer=48, n_head=25, n_embd=1600, n_positions=10**5), 1, 10**9, torch.float32) == 1


# --- random --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"top_k": 1}, {"top_p": 1e-6}])
def test_a_single_candidate_is_greedy_at_any_temperature(how: dict[str, Any], model: GPT) -> None:
    assert generated(model, [[5]], 15, temperature=5.0, **how) == generated(model, [[5]], 15)


def test_texts_depend_on_seed_and_sample(model: GPT) -> None:
    first, again, other = (generated(model, [[5], [5]], 30, [0, 1], temperature=1.0, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert len({tuple(text) for text in (*first, *other)}) == 4


def test_prompts_do_not_share_their_random_numbers() -> None:
    model = build_model(CONFIG, 0, CPU)
    with torch.no_grad():
        model.head.zero_()  # uniform prediction
    first, second = generated(model, [[5], [6]], 30, temperature=1.0)
    assert first != second


def test_a_text_does_not_depend_on_its_batch(model: GPT) -> None:
    how: Any = {"temperature": 1.0, "top_k": 20, "top_p": 0.95, "seed": 7, "stop": 3}
    together = generated(model, PROMPTS, 60, **how)
    assert together[::-1] == generated(model, PROMPTS[::-1], 60, **how)
    assert together == [generated(model, [prompt], 60, **how)[0] for prompt in PROMPTS]


def test_a_shorter_text_is_a_prefix_of_a_longer_one(model: GPT) -> None:
    longer = generated(model, PROMPTS, 60, temperature=1.0)
    assert generated(model, PROMPTS, 21, temperature=1.0) == [text[:21] for text in longer]


def test_global_random_state_is_neither_used_nor_changed(model: GPT) -> None:
    texts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        texts.append(generated(model, [[5]], 10, temperature=1.0))
        assert torch.equal(torch.get_rng_state(), before)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_not_changed(dtype: torch.dtype) -> None:
    model = random_model(CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generated(model, [[5]], 30, temperature=1.0, dtype=dtype)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert model.training
    assert all(p.grad is None and p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_no_graph_is_kept_for_a_backward_pass(model: GPT) -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        generated(model, [[5]], 5)
    assert not kept


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_of_the_vocabulary_is_never_sampled(temperature: float, dtype: torch.dtype) -> None:
    model = build_model(ModelConfig(n_layer=1, n_head=1, n_embd=16, n_positions=16), 0, CPU)
    with torch.no_grad():
        model.head[50257:] = 1000.0 * torch.randn(47, 16, generator=torch.Generator().manual_seed(0))
    rows = generated(model, [[END_OF_TEXT]] * 4, 4, [0, 1, 2, 3], temperature=temperature, dtype=dtype)
    assert max(map(max, rows)) < 50257


def test_nan_weights_are_a_user_error() -> None:
    model = random_model(CONFIG)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        generated(model, [[5]], 1)


# --- bf16 ----------------------------------------------------------------------------------------------------


def test_casting_once_gives_the_logits_of_autocast_bit_for_bit(model: GPT) -> None:
    tokens = random_tokens(CONFIG, 1, 9)
    decoder = Decoder(model, torch.bfloat16)
    cache = RowCache(CONFIG, 1, CPU, torch.bfloat16, 24)
    plain = KVCache(CONFIG, 1, CPU, torch.bfloat16)
    with torch.no_grad():
        decoder.prefill([tokens[0, :8].tolist()], cache, [0])
        with autocast(CPU, torch.bfloat16):
            model(tokens[:, :8], plain)
            plain.length = 8
            expected = model(tokens[:, 8:], plain)[:, -1]
        assert torch.equal(decoder.step([int(tokens[0, 8])], cache), expected)


def test_in_bf16_only_linear_layers_are_copied(model: GPT) -> None:
    copy = dict(Decoder(model, torch.bfloat16).transformer.named_parameters())
    for name, parameter in model.transformer.named_parameters():
        linear = ".attn." in name or ".mlp." in name
        assert copy[name].dtype == (torch.bfloat16 if linear else torch.float32), name
        assert linear or copy[name].data_ptr() == parameter.data_ptr(), name


def test_column_major_weights_have_the_same_values(model: GPT) -> None:
    few, many = (Decoder(model, torch.float32, rows) for rows in (7, 8))
    assert few.transformer is model.transformer
    assert few.head.stride() == (CONFIG.n_embd, 1)
    assert many.head.stride() == (1, CONFIG.vocab_size)
    own, shared = many.transformer.h[0].mlp.c_fc, model.transformer.h[0].mlp.c_fc
    assert own.weight.stride() == (1, own.weight.shape[0])
    assert own.bias.data_ptr() == shared.bias.data_ptr(), "all but matrices of linear layers is shared"
    prompts = [[5, 6, 7], [8], *PROMPTS, [1, 2], [3, 4]]
    assert len(prompts) == 8
    assert generated(model, prompts, 20) == [generated(model, [prompt], 20)[0] for prompt in prompts]


def test_bf16_works_in_batches_and_beyond_the_context_length(model: GPT) -> None:
    rows = generated(model, PROMPTS, 60, temperature=1.0, dtype=torch.bfloat16)
    assert [len(row) for row in rows] == [60] * 4
    assert all(0 <= token < 97 for row in rows for token in row)
