"""`restomod prepare` handles large files like small ones, with any number of workers and bounded memory."""

from __future__ import annotations

import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest
import tiktoken

from restomod.data.prepare import run, units
from restomod.utils.errors import UserError
from tests.data.pieces import tiny_pieces
from tests.data.prepare.preparing import peak_memory
from tests.data.prepare.test_run import all_tokens, delimited, hashes, prepared, texts_of, write_jsonl


def write_texts(folder: Path, lengths: list[int]) -> None:
    folder.mkdir()
    for i, length in enumerate(lengths):
        text = "\r\n  ".join(texts_of(length, seed=i))
        content = lzma.compress(text.encode()) if i % 3 == 2 else text.encode()
        (folder / f"{i}.txt{'.xz' if i % 3 == 2 else ''}").write_bytes(content)


@pytest.mark.parametrize("values", [{}, {"val_fraction": 0.4, "shard_tokens": 200}, {"dedup": True, "split_seed": 3}])
@pytest.mark.parametrize("lengths", [[50], [1, 60, 2, 60, 1]])
def test_long_texts_become_the_bytes_that_short_ones_do(
    tmp_path: Path, lengths: list[int], values: dict[str, Any]
) -> None:
    write_texts(tmp_path / "text", lengths)
    if len(lengths) > 1:
        (tmp_path / "text" / "9.txt").write_bytes((tmp_path / "text" / "1.txt").read_bytes())  # a duplicate
    prepared(tmp_path, "short", **values)
    with tiny_pieces():
        prepared(tmp_path, "long", **values)
    assert hashes(tmp_path / "short") == hashes(tmp_path / "long")


@pytest.mark.parametrize("dedup", [False, True])
def test_a_long_text_that_changes_while_it_is_prepared_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dedup: bool
) -> None:
    write_texts(tmp_path / "text", [30, 30])
    real = run.PrepareUnit._write

    def change_and_write(step: run.PrepareUnit, unit: int, writers: Any) -> Any:
        (tmp_path / "text" / "1.txt").write_text("another text")
        return real(step, unit, writers)

    if dedup:
        monkeypatch.setattr(run.PrepareUnit, "_write", change_and_write)
    else:
        monkeypatch.setattr("restomod.data.prepare.worker.split_hash", lambda parts, seed: 0)
    with (
        tiny_pieces(),
        pytest.raises(UserError, match=r"[01]\.txt has changed since it was first read; choose another"),
    ):
        prepared(tmp_path, dedup=dedup)
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert not list((tmp_path / "out").glob("*.bin"))


# --- spans --------------------------------------------------------------------------------------------------


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "SPAN_BYTES", 900)


@pytest.mark.parametrize("dedup", [False, True])
def test_a_file_cut_into_spans_holds_its_documents_in_order(
    tmp_path: Path, spans: None, tiktoken_gpt2: tiktoken.Encoding, dedup: bool
) -> None:
    texts = texts_of(150, seed=1) * 2
    write_jsonl(tmp_path / "text" / "a.jsonl", texts)
    dataset = prepared(tmp_path, val_fraction=0.0, dedup=dedup)
    assert all_tokens(dataset.train) == delimited(list(dict.fromkeys(texts)) if dedup else texts, tiktoken_gpt2)
    planned = dataset.manifest["plan"]["units"]
    assert len(planned) > 10
    assert planned[1]["span"].keys() == {"start", "stop", "of"}
    prepared(tmp_path, "two", workers=2, val_fraction=0.0, dedup=dedup)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "two")
    assert prepared(tmp_path, val_fraction=0.0, dedup=dedup).manifest == dataset.manifest


def test_one_document_in_several_spans_is_no_single_document(
    tmp_path: Path, spans: None, tiktoken_gpt2: tiktoken.Encoding
) -> None:
    """The plan decides, because it is made before any file is read."""
    (text,) = texts_of(1, seed=1, length=2)
    write_jsonl(tmp_path / "text" / "a.jsonl", [text * 900])
    assert all_tokens(prepared(tmp_path, val_fraction=0.0).train) == delimited([text * 900], tiktoken_gpt2)


def begun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare the first three units."""
    real = run.PrepareUnit.work

    def work(step: run.PrepareUnit, unit: int) -> None:
        if unit == 3:
            raise KeyboardInterrupt
        real(step, unit)

    with monkeypatch.context() as patch:
        patch.setattr(run.PrepareUnit, "work", work)
        with pytest.raises(KeyboardInterrupt):
            prepared(folder)


def test_a_file_that_has_grown_since_some_of_its_spans_were_finished_is_refused(
    tmp_path: Path, spans: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "text" / "a.jsonl", texts_of(150, seed=1))
    begun(tmp_path, monkeypatch)
    with open(tmp_path / "text" / "a.jsonl", "a") as f:
        f.write(" ")
    with pytest.raises(UserError, match="unfinished work with other text or settings"):
        prepared(tmp_path)


def test_spans_are_resumed(tmp_path: Path, spans: None, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "text" / "a.jsonl", texts_of(150, seed=1))
    begun(tmp_path, monkeypatch)
    prepared(tmp_path)
    prepared(tmp_path, "reference")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "reference")


# --- memory -------------------------------------------------------------------------------------------------


def sentences(seed: int, size: int) -> str:
    chance = random.Random(seed)
    some = " ".join(f"w{n}," for n in chance.choices(range(100_000), k=size // 70))
    return (some * 10)[:size]


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [False, True])
def test_a_text_of_a_gigabyte_is_prepared_in_little_memory(tmp_path: Path, compressed: bool) -> None:
    block = (sentences(0, 10_000_000) + "\n").encode()
    with lzma.open(tmp_path / "a.txt.xz", "wb", preset=0) if compressed else open(tmp_path / "a.txt", "wb") as f:
        for _ in range(30 if compressed else 100):
            f.write(block)
    assert peak_memory(tmp_path, "prepare", f"a.txt{'.xz' * compressed}", "--out", "out", "--workers", "1") < 2**29


@pytest.mark.slow
def test_the_longest_lines_are_prepared_within_one_gibibyte(tmp_path: Path) -> None:
    with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as f:
        for seed in range(3):
            f.write(json.dumps({"text": sentences(seed, 31_900_000) + "🔥"}, ensure_ascii=False) + "\n")
    assert peak_memory(tmp_path, "prepare", "a.jsonl", "--out", "out", "--workers", "1", "--dedup") < 2**30
