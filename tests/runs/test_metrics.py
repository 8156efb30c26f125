"""`.jsonl` files return the written records; a crash damages at most the last line."""

from __future__ import annotations

from pathlib import Path

import pytest

from restomod.runs import metrics
from restomod.runs.metrics import (
    MAX_LINE,
    NewRecords,
    SampleRecord,
    ValidationLosses,
    append_jsonl,
    iterate_jsonl,
    keep_records,
    read_jsonl,
)
from restomod.utils.errors import UserError

RECORDS = [{"kind": "train", "step": step, "loss": loss} for step, loss in enumerate((10.82, 9.5, 8.25))]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    for record in RECORDS:
        append_jsonl(path, record)
    return path


def test_records_are_read_in_order(path: Path) -> None:
    assert read_jsonl(path) == RECORDS


def test_records_share_their_keys(path: Path) -> None:
    """Shared keys halve the memory of 600,000 records."""
    first, second, _ = map(list, read_jsonl(path))
    assert all(a is b for a, b in zip(first, second, strict=True))


def test_each_record_is_one_line(path: Path) -> None:
    assert path.read_text().count("\n") == 3


@pytest.mark.parametrize("text", ["two\nlines", "\u2028 \x85 \x0c \r", "naïve 猫 🐈", '"quoted" \\', "\x00\ufffd", ""])
def test_any_text_is_read_unchanged(text: str, tmp_path: Path) -> None:
    for step in (1, 2):
        append_jsonl(tmp_path / "samples.jsonl", {"step": step, "prompt": text, "text": text})
    assert read_jsonl(tmp_path / "samples.jsonl", SampleRecord) == [
        {"step": step, "prompt": text, "text": text} for step in (1, 2)
    ]


def test_a_missing_file_has_no_records(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_an_incomplete_last_line_is_skipped(path: Path) -> None:
    content = path.read_bytes()
    last = len(content) - content[:-1].rindex(b"\n") - 1  # bytes with the newline
    for cut in range(2, last):
        path.write_bytes(content[:-cut])
        assert read_jsonl(path) == RECORDS[:2]


def test_a_last_line_without_newline_is_read(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    assert read_jsonl(path) == RECORDS


def test_only_wanted_records_are_kept(path: Path) -> None:
    keep_records(path, lambda record: record["step"] != 1)
    assert read_jsonl(path) == [RECORDS[0], RECORDS[2]]


@pytest.mark.parametrize("cut", [1, 5])
def test_records_can_be_appended_after_an_incomplete_line_is_removed(path: Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:-cut])
    keep_records(path, lambda record: record["step"] < 2)
    append_jsonl(path, RECORDS[2])
    assert read_jsonl(path) == RECORDS


@pytest.mark.parametrize(
    "damage", [b"{", b"\xff\xfe", b"[]", b"5", b'{"kind": "train"}', b'{"step": "1"}', b"\x00" * 9]
)
def test_damaged_lines_are_counted_except_an_incomplete_last_one(path: Path, damage: bytes) -> None:
    said: list[str] = []
    assert list(iterate_jsonl(path, said.append)) == RECORDS
    assert not said
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"\n", damage + b"\n", damage + b"\n", *lines[1:], damage]))
    list(iterate_jsonl(path, said.append))
    assert len(said) == 1
    assert f"{path}: 2 of {len(lines) + 4} lines" in said[0]
    assert said[0].endswith("the first is line 3")


