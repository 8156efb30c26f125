"""Streaming readers of records: JSON objects, CSV rows, and documents between separators."""

from __future__ import annotations

import csv
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from restomod.data.documents import PIECE_CHARACTERS, AnyDocument, Document, LongDocument
from restomod.data.file_format import LONGEST_RECORD, SPACE, cut_short
from restomod.data.read_counts import ReadCounts
from restomod.data.streams import BOM
from restomod.utils.errors import UserError, one_line

NOT_SPACE = re.compile(f"[^{SPACE}]")
NEWLINES = "\r\n"
BEFORE = NEWLINES + BOM  # concatenated files keep their byte-order marks


def too_long(what: str) -> UserError:
    """Return an error for a record ``what`` of more than `LONGEST_RECORD` bytes."""
    return UserError(
        f"{what} is longer than {LONGEST_RECORD / 1e6:g} MB; move this document to a separate plain text file, "
        f"which can have any size"
    )


class _Text:
    """Buffer of text that is read in parts, without the text before position ``at``."""

    def __init__(self, parts: Iterable[str]) -> None:
        self._parts = iter(parts)
        self.held, self.at, self.line = "", 0, 1  # ``line``: line number of the beginning of ``held``

    def more(self) -> bool:
        """Double the buffered text; return whether there was more text."""
        self.line += self.held.count("\n", 0, self.at)
        self.held, self.at = self.held[self.at :], 0
        parts, size = [self.held], 0
        while size <= len(self.held) and (part := next(self._parts, "")):
            parts.append(part)
            size += len(part)
        self.held = "".join(parts)
        return size > 0

    def next_character(self) -> str:
        """Skip white space and return the next character; "" at the end."""
        while True:
            found = NOT_SPACE.search(self.held, self.at)
            self.at = found.start() if found else len(self.held)
            if found or not self.more():
                return self.held[self.at : self.at + 1]

    def where(self) -> str:
        return f"line {self.line + self.held.count(chr(10), 0, self.at)}"


def json_objects(path: Path, parts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON array, or of a sequence of JSON objects, over any number of lines.

    Args:
        path: path of the file, for error messages.
        parts: text of the file in parts of any length; memory contains one object and the current parts.

    Raises:
        UserError: the text is not JSON, a value is not an object, or an object is longer than `LONGEST_RECORD`.
    """
    text, decoder, n = _Text(parts), json.JSONDecoder(), 0
    array = text.next_character() == "["
    text.at += array
    while (character := text.next_character()) and not (array and character == "]"):
        if array and n:
            if character != ",":
                raise UserError(f"{path}, {text.where()}: not JSON (missing comma after record {n} of the array)")
            text.at += 1
            character = text.next_character()
        n += 1
        if character != "{":
            raise UserError(f"{path}, {text.where()}: record {n} must be a JSON object")
        yield _next_object(path, text, decoder, n)
    if array:
        if not character:
            raise UserError(f"{path} is truncated: its JSON array does not end after record {n}; download it again")
        text.at += 1
        if text.next_character():
            raise UserError(f"{path}, {text.where()}: not JSON (extra data after the end of the array)")


def _next_object(path: Path, text: _Text, decoder: json.JSONDecoder, n: int) -> dict[str, Any]:
    while True:
        try:
            value, end = decoder.raw_decode(text.held, text.at)
        except json.JSONDecodeError as e:
            if len(text.held) - text.at > LONGEST_RECORD:
                raise too_long(f"{path}, {text.where()}: record {n}") from None
            if cut_short(e, text.held) and text.more():
                continue
            raise UserError(f"{path}, {text.where()}: record {n} is not JSON ({e.msg})") from None
        except (RecursionError, ValueError) as e:
            raise UserError(f"{path}, {text.where()}: record {n} is not JSON ({one_line(e)})") from None
        text.at = end
        assert isinstance(value, dict)  # the text begins with a brace
        return value


def csv_rows(path: Path, parts: Iterable[str], delimiter: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of a CSV or TSV file with a header; blank lines are skipped.

    Args:
        path: path of the file, for error messages.
        parts: text of the file in parts of any length.
        delimiter: "," or a tab.

    Yields:
        Position such as "row 3", and the values by column.

    Raises:
        UserError: quotes are wrong, a line is longer than `LONGEST_RECORD`, or the number of fields in a row differs
            from the header.
    """
    csv.field_size_limit(LONGEST_RECORD)
    reader = csv.reader(_lines(path, parts), delimiter=delimiter, strict=True)
    rows = filter(None, reader)
    name, separators = ("TSV", "tabs") if delimiter == "\t" else ("CSV", "commas")
    try:
        header = [name.strip() for name in next(rows, [])]
        for number, row in enumerate(rows, 1):
            if len(row) != len(header):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(row)} fields, but {len(header)} in the header; "
                    f"quote texts that contain {separators} or line breaks, or convert the file to JSON lines"
                )
            yield f"row {number}", dict(zip(header, row, strict=True))
    except csv.Error as e:
        raise UserError(f"{path}, line {reader.line_num}: not {name} ({e})") from None


def _lines(path: Path, parts: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a text in parts, with their line feeds."""
    held: list[str] = []
    size = 0
    for part in parts:
        start = 0
        while (end := part.find("\n", start) + 1) > 0:
            held.append(part[start:end])
            yield "".join(held)
            held, size, start = [], 0, end
        held.append(part[start:])
        size += len(part) - start
        if size > LONGEST_RECORD:
            raise too_long(f"{path}: a line")
    if size:
        yield "".join(held)


# --- documents between separators ---------------------------------------------------------------------------


def split_documents(
    name: str, parts: Iterable[str], separator: str, long_text: int, counts: ReadCounts
) -> Iterator[AnyDocument]:
    """Yield the documents between separators, without newlines at both ends; empty documents are skipped.

    Args:
        name: name of the file in messages.
        parts: text of the file in parts of any length.
        separator: text between documents, not empty.
        long_text: limit in characters above which a document is stored in a temporary file.
        counts: counts of separators, which are updated.

    Raises:
        UserError: a temporary file cannot be written.
    """
    number, document = 1, _DocumentBuffer(long_text)
    at_beginning = True
    for text in _between(parts, separator):
        if text is None:
            counts.separators = (counts.separators or 0) + 1
            if not document.empty:
                yield document.finished(f"{name}, document {number}")
                number, document = number + 1, _DocumentBuffer(long_text)
            at_beginning = True
            continue
        if at_beginning:
            text = text.lstrip(BEFORE)
            at_beginning = not text
        document.add(text)
    if not document.empty:
        yield document.finished(f"{name}, document {number}")


def _between(parts: Iterable[str], separator: str) -> Iterator[str | None]:
    """Yield the text between separators in parts, without newlines at the end; yield None for each separator."""
    held = ""
    for part in parts:
        *whole, held = (held + part).split(separator)
        for text in whole:
            yield text.rstrip(NEWLINES)
            yield None
        sure = held[: max(0, len(held) - len(separator) + 1)].rstrip(NEWLINES)  # a separator may begin in the rest
        yield sure
        held = held[len(sure) :]
    yield held.rstrip(NEWLINES)


class _DocumentBuffer:
    """Buffer of a document that is being read; a long text is moved to a temporary file."""

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
            raise UserError(
                f"cannot write a temporary file for a long document in {folder} ({e.strerror}); set TMPDIR"
            ) from None
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
