from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from restomod.config.prepare import PrepareConfig
from restomod.config.run import DataConfig
from restomod.data.bulk_encoder import BulkEncoder
from restomod.data.dataset import Dataset, TokenStream
from restomod.data.prepare import text_cache, units, worker
from restomod.data.prepare.run import prepare_folder
from restomod.data.prepare.text_cache import prepare_text
from restomod.utils import locks
from restomod.utils.errors import UserError
from restomod.utils.temporary import Temporary
from restomod.utils.verified import VERIFIED
from tests.filesystems import refuse_renaming_folders

END = 50256  # <|endoftext|>


def text_config(folder: Path, val_fraction: float = 0.3, split_seed: int = 0) -> DataConfig:
    """Return a configuration that reads ``folder/text`` and caches in ``folder/cache``."""
    return DataConfig(
        source="text",
        path=str(folder / "text"),
        val_fraction=val_fraction,
        split_seed=split_seed,
        cache=str(folder / "cache"),
    )


def write_documents(folder: Path, texts: list[str]) -> None:
    shutil.rmtree(folder / "text", ignore_errors=True)
    (folder / "text").mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / "text" / f"{i:04d}.txt").write_text(text, encoding="utf-8")


def numbered(n: int) -> list[str]:
    return [f"Document {i} — naïve café: {'word ' * (i % 7)}end {i}" for i in range(n)]


def all_tokens(stream: TokenStream) -> list[int]:
    return stream.read(0, len(stream)).tolist()


def documents_of(stream: TokenStream) -> list[str]:
    """Return the token ids of every document of a split, as text."""
    texts = " ".join(map(str, all_tokens(stream))).split(str(END))[1:]
    return [text.strip() for text in texts]


# --- output -------------------------------------------------------------------------------------------------


def test_tinyshakespeare_has_its_published_number_of_tokens(tmp_path: Path) -> None:
    repository = Path(__file__).parents[3]
    play = repository.parent / "shared/data/tinyshakespeare/input.txt"
    if not play.exists():
        pytest.skip("needs TinyShakespeare's text in ../shared/data/tinyshakespeare/input.txt")
    config = DataConfig(source="tinyshakespeare", path=str(play), val_fraction=0.0, cache=str(tmp_path))
    dataset = prepare_text(config)
    assert (len(dataset.train), len(dataset.val)) == (338_025, 0)


