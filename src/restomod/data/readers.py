"""Reads the documents of a file: plain text, JSON (lines, an array, objects), CSV, TSV and Parquet, also compressed.

A plain text file is one document, or one between any two separators; a record (line, object, row) is one document.
Files are read as streams: memory holds a record or some rows, or a part of a long plain file.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from restomod.data.documents import AnyDocument, Document, LongDocument
from restomod.data.file_format import LONGEST_RECORD, detect_format
from restomod.data.read_counts import ReadCounts
from restomod.data.records import csv_rows, json_objects, split_documents, too_long
from restomod.data.streams import (
    READ_BYTES,
    checked_reads,
    chunks,
    decode_line,
    decode_parts,
    decoded,
    open_stream,
    refuse_zeros,
)
from restomod.utils.errors import UserError, one_line

LONG_TEXT = 8_000_000  # bytes: a plain file that is longer is not held in memory
PARQUET_ROWS = 256  # read at once, at most,
PARQUET_BYTES = 16_000_000  # and as many as have this size on average


@dataclass(frozen=True)
class Span:
    """The bytes from ``start`` up to ``stop`` of a file of ``of`` bytes. What begins there belongs to it."""

    start: int
    stop: int
    of: int


def read_documents(
    path: Path,
    text_column: str = "text",
    span: Span | None = None,
    separator: str | None = None,
    counts: ReadCounts | None = None,
) -> Iterator[AnyDocument]:
    """Yield the documents of a file, whose format `detect_format` finds; empty documents are skipped.

    Args:
        path: a file.
        text_column: the field or column that holds the text.
        span: only the lines, or groups of rows, that begin there; for a file that `can_be_cut`.
        separator: text between two documents of a plain text file. None: the file is one document.
        counts: gets the format of the file and the number of separators.

    Raises:
        UserError: the file is missing, no regular file, damaged, empty, not UTF-8, of a kind that holds no text, or
            lacks the column; line or row are named.
    """
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{path} is empty: there is nothing to train on")
    if span and path.is_file() and path.stat().st_size != span.of:
        raise UserError(f"{path} has changed since it was cut into units of work; run the same command again")
    seen = detect_format(path, text_column)
    counts = counts or ReadCounts()
    if separator is not None:
        counts.separators = counts.separators or 0
    if span is None or span.start == 0:
        counts.count_file(path, seen)
    if seen.kind == "Parquet":
        yield from _parquet(path, text_column, span, seen.compressed)
    elif seen.kind == "JSON lines":
        yield from _json_lines(path, text_column, span)
    elif seen.kind == "JSON":
        for n, record in enumerate(json_objects(path, decoded(path)), 1):
            if text := _text(path, functools.partial(str, f"record {n}"), text_column, record):
                yield Document(f"{path}, record {n}", text)
    elif seen.kind in ("CSV", "TSV"):
        for place, row in csv_rows(path, decoded(path), "," if seen.kind == "CSV" else "\t"):
            if text := _text(path, functools.partial(str, place), text_column, row, "column"):
                yield Document(f"{path}, {place}", text)
    elif separator is None:
        yield from _plain(path)
    else:
        yield from split_documents(str(path), decoded(path), separator, LONG_TEXT, counts)


def can_be_cut(path: Path, text_column: str) -> bool:
    """Whether a part of a file can be read without what stands before it; raises as `detect_format`."""
    seen = detect_format(path, text_column)
    return seen.kind in ("JSON lines", "Parquet") and not seen.compressed


def _plain(path: Path) -> Iterator[AnyDocument]:
    start: list[bytes] = []
    size = 0
    with closing(chunks(path)) as reads:
        while size <= LONG_TEXT and (chunk := next(reads, b"")):
            start.append(chunk)
            size += len(chunk)
    if size > LONG_TEXT:
        del start, chunk
        yield LongDocument(str(path), functools.partial(decoded, path))
    elif text := "".join(decode_parts(path, start)):
        yield Document(str(path), text)


def _text(path: Path, where: Callable[[], str], column: str, record: dict[str, Any], what: str = "field") -> str:
    """The text of a record; "" where it has none. ``where`` tells its place, for errors."""
    if column not in record:
        raise _no_column(f"{path}, {where()}", what, column, record)
    text = record[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{path}, {where()}: {column!r} should be text, not {text!r:.40}")
    return without_surrogates(text)


def without_surrogates(text: str) -> str:
    """Text with U+FFFD for each half of a surrogate pair, which JSON can hold; tiktoken does the same."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _no_column(where: str, what: str, column: str, names: Iterable[str]) -> UserError:
    known = sorted(names)
    there = ", ".join(known[:20]) + (" …" if len(known) > 20 else "")
    return UserError(
        f"{where} has no {what} {column!r}; it has: {there or 'none'}; name the one with the text by --text-column "
        f"(of `train`: --data.text-column)"
    )


# --- JSON lines ---------------------------------------------------------------------------------------------


def _json_lines(path: Path, column: str, span: Span | None) -> Iterator[Document]:
    with open_stream(path) as f:
        begin = _first_line(f, span) if span else 0
        numbers = itertools.count(1)  # enumerate would hold on to the line
        for line in checked_reads(path, _lines(f, span)):
            number = next(numbers)
            if number == 1 and begin == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            text = _text_of_line(path, line, column, functools.partial(_line_number, path, begin, number))
            del line  # while the text is worked on, its memory is wanted
            if text:
                where = f"line {number}" if begin == 0 else f"line {number} from byte {begin:,} on"
                yield Document(f"{path}, {where}", text)


