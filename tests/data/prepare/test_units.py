"""The units of work depend only on the settings and on the names and sizes of files."""

from __future__ import annotations

import gzip
import json
import lzma
import platform
import random
from pathlib import Path

import pytest

from restomod.config.prepare import PrepareConfig
from restomod.data.prepare import units as module
from restomod.data.prepare.units import Unit, describe, describe_files, plan_units, unit_documents
from restomod.utils.errors import UserError

CONFIG = PrepareConfig()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Create a folder of files of 1, 2, … 9 bytes."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(1, 10):
        (folder / f"{i}.txt").write_text("x" * i)
    return folder


def sizes_of(units: list[Unit]) -> list[list[int]]:
    return [[Path(file).stat().st_size for file in unit.files] for unit in units]


@pytest.mark.parametrize(
    ("unit_bytes", "expected"),
    [
        (1, [[1], [2], [3], [4], [5], [6], [7], [8], [9]]),
        (6, [[1, 2, 3], [4, 5], [6], [7], [8], [9]]),
        (10, [[1, 2, 3, 4], [5, 6], [7, 8], [9]]),
        (44, [[1, 2, 3, 4, 5, 6, 7, 8, 9]]),
        (46, [[1, 2, 3, 4, 5, 6, 7, 8, 9]]),
    ],
)
def test_files_are_put_together_until_a_unit_is_large_enough(
    text: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int, expected: list[list[int]]
) -> None:
    monkeypatch.setattr(module, "UNIT_BYTES", unit_bytes)
    units = plan_units((str(text),), CONFIG)
    assert sizes_of(units) == expected
    assert [unit.bytes for unit in units] == [sum(sizes) for sizes in expected]


def test_no_unit_holds_files_of_two_sources_and_sources_keep_their_order(text: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first in the alphabet, second in the command")
    units = plan_units((str(text), str(tmp_path / "a.txt"), str(text)), CONFIG)
    assert [len(unit.files) for unit in units] == [9, 1, 9]
    assert units[0] == units[2]


def test_files_are_sorted_and_hidden_and_empty_ones_left_out(tmp_path: Path) -> None:
    names = ["b/2.txt", "a.txt", "b/1.txt", "c.jsonl", "B.txt"]
    random.Random(0).shuffle(names)
    for name in [*names, ".hidden.txt", ".git/x.txt", "empty.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.txt" else "text")
    (unit,) = plan_units((str(tmp_path),), CONFIG)
    assert [str(Path(file).relative_to(tmp_path)) for file in unit.files] == [
        *("B.txt", "a.txt", "b/1.txt", "b/2.txt", "c.jsonl")
    ]
    (unit,) = plan_units((str(tmp_path),), PrepareConfig(glob="*.txt"))
    assert [Path(file).name for file in unit.files] == ["B.txt", "a.txt"]


def test_a_relative_source_makes_the_plan_of_the_absolute_one(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absolute = plan_units((str(text),), CONFIG)
    described = describe((str(text),), CONFIG, absolute)
    for folder, source in ((tmp_path, "text"), (tmp_path, "./text/"), (text, ".")):
        monkeypatch.chdir(folder)
        assert plan_units((source,), CONFIG) == absolute
        assert describe((source,), CONFIG, plan_units((source,), CONFIG)) == described


@pytest.mark.parametrize(
    ("sources", "name"),
    [
        (("a",), "a"),
        (("/x/a.jsonl", "b/"), "a.jsonl+b"),
        (("a", "b", "c"), "a+b+c"),
        (("a", "b", "c", "d"), "a+3 more"),
    ],
)
def test_the_data_is_named_after_its_sources(sources: tuple[str, ...], name: str) -> None:
    assert describe(sources, CONFIG, [])["name"] == name


@pytest.mark.parametrize("built_in", module.BUILT_IN)
def test_a_built_in_source_is_a_unit_unless_a_file_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built_in: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert plan_units((built_in,), CONFIG) == [Unit((), 0, built_in)]
    Path(built_in).write_text("mine")
    assert plan_units((built_in,), CONFIG) == [Unit((str(tmp_path / built_in),), 4)]


def test_the_standard_library_is_read_file_by_file() -> None:
    document = next(iter(unit_documents(Unit((), 0, "python-stdlib"), CONFIG, None)))
    assert document.name.endswith(".py")


def test_a_missing_source_is_refused() -> None:
    with pytest.raises(UserError, match=r"^'': no such file, folder or source"):  # not the current folder
        plan_units(("",), CONFIG)
    with pytest.raises(UserError, match=r"nowhere: no such file, folder or source; known: .*python-stdlib"):
        plan_units(("nowhere",), CONFIG)


@pytest.mark.parametrize("files", [{}, {"empty.txt": ""}, {".hidden": "text"}])
def test_a_folder_without_text_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="has no text"):
        plan_units((str(tmp_path),), CONFIG)


def test_files_are_described_by_ending() -> None:
    files = ("a/v1.2.txt", "b.TXT", "c.d.jsonl.xz", "Makefile", "hf://datasets/o/n@0/x.y.parquet")
    told = describe_files([Unit(files, 9), Unit((), 0, "python-stdlib")])
    assert told == "1 .jsonl.xz file, 1 .parquet file, 2 .txt files, 1 plain file, python-stdlib"


# --- spans of large files -----------------------------------------------------------------------------------


def spans_of(units: list[Unit]) -> list[tuple[int, int, int]]:
    return [(unit.span.start, unit.span.stop, unit.span.of) for unit in units if unit.span]


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".JSONL", ".parquet"])
@pytest.mark.parametrize(
    ("span_bytes", "expected"),
    [
        (100, []),
        (99, [(0, 50, 100), (50, 100, 100)]),
        (50, [(0, 50, 100), (50, 100, 100)]),
        (33, [(0, 25, 100), (25, 50, 100), (50, 75, 100), (75, 100, 100)]),
    ],
)
def test_a_large_file_is_cut_into_units_of_about_equal_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, span_bytes: int, expected: list[tuple[int, int, int]]
) -> None:
    file = tmp_path / f"large{ending}"
    file.write_bytes(b"x" * 100)
    monkeypatch.setattr(module, "SPAN_BYTES", span_bytes)
    units = plan_units((str(file),), CONFIG)
    assert spans_of(units) == expected
    assert sum(unit.bytes for unit in units) == 100
    assert all(unit.files == (str(file),) for unit in units)
    assert plan_units((str(file),), CONFIG) == units
    assert describe_files(units) == f"1 {ending.lower()} file"


