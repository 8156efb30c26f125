"""Documents of any length, their split hash, and cuts into pieces that are encoded one by one.

GPT-2's pattern first splits text into words. It has no look-behind, and looks ahead only for more white space. So a
word always ends between two characters that cannot be adjacent in a word, if the first is not white space. Text that is
cut there has the tokens of the whole text.
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from restomod.data.streams import refuse_zeros
from restomod.utils.errors import UserError

PIECE_CHARACTERS = 1_000_000  # of a long text, encoded at once
LONGEST_RUN = 2_000_000  # characters without a place to cut; to encode one takes up to 150 bytes


@dataclass(frozen=True)
class Document:
    """A text in memory, and where it came from."""

    name: str
    text: str

    def parts(self) -> Iterator[str]:
        """The text in parts of any length."""
        for start in range(0, len(self.text), PIECE_CHARACTERS):
            yield self.text[start : start + PIECE_CHARACTERS]


@dataclass(frozen=True)
class LongDocument:
    """A text too long for memory, which is read anew each time, and where it comes from."""

    name: str
    parts: Callable[[], Iterator[str]] = field(compare=False)
    """Reads the text from its beginning, in parts of any length."""


AnyDocument = Document | LongDocument


class SplitHash:
    """64-bit hash of a document's text, which decides its split: equal texts are always in the same split."""

    def __init__(self, seed: int) -> None:
        self._digest = hashlib.blake2b(digest_size=8, salt=seed.to_bytes(8, "little", signed=True))

    def pass_on(self, part: str) -> str:
        """Take the next part of the text, and return it."""
        self._digest.update(part.encode())
        return part

    def value(self) -> int:
        return int.from_bytes(self._digest.digest(), "little")


def split_hash(parts: Iterable[str], seed: int) -> int:
    """The `SplitHash` of a document, given its text in parts."""
    digest = SplitHash(seed)
    for part in parts:
        digest.pass_on(part)
    return digest.value()


def pieces(name: str, parts: Iterable[str]) -> Iterator[str]:
    """Yield text in pieces of `PIECE_CHARACTERS` or somewhat more, whose tokens in order are those of the whole text.

    Raises:
        UserError: there is no place to cut in `LONGEST_RUN` characters of document ``name``: such a run has to be
            encoded as one, in memory without bound.
    """
    held: list[str] = []  # what is not yet given away
    size = given = 0
    for part in filter(None, parts):
        joined = (held[-1][-1:] if held else "") + part  # a cut may stand between two parts
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
        f"{name}: more than {LONGEST_RUN:,} characters after the first {at:,} have no end of a word among them; "
        f"this is no text: break it into lines, or leave it out"
    )


def last_cut(text: str) -> int:
    """Index of the last character of ``text`` before which it can be cut; 0: nowhere."""
    for i in range(len(text) - 1, 0, -1):
        if can_cut(text[i - 1], text[i]):
            return i
    return 0


def can_cut(before: str, after: str) -> bool:
    """Whether GPT-2's pattern ends a word between these two characters in every text.

    Its words are a contraction (an apostrophe and letters), an optional space with letters, with numbers or with other
    characters that are not white space, and white space.
    """
    a, b = character_class(before), character_class(after)
    return a is not None and b is not None and a != b and a != "space" and not (before == "'" and b == "letter")


@functools.lru_cache(maxsize=100_000)
def character_class(character: str) -> str | None:
    """Class of a character in GPT-2's pattern: "space", "letter", "number" or "other"; None: not certain.

    Certain are characters that have kept their class since Unicode 3.2, so that the version of Unicode tables does
    not matter, and of white space and control characters only blank, tab, newline, carriage return and NUL.
    """
    if character in " \t\n\r":
        return "space"
    category = unicodedata.category(character)
    if character == "\0":
        return "other"
    if category != unicodedata.ucd_3_2_0.category(character) or category[0] in "ZC":
        return None
    return {"L": "letter", "N": "number"}.get(category[0], "other")
