"""Generated texts: end, reproducibility, streaming, prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
from hypothesis import given
from hypothesis import strategies as st

from restomod.checks.device_parity import random_model
from restomod.config.run import ModelConfig, OptimConfig, SamplingConfig
from restomod.data.tokenizer import END_OF_TEXT, Tokenizer, gpt2_tokenizer
from restomod.engine.optimizer import build_optimizer
from restomod.generate import decode as engine
from restomod.generate.decode import Prompt, generate
from restomod.generate.text import choose_prompts, continuations, prompt_tokens, sample_texts, stream_text, stream_texts
from restomod.model.gpt import GPT, build_model
from restomod.model.hf_io import save_model
from restomod.utils.errors import UserError
from tests.models import CPU
from tests.trainee import save_checkpoint

FP32 = torch.float32
SMALL = ModelConfig(n_layer=1, n_head=1, n_embd=16, n_positions=16)


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model(SMALL)


@pytest.fixture(scope="module")
def babbler() -> GPT:
    """A model that always predicts " the" (262) and "<|endoftext|>" with probability 1/2 each."""
    model = build_model(ModelConfig(n_layer=1, n_head=1, n_embd=8, n_positions=16), 0, CPU)
    with torch.no_grad():
        model.head.zero_()
        model.head[[262, END_OF_TEXT]] = 50.0
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
    return model


# --- whole texts ---------------------------------------------------------------------------------------------


def test_a_text_stops_at_endoftext(babbler: GPT, tokenizer: Tokenizer) -> None:
    sampling = SamplingConfig(max_tokens=30, temperature=1.0, top_k=2)
    (texts,) = continuations(babbler, tokenizer, ["once"], 50, sampling, seed=0, dtype=FP32)
    lengths = [text.count(" the") for text in texts]
    assert all(text == " the" * n for text, n in zip(texts, lengths, strict=True))
    assert lengths.count(0) in range(13, 38)  # half of 50, within 3.5 standard deviations
    assert 1 < max(lengths) < 30


def test_a_text_without_endoftext_has_the_requested_length(babbler: GPT, tokenizer: Tokenizer) -> None:
    model = build_model(babbler.config, 0, CPU)
    model.load_state_dict(babbler.state_dict())
    with torch.no_grad():
        model.head[END_OF_TEXT] = 0.0
    sampling = SamplingConfig(max_tokens=30)
    assert continuations(model, tokenizer, ["once"], 1, sampling, seed=0, dtype=FP32) == [[" the" * 30]]


def test_an_empty_prompt_starts_a_document(model: GPT, tokenizer: Tokenizer) -> None:
    greedy = SamplingConfig(max_tokens=5, temperature=0)
    ids = [new[0] for new in generate(model, [Prompt([END_OF_TEXT], 0)], greedy, 0)]
    assert END_OF_TEXT not in ids
    assert continuations(model, tokenizer, [""], 1, greedy, 0, FP32) == [[tokenizer.decode(ids)]]


def test_texts_are_grouped_by_prompt_and_independent(model: GPT, tokenizer: Tokenizer) -> None:
    how: Any = (2, SamplingConfig(max_tokens=20, temperature=1.0), 3, FP32)
    prompts = ["one", "another, longer one", ""]
    texts = continuations(model, tokenizer, prompts, *how)
    assert [len(set(of_prompt)) for of_prompt in texts] == [2, 2, 2]
    assert texts == [continuations(model, tokenizer, [prompt], *how)[0] for prompt in prompts]


def test_several_batches_give_the_texts_of_one(
    model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: Any = (["one", "another, longer one", ""], 3, SamplingConfig(max_tokens=12, temperature=1.0), 3, FP32)
    together = continuations(model, tokenizer, *how)
    batches = []
    monkeypatch.setattr(engine, "CACHE_BYTES", 2 * 2 * 16 * 16 * 4)  # two rows of 16 positions
    monkeypatch.setattr(
        "restomod.generate.text.generate",
        lambda model, requests, *a: (batches.append(len(requests)), generate(model, requests, *a))[1],
    )
    assert continuations(model, tokenizer, *how) == together
    assert batches == [2, 2, 2, 2, 1]


def test_no_prompts_give_no_texts(model: GPT, tokenizer: Tokenizer) -> None:
    assert continuations(model, tokenizer, [], 1, SamplingConfig(), 0, FP32) == []


# --- pieces --------------------------------------------------------------------------------------------------


def saying(tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every generation return ``tokens``."""
    monkeypatch.setattr("restomod.generate.text.generate", lambda *a: ({0: token} for token in tokens))


