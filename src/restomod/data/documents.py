"""Documents of any length, their split hash, and long documents in pieces that are encoded separately.

GPT-2's pattern first splits text into words. It has no look-behind, and it looks ahead only for white space. Therefore
a word always ends between two characters that cannot be adjacent in a word, if the first one is not white space. A cut
at such a position does not change the tokens.
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from restomod.data.streams import refuse_zeros
from restomod.utils.errors import UserError

PIECE_CHARACTERS = 1_000_000  # minimum size of a piece of a long text
LONGEST_RUN = 2_000_000  # characters without a possible cut; encoding needs up to 150 bytes for each


@dataclass(frozen=True)
class Document:
    """Document in memory, with its origin as ``name`` for messages."""

    name: str
    text: str

    def parts(self) -> Iterator[str]:
        """Yield the text in parts of any length."""
        for start in range(0, len(self.text), PIECE_CHARACTERS):
            yield self.text[start : start + PIECE_CHARACTERS]


@dataclass(frozen=True)
class LongDocument:
    """Document too long for memory, read from its file each time, with its origin as ``name``."""

    name: str
    parts: Callable[[], Iterator[str]] = field(compare=False)
    """Function that yields the text from its beginning, in parts of any length."""


AnyDocument = Document | LongDocument


class SplitHash:
    """Incremental 64-bit hash of a document's text. It determines the split, so equal texts are in the same split."""

    def __init__(self, seed: int) -> None:
        self._digest = hashlib.blake2b(digest_size=8, salt=seed.to_bytes(8, "little", signed=True))

    def update(self, part: str) -> str:
        """Update the hash with the next part of the text, and return that part."""
        self._digest.update(part.encode())
        return part

    def value(self) -> int:
        """Return the hash of the parts so far, in [0, 2^64)."""
        return int.from_bytes(self._digest.digest(), "little")


def split_hash(parts: Iterable[str], seed: int) -> int:
    """Compute the `SplitHash` of a document from its text in parts."""
    digest = SplitHash(seed)
    for part in parts:
        digest.update(part)
    return digest.value()


def pieces(name: str, parts: Iterable[str]) -> Iterator[str]:
    """Yield the text of a document in pieces whose concatenated tokens equal the tokens of the text.

    Args:
        name: name of the document in error messages.
        parts: text in parts of any length.

    Yields:
        Pieces of `PIECE_CHARACTERS` or slightly more.

    Raises:
        UserError: more than `LONGEST_RUN` characters have no possible cut, so their encoding needs unbounded memory.
    """
    held: list[str] = []  # text that has not been yielded
    size = given = 0
    for part in filter(None, parts):
        joined = (held[-1][-1:] if held else "") + part  # a cut can be between two parts
        cut = last_cut(joined) if size + len(part) >= PIECE_CHARACTERS else 0
        if cut:
            shared = len(joined) - len(part)
            piece = "".join([*held, part[: cut - shared]])
            given += len(piece)
            yield piece
            held, size = [part[cut - shared :]], len(joined) - cut
        else:
            held.append(part)
            size += len(part)
        if size > LONGEST_RUN + PIECE_CHARACTERS:
            _refuse_run(name, "".join(held), given)
    if size:
        yield "".join(held)


def _refuse_run(name: str, run: str, at: int) -> None:
    refuse_zeros(name, run.count("\0"), len(run))
    raise UserError(
        f"{name}: more than {LONGEST_RUN:,} characters without a word boundary after the first {at:,} characters; "
        f"insert line breaks or remove the document"
    )


def last_cut(text: str) -> int:
    """Return the index of the last possible cut in ``text``; 0 if there is none."""
    for i in range(len(text) - 1, 0, -1):
        if can_cut(text[i - 1], text[i]):
            return i
    return 0


def can_cut(before: str, after: str) -> bool:
    """Return whether GPT-2's pattern ends a word between these two characters in every text.

    A word is a contraction (an apostrophe and letters), white space, or an optional space followed by letters, numbers
    or other characters.
    """
    a, b = character_class(before), character_class(after)
    return a is not None and b is not None and a != b and a != "space" and not (before == "'" and b == "letter")


@functools.lru_cache(maxsize=100_000)
def character_class(character: str) -> str | None:
    """Return the class of a character in GPT-2's pattern: "space", "letter", "number" or "other"; None if uncertain.

    A class is certain if it has not changed since Unicode 3.2. Among white space and control characters only space,
    tab, newline, carriage return and NUL are certain.
    """
    if character in " \t\n\r":
        return "space"
    category = unicodedata.category(character)
    if character == "\0":
        return "other"
    if category != unicodedata.ucd_3_2_0.category(character) or category[0] in "ZC":
        return None
    return {"L": "letter", "N": "number"}.get(category[0], "other")
