"""Spans of a file and parts of a text contain exactly the documents of the complete file."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from restomod.data import readers, records, streams
from restomod.data.documents import LongDocument
from restomod.data.readers import Span, read_documents
from restomod.utils.errors import UserError
from tests.data.test_readers import COMPRESSORS, parquet, written


@contextlib.contextmanager
def file_of(name: str, content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield written(Path(folder), name, content)


def cut(path: Path, size: int) -> list[Span]:
    of = path.stat().st_size
    return [Span(start, min(start + size, of), of) for start in range(0, of, size)]


def texts(path: Path, span: Span | None = None) -> list[str]:
    return ["".join(document.parts()) for document in read_documents(path, span=span)]


any_record = st.tuples(st.text(max_size=30), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n", "\n \r\n"]))


@given(
    st.lists(any_record, min_size=1, max_size=12), st.booleans(), st.integers(1, 80), st.sampled_from([1, 7, 1 << 20])
)
def test_the_spans_of_json_lines_hold_all_lines_once_and_in_order(
    lines: list[tuple[str, bool, str]], final_newline: bool, size: int, read_bytes: int
) -> None:
    content = "".join(json.dumps({"text": text}, ensure_ascii=ascii) + end for text, ascii, end in lines)
    content = content if final_newline else content.rstrip()
    with file_of("a.jsonl", content.encode()) as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "READ_BYTES", read_bytes)
        parts = [texts(path, span) for span in cut(path, size)]
        assert [text for part in parts for text in part] == [text for text, *_ in lines if text] == texts(path)


@given(st.lists(st.text(max_size=30), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 2000), st.booleans())
def test_the_spans_of_a_parquet_file_hold_all_rows_once_and_in_order(
    rows: list[str], group: int, size: int, dictionary: bool
) -> None:
    buffer = io.BytesIO()
    table = pyarrow.table({"id": range(len(rows)), "text": rows})
    pyarrow.parquet.write_table(table, buffer, row_group_size=group, use_dictionary=dictionary)
    with file_of("a.parquet", buffer.getvalue()) as path:
        found = [document for span in cut(path, size) for document in read_documents(path, span=span)]
        assert found == list(read_documents(path))
        assert [(d.name, "".join(d.parts())) for d in found] == [
            (f"{path}, row {i}", text) for i, text in enumerate(rows, 1) if text
        ]


def test_rows_are_shared_out_to_the_spans_by_their_groups(tmp_path: Path) -> None:
    path = written(tmp_path, "a.parquet", parquet([f"row {i} " + "x" * (i % 90) for i in range(7000)]))
    counts = [len(texts(path, span)) for span in cut(path, path.stat().st_size // 4)]
    assert sum(counts) == 7000
    assert sum(count > 0 for count in counts) >= 4


@pytest.mark.parametrize("size", [1, 13, 40, 1000])
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (b"nonsense", "line 7: not JSON"),
        (b"[" * 3000, "line 7: not JSON"),
        (b'{"text": "\xff"}', "offset 10 of line 7"),
        (b'{"text": 3}', "line 7: 'text' must be text"),
        (b'{"body": "a"}', "line 7 has no field 'text'; it has: body;"),
        (b"\0" * 9, "line 7, is filled with NUL bytes"),
        (
            b'{"text": "' + b"a" * 500 + b'"}',
            r"line 7 is longer than 0\.0004 MB; move this document to a separate plain text",
        ),
        (b"\0" * 500, "line 7, is filled with NUL bytes"),
    ],
)
def test_an_error_names_the_line_of_the_file_and_not_of_the_span(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, bad: bytes, said: str
) -> None:
    lines = [
        b'{"text": "a"}',
        b"",
        b'{"text": "b"}\r',
        b"  ",
        b'{"text": "c"}',
        b'{"text": "d"}',
        bad,
        b'{"text": "e"}',
    ]
    path = written(tmp_path, "a.jsonl", b"\n".join(lines))
    if b"a" * 500 in bad or len(bad) == 500:
        monkeypatch.setattr(readers, "LONGEST_RECORD", 400)
        monkeypatch.setattr(records, "LONGEST_RECORD", 400)
    monkeypatch.setattr(streams, "READ_BYTES", 10)
    spans = iter(cut(path, size))
    found: list[str] = []
    with pytest.raises(UserError, match=said):
        found.extend(text for span in spans for text in texts(path, span))
    rest = [text for span in spans for text in texts(path, span)]
    assert rest in (["e"], [])


def test_documents_of_a_span_are_named_by_where_they_are(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n')
    names = [document.name for span in cut(path, 14) for document in read_documents(path, span=span)]
    assert names == [f"{path}, line 1", *[f"{path}, line 1 after byte {byte}" for byte in (14, 28)]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_file_whose_size_has_changed_since_it_was_cut_is_refused(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, b'{"text": "a"}\n')
    with pytest.raises(UserError, match=r"has changed since it was cut into units of work; run the same command again"):
        texts(path, Span(0, 7, 13))


# --- long texts ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tiny_reads(size: int, long_text: int = 0) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "READ_BYTES", size)
        patch.setattr(readers, "LONG_TEXT", long_text)
        yield


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_a_long_plain_file_is_read_in_parts_as_often_as_is_asked(tmp_path: Path, compression: str) -> None:
    text = "line é中🔥\r\n\n  " * 50 + "end"
    path = written(tmp_path, f"a.txt{compression}", COMPRESSORS[compression](text.encode()))
    with tiny_reads(7, long_text=500):
        (document,) = read_documents(path)
        assert document == LongDocument(str(path), document.parts)
        for _ in range(2):
            parts = list(document.parts())
            assert "".join(parts) == text
            assert len(parts) > 50


def said_of(path: Path) -> str:
    try:
        return repr(texts(path))
    except UserError as e:
        return str(e)


@given(
    st.lists(st.text(max_size=3).map(str.encode) | st.binary(max_size=3), max_size=9).map(b"".join), st.integers(1, 5)
)
def test_a_long_text_is_refused_where_a_short_one_is(content: bytes, read_bytes: int) -> None:
    """Check that both errors have the same offset and reason."""
    content = b"x" + content  # avoid a byte-order mark and the magic numbers of compressed files
    with file_of("a.txt", content + b"end") as path:
        short = said_of(path)
        try:
            assert short == repr([(content + b"end").decode()]) or "filled with NUL" in short
        except UnicodeDecodeError as e:
            assert f"byte 0x{content[e.start]:02x} at offset {e.start} ({e.reason})" in short  # noqa: PT017
        with tiny_reads(read_bytes):
            assert said_of(path) == short


def test_a_short_text_is_not_read_in_parts(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", b"12345678")
    with tiny_reads(3, long_text=8):
        assert [type(document).__name__ for document in read_documents(path)] == ["Document"]
    with tiny_reads(3, long_text=7):
        assert [type(document).__name__ for document in read_documents(path)] == ["LongDocument"]


# --- large records ------------------------------------------------------------------------------------------


def test_the_size_of_a_parquet_read_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("a" * 10, "b" * 1000)[i >= 1000] + str(i) for i in range(2000)]
    table = pyarrow.table({"text": rows, "other": ["c" * 9000 + str(i) for i in range(2000)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1000)
    asked: list[int] = []
    real = pyarrow.parquet.ParquetFile.iter_batches

    def iter_batches(self: Any, rows: int, **options: Any) -> Any:
        asked.append(rows)
        return real(self, rows, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", iter_batches)
    monkeypatch.setattr(readers, "PARQUET_BYTES", 10_000)
    assert texts(tmp_path / "a.parquet") == rows
    assert asked[0] == readers.PARQUET_ROWS
    assert 8 <= asked[1] <= 10
    monkeypatch.setattr(readers, "PARQUET_BYTES", 10)
    texts(tmp_path / "a.parquet")
    assert asked[3] == 1


def test_a_row_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST_RECORD", 1000)
    monkeypatch.setattr(records, "LONGEST_RECORD", 1000)
    path = written(tmp_path, "a.parquet", parquet([f"short {i}" for i in range(5)] + ["x" * 1001]))
    with pytest.raises(
        UserError, match=r"a\.parquet, row 6 is longer than 0\.001 MB; move this document to a separate plain"
    ):
        texts(path)
    path = written(tmp_path, "b.parquet", parquet(["short"] * 700 + ["".join(map(str, range(999)))]))
    with pytest.raises(UserError, match=r"b\.parquet: one of the rows 701 to 701 is longer than 0\.001 MB; move this"):
        texts(path)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_line_of_the_longest_size_is_read_and_a_longer_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: bytes
) -> None:
    line = json.dumps({"text": "x" * 100}).encode() + end
    path = written(tmp_path, "a.jsonl", b'{"text": "a"}\n' + line)
    monkeypatch.setattr(readers, "LONGEST_RECORD", len(line))
    assert texts(path) == ["a", "x" * 100]
    monkeypatch.setattr(readers, "LONGEST_RECORD", len(line) - 1)
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 is longer than"):
        texts(path)


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_a_compressed_parquet_file_is_read_from_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    path = written(tmp_path, f"a.parquet{compression}", COMPRESSORS[compression](parquet(["a", "b"])))
    (tmp_path / "room").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "room"))
    assert texts(path) == ["a", "b"]
    assert list((tmp_path / "room").iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"a\.parquet\.\w+: cannot decompress it into .*nowhere \(No such file"):
        texts(path)


def test_a_row_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    raw = pyarrow.array([b"a", b"\xff"], type=pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 2: not UTF-8 text \(invalid start byte\)"):
        texts(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_other_arrow_types_of_text_are_read(tmp_path: Path, kind: Any) -> None:
    table = pyarrow.table({"text": pyarrow.array(["a", None, "é"]).cast(kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["a", "é"]
