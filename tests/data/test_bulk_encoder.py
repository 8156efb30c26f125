"""The bulk encoder returns tiktoken's tokens for any text."""

from __future__ import annotations

import importlib.metadata
import random

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from restomod.data import bulk_encoder
from restomod.data.bulk_encoder import BulkEncoder, _pieces
from restomod.data.tokenizer import gpt2_tokenizer
from tests.properties import examples

# known differences between tokie and tiktoken, and characters with a special role in GPT-2's pattern
TRICKY = [
    *" '\t\n\r\v\fsStTrevmlLdDaé0٣½²!?.—’|<>\x00\x1c\x85\xa0\u1680\u2003\u2028\u200b\u200d\u3000\ufeff",
    *"中あ🔥👩\u0301\u0903Ⓐⓩ🄰ⅷ\u0378\u088f\U0001e030\U00010940",
    *["'s", "'re", "'ll", "'ve", " '", "\t's", "\f's", "  ", " \n", "\n\n", "\r\n", "hello", "The", "<|endoftext|>"],
]


@pytest.fixture(scope="module")
def encoder() -> BulkEncoder:
    encoder = BulkEncoder(gpt2_tokenizer())
    if encoder._fast is None:
        pytest.skip(f"tokie {bulk_encoder.TOKIE} is not installed")
    return encoder


def assert_tiktokens(encoder: BulkEncoder, texts: list[str], reference: tiktoken.Encoding) -> None:
    for text, tokens in zip(texts, encoder.encode(texts), strict=True):
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == reference.encode_ordinary(text), repr(text[:200])


@examples(400)
@given(texts=st.lists(st.lists(st.sampled_from(TRICKY) | st.characters(), max_size=40).map("".join), max_size=5))
def test_tokens_of_tricky_texts_are_tiktokens(
    encoder: BulkEncoder, tiktoken_gpt2: tiktoken.Encoding, texts: list[str]
) -> None:
    assert_tiktokens(encoder, texts, tiktoken_gpt2)


def test_a_fuzz_corpus_encodes_as_tiktoken_does(encoder: BulkEncoder, tiktoken_gpt2: tiktoken.Encoding) -> None:
    chance = random.Random(0)
    texts = ["".join(chance.choices(TRICKY, k=chance.randrange(60))) for _ in range(20_000)]
    assert_tiktokens(encoder, texts, tiktoken_gpt2)


@pytest.mark.parametrize("tail", ["'s", " x", "", "\n", "中", "🔥'll"])
def test_long_texts_are_cut_without_changing_a_token(
    encoder: BulkEncoder, tiktoken_gpt2: tiktoken.Encoding, tail: str
) -> None:
    chance = random.Random(1)
    words = [w for w in TRICKY if w not in "\v\fⒶⓩ🄰"] + [" word"] * 20 + ["  indented", "\n\n"]
    texts = ["".join(chance.choices(words, k=30_000)) + tail for _ in range(5)]
    assert all(len(_pieces(text)) > 5 for text in texts)
    assert_tiktokens(encoder, texts, tiktoken_gpt2)


@pytest.mark.parametrize(
    "text", ["\n" * 70_000, " " * 70_000, "a" * 70_000, "ab\n^" * 20_000, "中日本" * 9_000, "\0" * 70_000]
)
def test_long_texts_that_cannot_be_cut_encode_as_tiktoken_does(
    encoder: BulkEncoder, tiktoken_gpt2: tiktoken.Encoding, text: str
) -> None:
    assert_tiktokens(encoder, ["before", text, "after"], tiktoken_gpt2)


@pytest.mark.parametrize("spaces", [2, 3, 60])
def test_a_cut_never_falls_into_a_run_of_spaces(
    encoder: BulkEncoder, tiktoken_gpt2: tiktoken.Encoding, spaces: int
) -> None:
    texts = []
    for before in range(bulk_encoder.PIECE_BYTES - 70, bulk_encoder.PIECE_BYTES + 5):
        head = "ab " * (before // 3)
        texts.append(head + "x" * (before - len(head)) + " " * spaces + "end of it " * 10)
    assert_tiktokens(encoder, texts, tiktoken_gpt2)


def test_half_a_surrogate_pair_encodes_as_tiktoken_does(encoder: BulkEncoder, tiktoken_gpt2: tiktoken.Encoding) -> None:
    assert_tiktokens(encoder, ["a \ud800 b", "plain"], tiktoken_gpt2)


def test_a_system_without_files_in_memory_encodes_the_same(
    encoder: BulkEncoder, tiktoken_gpt2: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(bulk_encoder.os, "memfd_create", raising=False)
    assert_tiktokens(encoder, ["some text", "", "more of it 中"], tiktoken_gpt2)


def test_empty_texts_have_no_tokens(encoder: BulkEncoder) -> None:
    assert [len(tokens) for tokens in encoder.encode(["", "a", ""])] == [0, 1, 0]
    assert encoder.encode([]) == []


def test_pieces_are_the_text_again_and_short(encoder: BulkEncoder) -> None:
    text = " ".join(f"{i}: word, (word)" for i in range(20_000))
    pieces = _pieces(text)
    assert b"".join(pieces).decode() == text
    assert max(map(len, pieces)) <= bulk_encoder.PIECE_BYTES


def test_ordinary_text_goes_the_fast_way(encoder: BulkEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(text: str) -> np.ndarray:
        raise AssertionError(f"tiktoken was asked for {text[:80]!r}")

    monkeypatch.setattr(encoder.tokenizer, "encode", slow, raising=True)
    encoder.encode(["It's text, isn't it?\n\nCafé, naïve; 日本語 — emoji 🔥.\n" * 2000, "x"])


def test_one_doubtful_place_does_not_slow_a_whole_text(encoder: BulkEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = encoder.tokenizer.encode

    def slow(text: str) -> np.ndarray:
        asked.append(text)
        return real(text)

    monkeypatch.setattr(encoder.tokenizer, "encode", slow)
    encoder.encode(["word " * 10_000 + "\f" + " word" * 10_000])
    assert 1 <= len(asked) <= 2
    assert sum(map(len, asked)) <= 2 * bulk_encoder.PIECE_BYTES


@pytest.mark.parametrize("release", [None, "0.1.5"])
def test_without_the_tested_tokie_tiktoken_does_the_work(
    release: str | None, monkeypatch: pytest.MonkeyPatch, tiktoken_gpt2: tiktoken.Encoding
) -> None:
    def version(name: str) -> str:
        if release is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return release

    monkeypatch.setattr(importlib.metadata, "version", version)
    plain = BulkEncoder(gpt2_tokenizer())
    assert plain._fast is None
    assert_tiktokens(plain, ["some text", "", "\t's"], tiktoken_gpt2)


@pytest.mark.slow
@pytest.mark.parametrize("context", ["{}'s", "\n{}\t{}中1"])
def test_every_code_point_encodes_as_tiktoken_does(
    encoder: BulkEncoder, tiktoken_gpt2: tiktoken.Encoding, context: str
) -> None:
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(codes), 100_000):
        texts = [context.format(*[chr(code)] * 2) for code in codes[start : start + 100_000]]
        assert_tiktokens(encoder, texts, tiktoken_gpt2)