def test_train_and_prepare_make_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test one and several units of work."""
    write_documents(tmp_path, numbered(60))
    monkeypatch.setattr(units, "UNIT_BYTES", 500)
    cached = prepare_text(text_config(tmp_path))
    settings = PrepareConfig(val_fraction=0.3)
    prepared = prepare_folder((str(tmp_path / "text"),), settings, tmp_path / "out", workers=1)
    assert len(cached.manifest["splits"]["val"]["shards"]) > 2
    assert contents(cached.folder).keys() == contents(prepared.folder).keys()
    made = [contents(dataset.folder) for dataset in (cached, prepared)]
    del made[0]["manifest.json"], made[1]["manifest.json"]
    assert made[0] == made[1]
    assert cached.manifest.keys() == prepared.manifest.keys()
    assert cached.fingerprint == prepared.fingerprint


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "--data.source text needs --data.path"),
        ({"path": ""}, "--data.source text needs --data.path"),
        ({"path": "nowhere"}, "nowhere: no such file or folder"),
        ({"path": "fineweb-edu"}, "fineweb-edu: no such file or folder"),  # no source on the hub
        ({"path": "empty.txt"}, "empty.txt is empty"),
        ({"path": "blank.jsonl"}, "the sources have no text"),
        ({"path": "latin.txt"}, "latin.txt is not UTF-8 text: byte 0xef at offset 2"),
        ({"path": "tokens"}, "tokens contains token shards, not text; add --data.source tokens"),
    ],
)
def test_a_source_without_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "manifest.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        prepare_text(DataConfig(source="text", cache=str(tmp_path / "cache"), **values))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("text*"))


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files except the record of verified shards, which is written only after a slow preparation."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != VERIFIED}


# --- the split ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("val_fraction", [1e-9, 0.05, 0.5, 0.999999])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_neither_split_is_empty_where_validation_is_asked_for(tmp_path: Path, n: int, val_fraction: float) -> None:
    write_documents(tmp_path, numbered(n))
    dataset = prepare_text(text_config(tmp_path, val_fraction))
    assert min(len(dataset.train), len(dataset.val)) > 0
    assert all_tokens(dataset.train).count(END) + all_tokens(dataset.val).count(END) == n


@pytest.mark.parametrize("val_fraction", [1e-9, 0.05, 0.5, 0.999999])
def test_no_document_is_in_both_splits_even_if_it_is_repeated(tmp_path: Path, val_fraction: float) -> None:
    write_documents(tmp_path, [*numbered(20), *numbered(20)])
    dataset = prepare_text(text_config(tmp_path, val_fraction))
    train, val = (documents_of(stream) for stream in (dataset.train, dataset.val))
    assert (len(train + val), len({*train, *val})) == (40, 20)
    assert not {*train} & {*val}


def test_one_text_repeated_is_all_for_training(tmp_path: Path) -> None:
    write_documents(tmp_path, ["the same"] * 4)
    dataset = prepare_text(text_config(tmp_path, val_fraction=0.5))
    assert len(dataset.train) == 4 * 3
    assert len(dataset.val) == 0


# --- the cache ----------------------------------------------------------------------------------------------


@pytest.fixture
def book(tmp_path: Path) -> DataConfig:
    write_documents(tmp_path, numbered(6))
    return text_config(tmp_path)


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every file below ``folder`` with its inode and modification time."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def folders(config: DataConfig) -> list[str]:
    return os.listdir(config.cache) if os.path.exists(config.cache) else []


def fail(*_: object) -> NoReturn:
    raise RuntimeError("this was not to be called")


def test_a_second_call_uses_the_cache_and_writes_nothing(book: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_text(book)
    before = state(Path(book.cache))
    monkeypatch.setattr(BulkEncoder, "encode", fail)
    second = prepare_text(book)
    assert state(Path(book.cache)) == before
    assert second.manifest == first.manifest


def test_the_folder_is_named_after_its_source(book: DataConfig) -> None:
    assert folders(book) == []
    folder = prepare_text(book).folder
    assert folders(book) == [folder.name]
    assert re.fullmatch("text-[0-9a-f]{12}", folder.name)


SIX = numbered(6)


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        ([*SIX[:5], "other"], {}),
        ([SIX[0] + SIX[1], *SIX[2:]], {}),
        (SIX[::-1], {}),
        (SIX, {"val_fraction": 0.31}),
        (SIX, {"split_seed": 1}),
    ],
)
def test_text_or_settings_that_change_the_tokens_get_another_folder(
    tmp_path: Path, book: DataConfig, texts: list[str], values: dict[str, Any]
) -> None:
    first = prepare_text(book)
    write_documents(tmp_path, texts)
    second = prepare_text(text_config(tmp_path, **values))
    assert first.folder != second.folder
    assert first.folder.exists()


def test_equal_texts_under_other_names_are_found_again(tmp_path: Path, book: DataConfig) -> None:
    """The dataset describes the current files."""
    first = prepare_text(book)
    (tmp_path / "text" / "0000.txt").rename(tmp_path / "text" / "000.md")
    again = prepare_text(book)
    assert again.folder == first.folder
    names = [[Path(f).name for f in dataset.manifest["plan"]["units"][0]["files"]] for dataset in (first, again)]
    assert [sorted(of)[0] for of in names] == ["0000.txt", "000.md"]


def test_a_document_of_several_units_is_not_taken_for_one_of_a_single_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several units, a single document has a separator."""
    write_documents(tmp_path, ["The only text."])
    (tmp_path / "text" / "blank.jsonl").write_text('{"text": ""}\n')
    alone = prepare_text(text_config(tmp_path, val_fraction=0.0))
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    beside = prepare_text(text_config(tmp_path, val_fraction=0.0))
    assert [all_tokens(dataset.train).count(END) for dataset in (alone, beside)] == [0, 1]


@pytest.mark.parametrize("unit_bytes", [1, units.UNIT_BYTES])
def test_progress_is_shown_within_a_unit_and_after_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unit_bytes: int
) -> None:
    monkeypatch.setattr(text_cache, "REPORT_SECONDS", 0)
    monkeypatch.setattr(units, "UNIT_BYTES", unit_bytes)
    if unit_bytes == 1:
        write_documents(tmp_path, numbered(3))
        expected = [f"{n} of 3" for n in (1, 2, 3)]
    else:
        (tmp_path / "text").mkdir()
        records = "".join(json.dumps({"text": text}) + "\n" for text in numbered(2000))
        (tmp_path / "text" / "a.jsonl.gz").write_bytes(gzip.compress(records.encode()))
        expected = [f"{n:,} of 2,000" for n in range(16, 2001, 16)] + ["2,000 of 2,000"]
    prepare_text(text_config(tmp_path))
    assert capsys.readouterr().err.splitlines() == [f"preparing text: {progress} documents" for progress in expected]


@pytest.mark.parametrize("at_document", [0, 3])
def test_a_failure_midway_leaves_nothing_and_can_be_repeated(
    book: DataConfig, monkeypatch: pytest.MonkeyPatch, at_document: int
) -> None:
    calls, encode = iter(range(100)), BulkEncoder.encode

    def fail_at(encoder: BulkEncoder, texts: list[str]) -> list[np.ndarray]:
        if next(calls) == at_document:
            fail()
        return encode(encoder, texts)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "BATCH_CHARACTERS", 1)  # one document per batch
        patch.setattr(BulkEncoder, "encode", fail_at)
        with pytest.raises(RuntimeError):
            prepare_text(book, shard_tokens=10)
    assert folders(book) == []
    assert prepare_text(book).manifest["documents"] == 6


