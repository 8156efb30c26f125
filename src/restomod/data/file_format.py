"""Detects the format of a text file by its content, and refuses files that hold no text.

Whatever a file is called, JSON lines are read as JSON lines, gzip is decompressed, and a container that holds no plain
text (tar, zip, PDF, arrays, pictures) is refused instead of being trained on as prose.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from restomod.data.dataset import MAGIC
from restomod.data.streams import COMPRESSION_ENDINGS, chunks, compression_of
from restomod.utils.errors import UserError

Kind = Literal["plain text", "JSON lines", "JSON", "CSV", "TSV", "Parquet"]

LONGEST_RECORD = 32_000_000  # bytes of a line or a row; one character beyond U+FFFF makes Python hold four times that
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
TABLES: dict[str, Kind] = {".csv": "CSV", ".tsv": "TSV"}
HEAD_BYTES = 65_536
MOST_LINES = 20  # of a file's beginning, by which damaged JSON lines and tables are recognised
SPACE = " \t\n\r"  # JSON's white space

UNPACK = "unpack it and name the folder with its files"
EXPORT = "write its text as JSON lines or Parquet"
CONTAINERS: tuple[tuple[bytes, str, str], ...] = (  # first bytes, what they say, how to fix it
    (b"PK\x03\x04", "a zip archive (or .docx, .epub, .npz, .pt)", UNPACK),
    (b"PK\x05\x06", "an empty zip archive", UNPACK),
    (b"PK\x07\x08", "a zip archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (b"\x04\x22\x4d\x18", "compressed with LZ4", "decompress it"),
    (b"\x1f\x9d", "compressed with compress (.Z)", "decompress it"),
    (b"%PDF-", "a PDF", "extract its text (pdftotext)"),
    (b"%!PS-Adobe", "PostScript", "extract its text"),
    (b"{\\rtf", "a document in RTF", "save it as plain text"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a document of Microsoft Office", "save it as plain text"),
    (b"WARC/1.", "a web archive (WARC)", "extract its text, as JSON lines"),
    (b"\x93NUMPY", "an array of NumPy", "train on token shards with --data.source tokens"),
    (MAGIC.to_bytes(4, "little"), "a shard of tokens", "train on its folder with --data.source tokens"),
    (b"ARROW1\0\0", "an Arrow file", EXPORT),
    (b"\xff\xff\xff\xff", "an Arrow stream, as `datasets` saves to disk", EXPORT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", EXPORT),
    (b"Obj\x01", "an Avro file", EXPORT),
    (b"SQLite format 3\0", "an SQLite database", EXPORT),
    *((b"GGUF" + bytes([version, 0]), "a model in GGUF", "give text files") for version in (1, 2, 3)),
    (b"\x7fELF", "a program", "give text files"),
    (b"\x89PNG\r\n\x1a\n", "a picture (PNG)", "give text files"),
    *((b"\xff\xd8\xff" + bytes([b]), "a picture (JPEG)", "give text files") for b in (0xDB, 0xE0, 0xE1, 0xEE)),
    (b"GIF89a", "a picture (GIF)", "give text files"),
    *((bytes([0x80, protocol]), "a pickle, which could run code", EXPORT) for protocol in (2, 3, 4, 5)),
    (
        b"version https://git-lfs.github.com/spec/",
        "a pointer of Git LFS in place of the file",
        "fetch it: git lfs pull",
    ),
)
WIDE = {  # byte-order marks of encodings that are not read
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True)
class FileFormat:
    """The format of a file."""

    kind: Kind
    compressed: bool
    as_text: bool = False
    """True for JSON that is read as plain text: one object without the text field, or no objects."""


def detect_format(path: Path, column: str = "text") -> FileFormat:
    """Detect the format of a file by its first bytes; by its name only for CSV and TSV with another header.

    ``column`` is the field that holds the text, by which a single JSON object counts as a record.

    Raises:
        UserError: it cannot be read or decompressed; it is a container or in an encoding that is not read.
    """
    compressed = compression_of(path) is not None
    with closing(chunks(path)) as reads:
        head = _grown(b"", reads, HEAD_BYTES)
        _refuse_container(path, head, compressed)
        _refuse_wide(path, head)
        name = inner_ending(path)
        if head.startswith(b"PAR1") or name == PARQUET:
            return FileFormat("Parquet", compressed)
        shape = _json_shape(head, reads, column)
    if shape is None and _mostly_records(head, column):
        shape = "lines"  # whose reader names the lines that are damaged
    if shape is None and (table := _table(head, column) or TABLES.get(name)):
        return FileFormat(table, compressed)
    if shape == "records":
        return FileFormat("JSON", compressed)
    if shape == "lines" or name in JSON_LINES:
        return FileFormat("JSON lines", compressed)
    return FileFormat("plain text", compressed, as_text=shape == "lone" or name == ".json")


def ending(path: Path) -> str:
    """`.jsonl.xz` of `a.b.jsonl.xz`, `.txt` of `v1.2.txt`; `plain` where there is none."""
    inner = Path(path.stem).suffix if path.suffix.lower() in COMPRESSION_ENDINGS else ""
    return (inner + path.suffix).lower() or "plain"


def inner_ending(path: Path) -> str:
    """The ending without that of a compression: `.jsonl` of `a.jsonl.xz`."""
    return (Path(path.stem) if path.suffix.lower() in COMPRESSION_ENDINGS else path).suffix.lower()


def _grown(held: bytes, reads: Iterator[bytes], size: int) -> bytes:
    """``held``, extended from ``reads`` to at least ``size`` bytes; fewer at the end of the file."""
    parts, n = [held], len(held)
    while n < size and (part := next(reads, b"")):
        parts.append(part)
        n += len(part)
    return b"".join(parts)


def _refuse_container(path: Path, head: bytes, compressed: bool) -> None:
    found = next(((what, remedy) for magic, what, remedy in CONTAINERS if head.startswith(magic)), None)
    if found is None and compressed and compression_of(head):
        found = "compressed twice", "decompress it once"
    if found is None and b"\0" in head[:512] and _is_tar(head[:512]):
        found = "a tar archive", UNPACK
    if found is not None:
        inside = "holds" if compressed and found[0].startswith("a") else "is"
        raise UserError(f"{path} {inside} {found[0]}, not text: {found[1]}, or leave it out with a glob")


def _is_tar(block: bytes) -> bool:
    """Whether a block of 512 bytes is a tar header: its checksum says so, in the oldest formats too."""
    with contextlib.suppress(tarfile.HeaderError, ValueError):
        return bool(tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape"))
    return False


def _refuse_wide(path: Path, head: bytes) -> None:
    """Refuse UTF-16 and UTF-32: with their byte-order mark, or where every other byte of the beginning is NUL."""
    encoding = next((name for mark, name in WIDE.items() if head.startswith(mark)), None)
    start = head[: min(len(head), 512) // 2 * 2]
    if encoding is None and len(start) >= 8 and (any(start[::2]) != any(start[1::2])):
        encoding = "UTF-32" if sum(any(start[i::4]) for i in range(4)) == 1 else "UTF-16"
    if encoding is not None:
        raise UserError(f"{path} is not UTF-8 text but {encoding}; convert it: iconv -f {encoding} -t UTF-8 OLD > NEW")


def _json_shape(head: bytes, reads: Iterator[bytes], column: str) -> Literal["lines", "records", "lone"] | None:
    """Detect the layout of the JSON objects of a file.

    Returns:
        lines: an object a line; records: the elements of an array, or objects over several lines; lone: one object
        without the field ``column``, or an array of something else than objects; None: it is no JSON, or holds none.
    """
    decoder = json.JSONDecoder()
    while True:
        text = head.decode("utf-8-sig", errors="replace").lstrip(SPACE)
        array = text.startswith("[")
        text = text[array:].lstrip(SPACE)
        ended = len(head) < HEAD_BYTES
        if text and text[0] != "{":
            return "lone" if array and _is_element(decoder, text) else None
        value: dict[str, Any] = {}
        rest = ""
        try:
            if text:
                value, end = decoder.raw_decode(text)
                rest = text[end:].lstrip(SPACE)
        except json.JSONDecodeError as e:
            if not cut_short(e, text):
                return None
        except (RecursionError, ValueError):  # nested too deeply, a number of too many digits
            return None
        if rest:
            break
        if len(head) > LONGEST_RECORD:
            return "records"  # whose reader refuses the first one for its length
        longer = head if ended else _grown(head, reads, 2 * len(head))
        if len(longer) == len(head):
            if not value:
                return None
            break
        head = longer
    if array:
        return "records" if column in value or rest[:1] in ("", ",", "]") else None
    one_line = "\n" not in text[:end] and (not rest or "\n" in text[end : len(text) - len(rest)])
    if not rest and column not in value:
        return "lone"
    if rest and not rest.startswith("{") and column not in value:
        return None
    return "lines" if one_line else "records"


def _is_element(decoder: json.JSONDecoder, text: str) -> bool:
    """Whether text begins with an element of a JSON array, and is not prose in brackets."""
    with contextlib.suppress(ValueError, RecursionError):
        return text[0] in '"[n' and text[decoder.raw_decode(text)[1] :].lstrip(SPACE)[:1] in (",", "]")
    return False


def _mostly_records(head: bytes, column: str) -> bool:
    """Whether half of the first lines, or more, are JSON objects with the field ``column``."""
    lines = [line for line in head.split(b"\n", MOST_LINES)[:MOST_LINES] if line.strip()]
    records = 0
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            records += line.lstrip().startswith(b"{") and column in json.loads(line)
    return 0 < len(lines) <= 2 * records


def _table(head: bytes, column: str) -> Literal["CSV", "TSV"] | None:
    """Whether a header of several fields names the column, and the first rows have as many fields."""
    text = head.decode("utf-8-sig", errors="replace")
    if column not in text.partition("\n")[0]:
        return None
    tables: tuple[tuple[Literal["CSV", "TSV"], str], ...] = (("CSV", ","), ("TSV", "\t"))
    for kind, delimiter in tables:
        rows: list[list[str]] = []
        with contextlib.suppress(csv.Error):  # the last row may be cut short
            for row in itertools.islice(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), MOST_LINES):
                rows += [row] if row else []
        width = len(rows[0]) if rows else 0
        named = width > 1 and column in map(str.strip, rows[0])
        whole = rows[1:] if len(head) < HEAD_BYTES or len(rows) < 3 else rows[1:-1]
        if named and whole and all(len(row) == width for row in whole):
            return kind
    return None


def cut_short(e: json.JSONDecodeError, text: str) -> bool:
    """Whether JSON may be wrong only because ``text`` ends too soon."""
    return e.msg.startswith("Unterminated string") or e.pos >= len(text) - 8
