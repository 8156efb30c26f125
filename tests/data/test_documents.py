"""The pieces of a long text do not change its hash or its tokens."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from restomod.data import documents as module
from restomod.data.bulk_encoder import BulkEncoder
from restomod.data.documents import Document, LongDocument, can_cut, character_class, pieces, split_hash
from restomod.data.prepare.worker import document_batches, encoded
from restomod.data.tokenizer import gpt2_tokenizer
from restomod.utils.errors import UserError
from tests.data.test_bulk_encoder import TRICKY
from tests.properties import examples

AT_CUTS = [
    "word",
    "don't",
    "we'll",
    "x'",
    "a.",
    "1,",
    "  ",
    "    ",
    "\r\n",
    "\n\n",
    " \n",
    "\t",
    ", ",
    "。",
    "日本",
    "9é",
    "'s",
]
tricky_texts = st.lists(st.sampled_from(TRICKY + AT_CUTS) | st.characters(codec="utf-8"), max_size=60).map("".join)


def in_parts(text: str, lengths: list[int]) -> Iterator[str]:
    """Yield ``text`` in parts of these lengths, repeatedly."""
    start = 0
    for length in itertools.cycle(lengths):
        if start >= len(text):
            return
        yield text[start : start + length]
        start += length


def cut(text: str, lengths: list[int], piece: int, run: int = 10**9) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_CHARACTERS", piece)
        patch.setattr(module, "LONGEST_RUN", run)
        return list(pieces("a.txt", in_parts(text, lengths)))


@examples(1500)
@given(tricky_texts, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 12))
def test_pieces_have_the_tokens_of_the_complete_text(
    tiktoken_gpt2: tiktoken.Encoding, text: str, lengths: list[int], piece: int
) -> None:
    found = cut(text, lengths, piece)
    assert "".join(found) == text
    assert "" not in found
    assert [t for p in found for t in tiktoken_gpt2.encode_ordinary(p)] == tiktoken_gpt2.encode_ordinary(text)


@given(st.text(" \t\r\n'sa1.中。", max_size=40), st.integers(1, 5))
def test_runs_of_white_space_line_ends_and_apostrophes_are_not_torn(
    tiktoken_gpt2: tiktoken.Encoding, text: str, piece: int
) -> None:
    found = cut(text, [1], piece)
    assert [t for p in found for t in tiktoken_gpt2.encode_ordinary(p)] == tiktoken_gpt2.encode_ordinary(text)


@pytest.mark.parametrize(
    "text",
    [
        "Plain prose, with a few words; and so on.\r\n",
        "a,b,1,2\n",
        "日本語、中文。",
        "{minified:[1,2],js:'x'}",
        "QmFzZTY0IHN0YXRlcw==0Zk9",
    ],
)
def test_any_usual_text_is_cut_into_pieces_of_the_size_that_is_asked_for(text: str) -> None:
    for part in (1, 50):  # a cut can be between two parts
        found = cut(text * 200, [part], piece=100)
        assert max(map(len, found)) <= 200
        assert len(found) >= len(text)


@pytest.mark.slow
def test_every_character_is_of_the_class_that_tiktoken_takes_it_for(tiktoken_gpt2: tiktoken.Encoding) -> None:
    encode = tiktoken_gpt2.encode_ordinary
    certain = [c for c in map(chr, range(0x110000)) if not 0xD800 <= ord(c) < 0xE000 and character_class(c)]
    assert len(certain) > 90_000
    for character in certain:
        for other in "sé中7½!'—🔥 \n\r":
            for a, b in ((character, other), (other, character)):
                if can_cut(a, b):
                    for before, after in (("x", "s"), ("'", "  "), (" 1", "'ll")):
                        assert encode(before + a) + encode(b + after) == encode(before + a + b + after), (a, b)


def test_a_run_too_long_to_encode_is_refused() -> None:
    for run in ("a" * 100, " " * 100, "\n" * 100, "^" * 100):
        assert cut("one two " + run + " three", [7], piece=20, run=100)
        with pytest.raises(
            UserError, match=r"a\.txt: more than 70 characters without a word boundary after the first \d+"
        ):
            cut("one two " * 9 + run + " three", [7], piece=20, run=70)
    with pytest.raises(UserError, match=r"a\.txt is filled with NUL bytes"):
        cut("one two " + "\0" * 100 + " three", [7], piece=20, run=70)


@given(st.text(max_size=50), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2**31))
def test_the_hash_is_that_of_the_whole_text(text: str, lengths: list[int], seed: int) -> None:
    """Compare with the documented rule."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    assert split_hash(in_parts(text, lengths), seed) == int.from_bytes(digest, "little")


