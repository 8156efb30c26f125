"""Splitting plain text into documents at a separator while it is read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from typing import IO

from restomod.data.documents import PIECE_CHARACTERS, AnyDocument, Document, LongDocument
from restomod.data.reading import Reading
from restomod.data.streams import BOM
from restomod.utils.errors import UserError

NEWLINES = "\r\n"
BEFORE = NEWLINES + BOM  # files that were put together keep their byte-order marks


def split_documents(
    name: str, parts: Iterable[str], separator: str, long_text: int, reading: Reading
) -> Iterator[AnyDocument]:
    """The documents between separators, empty ones left out.

    The newlines at the ends of a document, which stand around the separators, do not belong to it.

    Args:
        name: of the file.
        parts: its text, in parts of any length.
        separator: not empty.
        long_text: a document of more characters is held in a temporary file instead of in memory.
        reading: where the separators are counted.

    Raises:
        UserError: there is no room for a temporary file.
    """
    number, document = 1, _Growing(long_text)
    at_beginning = True
    for text in _between(parts, separator):
        if text is None:
            reading.separators = (reading.separators or 0) + 1
            if not document.empty:
                yield document.finished(f"{name}, document {number}")
                number, document = number + 1, _Growing(long_text)
            at_beginning = True
            continue
        if at_beginning:
            text = text.lstrip(BEFORE)
            at_beginning = not text
        document.add(text)
    if not document.empty:
        yield document.finished(f"{name}, document {number}")


def _between(parts: Iterable[str], separator: str) -> Iterator[str | None]:
    """The text between separators in parts, without the newlines before one or at the end; None for each separator."""
    held = ""
    for part in parts:
        *whole, held = (held + part).split(separator)
        for text in whole:
            yield text.rstrip(NEWLINES)
            yield None
        sure = held[: max(0, len(held) - len(separator) + 1)].rstrip(NEWLINES)  # in what follows one may have begun
        yield sure
        held = held[len(sure) :]
    yield held.rstrip(NEWLINES)


class _Growing:
    """A document whose text is still being read."""

    def __init__(self, long_text: int) -> None:
        self._long_text = long_text
        self._parts: list[str] = []
        self._size = 0
        self._file: IO[str] | None = None

    @property
    def empty(self) -> bool:
        return self._size == 0

    def add(self, text: str) -> None:
        self._size += len(text)
        if text:
            self._parts.append(text)
        if self._size > self._long_text:
            self._spill()

    def _spill(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile("w+", encoding="utf-8", newline="")  # noqa: SIM115 - kept open
            self._file.write("".join(self._parts))
            self._file.flush()
        except OSError as e:
            folder = tempfile.gettempdir()
            raise UserError(f"cannot write a temporary file for a long document in {folder} ({e.strerror})") from None
        self._parts = []

    def finished(self, name: str) -> AnyDocument:
        if self._file is None:
            return Document(name, "".join(self._parts))
        self._spill()
        file = self._file

        def read() -> Iterator[str]:
            file.seek(0)
            while part := file.read(PIECE_CHARACTERS):
                yield part

        return LongDocument(name, read)
