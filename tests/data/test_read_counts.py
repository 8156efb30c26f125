"""Files are counted by format or by the reason for skipping; the manifest and all commands show the counts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from restomod.cli import main
from restomod.config.prepare import PrepareConfig
from restomod.config.run import DataConfig
from restomod.data import overview, readers, streams
from restomod.data.dataset import open_dataset
from restomod.data.documents import Document, LongDocument
from restomod.data.manifest import merge_counts
from restomod.data.prepare import units
from restomod.data.prepare.run import prepare_folder
from restomod.data.prepare.text_cache import prepare_text
from restomod.data.read_counts import ReadCounts, summary_rows
from restomod.data.tokenizer import Tokenizer

END = "<|endoftext|>"
EXPECTED = {
    "files": {
        "JSON": {".json": 1},
        "JSON lines": {".json.gz": 1},
        "plain text": {".md": 2, ".xyz": 1},
        "plain text (JSON without the text field)": {".json": 1},
    },
    "left_out": {"broken link": 1, "empty": 1, "hidden": 1},
    "end_of_text_literals": 4,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "text"
    root.mkdir()
    (root / "a.md").write_text(f"one {END}\n{END} two")
    (root / "b.md").write_text("three")
    (root / "c.xyz").write_text("four")
    (root / "d.json").write_text(json.dumps([{"text": f"five{END}"}, {"text": "six"}]))
    (root / "e.json.gz").write_bytes(gzip.compress(b'{"text": "seven"}\n{"text": "eight %s"}\n' % END.encode()))
    (root / "package.json").write_text('{\n "name": "nine"\n}')
    (root / ".hidden").write_text("no")
    (root / "empty").touch()
    (root / "broken").symlink_to("nowhere")
    return root


def sizes_of(folder: Path) -> dict[str, int]:
    kinds = {"JSON": ["d.json"], "JSON lines": ["e.json.gz", "lines"], "plain text": ["a.md", "b.md", "c.xyz"]}
    kinds |= {"plain text (JSON without the text field)": ["package.json"]}
    files = {kind: [folder / name for name in names] for kind, names in kinds.items()}
    return {kind: sum(path.stat().st_size for path in paths if path.exists()) for kind, paths in files.items()}


@pytest.mark.parametrize("dedup", [False, True])
@pytest.mark.parametrize(("unit_bytes", "span_bytes", "workers"), [(10**9, 10**9, 1), (1, 10**9, 1), (1, 20, 1)])
def test_prepare_counts_the_same_in_any_units_and_spans(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dedup: bool,
    unit_bytes: int,
    span_bytes: int,
    workers: int,
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", unit_bytes)
    monkeypatch.setattr(units, "SPAN_BYTES", span_bytes)
    (folder / "lines").write_text('{"text": "a long line to be cut"}\n' * 3)
    dataset = prepare_folder((str(folder),), PrepareConfig(dedup=dedup), tmp_path / "out", workers)
    sizes = sizes_of(folder)
    expected = EXPECTED | {"files": EXPECTED["files"] | {"JSON lines": {".json.gz": 1, "plain": 1}}, "bytes": sizes}
    assert dataset.manifest["read"] == expected


def test_train_counts_the_current_files(folder: Path, tmp_path: Path) -> None:
    config = DataConfig(source="text", path=str(folder), cache=str(tmp_path / "cache"))
    first = prepare_text(config)
    expected = EXPECTED | {"bytes": sizes_of(folder)}
    assert first.manifest["read"] == expected
    assert json.loads((first.folder / "manifest.json").read_text())["read"] == expected
    (folder / "b.md").rename(folder / "b.txt")
    again = prepare_text(config)
    assert again.folder == first.folder
    assert again.manifest["read"]["files"]["plain text"] == {".md": 1, ".txt": 1, ".xyz": 1}


def test_every_command_prints_the_counts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    for command in (["prepare", str(folder), "--out", out], ["prepare", str(folder), "--out", out], ["data", out]):
        assert main(command) == 0
        said = capsys.readouterr().out
        sizes = sizes_of(folder)
        assert f"as plain text (.md 2, .xyz 1, {sizes['plain text']} bytes)" in said
        assert f"1 file as JSON lines (.json.gz, {sizes['JSON lines']} bytes)" in said
        assert "skipped: 3 files or folders: broken link 1, empty 1, hidden 1" in said
        assert f"warning: the text contains a literal {END} 4 times; if it separates documents, split" in said
        assert "warning: files may be missing: broken link 1" in said


def test_a_manifest_without_the_counts_opens_and_says_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: Tokenizer
) -> None:
    out = tmp_path / "out"
    prepare_folder((str(folder),), PrepareConfig(), out, 1)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["read"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert main(["data", str(out)]) == 0
    assert "skipped" not in capsys.readouterr().out
    assert summary_rows(open_dataset(out, tokenizer.sha256).manifest) == []
    assert main(["prepare", str(folder), "--out", str(out)]) == 0  # the folder is finished, also without the counts


def test_an_absent_separator_causes_a_warning(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(folder), "--out", str(tmp_path / "out"), "--separator", "---"]) == 0
    assert "warning: --separator does not occur" in capsys.readouterr().out


def test_with_a_separator_only_literals_in_records_are_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = prepare_folder((str(folder),), PrepareConfig(separator=END), tmp_path / "out", 1)
    assert (dataset.manifest["read"]["separators"], dataset.manifest["read"]["end_of_text_literals"]) == (2, 2)


pieces = st.lists(st.sampled_from([END, "<|", "endoftext", "|>", "a", "é"]), max_size=12).map("".join)


@given(pieces, st.integers(1, 15))
def test_literals_are_counted_across_the_parts_of_a_long_document_and_once(text: str, size: int) -> None:
    counts = ReadCounts()
    long = LongDocument("long", lambda: (text[i : i + size] for i in range(0, len(text), size)))
    for document in map(counts.count, [Document("a", text), long]):
        for _ in range(2):
            assert "".join(document.parts()) == text
    assert counts.to_dict().get("end_of_text_literals", 0) == 2 * text.count(END)


def test_a_long_file_is_counted_as_a_short_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(f"{END} text\n" * 99)
    monkeypatch.setattr(readers, "LONG_TEXT", 50)
    monkeypatch.setattr(streams, "READ_BYTES", 16)
    for made in (
        prepare_text(DataConfig(source="text", path=str(tmp_path / "a.txt"), cache=str(tmp_path / "cache"))),
        prepare_folder((str(tmp_path / "a.txt"),), PrepareConfig(), tmp_path / "out", 1),
    ):
        assert made.manifest["read"]["end_of_text_literals"] == 99


def test_counts_of_units_are_summed() -> None:
    parts = [{"files": {"A": {".x": 1}}, "separators": 0}, {}, {"files": {"A": {".x": 2, ".y": 1}, "B": {".z": 1}}}]
    assert merge_counts(parts) == {"files": {"A": {".x": 3, ".y": 1}, "B": {".z": 1}}, "separators": 0}


@pytest.mark.parametrize("read_tokens", [1, 5, 1_000_000])
def test_data_counts_separators_and_literals_separately(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiktoken_gpt2: tiktoken.Encoding,
    read_tokens: int,
) -> None:
    """The counts also work for published shards without a manifest."""
    monkeypatch.setattr(overview, "READ_TOKENS", read_tokens)
    text = f"{END}one.{END}.\n({END}) endoftext <|endoftext |endoftext|> {END}{END} {END}"
    tokens = [50256, *tiktoken_gpt2.encode_ordinary(text), 50256, *tiktoken_gpt2.encode_ordinary("b")]
    np.save(tmp_path / "x_train_0.npy", np.array(tokens, dtype=np.uint16))
    assert main(["data", str(tmp_path)]) == 0
    assert f"2 tokens 50256, {text.count(END)} literal {END}" in capsys.readouterr().out
