"""Plain text with a separator has the documents and tokens of `str.split` on the complete text."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from restomod.config.prepare import PrepareConfig
from restomod.config.run import DataConfig
from restomod.data import readers, records, streams
from restomod.data.documents import Document, LongDocument
from restomod.data.prepare.run import prepare_folder
from restomod.data.prepare.text_cache import prepare_text
from restomod.data.read_counts import ReadCounts
from restomod.data.readers import read_documents
from restomod.data.records import split_documents
from restomod.data.tokenizer import Tokenizer
from restomod.utils.errors import UserError

END = "<|endoftext|>"
STORIES = f"Once upon a time.\nIt slept.\n{END}\n\nA dog, naïve 🔥.\r\n{END}\r\n{END}Three birds\n\nsang.{END}last\n"


def split(text: str, at: str) -> list[str]:
    """Return the reference: `str.split` on the complete text."""
    return [part for part in (part.strip("\r\n") for part in text.split(at)) if part]


text = st.lists(st.sampled_from(["a", "aa", "b", "\n", "\r\n", "<|", "|>", "END", "EN", "D", " "]), max_size=30)


@given(text, st.sampled_from(["END", "aa", "a", "\n\n", "\n", "aEND"]), st.integers(1, 7), st.sampled_from([0, 3, 99]))
def test_documents_are_those_of_the_whole_text_split(pieces: list[str], at: str, size: int, long_text: int) -> None:
    whole = "".join(pieces)
    parts = [whole[i : i + size] for i in range(0, len(whole), size)]
    counts = ReadCounts()
    found = ["".join(d.parts()) for d in split_documents("a", parts, at, long_text, counts)]
    assert found == split(whole, at)
    assert (counts.separators or 0) == whole.count(at)


def test_a_long_document_can_be_read_again_and_its_neighbours_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "PIECE_CHARACTERS", 5)
    parts = ["short\nEND\n", "long " * 9 + "é\r\nx", "🔥" * 9, "END", "another long one"]
    documents = list(split_documents("a.txt", parts, "END", 10, ReadCounts()))
    assert [type(d) for d in documents] == [Document, LongDocument, LongDocument]
    assert [d.name for d in documents] == [f"a.txt, document {n}" for n in (1, 2, 3)]
    for _ in range(2):
        assert ["".join(d.parts()) for d in documents] == split("".join(parts), "END")


@pytest.mark.parametrize("compressed", [False, True])
def test_only_plain_text_is_split(tmp_path: Path, compressed: bool) -> None:
    content = STORIES.encode()
    (tmp_path / "a.txt").write_bytes(gzip.compress(content) if compressed else content)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": f"a{END}b"}))
    found = [
        "".join(d.parts()) for name in ("a.txt", "b.jsonl") for d in read_documents(tmp_path / name, separator=END)
    ]
    assert found == [*split(STORIES, END), f"a{END}b"]


@pytest.mark.parametrize("tiny_pieces", [False, True])
def test_the_tokens_are_tiktokens_of_the_split_text(
    tmp_path: Path,
    tokenizer: Tokenizer,
    tiktoken_gpt2: tiktoken.Encoding,
    tiny_pieces: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Test `prepare` and `train`, also with every document treated as a long one."""
    if tiny_pieces:
        monkeypatch.setattr(readers, "LONG_TEXT", 3)
        monkeypatch.setattr(streams, "READ_BYTES", 7)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_bytes(STORIES.encode())
    documents = [[tokenizer.end_of_text, *tiktoken_gpt2.encode_ordinary(d)] for d in split(STORIES, END)]
    made = prepare_folder(
        (str(tmp_path / "text"),), PrepareConfig(val_fraction=0.0, separator=END), tmp_path / "out", workers=1
    )
    config = DataConfig(
        source="text", path=str(tmp_path / "text"), separator=END, val_fraction=0.0, cache=str(tmp_path / "cache")
    )
    for dataset in (made, prepare_text(config)):
        assert dataset.train.read(0, len(dataset.train)).tolist() == [t for d in documents for t in d]
        assert dataset.manifest["documents"] == len(documents)
        assert dataset.manifest["splits"]["train"]["text_bytes"] == len("".join(split(STORIES, END)).encode())
        assert dataset.manifest["read"] == {
            "files": {"plain text": {".txt": 1}},
            "bytes": {"plain text": len(STORIES.encode())},
            "separators": 4,
        }


def test_an_empty_or_useless_separator_is_refused() -> None:
    for make in (lambda: PrepareConfig(separator=""), lambda: DataConfig(source="text", path="a", separator="")):
        with pytest.raises(UserError, match="separator is empty"):
            make()
    with pytest.raises(UserError, match=r"data\.separator needs data\.source text"):
        DataConfig(source="tinyshakespeare", separator="X")


def test_literals_are_ordinary_tokens(tokenizer: Tokenizer, tiktoken_gpt2: tiktoken.Encoding) -> None:
    assert tokenizer.encode(STORIES).tolist() == tiktoken_gpt2.encode_ordinary(STORIES)
    special = tiktoken_gpt2.encode(STORIES, allowed_special="all")
    assert tokenizer.encode_special(STORIES).tolist() == special
    assert np.count_nonzero(np.array(special) == tokenizer.end_of_text) == STORIES.count(END)


def test_byte_order_marks_of_files_that_were_put_together_are_no_text(tmp_path: Path) -> None:
    stories = ["\ufeffone", "\ufefftwo", "three \ufeff in it"]
    (tmp_path / "a.txt").write_text(f"\n{END}\n".join(stories))
    read = read_documents(tmp_path / "a.txt", separator=END)
    assert ["".join(document.parts()) for document in read] == ["one", "two", "three \ufeff in it"]
