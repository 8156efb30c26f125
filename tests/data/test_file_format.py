"""The format of a file is detected from its content, and files without text are refused."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import signal
import socket
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from restomod.data import file_format, records, streams
from restomod.data.dataset import open_shard
from restomod.data.file_format import detect_format
from restomod.data.readers import read_documents
from restomod.evals.tasks.registry import load_task
from restomod.generate.text import choose_prompts
from restomod.utils.errors import UserError
from restomod.utils.json_files import read_json
from tests.data.test_readers import json_lines, parquet, written, zstd

TEXTS = ["one\n\n two", "naïve 中 🔥, [x] {y}", 'with "quotes", commas\tand tabs', "four"]


def texts(path: Path, column: str = "text", **options: Any) -> list[str]:
    return ["".join(document.parts()) for document in read_documents(path, column, **options)]


def objects(texts: list[str], column: str = "text") -> list[dict[str, Any]]:
    return [{"id": i, column: text, "more": [1, {"a": None}]} for i, text in enumerate(texts)]


def as_array(texts: list[str], column: str = "text") -> bytes:
    return json.dumps(objects(texts, column)).encode()


def as_pretty_array(texts: list[str], column: str = "text") -> bytes:
    return json.dumps(objects(texts, column), indent=4, ensure_ascii=False).encode()


def as_pretty_objects(texts: list[str], column: str = "text") -> bytes:
    return "\n".join(json.dumps(o, indent=2) for o in objects(texts, column)).encode()


def as_table(delimiter: str) -> Callable[..., bytes]:
    def write(texts: list[str], column: str = "text") -> bytes:
        out = io.StringIO()
        rows = csv.writer(out, delimiter=delimiter)
        rows.writerows([["id", column], *([i, text] for i, text in enumerate(texts))])
        return out.getvalue().encode()

    return write


def as_one_line(texts: list[str], column: str = "text") -> bytes:
    return " ".join(map(json.dumps, objects(texts, column))).encode()


LAYOUTS: dict[str, Callable[..., bytes]] = {
    "lines": json_lines,
    "array": as_array,
    "pretty array": as_pretty_array,
    "pretty objects": as_pretty_objects,
    "objects on a line": as_one_line,
    "parquet": parquet,
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "lzma": lambda content: lzma.compress(content, lzma.FORMAT_ALONE),
    "bz2": bz2.compress,
    "zstd": zstd,
    "zstd, a frame to skip first": lambda content: b"\x50\x2a\x4d\x18\4\0\0\0pads" + zstd(content),
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["a.json", "a", "a.txt", "a.gz", "c4-train.00000-of-01024.json.gz", "a.jsonl", "a.dat"]
)
def test_records_are_documents_whatever_the_file_is_called(
    tmp_path: Path, layout: str, compression: str, name: str
) -> None:
    content = COMPRESSIONS[compression](LAYOUTS[layout](TEXTS))
    assert texts(written(tmp_path, name, content)) == TEXTS


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(("ending", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".CSV", ",")])
def test_rows_of_a_table_are_documents(tmp_path: Path, ending: str, delimiter: str, compression: str) -> None:
    content = COMPRESSIONS[compression](codecs.BOM_UTF8 + as_table(delimiter)(TEXTS, "body"))
    path = written(tmp_path, f"a{ending}.gz", content)
    assert texts(path, "body") == TEXTS
    with pytest.raises(UserError, match=r"has no column 'text'; it has: body, id; select one with --text-"):
        texts(path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["a.json", "a"])
def test_without_the_field_records_are_refused_by_name(tmp_path: Path, layout: str, name: str) -> None:
    path = written(tmp_path, name, LAYOUTS[layout](TEXTS, "content"))
    assert texts(path, "content") == TEXTS
    with pytest.raises(UserError, match=rf"{name}.* has no (field|column) 'text'; it has: content, id"):
        texts(path)


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("layout", ["lines", "array", "pretty array", "pretty objects"])
def test_json_longer_than_the_first_read(
    tmp_path: Path, layout: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_format, "HEAD_BYTES", 10)
    monkeypatch.setattr(streams, "READ_BYTES", size)
    many = ["a" * 500, *(f"{text} {i}" for i in range(20) for text in TEXTS)]
    assert texts(written(tmp_path, "a.json", LAYOUTS[layout](many))) == many


@pytest.mark.parametrize("indent", [None, 2])
def test_one_json_object_with_the_field_is_one_document(tmp_path: Path, indent: int | None) -> None:
    path = written(tmp_path, "a.json", json.dumps({"text": "one", "id": 3}, indent=indent).encode())
    assert texts(path) == ["one"]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"name": "package", "version": "1.0"}, indent=2),
        json.dumps({"name": "package", "version": "1.0"}),
        "{% block title %}\nsome {{ template }}\n",
        "{ int a; }\n",
        "[1] A footnote, and [2] another.",
        "[section]\nkey = value\n",
        "[]",
        "[1, 2, 3]",
        '["a", "b"]',
        "[{not json}]",
        '{"a": // a comment\n 1}',
        '"a string"\n"another"\n',
        "{",
        "BZh9 is how bzip2 begins",
        "<html>\n<p>text</p>",
        "#!/bin/sh\necho\n",
        '# How to\nWrite lines such as\n{"text": "a document"}\n' + "and more\n" * 3,
        "first comes,text\nand then, as one sees, more of it\nwithout commas\n",
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.txt"])
def test_text_that_resembles_records_is_plain_text(tmp_path: Path, content: str, name: str) -> None:
    assert texts(written(tmp_path, name, content.encode())) == [content]


@pytest.mark.parametrize(
    ("content", "as_text"),
    [
        *((content, True) for content in ('["one", "two"]', '[["id", "text"]]', '[null, {"text": "a"}]')),
        *((content, True) for content in ('["a"]\n["b"]\n', '{"name": "a"}')),
        *((content, False) for content in ('["Yes," he said] and left', "[[Main page]] of a wiki", "[1] A", '["a" b]')),
    ],
)
def test_json_read_as_text_is_reported(tmp_path: Path, content: str, as_text: bool) -> None:
    path = written(tmp_path, "a.txt", content.encode())
    assert detect_format(path) == file_format.FileFormat("plain text", False, as_text)
    assert not detect_format(path, "name").as_text or "name" not in content


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"text": "a"} {"text": "b"}]', "line 1: not JSON .missing comma after record 1"),
        (b'[{"text": "a"},\n 3]', "line 2: record 2 must be a JSON object"),
        (b'[{"text": "a"},\n\n {"text": }]', "line 3: record 2 is not JSON"),
        (b'[{"text": "a"}, {"text": "b"', "record 2 is not JSON"),
        (b'[{"text": "a"}', "is truncated: its JSON array does not end after record 1"),
        (b'[{"text": "a"}] more', "extra data after the end of the array"),
        (b'[{"text": 3}]', "record 1: 'text' must be text, not 3"),
        (b'{"text": "a"}\nno JSON\n', "line 2: not JSON"),
        (b'[{"text": "a"}, {"text": "\xff"}]', "is not UTF-8 text: byte 0xff at offset 26"),
        (b'[{"text": "a"}, {"text": ' + b"[" * 100_000, "record 2 is not JSON"),
    ],
)
def test_damaged_json_is_named_by_its_place(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        texts(written(tmp_path, "a.json", content))
    assert "\n" not in str(caught.value)


def test_a_record_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LONGEST_RECORD", 1000)
    monkeypatch.setattr(file_format, "LONGEST_RECORD", 1000)
    monkeypatch.setattr(file_format, "HEAD_BYTES", 100)
    monkeypatch.setattr(streams, "READ_BYTES", 100)
    for long in ([{"text": "a" * 3000}], [{"text": "b"}, {"text": "a" * 3000}]):
        with pytest.raises(
            UserError, match=r"record \d is longer than 0\.001 MB; move this document to a separate plain text"
        ):
            texts(written(tmp_path, "a.json", json.dumps(long).encode()))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"id,text\n1,a, b\n", "line 2: 3 fields, but 2 in the header"),
        (b"id,text\n1,a\n2\n", "line 3: 1 fields"),
        (b'id,text\n1,"a" b\n', "line 2: not CSV"),
        (b'id,text\n1,"a\nb\n', "not CSV .unexpected end of data"),
    ],
)
def test_a_row_that_would_lose_text_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(UserError, match=said):
        texts(written(tmp_path, "a.csv", content))


# --- containers ---------------------------------------------------------------------------------------------


def as_tar(format: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        entry = tarfile.TarInfo("a.txt")
        entry.size = 5
        tar.addfile(entry, io.BytesIO(b"hello"))
    return out.getvalue()


def as_old_tar() -> bytes:
    """Old tar files without `ustar` are recognised by the checksum."""
    block = bytearray(as_tar(tarfile.USTAR_FORMAT))
    block[257:265] = bytes(8)
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block[:512]):06o}\0 ".encode()
    return bytes(block)


def as_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("a.txt", "hello")
    return out.getvalue()


def as_npy() -> bytes:
    out = io.BytesIO()
    np.save(out, np.arange(9))
    return out.getvalue()


def as_arrow(stream: bool) -> bytes:
    table, out = pyarrow.table({"text": ["a"]}), io.BytesIO()
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


CONTAINERS = {
    "tar": as_tar(tarfile.GNU_FORMAT),
    "pax": as_tar(tarfile.PAX_FORMAT),
    "old tar": as_old_tar(),
    "zip": as_zip(),
    "npy": as_npy(),
    "arrow file": as_arrow(stream=False),
    "arrow stream": as_arrow(stream=True),
    "pdf": b"%PDF-1.7\nsome objects",
    "tokens": np.array([20240520, 1, 0], dtype="<i4").tobytes() + bytes(1012),
    "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "warc": b"WARC/1.0\r\nWARC-Type: response\r\n",
    **{f"pickle {protocol}": pickle.dumps(["text"] * 9, protocol) for protocol in (2, 3, 4, 5)},
}


@pytest.mark.parametrize("compression", ["plain", "gzip", "zstd"])
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", ["a.txt", "a.json", "a"])
def test_a_container_is_refused_with_a_fix(tmp_path: Path, container: str, compression: str, name: str) -> None:
    path = written(tmp_path, name, COMPRESSIONS[compression](CONTAINERS[container]))
    with pytest.raises(UserError, match=f"{name} (is|contains) .*, not text: .*, or exclude it with a glob$"):
        texts(path)


def test_a_file_that_is_compressed_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="compressed twice"):
        texts(written(tmp_path, "a.txt.gz", gzip.compress(gzip.compress(b"text"))))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_utf_16_and_32_are_refused_with_how_to_convert(tmp_path: Path, encoding: str, name: str) -> None:
    """They are recognised by the byte-order mark, or by NUL in every second byte of English."""
    wide = encoding[:6].upper()
    with pytest.raises(UserError, match=f"is {wide}, not UTF-8 text; convert it: iconv -f {wide} -t UTF-8"):
        texts(written(tmp_path, name, "some English text".encode(encoding)))


# --- byte-order marks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["plain", "gzip"])
@pytest.mark.parametrize("layout", ["lines", "array", "pretty objects"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a"])
def test_a_byte_order_mark_before_records_is_none_of_them(
    tmp_path: Path, layout: str, name: str, compression: str
) -> None:
    content = COMPRESSIONS[compression](codecs.BOM_UTF8 + LAYOUTS[layout](TEXTS))
    assert texts(written(tmp_path, name, content)) == TEXTS


@pytest.mark.parametrize("size", [1, 2, 3, 1 << 20])
@pytest.mark.parametrize("long_text", [0, 1000])
@pytest.mark.parametrize("text", ["", "a", "\ufeff", "text \ufeff inside"])
def test_a_byte_order_mark_is_no_part_of_a_text(
    tmp_path: Path, text: str, size: int, long_text: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first byte-order mark is removed; later ones are part of the text."""
    monkeypatch.setattr(streams, "READ_BYTES", size)
    monkeypatch.setattr("restomod.data.readers.LONG_TEXT", long_text)
    path = written(tmp_path, "a.txt", codecs.BOM_UTF8 + text.encode())
    assert "".join(texts(path)) == text