@pytest.mark.parametrize("name", ["large.txt", "large.jsonl.xz", "large.parquet.gz", "jsonl"])
def test_a_plain_or_compressed_file_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    content = {".xz": lzma.compress, ".gz": gzip.compress}.get(Path(name).suffix, bytes)(b"x" * 100)
    (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(module, "SPAN_BYTES", 10)
    assert plan_units((str(tmp_path / name),), CONFIG) == [Unit((str(tmp_path / name),), len(content))]


def test_a_large_file_among_small_ones_keeps_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"a.txt": 5, "b.txt": 5, "c.jsonl": 100, "d.jsonl": 5, "e.txt": 200, "f.txt": 5}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    monkeypatch.setattr(module, "SPAN_BYTES", 60)
    units = plan_units((str(tmp_path),), CONFIG)
    assert [[Path(file).name for file in unit.files] for unit in units] == [
        ["a.txt", "b.txt"],
        ["c.jsonl"],
        ["c.jsonl"],
        ["d.jsonl", "e.txt", "f.txt"],
    ]
    assert [unit.bytes for unit in units] == [10, 50, 50, 210]


def test_only_units_of_spans_have_a_span_in_the_plan(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"x" * 100)
    monkeypatch.setattr(module, "SPAN_BYTES", 60)
    sources = (str(text), str(tmp_path / "a.jsonl"), "python-stdlib")
    description = describe(sources, CONFIG, plan_units(sources, CONFIG))
    assert json.loads(json.dumps(description)) == description
    assert [set(unit) for unit in description["units"]] == [
        {"files", "bytes", "source"},
        *[{"files", "bytes", "source", "span"}] * 2,
        {"files", "bytes", "source"},
    ]


def test_another_size_of_a_file_is_another_plan_of_each_of_its_spans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a finished unit of the old file would be used for the new one."""
    monkeypatch.setattr(module, "SPAN_BYTES", 60)
    units = []
    for size in (100, 101):
        (tmp_path / "a.jsonl").write_bytes(b"x" * size)
        units.append(plan_units((str(tmp_path),), CONFIG))
    assert len(units[0]) == len(units[1]) == 2
    assert units[0][0].bytes == units[1][0].bytes
    assert units[0][0] != units[1][0]


def test_the_plan_of_the_standard_library_names_the_python_that_it_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def described() -> dict[str, object]:
        return describe(("python-stdlib",), CONFIG, plan_units(("python-stdlib",), CONFIG))

    mine = described()
    assert mine == described()
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    assert described() != mine
    assert "python" not in describe(("a",), CONFIG, [Unit(("a",), 1)])
