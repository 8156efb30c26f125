"""Documents out of files: plain text, JSON lines and Parquet, each also compressed.

A plain text file is one document; a line of JSON lines and a row of a Parquet file are one document each. Files are
read as streams: memory holds a line or some rows, or a part of a long plain file, whatever the size of the file.
"""

from __future__ import annotations

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
from restomod.data.streams import (
    DECOMPRESSORS,
    READ_BYTES,
    chunks,
    decode_line,
    decode_parts,
    decoded,
    guarded,
    open_stream,
    refuse_zeros,
)
from restomod.errors import UserError

LONG_TEXT = 8_000_000  # bytes: a plain file that is longer is not held in memory
LONGEST_RECORD = 32_000_000  # bytes of a line or a row; one character beyond U+FFFF makes Python hold four times that
PARQUET_ROWS = 256  # read at once, at most,
PARQUET_BYTES = 16_000_000  # and as many as have this size on average
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
OF_ITS_OWN = "put this document into a plain text file of its own, which may have any size"


@dataclass(frozen=True)
class Span:
    """The bytes from ``start`` up to ``stop`` of a file of ``of`` bytes. What begins there belongs to it."""

    start: int
    stop: int
    of: int


def read_documents(path: Path, text_column: str = "text", span: Span | None = None) -> Iterator[AnyDocument]:
    """Yield the documents of a file, empty ones left out.

    Args:
        path: `.jsonl`, `.ndjson` or `.parquet`, anything else is plain UTF-8 text; before `.gz`, `.xz` or `.zst` too.
        text_column: the field or column that holds the text.
        span: only the lines, or groups of rows, that begin there; for a file that `can_span`.

    Raises:
        UserError: the file is missing, damaged, empty, not UTF-8, or lacks the column; line or row are named.
    """
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{path} is empty: there is nothing to train on")
    if span and path.is_file() and path.stat().st_size != span.of:
        raise UserError(f"{path} has changed since it was cut into units of work; run the same command again")
    kind = Path(path.stem).suffix.lower() if path.suffix.lower() in DECOMPRESSORS else path.suffix.lower()
    if kind == PARQUET:
        yield from _parquet(path, text_column, span)
    elif kind in JSON_LINES:
        yield from _json_lines(path, text_column, span)
    else:
        yield from _plain(path)


def can_span(path: Path) -> bool:
    """Whether a part of a file can be read without all that stands before it."""
    return path.suffix.lower() in (*JSON_LINES, PARQUET)


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


def _checked(path: Path, where: Callable[[], str], column: str, text: Any) -> str:
    """The text of a record; "" where it has none."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{path}, {where()}: {column!r} should be text, not {text!r:.40}")
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can say: U+FFFD, as with tiktoken
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
        for line in guarded(path, _lines(f, span)):
            number = next(numbers)
            place = functools.partial(_line_number, path, begin, number)
            text = _text_of_line(path, line, column, place)
            del line  # while the text is worked on, its memory is wanted
            if text:
                where = f"line {number}" if begin == 0 else f"line {number} from byte {begin:,} on"
                yield Document(f"{path}, {where}", text)


def _first_line(f: IO[bytes], span: Span) -> int:
    """Go to the first line that begins in ``span`` and return its place, or one at or after the span's end."""
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
    if begin == 0:
        return number
    with closing(chunks(path)) as reads:
        for chunk in reads:
            number += chunk[:begin].count(b"\n")
            begin -= len(chunk)
            if begin <= 0:
                break
    return number


def _text_of_line(path: Path, line: bytes, column: str, place: Callable[[], int]) -> str:
    if len(line) > LONGEST_RECORD:
        refuse_zeros(f"{path}, line {place()},", line.count(0), len(line))
        raise UserError(f"{path}, line {place()} is longer than {LONGEST_RECORD / 1e6:g} MB; {OF_ITS_OWN}")
    text = decode_line(path, line, place)
    if not text.strip():
        return ""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}, line {place()}: not JSON ({e})") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}, line {place()}: should be an object with a field {column!r}")
    if column not in record:
        raise _no_column(f"{path}, line {place()}", "field", column, record)
    return _checked(path, lambda: f"line {place()}", column, record[column])


# --- Parquet ------------------------------------------------------------------------------------------------


def _parquet(path: Path, column: str, span: Span | None) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} is a Parquet file: pip install pyarrow") from None
    try:
        with _seekable(path) as f:
            file = pyarrow.parquet.ParquetFile(f, buffer_size=READ_BYTES)  # else a group's column is read whole
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
    except (pyarrow.ArrowException, OSError, EOFError) as e:
        said = str(e).split("\n")[0].rstrip(".")
        raise UserError(f"{path} is damaged: {said or 'not a Parquet file'}; get it again") from None


def _seekable(path: Path) -> IO[bytes]:
    """The file itself, or what it holds decompressed, in a temporary file: Parquet begins to be read at its end."""
    if path.suffix.lower() not in DECOMPRESSORS:
        return open_stream(path)
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
        # in the order of the groups, and within the file, whatever a strange writer has put down
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
        raise UserError(
            f"{path}: one of the rows {before + 1:,} to {before + group.num_rows:,} is longer than "
            f"{LONGEST_RECORD / 1e6:g} MB; {OF_ITS_OWN}"
        )
    return max(1, min(PARQUET_ROWS, PARQUET_BYTES // max(average, 1)))


def _text_of_row(path: Path, value: Any, column: str, number: int) -> str:
    """The text of a pyarrow scalar."""
    if value.is_valid and hasattr(value, "as_buffer") and value.as_buffer().size > LONGEST_RECORD:
        raise UserError(f"{path}, row {number} is longer than {LONGEST_RECORD / 1e6:g} MB; {OF_ITS_OWN}")
    try:
        text = value.as_py()
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path}, row {number}: not UTF-8 text ({e.reason}); write this file anew, or leave it out with a glob"
        ) from None
    return _checked(path, lambda: f"row {number}", column, text)