def _first_line(f: IO[bytes], span: Span) -> int:
    """Seek the first line that begins in ``span``; return its offset, or one at or after the span's end."""
    if span.start == 0:
        return 0
    at = f.seek(span.start - 1)
    while at < span.stop and (part := f.readline(READ_BYTES)):
        at += len(part)
        if part.endswith(b"\n"):
            break
    return at


def _lines(f: IO[bytes], span: Span | None) -> Iterator[bytes]:
    """The lines from here on that begin before the end of ``span``; of one that is too long, enough to tell."""
    longest = LONGEST_RECORD + 1
    if span is None:
        return iter(lambda: f.readline(longest), b"")
    return iter(lambda: f.readline(longest) if f.tell() < span.stop else b"", b"")


def _line_number(path: Path, begin: int, number: int) -> int:
    """The number in its file of line ``number`` from the byte ``begin`` on. For errors: it reads all before."""
    with open_stream(path) as f:
        while part := f.read(min(begin, READ_BYTES)):
            number += part.count(b"\n")
            begin -= len(part)
    return number


def _text_of_line(path: Path, line: bytes, column: str, place: Callable[[], int]) -> str:
    if len(line) > LONGEST_RECORD:
        refuse_zeros(f"{path}, line {place()},", line.count(0), len(line))
        raise too_long(f"{path}, line {place()}")
    text = decode_line(path, line, place)
    if not text.strip():
        return ""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}, line {place()}: not JSON ({e})") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}, line {place()}: should be an object with a field {column!r}")
    return _text(path, lambda: f"line {place()}", column, record)


# --- Parquet ------------------------------------------------------------------------------------------------


def _parquet(path: Path, column: str, span: Span | None, compressed: bool) -> Iterator[Document]:
    with open_parquet(path, compressed) as file:
        names = list(file.schema_arrow.names)
        if column not in names:
            raise _no_column(str(path), "column", column, names)
        for group, number in _row_groups(file.metadata, span):
            rows = _rows_at_once(path, file.metadata.row_group(group), column, number)
            for batch in file.iter_batches(rows, row_groups=[group], columns=[column]):
                for value in batch.column(0):
                    number += 1
                    text = _text_of_row(path, value, column, number)
                    if text:
                        yield Document(f"{path}, row {number}", text)


@contextlib.contextmanager
def open_parquet(path: Path, compressed: bool) -> Iterator[Any]:
    """Open a `pyarrow.parquet.ParquetFile` that verifies page checksums; all its errors become UserErrors."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} is a Parquet file: pip install pyarrow") from None
    try:
        with _decompressed(path) if compressed else open_stream(path) as f:
            # without a buffer, a group's column is read whole
            yield pyarrow.parquet.ParquetFile(f, buffer_size=READ_BYTES, page_checksum_verification=True)
    except UserError:
        raise
    except Exception as e:  # of a damaged file pyarrow raises errors of many kinds, of names UnicodeDecodeError
        raise UserError(f"{path} is damaged: {one_line(e).rstrip('.')}; get it again") from None


def _decompressed(path: Path) -> IO[bytes]:
    """What a compressed file holds, in a temporary file: Parquet begins to be read at its end."""
    try:
        f = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
        for chunk in chunks(path):
            f.write(chunk)
    except OSError as e:
        raise UserError(f"{path}: cannot decompress it into {tempfile.gettempdir()} ({e.strerror})") from None
    return f


def _row_groups(metadata: Any, span: Span | None) -> Iterator[tuple[int, int]]:
    """The groups of rows that begin in ``span``, each with the number of rows before it."""
    rows = begin = 0
    for group in range(metadata.num_row_groups):
        first = metadata.row_group(group).column(0)
        # in the order of the groups, and within the file, even if a strange writer has put down something else
        begin = max(begin, min(filter(None, (first.dictionary_page_offset, first.data_page_offset)), default=0))
        if span is None or span.start <= min(begin, span.of - 1) < span.stop:
            yield group, rows
        rows += metadata.row_group(group).num_rows


def _rows_at_once(path: Path, group: Any, column: str, before: int) -> int:
    """How many rows of a group to read at once, so that they are about `PARQUET_BYTES`."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    size = sum(c.total_uncompressed_size for c in chunks if f"{c.path_in_schema}.".startswith(f"{column}."))
    average = size // max(group.num_rows, 1)
    if average > LONGEST_RECORD:
        rows = f"{path}: one of the rows {before + 1:,} to {before + group.num_rows:,}"
        raise too_long(rows)
    return max(1, min(PARQUET_ROWS, PARQUET_BYTES // max(average, 1)))


def _text_of_row(path: Path, value: Any, column: str, number: int) -> str:
    """The text of a pyarrow scalar."""
    if value.is_valid and hasattr(value, "as_buffer") and value.as_buffer().size > LONGEST_RECORD:
        raise too_long(f"{path}, row {number}")
    try:
        text = value.as_py()
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path}, row {number}: not UTF-8 text ({e.reason}); write this file anew, or leave it out with a glob"
        ) from None
    return _text(path, lambda: f"row {number}", column, {column: text})
