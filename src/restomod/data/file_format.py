"""Detection of a file's text format by its content, and refusal of files without text.

The file name matters only where the content is ambiguous. Containers without plain text (tar, zip, PDF, arrays,
images) are refused, so that they are not trained on as text.
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

LONGEST_RECORD = 32_000_000  # bytes of a line or row; Python needs 4 times that with characters beyond U+FFFF
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
TABLES: dict[str, Kind] = {".csv": "CSV", ".tsv": "TSV"}
HEAD_BYTES = 65_536
MOST_LINES = 20  # first lines by which damaged JSON lines and tables are recognised
SPACE = " \t\n\r"  # white space in JSON

UNPACK = "unpack it and name the folder of its files"
EXPORT = "write its text as JSON lines or Parquet"
CONTAINERS: tuple[tuple[bytes, str, str], ...] = (  # first bytes, format, fix
    (b"PK\x03\x04", "a zip archive (or .docx, .epub, .npz, .pt)", UNPACK),
    (b"PK\x05\x06", "an empty zip archive", UNPACK),
    (b"PK\x07\x08", "a zip archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (b"\x04\x22\x4d\x18", "compressed with LZ4", "decompress it"),
    (b"\x1f\x9d", "compressed with compress (.Z)", "decompress it"),
    (b"%PDF-", "a PDF", "extract its text with pdftotext"),
    (b"%!PS-Adobe", "PostScript", "extract its text"),
    (b"{\\rtf", "an RTF document", "save it as plain text"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a Microsoft Office document", "save it as plain text"),
    (b"WARC/1.", "a web archive (WARC)", "extract its text as JSON lines"),
    (b"\x93NUMPY", "a NumPy array", "train on token shards with --data.source tokens"),
    (MAGIC.to_bytes(4, "little"), "a token shard", "train on its folder with --data.source tokens"),
    (b"ARROW1\0\0", "an Arrow file", EXPORT),
    (b"\xff\xff\xff\xff", "an Arrow stream, as saved by `datasets`", EXPORT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", EXPORT),
    (b"Obj\x01", "an Avro file", EXPORT),
    (b"SQLite format 3\0", "an SQLite database", EXPORT),
    *((b"GGUF" + bytes([version, 0]), "a GGUF model", "give text files") for version in (1, 2, 3)),
    (b"\x7fELF", "an executable program", "give text files"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image", "give text files"),
    *((b"\xff\xd8\xff" + bytes([b]), "a JPEG image", "give text files") for b in (0xDB, 0xE0, 0xE1, 0xEE)),
    (b"GIF89a", "a GIF image", "give text files"),
    *((bytes([0x80, protocol]), "a pickle, which could run code", EXPORT) for protocol in (2, 3, 4, 5)),
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer",
        "download the file: git lfs pull",
    ),
)
WIDE = {  # byte-order marks of unsupported encodings
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True)
class FileFormat:
    """Format of a file."""

    kind: Kind
    compressed: bool
    as_text: bool = False
    """True for JSON that is read as plain text: a single object without the text field, or no objects."""


def detect_format(path: Path, column: str = "text") -> FileFormat:
    """Detect the format of a file by its first bytes, and by its name where these are ambiguous.

    Args:
        path: file to inspect, possibly compressed.
        column: field or column that contains the text; it identifies a single JSON object as a record, and the header
            of CSV and TSV.

    Raises:
        UserError: the file cannot be read or decompressed, is a container, or has an unsupported encoding.
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
        shape = "lines"  # the reader reports the damaged lines
    if shape is None and (table := _table(head, column) or TABLES.get(name)):
        return FileFormat(table, compressed)
    if shape == "records":
        return FileFormat("JSON", compressed)
    if shape == "lines" or name in JSON_LINES:
        return FileFormat("JSON lines", compressed)
    return FileFormat("plain text", compressed, as_text=shape == "lone" or name == ".json")


def ending(path: Path) -> str:
    """Return the ending of a file name: `.jsonl.xz` for `a.b.jsonl.xz`, `.txt` for `v1.2.txt`, `plain` without one."""
    inner = Path(path.stem).suffix if path.suffix.lower() in COMPRESSION_ENDINGS else ""
    return (inner + path.suffix).lower() or "plain"