def long(text: str, *later: str) -> LongDocument:
    """Document with another text at each read."""
    texts = iter([text, *later])
    last = [text]

    def parts() -> Iterator[str]:
        last[0] = next(texts, last[0])
        return in_parts(last[0], [5])

    return LongDocument("long.txt", parts)


def test_long_documents_come_by_themselves_and_short_ones_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("restomod.data.prepare.worker.PIECE_CHARACTERS", 10)
    documents = [Document("", "a"), Document("", "b"), long("c"), long("d"), Document("", "e" * 11), Document("", "f")]
    assert list(document_batches(documents)) == [documents[:2], *([d] for d in documents[2:5]), documents[5:]]


@pytest.mark.parametrize("known", [False, True])
def test_documents_are_encoded_in_order_with_their_hashes(
    monkeypatch: pytest.MonkeyPatch, tiktoken_gpt2: tiktoken.Encoding, known: bool
) -> None:
    chance = random.Random(0)
    texts = ["".join(chance.choices(TRICKY, k=chance.choice([1, 5, 300]))) for _ in range(200)]
    documents = [long(text) if i % 7 == 3 else Document("", text) for i, text in enumerate(texts)]
    hashes = [split_hash([text], seed=4) for text in texts]
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr("restomod.data.prepare.worker.PIECE_CHARACTERS", 50)
    monkeypatch.setattr("restomod.data.prepare.worker.BATCH_CHARACTERS", 60)
    found = encoded(documents, BulkEncoder(gpt2_tokenizer()), 4, hashes if known else None)
    counts = []
    for text, expected, (h, parts) in zip(texts, hashes, found, strict=True):
        tokens = list(parts)
        counts.append(len(tokens))
        assert h == expected
        assert [t for part in tokens for t in part.tolist()] == tiktoken_gpt2.encode_ordinary(text)
    assert 1 in counts
    assert max(counts) > 3


@pytest.mark.parametrize(
    ("documents", "known"),
    [
        ([Document("long.txt", "b")], ["a"]),
        ([long("b")], ["a"]),
        ([long("a", "b")], None),  # between its hash and its tokens
        ([Document("", "a"), Document("long.txt", "b")], ["a"]),
        ([Document("", "a"), long("b")], ["a"]),
    ],
)
def test_a_document_that_has_changed_is_refused(
    documents: list[Document | LongDocument], known: list[str] | None
) -> None:
    hashes = known and [split_hash([text], 0) for text in known]
    given: list[int] = []

    def take() -> None:
        for h, parts in encoded(documents, BulkEncoder(gpt2_tokenizer()), 0, hashes, "do so"):
            given.append(h)
            list(parts)

    with pytest.raises(UserError, match=r"long\.txt has changed since it was first read; do so"):
        take()
    assert given == (hashes or given)[: len(given)]  # only known hashes


def test_missing_documents_are_detected() -> None:
    with pytest.raises(UserError, match="documents have disappeared since the first read; do so"):
        list(encoded([Document("", "a")], BulkEncoder(gpt2_tokenizer()), 0, [split_hash(["a"], 0), 7], "do so"))