# --- special files ------------------------------------------------------------------------------------------


@pytest.fixture
def at_most_seconds() -> Iterator[None]:
    """End a test that blocks while opening or reading."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


READERS: dict[str, Callable[[Path], Any]] = {
    "text": texts,
    "prompts": lambda path: choose_prompts((), str(path), ()),
    "task": lambda path: load_task(f"lambada={path}", path),
    "JSON": lambda path: read_json(path, "manifest"),
    "shard": open_shard,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["fifo", "device", "socket"])
@pytest.mark.usefixtures("at_most_seconds")
def test_no_pipe_device_or_socket_is_opened(
    tmp_path: Path, kind: str, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening such a file can block, and reading it can be endless."""
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    path = tmp_path / kind
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to(os.ttyname(os.openpty()[1]))  # unlike /dev/zero, it gives nothing where it is read
        else:
            server.bind(kind)
        with pytest.raises(UserError, match=f"{kind} is a .*, not a regular file"):
            READERS[reader](path)


# --- formats recognised by several lines --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "a.txt", "a.json", "a.log"])
@pytest.mark.parametrize("first", ['{"text": "cut', "# records", '{"text": "a", }'])
def test_a_damaged_first_line_makes_no_prose_of_json_lines(tmp_path: Path, name: str, first: str) -> None:
    path = tmp_path / name
    path.write_text(first + "\n" + '{"text": "a whole line"}\n' * 9)
    with pytest.raises(UserError, match=r"line 1: not JSON"):
        texts(path)


@pytest.mark.parametrize(("name", "delimiter"), [("t.txt", ","), ("t", ","), ("t.tab", "\t"), ("t.csv", "\t")])
@pytest.mark.parametrize("rows", [1, 3, 40_000])
def test_a_table_is_recognised_by_its_header_and_rows(tmp_path: Path, name: str, delimiter: str, rows: int) -> None:
    written = io.StringIO(newline="")
    csv.writer(written, delimiter=delimiter).writerows([["id", "text"], *([i, TEXTS[i % 4]] for i in range(rows))])
    (tmp_path / name).write_bytes(written.getvalue().encode())
    assert texts(tmp_path / name) == [TEXTS[i % 4] for i in range(rows)]


def test_a_folder_in_place_of_a_file_is_called_one(tmp_path: Path) -> None:
    for read in (detect_format, lambda path: load_task(str(path), tmp_path, None)):
        with pytest.raises(UserError, match="is a folder; give the path of a file"):
            read(tmp_path)