def inner_ending(path: Path) -> str:
    """Return the ending of a file name without the compression: `.jsonl` for `a.jsonl.xz`."""
    return (Path(path.stem) if path.suffix.lower() in COMPRESSION_ENDINGS else path).suffix.lower()


def _grown(held: bytes, reads: Iterator[bytes], size: int) -> bytes:
    """Extend ``held`` from ``reads`` to at least ``size`` bytes, or to the end of the file."""
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
        inside = "contains" if compressed and found[0].startswith("a") else "is"
        raise UserError(f"{path} {inside} {found[0]}, not text: {found[1]}, or exclude it with a glob")


def _is_tar(block: bytes) -> bool:
    """Return whether a block of 512 bytes is a tar header, by its checksum, which all tar formats have."""
    with contextlib.suppress(tarfile.HeaderError, ValueError):
        return bool(tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape"))
    return False


def _refuse_wide(path: Path, head: bytes) -> None:
    """Refuse UTF-16 and UTF-32, recognised by a byte-order mark, or by NUL at every second of the first 512 bytes."""
    encoding = next((name for mark, name in WIDE.items() if head.startswith(mark)), None)
    start = head[: min(len(head), 512) // 2 * 2]
    if encoding is None and len(start) >= 8 and (any(start[::2]) != any(start[1::2])):
        encoding = "UTF-32" if sum(any(start[i::4]) for i in range(4)) == 1 else "UTF-16"
    if encoding is not None:
        raise UserError(f"{path} is {encoding}, not UTF-8 text; convert it: iconv -f {encoding} -t UTF-8 OLD > NEW")


def _json_shape(head: bytes, reads: Iterator[bytes], column: str) -> Literal["lines", "records", "lone"] | None:
    """Detect the layout of the JSON objects of a file.

    Returns:
        "lines": one object per line; "records": objects in an array or over several lines; "lone": a single object
        without the field ``column``, or an array of other values; None: no JSON, or no values.
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
        except (RecursionError, ValueError):  # too deeply nested, or a number with too many digits
            return None
        if rest:
            break
        if len(head) > LONGEST_RECORD:
            return "records"  # the reader refuses the first record for its length
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
    """Return whether ``text`` begins with an element of a JSON array, in contrast to prose in brackets."""
    with contextlib.suppress(ValueError, RecursionError):
        return text[0] in '"[n' and text[decoder.raw_decode(text)[1] :].lstrip(SPACE)[:1] in (",", "]")
    return False


def _mostly_records(head: bytes, column: str) -> bool:
    """Return whether at least half of the first lines are JSON objects with the field ``column``."""
    lines = [line for line in head.split(b"\n", MOST_LINES)[:MOST_LINES] if line.strip()]
    records = 0
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            records += line.lstrip().startswith(b"{") and column in json.loads(line)
    return 0 < len(lines) <= 2 * records


def _table(head: bytes, column: str) -> Literal["CSV", "TSV"] | None:
    """Detect CSV or TSV: a header of several fields that contains ``column``, and rows of the same number of fields."""
    text = head.decode("utf-8-sig", errors="replace")
    if column not in text.partition("\n")[0]:
        return None
    tables: tuple[tuple[Literal["CSV", "TSV"], str], ...] = (("CSV", ","), ("TSV", "\t"))
    for kind, delimiter in tables:
        rows: list[list[str]] = []
        with contextlib.suppress(csv.Error):  # the last row may be incomplete
            for row in itertools.islice(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), MOST_LINES):
                rows += [row] if row else []
        width = len(rows[0]) if rows else 0
        named = width > 1 and column in map(str.strip, rows[0])
        whole = rows[1:] if len(head) < HEAD_BYTES or len(rows) < 3 else rows[1:-1]
        if named and whole and all(len(row) == width for row in whole):
            return kind
    return None


def cut_short(e: json.JSONDecodeError, text: str) -> bool:
    """Return whether the JSON error can result from the end of ``text`` only, which may be incomplete."""
    return e.msg.startswith("Unterminated string") or e.pos >= len(text) - 8