def test_damaged_lines_between_kept_records_stay_unchanged(path: Path) -> None:
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\xff{\n" + second + b"[\n" + third + b'{"st')
    keep_records(path, lambda record: record["step"] < 2)
    assert path.read_bytes() == first + b"\xff{\n" + second


def test_keeping_records_creates_no_file(tmp_path: Path) -> None:
    keep_records(tmp_path / "metrics.jsonl", lambda _: True)
    assert list(tmp_path.iterdir()) == []


def test_only_new_lines_are_read(path: Path) -> None:
    reader = NewRecords(path)
    fresh, records = reader.read()
    assert (fresh, list(records)) == (True, RECORDS)
    with open(path, "r+b") as f:  # a second read would find no records
        f.write(b"#" * 10)
    append_jsonl(path, {"kind": "train", "step": 3})
    fresh, records = reader.read()
    assert (fresh, list(records)) == (False, [{"kind": "train", "step": 3}])
    fresh, records = reader.read()
    assert (fresh, list(records)) == (False, [])


def test_a_new_line_is_read_when_it_is_complete(path: Path) -> None:
    reader = NewRecords(path)
    assert len(list(reader.read()[1])) == 3
    with open(path, "a") as f:
        f.write('{"kind": "val", "step": 3, "lo')
    assert list(reader.read()[1]) == []
    with open(path, "a") as f:
        f.write('ss": 5}\nnot JSON\n[1]\n{"kind": "val", "step": 4}\n')
    assert list(reader.read()[1]) == [{"kind": "val", "step": 3, "loss": 5}, {"kind": "val", "step": 4}]


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("more", [0, 1, 5])
def test_a_rewritten_file_is_read_from_its_start(kept: int, more: int, path: Path) -> None:
    reader = NewRecords(path)
    assert len(list(reader.read()[1])) == 3
    keep_records(path, lambda record: record["step"] < kept)
    again = [{"kind": "train", "step": kept + i, "loss": 1.0} for i in range(more)]
    for record in again:
        append_jsonl(path, record)
    fresh, records = reader.read()
    assert (fresh, list(records)) == (True, RECORDS[:kept] + again)


def test_a_file_may_appear_and_disappear(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = NewRecords(path)
    fresh, records = reader.read()
    assert (fresh, list(records)) == (True, [])
    append_jsonl(path, RECORDS[0])
    fresh, records = reader.read()
    assert (fresh, list(records)) == (True, RECORDS[:1])
    path.unlink()
    fresh, records = reader.read()
    assert (fresh, list(records)) == (True, [])


def test_validation_losses_are_read_incrementally(tmp_path: Path) -> None:
    losses, path = ValidationLosses(tmp_path), tmp_path / "metrics.jsonl"
    assert losses.read() == {}
    for kind, step, loss in (("val", 0, 9.0), ("train", 1, 8.0), ("val", 2, 7.0), ("val", 4, None), ("val", "x", 1.0)):
        append_jsonl(path, {"kind": kind, "step": step, "loss": loss})
    assert losses.read() == {0: 9.0, 2: 7.0}
    append_jsonl(path, {"kind": "val", "step": 6, "loss": 6.0})
    assert losses.after_start() == {2: 7.0, 6: 6.0}
    keep_records(path, lambda record: record["step"] == 0)
    assert losses.read() == {0: 9.0}


TRAIN = b'{"kind": "train", "step": 3'


@pytest.mark.parametrize(
    "line",
    [
        TRAIN + b', "loss": "low"}',
        TRAIN + b', "loss": true}',
        TRAIN + b', "ms": -1}',
        TRAIN + b', "ms": 1e400}',
        TRAIN + b', "time": ' + b"9" * 400 + b"}",
        TRAIN + b', "skipped": 5}',
        TRAIN + b', "sources": [1]}',
        TRAIN + b', "more": ' + b"[" * 100_000 + b"}",
        TRAIN + b"}" + b" " * MAX_LINE,
        b"\0" * 3 * MAX_LINE,
        b"x" * MAX_LINE,
        b'{"kind": "train", "step": -1}',
        b'{"kind": "train", "step": 9007199254740993}',
        b'{"kind": "train", "step": ' + b"1" * 400 + b"}",
        b'{"kind": "train", "step": true}',
        b'{"kind": 5, "step": 3}',
        b'{"kind": "\\ud800", "step": 3}',
        b'{"kind": "task", "task": "a", "step": 3, "acc": [1]}',
    ],
    ids=lambda line: str(line[:40]),
)
def test_values_of_wrong_types_or_out_of_range_are_damage(path: Path, line: bytes) -> None:
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, line, b"\n", *others]))
    said: list[str] = []
    assert list(iterate_jsonl(path, said.append)) == RECORDS
    assert said == [f"{path}: 1 of 4 lines cannot be read and are skipped; the first is line 2"]
    reader = NewRecords(path)
    assert list(reader.read()[1]) == RECORDS
    append_jsonl(path, RECORDS[0] | {"step": 7})
    fresh, records = reader.read()
    assert (fresh, list(records)) == (False, [RECORDS[0] | {"step": 7}])
    keep_records(path, lambda record: record["step"] != 7)
    assert read_jsonl(path) == RECORDS


def test_records_of_a_healthy_run_are_read_unchanged(tmp_path: Path) -> None:
    records = [
        {"kind": "val", "step": 0, "loss": float("inf"), "tokens": 5, "sources": {"a": 1.5, "b": 2}, "time": 1.5},
        {
            "kind": "train",
            "step": 0,
            "loss": None,
            "lr": 0.0,
            "grad_norm": None,
            "ms": 1.0,
            "mfu": None,
            "skipped": "x",
        },
        {"kind": "task", "step": 5, "task": "a", "examples": 7, "acc": 0.5, "acc_stderr": 0.1, "seconds": 2},
        {"kind": "rollback", "step": 5, "failed_step": 7, "data_offset": 3, "time": 1732667712.123},
        {"kind": "of a later version", "step": 9},
    ]
    for record in records:
        append_jsonl(tmp_path / "metrics.jsonl", record)
    assert read_jsonl(tmp_path / "metrics.jsonl") == records
    append_jsonl(tmp_path / "metrics.jsonl", {"kind": "val", "step": 9, "loss": float("nan"), "foreign": "s3cr3t"})
    last = read_jsonl(tmp_path / "metrics.jsonl")[-1]
    assert (set(last), last["loss"] != last["loss"]) == ({"kind", "step", "loss"}, True)


def test_an_endless_line_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_SKIPPED", 4 * MAX_LINE)
    with open(path, "ab") as f:
        f.truncate(2**40)  # zeros
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        read_jsonl(path)
