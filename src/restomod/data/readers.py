"""Documents out of files: plain text, JSON lines and Parquet, each also compressed.

A plain text file is one document; a line of JSON lines and a row of a Parquet file are one document each. Files are
read as streams, so memory holds a document or a few hundred rows, whatever the size of the file.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from restomod.errors import UserError, did_you_mean

PARQUET_ROWS = 256  # read at once
JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    text: str


def read_documents(path: Path, text_column: str = "text") -> Iterator[Document]:
    """Yield the documents of a file, empty ones left out.

    Args:
        path: `.jsonl`, `.ndjson` or `.parquet`, anything else is plain UTF-8 text; before `.gz`, `.xz` or `.zst` too.
        text_column: the field or column that holds the text.

    Raises:
        UserError: the file is missing, damaged, empty, not UTF-8, or lacks the column; line or row are named.
    """
    kind = Path(path.stem).suffix.lower() if path.suffix.lower() in DECOMPRESSORS else path.suffix.lower()
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{path} is empty: there is nothing to train on")
    if kind == ".parquet":
        yield from _parquet(path, text_column)
    elif kind in JSON_LINES:
        yield from _json_lines(path, text_column)
    else:
        text = _decode(path, b"".join(_chunks(path)))
        if text:
            yield Document(str(path), text)


def _gzip(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb"))


def _xz(path: Path) -> IO[bytes]:
    return lzma.open(path, "rb")


def _zstd(path: Path) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))  # notices a truncated file


DECOMPRESSORS: dict[str, Callable[[Path], IO[bytes]]] = {".gz": _gzip, ".xz": _xz, ".zst": _zstd}


def _open(path: Path) -> IO[bytes]:
    decompress = DECOMPRESSORS.get(path.suffix.lower())
    try:
        return decompress(path) if decompress else path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder; give an existing one with --data.path") from None
    except OSError as e:
        raise UserError(f"{path}: cannot read it ({e.strerror})") from None
    except ImportError:
        raise UserError(f"{path} is compressed with Zstandard: pip install pyarrow") from None


def _chunks(path: Path, size: int = 1 << 20) -> Iterator[bytes]:
    """The decompressed bytes of a file, in order."""
    with _open(path) as f:
        yield from _guarded(path, iter(lambda: f.read(size), b""))


def _guarded(path: Path, reads: Iterator[bytes]) -> Iterator[bytes]:
    """Pass ``reads`` on, and turn what a damaged file raises into a UserError."""
    while True:
        try:
            part = next(reads, None)
        except EOFError:  # gzip, xz
            raise UserError(f"{path} is truncated: its compressed data ends too soon; get it again") from None
        except (lzma.LZMAError, zlib.error, OSError) as e:  # OSError: gzip's and Zstandard's, and the disk's
            raise UserError(f"{path} is damaged: {e}; get it again") from None
        if part is None:
            return
        yield part


def _decode(path: Path, content: bytes, line: int | None = None) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path} is not UTF-8 text: byte 0x{content[e.start]:02x} at offset {e.start}"
            f"{f' of line {line}' if line else ''} ({e.reason}); "
            f"convert it, or leave it out with --data.glob"
        ) from None
    if content.count(0) > len(content) // 2:
        where = f"{path}, line {line}," if line else str(path)
        raise UserError(f"{where} is filled with NUL bytes: it is not text, or was not wholly written")
    return text


def _json_lines(path: Path, column: str) -> Iterator[Document]:
    with _open(path) as f:
        for number, line in enumerate(_guarded(path, iter(f.readline, b"")), 1):
            text = _decode(path, line, number)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except ValueError as e:
                raise UserError(f"{path}, line {number}: not JSON ({e})") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number}: should be an object with a field {column!r}")
            if column not in record:
                raise UserError(f"{path}, line {number}: no field {column!r}{did_you_mean(column, map(str, record))}")
            yield from _row(path, f"line {number}", column, record[column])


def _parquet(path: Path, column: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{path} is a Parquet file: pip install pyarrow") from None
    try:
        with _open(path) as f:
            seekable: Any = f if f.seekable() else io.BytesIO(b"".join(_chunks(path)))
            file = parquet.ParquetFile(seekable)
            names = list(file.schema_arrow.names)
            if column not in names:
                raise UserError(f"{path} has no column {column!r}{did_you_mean(column, names)}")
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield from _row(path, f"row {number}", column, text)
    except (pyarrow.ArrowException, OSError, EOFError) as e:
        raise UserError(f"{path} is damaged: {str(e).splitlines()[0] or 'not a Parquet file'}; get it again") from None


def _row(path: Path, where: str, column: str, text: Any) -> Iterator[Document]:
    if text is None or text == "":
        return
    if not isinstance(text, str):
        raise UserError(f"{path}, {where}: {column!r} should be text, not {text!r:.40}")
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can say: U+FFFD, as with tiktoken
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    yield Document(f"{path}, {where}", text)