def pieces(model: GPT, tokenizer: Tokenizer) -> list[str]:
    return list(stream_text(model, tokenizer, "", 0, SamplingConfig(), 0, FP32))


def test_incomplete_characters_are_not_streamed(
    model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tokenizer.encode("a🦜é").tolist()
    assert [tokenizer.decode_bytes([token]) for token in tokens] == [b"a", b"\xf0\x9f", b"\xa6", b"\x9c", b"\xc3\xa9"]
    saying([*tokens, END_OF_TEXT], monkeypatch)
    assert pieces(model, tokenizer) == ["a", "", "", "🦜", "é", ""]


def test_an_incomplete_last_character_is_replaced(
    model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    saying(tokenizer.encode("a🦜").tolist()[:-1], monkeypatch)
    assert pieces(model, tokenizer) == ["a", "", "", "�"]


@given(st.lists(st.integers(0, 50255)))
def test_streamed_pieces_join_to_the_text(tokens: list[int]) -> None:
    tokenizer = gpt2_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        saying(tokens, patch)
        assert "".join(pieces(random_model(SMALL), tokenizer)) == tokenizer.decode(tokens)


def test_streamed_texts_equal_those_of_a_batch(model: GPT, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    how: Any = (str(tmp_path), ["one", ""], 2, SamplingConfig(max_tokens=20, temperature=1.0), 3, "cpu", "fp32")
    whole = [text for texts in sample_texts(*how) for text in texts]
    assert ["".join(text) for text in stream_texts(*how)] == whole


# --- prompts and models --------------------------------------------------------------------------------------


def test_prompts_are_the_lines_of_a_file_that_are_not_blank(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeff first\r\n\r\n  second é \n \nthird".encode())
    assert choose_prompts((), str(tmp_path / "p.txt"), ("",)) == (" first", "  second é ", "third")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85"])
def test_only_newlines_end_a_prompt(tmp_path: Path, inside: str, newline: str) -> None:
    (tmp_path / "p.txt").write_bytes(newline.join([f"one{inside}prompt", "two", ""]).encode())
    assert choose_prompts((), str(tmp_path / "p.txt"), ("",)) == (f"one{inside}prompt", "two")


@pytest.mark.parametrize("prompt", ["<|endoftext|>", "a<|endoftext|>b", "a <|endoftext|>\n<|endoftext|>", "<|endof"])
def test_endoftext_in_a_prompt_becomes_the_token(
    prompt: str, tokenizer: Tokenizer, tiktoken_gpt2: tiktoken.Encoding
) -> None:
    """nanoGPT and transformers do the same."""
    assert prompt_tokens(tokenizer, prompt) == tiktoken_gpt2.encode(prompt, allowed_special={"<|endoftext|>"})


def test_given_prompts_replace_the_default() -> None:
    assert choose_prompts(("a", ""), None, ("b",)) == ("a", "")
    assert choose_prompts((), None, ("b",)) == ("b",)


def test_a_huge_prompt_file_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "prompts.txt", "wb") as f:
        f.truncate(2**40)
    with pytest.raises(UserError, match=r"prompts\.txt is too large"):
        choose_prompts((), str(tmp_path / "prompts.txt"), ())


@pytest.mark.parametrize("content", [None, b"", b"\n \n\t\n"])
def test_no_file_and_a_file_without_prompts_are_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(UserError, match="--prompt-file"):
        choose_prompts((), "" if content is None else str(tmp_path / "p.txt"), ("",))


def test_sampling_from_a_run_uses_its_newest_checkpoint(tokenizer: Tokenizer, tmp_path: Path) -> None:
    sampling = SamplingConfig(max_tokens=8)
    for step, seed in ((0, 1), (5, 2)):
        model = random_model(SMALL, seed)
        optimizer = build_optimizer(model, OptimConfig())
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.update(1.0, torch.tensor(1.0), torch.tensor(False))
        save_checkpoint(tmp_path, step, model, optimizer)
    expected = continuations(model, tokenizer, ["def "], 2, sampling, 3, FP32)
    assert sample_texts(str(tmp_path), ["def "], 2, sampling, 3, "cpu", "fp32") == expected
    first = str(tmp_path / "checkpoints" / "step_000000")
    assert sample_texts(first, ["def "], 2, sampling, 3, "cpu", "fp32") != expected