def test_a_kill_midway_does_not_stand_in_the_way_of_the_next_try(
    book: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process leaves its files, and in a container the next process often has the same id."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(BulkEncoder, "encode", fail)
        with pytest.raises(RuntimeError):
            prepare_text(book)
    assert prepare_text(book).manifest["documents"] == 6


def test_a_folder_without_a_manifest_is_prepared_again(book: DataConfig) -> None:
    folder = prepare_text(book).folder
    (folder / "manifest.json").unlink()
    (folder / "train_00000_000000.bin").write_bytes(b"half of this")
    assert prepare_text(book).manifest["documents"] == 6


def test_a_damaged_folder_is_refused(book: DataConfig) -> None:
    folder = prepare_text(book).folder
    (folder / "train_00000_000000.bin").write_bytes(b"half of this")
    with pytest.raises(UserError, match=r"train_00000_000000\.bin .*delete the folder and prepare it again"):
        prepare_text(book)


def test_a_text_that_changes_while_it_is_prepared_is_refused(
    tmp_path: Path, book: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assign_splits = text_cache.assign_splits

    def change_and_assign(*arguments: Any) -> None:
        assign_splits(*arguments)
        (tmp_path / "text" / "0003.txt").write_text("another")

    monkeypatch.setattr(text_cache, "assign_splits", change_and_assign)
    with pytest.raises(UserError, match=r"0003\.txt has changed since it was first read; run the same command again"):
        prepare_text(book)
    assert folders(book) == []


def test_a_folder_that_another_process_finished_meanwhile_is_left_as_it_is(
    book: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process may be opening it; this matters on file systems without locks."""
    monkeypatch.setattr(locks, "fcntl", None)
    others: list[Dataset] = []
    finished = {}

    encode = BulkEncoder.encode

    def overtaken(encoder: BulkEncoder, texts: list[str]) -> list[np.ndarray]:
        monkeypatch.setattr(BulkEncoder, "encode", encode)
        others.append(prepare_text(book))
        finished.update(state(others[0].folder))
        return encode(encoder, texts)

    monkeypatch.setattr(BulkEncoder, "encode", overtaken)
    mine = prepare_text(book)
    assert mine.manifest == others[0].manifest
    assert folders(book) == [mine.folder.name]
    assert state(mine.folder) == finished


def test_one_of_several_simultaneous_calls_prepares(book: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = text_cache._prepare, []

    def slow(*arguments: Any) -> None:
        written.append(threading.current_thread())
        time.sleep(0.3)
        write(*arguments)

    monkeypatch.setattr(text_cache, "_prepare", slow)
    found: list[Dataset] = []
    threads = [threading.Thread(target=lambda: found.append(prepare_text(book))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert [dataset.manifest for dataset in found] == [found[0].manifest] * 3
    assert folders(book) == [found[0].folder.name]


def test_leftovers_of_killed_processes_only_are_removed(book: DataConfig) -> None:
    cache = Path(book.cache)
    prepare_text(book)
    killed, foreign = cache / f".restomod.{'a1' * 8}.tmp", cache / ".mine.tmp"
    with Temporary(cache, "folder") as at_work:
        for folder in (killed, foreign):
            folder.mkdir()
        for folder in (killed, foreign, at_work.path):
            (folder / "train_00000_000000.bin").write_bytes(b"half of it")
        prepare_text(book)
        assert [path.exists() for path in (killed, foreign, at_work.path)] == [False, True, True]


# --- existing token shards ----------------------------------------------------------------------------------


def test_a_folder_of_tokens_is_opened_where_it_is(tmp_path: Path) -> None:
    write_documents(tmp_path, numbered(9))
    made = prepare_folder((str(tmp_path / "text"),), PrepareConfig(val_fraction=0.3), tmp_path / "out", workers=1)
    opened = prepare_text(DataConfig(source="tokens", path=str(tmp_path / "out"), cache=str(tmp_path / "cache")))
    assert opened.manifest == made.manifest
    assert all_tokens(opened.train) == all_tokens(made.train)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (None, "--data.source tokens needs --data.path FOLDER"),
        ("nowhere", "nowhere: no such folder of token shards; create it: restomod prepare SOURCE --out nowhere"),
    ],
)
def test_missing_tokens_are_refused(path: str | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        prepare_text(DataConfig(source="tokens", path=path))


def test_where_folders_cannot_be_renamed_the_cache_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = text_config(tmp_path)
    write_documents(tmp_path, numbered(5))
    expected = contents(prepare_text(config).folder)
    shutil.rmtree(config.cache)
    refuse_renaming_folders(monkeypatch)
    dataset = prepare_text(config)
    assert contents(dataset.folder) == expected
    assert [path.name for path in Path(config.cache).iterdir()] == [dataset.folder.name]
