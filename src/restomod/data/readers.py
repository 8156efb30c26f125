"""Reader of documents from plain text, JSON (lines, array, objects), CSV, TSV and Parquet, also compressed.

A record (line, object, row) is one document. A plain text file is one document, or several with a separator. Files
are streamed; memory contains one record, some rows of Parquet, or a part of a long plain text file.
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

LONG_TEXT = 8_000_000  # bytes; a longer plain text file is streamed instead of loaded
PARQUET_ROWS = 256  # maximum rows per read
PARQUET_BYTES = 16_000_000  # average size of a read


@dataclass(frozen=True)
class Span:
    """Byte range [start, stop) of a file of ``of`` bytes; all records that begin in it belong to it."""

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
    """Yield the documents of a file; empty documents are skipped.

    Args:
        path: file of any format that `detect_format` recognises.
        text_column: field or column that contains the text.
        span: part of the file to read, if `can_be_cut`; None: complete file.
        separator: text between the documents of a plain text file; None: the file is one document.
        counts: counts of the file's format and separators, which are updated.

    Raises:
        UserError: the file is missing, empty, not a regular file, damaged, not UTF-8, of a format without text, has no
            such column, or has changed since ``span`` was planned.
    """
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{path} is empty; give a file with text")
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
    """Return whether parts of a file can be read independently: uncompressed JSON lines or Parquet.

    Raises:
        UserError: the file cannot be read, is a container, or has an unsupported encoding.
    """
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
    """Return the text of a record, "" for null. ``where`` returns the position for error messages."""
    if column not in record:
        raise _no_column(f"{path}, {where()}", what, column, record)
    text = record[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{path}, {where()}: {column!r} must be text, not {text!r:.40}")
    return without_surrogates(text)


def without_surrogates(text: str) -> str:
    """Replace each lone surrogate, which JSON can contain, by U+FFFD, as tiktoken does."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _no_column(where: str, what: str, column: str, names: Iterable[str]) -> UserError:
    known = sorted(names)
    there = ", ".join(known[:20]) + (" …" if len(known) > 20 else "")
    return UserError(
        f"{where} has no {what} {column!r}; it has: {there or 'none'}; select one with --text-column "
        f"(train: --data.text-column)"
    )


# --- JSON lines ---------------------------------------------------------------------------------------------


def _json_lines(path: Path, column: str, span: Span | None) -> Iterator[Document]:
    with open_stream(path) as f:
        begin = _first_line(f, span) if span else 0
        numbers = itertools.count(1)  # enumerate would keep a reference to the line
        for line in checked_reads(path, _lines(f, span)):
            number = next(numbers)
            if number == 1 and begin == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            text = _text_of_line(path, line, column, functools.partial(_line_number, path, begin, number))
            del line  # free its memory while the text is processed
            if text:
                where = f"line {number}" if begin == 0 else f"line {number} after byte {begin:,}"
                yield Document(f"{path}, {where}", text)


def _first_line(f: IO[bytes], span: Span) -> int:
    """Seek to the first line that begins in ``span``; return its offset, or an offset beyond the span."""
    if span.start == 0:
        return 0
    at = f.seek(span.start - 1)
    while at < span.stop and (part := f.readline(READ_BYTES)):
        at += len(part)
        if part.endswith(b"\n"):
            break
    return at


def _lines(f: IO[bytes], span: Span | None) -> Iterator[bytes]:
    """Iterate over the lines that begin before the end of ``span``; too long lines are cut one byte above the limit."""
    longest = LONGEST_RECORD + 1
    if span is None:
        return iter(lambda: f.readline(longest), b"")
    return iter(lambda: f.readline(longest) if f.tell() < span.stop else b"", b"")


def _line_number(path: Path, begin: int, number: int) -> int:
    """Return the line number in the file of line ``number`` after byte ``begin``; slow, for error messages."""
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
        raise UserError(f"{path}, line {place()}: must be a JSON object with a field {column!r}")
    return _text(path, lambda: f"line {place()}", column, record)


# --- Parquet ------------------------------------------------------------------------------------------------


def _parquet(path: Path, column: str, span: Span | None, compressed: bool) -> Iterator[Document]:
    with open_parquet(path, compressed) as file:
        names = list(file.schema_arrow.names)
        if column not in names:
            raise _no_column(str(path), "column", column, names)
        for group, number in _row_groups(file.metadata, span):
            rows = _rows_per_read(path, file.metadata.row_group(group), column, number)
            for batch in file.iter_batches(rows, row_groups=[group], columns=[column]):
                for value in batch.column(0):
                    number += 1
                    text = _text_of_row(path, value, column, number)
                    if text:
                        yield Document(f"{path}, row {number}", text)


@contextlib.contextmanager
def open_parquet(path: Path, compressed: bool) -> Iterator[Any]:
    """Open a `pyarrow.parquet.ParquetFile` that verifies page checksums.

    Args:
        path: Parquet file.
        compressed: whether the complete file is compressed, such as `.parquet.gz`.

    Raises:
        UserError: pyarrow is missing, or the file is damaged.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} is a Parquet file and needs pyarrow: pip install pyarrow") from None
    try:
        with _decompressed(path) if compressed else open_stream(path) as f:
            # without a buffer, pyarrow reads the complete column of a row group
            yield pyarrow.parquet.ParquetFile(f, buffer_size=READ_BYTES, page_checksum_verification=True)
    except UserError:
        raise
    except Exception as e:  # pyarrow raises many kinds of errors for damaged files
        raise UserError(f"{path} is damaged: {one_line(e).rstrip('.')}; download it again") from None


def _decompressed(path: Path) -> IO[bytes]:
    """Decompress a file into a temporary file, because reading Parquet starts at the end of the file."""
    try:
        f = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
        for chunk in chunks(path):
            f.write(chunk)
    except OSError as e:
        raise UserError(f"{path}: cannot decompress it into {tempfile.gettempdir()} ({e.strerror})") from None
    return f


def _row_groups(metadata: Any, span: Span | None) -> Iterator[tuple[int, int]]:
    """Yield the row groups that begin in ``span``, each with the number of rows before it."""
    rows = begin = 0
    for group in range(metadata.num_row_groups):
        first = metadata.row_group(group).column(0)
        # some writers store wrong offsets; keep them increasing and inside the file
        begin = max(begin, min(filter(None, (first.dictionary_page_offset, first.data_page_offset)), default=0))
        if span is None or span.start <= min(begin, span.of - 1) < span.stop:
            yield group, rows
        rows += metadata.row_group(group).num_rows


def _rows_per_read(path: Path, group: Any, column: str, before: int) -> int:
    """Return the number of rows of a group per read, about `PARQUET_BYTES`."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    size = sum(c.total_uncompressed_size for c in chunks if f"{c.path_in_schema}.".startswith(f"{column}."))
    average = size // max(group.num_rows, 1)
    if average > LONGEST_RECORD:
        rows = f"{path}: one of the rows {before + 1:,} to {before + group.num_rows:,}"
        raise too_long(rows)
    return max(1, min(PARQUET_ROWS, PARQUET_BYTES // max(average, 1)))


def _text_of_row(path: Path, value: Any, column: str, number: int) -> str:
    """Return the text of a pyarrow scalar."""
    if value.is_valid and hasattr(value, "as_buffer") and value.as_buffer().size > LONGEST_RECORD:
        raise too_long(f"{path}, row {number}")
    try:
        text = value.as_py()
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path}, row {number}: not UTF-8 text ({e.reason}); write the file again, or exclude it with a glob"
        ) from None
    return _text(path, lambda: f"row {number}", column, {column: text})
