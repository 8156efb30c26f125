"""Documents are read unchanged from every format, and errors in a file are one line."""

from __future__ import annotations

import builtins
import contextlib
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from restomod.data.readers import Document, read_documents
from restomod.utils.errors import UserError

TEXTS = [f"document {i}\n\twith é, 中 and 🔥, {'long ' * (i % 50)}" for i in range(3000)]


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def json_lines(texts: list[Any], column: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, column: text}).encode() + b"\n" for i, text in enumerate(texts))


def parquet(texts: list[Any], column: str = "text") -> bytes:
    table = pyarrow.table({"id": list(range(len(texts))), column: texts})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, row_group_size=700)
    return buffer.getvalue()


WRITERS: dict[str, Callable[[list[Any]], bytes]] = {".jsonl": json_lines, ".ndjson": json_lines, ".parquet": parquet}
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("kind", [".txt", ".md", ".py", ""])
def test_any_other_file_is_one_document(tmp_path: Path, kind: str, compression: str) -> None:
    text = "line\r\n" * 400_000 + "end"  # larger than one read, its line ends kept
    path = written(tmp_path, f"a{kind}{compression}", COMPRESSORS[compression](text.encode()))
    assert list(read_documents(path)) == [Document(str(path), text)]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_empty_and_absent_texts_are_left_out_and_the_others_named_by_their_place(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, f"a{kind}", WRITERS[kind](["one", "", None, "four"]))
    place = "line" if kind == ".jsonl" else "row"
    assert list(read_documents(path)) == [
        Document(f"{path}, {place} 1", "one"),
        Document(f"{path}, {place} 4", "four"),
    ]


def test_blank_lines_are_left_out(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", b'{"text": "a"}\n\n  \r\n{"text": "b"}')
    assert [document.text for document in read_documents(path)] == ["a", "b"]


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", b'{"text": "a \\ud800 b \\ud83d\\udd25"}\n')
    assert [document.text for document in read_documents(path)] == ["a \ufffd b 🔥"]


def test_several_streams_in_one_file_are_read_to_the_end(tmp_path: Path) -> None:
    half = json_lines(TEXTS[:5])
    for compression in (".gz", ".xz", ".zst"):
        path = written(tmp_path, f"a.jsonl{compression}", COMPRESSORS[compression](half) * 2)
        assert [document.text for document in read_documents(path)] == TEXTS[:5] * 2


def test_a_file_is_read_lazily(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", json_lines(TEXTS) + b"this is no JSON\n")
    documents = read_documents(path)
    assert next(documents).text == TEXTS[0]
    with pytest.raises(UserError, match="line 3001: not JSON"):
        list(documents)


# --- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_a_truncated_compressed_file_is_refused(tmp_path: Path, kind: str, compression: str) -> None:
    content = WRITERS.get(kind, json_lines)(TEXTS)
    whole = COMPRESSORS[compression](content)
    for kept in (len(whole) // 2, len(whole) - 5):
        path = written(tmp_path, f"a{kind}{compression}", whole[:kept])
        with pytest.raises(UserError, match=r"a\.\w+\.\w+ is (truncated|damaged): .*download it again$"):
            list(read_documents(path))


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_a_file_that_is_not_compressed_as_its_name_says_is_read_as_it_is(tmp_path: Path, compression: str) -> None:
    """Browsers and proxies can decompress a file during the download."""
    path = written(tmp_path, f"a.txt{compression}", b"plain text, and enough of it")
    assert [document.text for document in read_documents(path)] == ["plain text, and enough of it"]


def test_an_altered_gzip_file_is_refused(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(b"a" * 1000))
    content[-6] ^= 1  # of the checksum
    with pytest.raises(UserError, match="is damaged: CRC check failed"):
        list(read_documents(written(tmp_path, "a.txt.gz", bytes(content))))


@pytest.mark.parametrize("cut", [7, 1000, -1])
def test_a_corrupt_parquet_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path, "a.parquet", parquet(TEXTS)[:cut])
    with pytest.raises(UserError, match=r"a\.parquet is damaged: .*[Pp]arquet.*; download it again"):
        list(read_documents(path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\n{"text":\n', r"a\.jsonl, line 2: not JSON"),
        (b'{"text": "a"}\n["text"]\n', r"a\.jsonl, line 2: must be a JSON object with a field 'text'"),
        (b'{"text": "a"}\n{"txt": "a"}\n', r"a\.jsonl, line 2 has no field 'text'; it has: txt; select one"),
        (b'{"body": "a", "title": "b"}\n', r"a\.jsonl, line 1 has no field 'text'; it has: body, title; select one"),
        (b'{"text": 3}\n', r"a\.jsonl, line 1: 'text' must be text, not 3"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl is not UTF-8 text: byte 0xff at offset 10 of line 2"),
        (b"", r"a\.jsonl is empty"),
        (b"\0" * 500, r"a\.jsonl, line 1, is filled with NUL bytes"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(UserError, match=said):
        list(read_documents(written(tmp_path, "a.jsonl", content)))


def test_a_parquet_column_of_numbers_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "a.parquet", parquet(["a"]))
    with pytest.raises(UserError, match="row 1: 'id' must be text, not 0"):
        list(read_documents(path, "id"))


def test_a_file_filled_with_nul_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.txt is filled with NUL bytes"):
        list(read_documents(written(tmp_path, "a.txt", b"some" + b"\0" * 4096)))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: no such file or folder"):
        list(read_documents(tmp_path / name))


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst"])
def test_without_pyarrow_its_files_say_how_to_get_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, name, {"a.parquet": parquet(["a"]), "a.txt.zst": zstd(b"a")}[name])
    real = builtins.__import__

    def without(module: str, *arguments: Any, **options: Any) -> Any:
        if module.partition(".")[0] == "pyarrow":
            raise ImportError(module)
        return real(module, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install pyarrow"):
        list(read_documents(path))


def test_a_page_of_parquet_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["to be or not to be"]})
    as_is = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pyarrow.parquet.write_table(table, path, write_page_checksum=True, **as_is)
    assert [document.text for document in read_documents(path)] == ["to be or not to be"]
    path.write_bytes(path.read_bytes().replace(b"or not", b"or nut", 1))
    with pytest.raises(UserError, match=r"a\.parquet is damaged: .*CRC"):
        list(read_documents(path))


@pytest.mark.parametrize("text", ['[{"text": ' + "9" * 5000 + "}]", '{"text":\n' + "9" * 5000 + '}\n{"text": "b"}'])
def test_a_number_of_thousands_of_digits_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},' + text[1:] if text.startswith("[") else text)
    with contextlib.suppress(UserError):
        list(read_documents(path))
