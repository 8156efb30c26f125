"""Records out of text that is read as a stream: JSON objects that are not a line each, and rows of CSV."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from restomod.data.kinds import LONGEST_RECORD, SPACE, cut_short
from restomod.utils.errors import UserError, one_line

NOT_SPACE = re.compile(f"[^{SPACE}]")
OF_ITS_OWN = "put this document into a plain text file of its own, which may have any size"


class _Text:
    """Text that is read in parts; only the part that is not used yet is held."""

    def __init__(self, parts: Iterable[str]) -> None:
        self._parts = iter(parts)
        self.held, self.at, self.line = "", 0, 1  # ``line``: the number of the line in which ``held`` begins

    def more(self) -> bool:
        """Read about as much again as is held. Returns whether there was any."""
        self.line += self.held.count("\n", 0, self.at)
        self.held, self.at = self.held[self.at :], 0
        parts, size = [self.held], 0
        while size <= len(self.held) and (part := next(self._parts, "")):
            parts.append(part)
            size += len(part)
        self.held = "".join(parts)
        return size > 0

    def next_character(self) -> str:
        """Pass over white space, and return what comes then; "" at the end."""
        while True:
            found = NOT_SPACE.search(self.held, self.at)
            self.at = found.start() if found else len(self.held)
            if found or not self.more():
                return self.held[self.at : self.at + 1]

    def where(self) -> str:
        return f"line {self.line + self.held.count(chr(10), 0, self.at)}"


def json_objects(path: Path, parts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The objects that are the elements of one JSON array, or stand one after the other, over any number of lines.

    Memory holds one of them and what was read with it.

    Args:
        path: of the file, for messages.
        parts: its text.

    Raises:
        UserError: it is not JSON, holds something else than objects, or one is longer than `LONGEST_RECORD`.
    """
    text, decoder, n = _Text(parts), json.JSONDecoder(), 0
    array = text.next_character() == "["
    text.at += array
    while (character := text.next_character()) and not (array and character == "]"):
        if array and n:
            if character != ",":
                raise UserError(f"{path}, {text.where()}: not JSON (a comma is missing after record {n} of the array)")
            text.at += 1
            character = text.next_character()
        n += 1
        if character != "{":
            raise UserError(f"{path}, {text.where()}: record {n} should be a JSON object")
        yield _next_object(path, text, decoder, n)
    if array:
        if not character:
            raise UserError(f"{path} is truncated: its JSON array has no end after record {n}; get it again")
        text.at += 1
        if text.next_character():
            raise UserError(f"{path}, {text.where()}: not JSON (extra data after the end of the array)")


def _next_object(path: Path, text: _Text, decoder: json.JSONDecoder, n: int) -> dict[str, Any]:
    while True:
        try:
            value, end = decoder.raw_decode(text.held, text.at)
        except json.JSONDecodeError as e:
            if len(text.held) - text.at > LONGEST_RECORD:
                raise UserError(
                    f"{path}, {text.where()}: record {n} is longer than {LONGEST_RECORD / 1e6:g} MB; {OF_ITS_OWN}"
                ) from None
            if cut_short(e, text.held) and text.more():
                continue
            raise UserError(f"{path}, {text.where()}: record {n} is not JSON ({e.msg})") from None
        except (RecursionError, ValueError) as e:
            raise UserError(f"{path}, {text.where()}: record {n} is not JSON ({one_line(e)})") from None
        text.at = end
        assert isinstance(value, dict)  # it begins with a brace
        return value


def csv_rows(path: Path, parts: Iterable[str], delimiter: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV (or TSV) file with a header, as (place, column -> value); blank lines are left out.

    Args:
        path: of the file, for messages.
        parts: its text.
        delimiter: between two fields.

    Raises:
        UserError: quotes are wrong, or a row has another number of fields than the header.
    """
    csv.field_size_limit(LONGEST_RECORD)
    reader = csv.reader(_lines(path, parts), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        try:
            row = next(reader, None)
        except csv.Error as e:
            raise UserError(f"{path}, line {reader.line_num}: not {_name(delimiter)} ({e})") from None
        if row is None:
            return
        if not row:
            continue
        if header is None:
            header = [name.strip() for name in row]
            continue
        number += 1
        if len(row) != len(header):
            raise UserError(
                f"{path}, line {reader.line_num}: {len(row)} fields in a row, and {len(header)} in the header; "
                f"quote a text that holds {'tabs' if delimiter == chr(9) else 'commas'} or line breaks, or convert "
                f"the file to JSON lines"
            )
        yield f"row {number}", dict(zip(header, row, strict=True))


def _name(delimiter: str) -> str:
    return "TSV" if delimiter == "\t" else "CSV"


def _lines(path: Path, parts: Iterable[str]) -> Iterator[str]:
    """The lines of text that comes in parts, with their line feeds."""
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
            raise UserError(f"{path}: a line is longer than {LONGEST_RECORD / 1e6:g} MB; {OF_ITS_OWN}")
    if size:
        yield "".join(held)
