"""The output bytes do not depend on the number of workers or on interruptions."""

from __future__ import annotations

import errno
import hashlib
import json
import lzma
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pyarrow
import pyarrow.parquet
import pytest
import tiktoken

from restomod.cli import main
from restomod.config.prepare import PrepareConfig
from restomod.data import dataset as dataset_module
from restomod.data.dataset import Dataset, TokenStream
from restomod.data.prepare import folder as folder_module
from restomod.data.prepare import run as prepare_run
from restomod.data.prepare import units
from restomod.data.prepare.run import prepare_folder
from restomod.utils.errors import UserError
from tests.data.prepare.preparing import (
    Command,
    alive,
    finished,
    hashes,
    nothing_but_the_shards,
    peak_memory,
    texts_of,
    write_jsonl,
)

END = 50256  # <|endoftext|>

# command line with a limit of 30,000 bytes per file, set after the tokenizer has written its files
PROGRAM_ON_A_FULL_DISK = """
import resource, sys
import restomod.data.prepare.units, restomod.data.prepare.worker
from restomod.cli import main
from restomod.data.bulk_encoder import BulkEncoder
from restomod.data.tokenizer import gpt2_tokenizer
restomod.data.prepare.units.UNIT_BYTES = int(sys.argv.pop(1))
restomod.data.prepare.worker.BATCH_CHARACTERS = 10_000
BulkEncoder(gpt2_tokenizer())
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
sys.exit(main())
"""


@pytest.fixture
def text(tmp_path: Path) -> dict[str, list[str]]:
    """Write six files below ``tmp_path/text``, and return their documents in reading order."""
    files = {f"{i}.jsonl": texts_of(20, seed=i) for i in range(6)}
    for name, texts in files.items():
        write_jsonl(tmp_path / "text" / name, texts)
    return files


@pytest.fixture
def many_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every file a unit."""
    monkeypatch.setattr(units, "UNIT_BYTES", 1)


def prepared(folder: Path, out: str = "out", workers: int = 1, **values: Any) -> Dataset:
    return prepare_folder((str(folder / "text"),), PrepareConfig(**values), folder / out, workers)


def all_tokens(stream: TokenStream) -> list[int]:
    return stream.read(0, len(stream)).tolist()


def delimited(texts: list[str], encoding: tiktoken.Encoding) -> list[int]:
    return [token for text in texts for token in [END, *encoding.encode_ordinary(text)]]


def is_validation(text: str, fraction: float, seed: int) -> bool:
    """Apply the documented rule: the 64-bit BLAKE2b hash, salted with the seed, is below the fraction of 2^64."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") / 2**64 < fraction


# --- known answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit_bytes", [1, 3000, 64_000_000])
def test_shards_hold_tiktokens_tokens_in_the_order_of_the_files(
    tmp_path: Path,
    text: dict[str, list[str]],
    tiktoken_gpt2: tiktoken.Encoding,
    monkeypatch: pytest.MonkeyPatch,
    unit_bytes: int,
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", unit_bytes)
    dataset = prepared(tmp_path, val_fraction=0.3, split_seed=3)
    texts = [t for file in text.values() for t in file]
    for split, stream in (("train", dataset.train), ("val", dataset.val)):
        expected = [t for t in texts if is_validation(t, 0.3, 3) == (split == "val")]
        assert all_tokens(stream) == delimited(expected, tiktoken_gpt2)
        part = dict(dataset.manifest["splits"][split])
        del part["shards"]
        assert part == {
            "tokens": len(stream),
            "documents": len(expected),
            "text_bytes": sum(len(t.encode()) for t in expected),
        }
        assert len(expected) > 10
    assert dataset.manifest["documents"] == len(texts)
    assert dataset.manifest["tokens"] == len(dataset.train) + len(dataset.val)
    assert dataset.manifest["duplicates"] == 0


def test_small_shards_hold_the_same_tokens_and_the_manifest_names_them_in_order(
    tmp_path: Path, text: dict[str, list[str]], tiktoken_gpt2: tiktoken.Encoding, many_units: None
) -> None:
    dataset = prepared(tmp_path, val_fraction=0.0, shard_tokens=50)
    texts = [t for file in text.values() for t in file]
    assert all_tokens(dataset.train) == delimited(texts, tiktoken_gpt2)
    entries = dataset.manifest["splits"]["train"]["shards"]
    expected = []
    for unit, file in enumerate(text.values()):
        n = len(delimited(file, tiktoken_gpt2))
        expected += [(f"train_{unit:05d}_{i:06d}.bin", min(50, n - 50 * i)) for i in range(-(-n // 50))]
    assert [(entry["file"], entry["tokens"]) for entry in entries] == expected
    written = hashes(tmp_path / "out")
    assert {entry["file"]: entry["sha256"] for entry in entries} == {k: v for k, v in written.items() if "bin" in k}
    assert written.keys() - {entry["file"] for entry in entries} == {"manifest.json"}


@pytest.mark.parametrize(("val_fraction", "in_splits"), [(0.0, [1, 0]), (0.25, [1, 1])])
def test_a_single_document_is_bare_and_its_tail_is_the_validation(
    tmp_path: Path, tiktoken_gpt2: tiktoken.Encoding, val_fraction: float, in_splits: list[int]
) -> None:
    (tmp_path / "text").write_text("To be, or not to be. " * 50)
    dataset = prepared(tmp_path, val_fraction=val_fraction)
    expected = tiktoken_gpt2.encode_ordinary("To be, or not to be. " * 50)
    cut = len(expected) - int(val_fraction * len(expected))
    assert (all_tokens(dataset.train), all_tokens(dataset.val)) == (expected[:cut], expected[cut:])
    splits = dataset.manifest["splits"]
    assert [splits[split]["documents"] for split in ("train", "val")] == in_splits
    assert splits["train"]["text_bytes"] + splits["val"]["text_bytes"] == 21 * 50


def test_one_document_in_each_of_two_units_is_no_single_document(
    tmp_path: Path, tiktoken_gpt2: tiktoken.Encoding, many_units: None
) -> None:
    for i, one in enumerate(["one", "two"]):
        write_jsonl(tmp_path / "text" / f"{i}.jsonl", [one])
    dataset = prepared(tmp_path, val_fraction=0.0)
    assert all_tokens(dataset.train) == delimited(["one", "two"], tiktoken_gpt2)


@pytest.mark.parametrize("unit_bytes", [1, 64_000_000])
def test_dedup_keeps_the_first_occurrence_across_files_and_units(
    tmp_path: Path, tiktoken_gpt2: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch, unit_bytes: int
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", unit_bytes)
    chance, pool = random.Random(1), texts_of(40, seed=9)
    files = [chance.choices(pool, k=25) for _ in range(4)]
    for i, file in enumerate(files):
        write_jsonl(tmp_path / "text" / f"{i}.jsonl", file)
    everything = [t for file in files for t in file]
    kept = list(dict.fromkeys(everything))
    dataset = prepared(tmp_path, dedup=True, val_fraction=0.25)
    for stream, held_out in ((dataset.train, False), (dataset.val, True)):
        assert all_tokens(stream) == delimited(
            [t for t in kept if is_validation(t, 0.25, 0) == held_out], tiktoken_gpt2
        )
    assert dataset.manifest["documents"] == len(kept)
    assert dataset.manifest["duplicates"] == len(everything) - len(kept) > 10
    assert hashes(tmp_path / "out").keys() == {"manifest.json"} | {p.name for p in (tmp_path / "out").glob("*.bin")}


def test_the_fingerprint_is_of_the_tokens_and_not_of_where_they_are(tmp_path: Path, text: dict[str, list[str]]) -> None:
    first = prepared(tmp_path)
    shutil.copytree(tmp_path / "text", tmp_path / "else" / "text")
    assert prepared(tmp_path / "else").fingerprint == first.fingerprint
    write_jsonl(tmp_path / "else" / "text" / "0.jsonl", texts_of(20, seed=77))
    assert prepared(tmp_path / "else", "out2").fingerprint != first.fingerprint


# --- workers, current folder and locale ---------------------------------------------------------------------


def test_workers_current_folder_and_locale_do_not_change_the_bytes(
    tmp_path: Path, text: dict[str, list[str]], many_units: None, restomod: Command
) -> None:
    settings = {"val_fraction": 0.2, "dedup": True, "shard_tokens": 100}
    flags = ("--val-fraction", "0.2", "--dedup", "--shard-tokens", "100")
    prepared(tmp_path, "one", **settings)
    said = finished(restomod("text/", *flags, "--workers", "2", "--out", "two", LC_ALL="C"), tmp_path)
    assert "two: 1" in said
    (tmp_path / "below").mkdir()
    absolute = (str(tmp_path / "text"), *flags, "--workers", "3", "--out", "../three")
    finished(restomod(*absolute, cwd=tmp_path / "below"), tmp_path)
    assert len(hashes(tmp_path / "one")) > 12
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two") == hashes(tmp_path / "three")


def test_a_finished_folder_is_found_and_nothing_written(
    tmp_path: Path, text: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    monkeypatch.setattr(prepare_run, "begin_folder", fail)
    assert prepared(tmp_path).manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_the_report_of_prepare(
    tmp_path: Path, text: dict[str, list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["prepare", "text", "text/0.jsonl", "--out", "my out", "--val-fraction", "0.5", "--dedup"]
    assert main([*arguments, "--workers", "1"]) == 0
    reading, searching, first, train, val, read, literals, warning, speed, how = capsys.readouterr().out.splitlines()
    assert reading == f"input: {len(list(Path('text').iterdir())) + 1} .jsonl files; 2 units of work"
    assert searching == "finding duplicate documents"
    files = [*sorted(Path("text").iterdir()), Path("text/0.jsonl")]
    size = sum(file.stat().st_size for file in files)
    assert read == f"read: {len(files)} files as JSON lines (.jsonl, {size:,} bytes)"
    n = sum(file.read_text().count("<|endoftext|>") for file in files)
    assert literals.startswith(f"warning: the text contains a literal <|endoftext|> {n:,} times")
    assert "validation tokens; raise --val-fraction (now 0.5)" in warning
    manifest = json.loads(Path("my out/manifest.json").read_text())
    assert first == f"my out: {manifest['documents']} documents, {manifest['tokens']:,} tokens, 20 duplicates dropped"
    part = manifest["splits"]["train"]
    shards = len(part["shards"])
    assert train == f"  train {part['tokens']:,} tokens in {shards} shard{'s' * (shards > 1)}"
    assert val.startswith("  val   ")
    assert "MB/s of text" in speed
    assert how.endswith("--data.source tokens --data.path 'my out'")
    assert main(arguments) == 0
    assert "already prepared" in capsys.readouterr().out


# --- killed and resumed -------------------------------------------------------------------------------------


def fail(*_: object) -> NoReturn:
    raise RuntimeError("this was not to be called")


def check_kills(
    tmp_path: Path, restomod: Command, kills: int, seed: int, workers: tuple[int, ...], flags: tuple[str, ...] = ()
) -> None:
    """Kill and restart the command ``kills`` times, let it finish, and compare with an uninterrupted run."""
    print(f"seed {seed}")
    chance, out = random.Random(seed), tmp_path / "killed"
    command = ("text", "--val-fraction", "0.1", "--shard-tokens", "5000", *flags, "--workers")
    finished(restomod(*command, str(workers[0]), "--out", "reference"), tmp_path)
    n_units = len(list((tmp_path / "text").iterdir()))
    in_the_middle = 0
    for attempt in range(kills):
        process = restomod(*command, str(workers[attempt % len(workers)]), "--out", "killed")
        done = min(len(list(out.glob(".prepare/unit_*.json"))) + chance.randrange(1, 4), n_units - 1)
        deadline = time.monotonic() + 60
        while len(list(out.glob(".prepare/unit_*.json"))) < done and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.05))
        if attempt % 3 == 2:
            process.kill()  # only the parent; its workers exit soon after
        else:
            os.killpg(process.pid, signal.SIGKILL)
        in_the_middle += process.wait() == -signal.SIGKILL and not (out / "manifest.json").exists()
    assert in_the_middle >= min(kills, n_units // 4) > 0, "the work was too short to be hit"
    finished(restomod(*command, str(workers[-1]), "--out", "killed"), tmp_path)
    assert hashes(out) == hashes(tmp_path / "reference")
    assert nothing_but_the_shards(out)


def test_sigkill_at_a_random_moment_changes_nothing(tmp_path: Path, restomod: Command) -> None:
    for i in range(30):
        write_jsonl(tmp_path / "text" / f"{i:03d}.jsonl", texts_of(200, seed=i))
    check_kills(tmp_path, restomod, kills=2, seed=random.randrange(1000), workers=(1,))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--dedup",)])
def test_twenty_kills_change_nothing(tmp_path: Path, restomod: Command, flags: tuple[str, ...]) -> None:
    for i in range(80):
        write_jsonl(tmp_path / "text" / f"{i:03d}.jsonl", texts_of(1000, seed=i % 70))
    check_kills(tmp_path, restomod, kills=20, seed=random.randrange(1000), workers=(1, 2, 3), flags=flags)


STOPS = [(sent, n, group) for sent in (signal.SIGINT, signal.SIGTERM) for n in "12" for group in (True, False)]
QUICK_STOPS = [(signal.SIGTERM, "1", True), (signal.SIGTERM, "2", False)]


@pytest.mark.parametrize(
    ("sent", "workers", "group"),
    [pytest.param(*stop, marks=[] if stop in QUICK_STOPS else pytest.mark.slow) for stop in STOPS],
)
def test_a_stop_signal_is_one_line_and_leaves_no_process(
    tmp_path: Path, restomod: Command, sent: signal.Signals, workers: str, group: bool
) -> None:
    for i in range(40):
        write_jsonl(tmp_path / "text" / f"{i:03d}.jsonl", texts_of(300, seed=i))
    out = tmp_path / "out"
    process = restomod("text", "--out", "out", "--workers", workers)
    while not list(out.glob(".prepare/unit_*.json")) and process.poll() is None:
        time.sleep(0.005)
    (os.killpg if group else os.kill)(process.pid, sent)
    code = process.wait(timeout=30)
    assert (code, (tmp_path / "stderr").read_text()) == (130, "restomod: stopped\n")
    for _ in range(100):  # terminated processes need a moment
        if not alive(process.pid):
            break
        time.sleep(0.05)
    assert alive(process.pid) == []
    assert not (out / "manifest.json").exists()
    assert not list(out.glob(".*.tmp"))
    reports: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "UNIT_BYTES", 1)
        prepare_folder((str(tmp_path / "text"),), PrepareConfig(), out, 1, reports.append)
    assert reports[0].startswith("resuming: ")
    assert nothing_but_the_shards(out)


def test_a_unit_that_is_finished_is_not_done_again(
    tmp_path: Path, text: dict[str, list[str]], many_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(tmp_path, "reference")
    worked = []
    work = prepare_run.PrepareUnit._write

    def failing(step: prepare_run.PrepareUnit, unit: int, writers: Any) -> Any:
        worked.append(unit)
        if worked == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        return work(step, unit, writers)

    monkeypatch.setattr(prepare_run.PrepareUnit, "_write", failing)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path)
    prepared(tmp_path)
    assert worked == [0, 1, 2, 3, 3, 4, 5]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "reference")


def test_a_kill_while_the_plan_is_written_is_resumed(tmp_path: Path, text: dict[str, list[str]]) -> None:
    (tmp_path / "out" / ".prepare").mkdir(parents=True)
    (tmp_path / "out" / ".prepare" / ".plan.json.tmp").write_text('{"half of')
    prepared(tmp_path)
    assert nothing_but_the_shards(tmp_path / "out")


def test_a_kill_right_after_the_manifest_leaves_nothing_once_it_is_run_again(
    tmp_path: Path, text: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "remove_leftovers", fail)
        with pytest.raises(RuntimeError):
            prepared(tmp_path)
    assert (tmp_path / "out" / ".prepare").exists()
    prepared(tmp_path)
    assert nothing_but_the_shards(tmp_path / "out")


# --- refused calls ------------------------------------------------------------------------------------------


def refused(*arguments: Any, workers: int = 1, **values: Any) -> str:
    with pytest.raises(UserError) as caught:
        prepared(*arguments, workers=workers, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def interrupt_at(unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    work = prepare_run.PrepareUnit.work

    def interrupted(step: prepare_run.PrepareUnit, at: int) -> None:
        if at == unit:
            raise KeyboardInterrupt
        work(step, at)

    monkeypatch.setattr(prepare_run.PrepareUnit, "work", interrupted)


@pytest.fixture
def begun(
    tmp_path: Path, text: dict[str, list[str]], many_units: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Prepare the first three units of six."""

    def begin(**values: Any) -> None:
        with monkeypatch.context() as patch:
            interrupt_at(3, patch)
            with pytest.raises(KeyboardInterrupt):
                prepared(tmp_path, **values)

    return begin


OTHER_SETTINGS = [
    {"val_fraction": 0.5},
    {"split_seed": 1},
    {"dedup": True},
    {"shard_tokens": 7},
    {"text_column": "body"},
    {"glob": "*.jsonl"},
]


@pytest.mark.parametrize("values", OTHER_SETTINGS)
def test_other_settings_in_a_begun_folder_are_refused(
    tmp_path: Path, begun: Callable[..., None], values: dict[str, Any]
) -> None:
    begun()
    before = hashes(tmp_path / "out")
    assert "has unfinished work with other text or settings" in refused(tmp_path, **values)
    assert hashes(tmp_path / "out") == before


@pytest.mark.parametrize("values", [*OTHER_SETTINGS[:4], None])
def test_other_settings_or_text_in_a_finished_folder_are_refused(
    tmp_path: Path, text: dict[str, list[str]], values: dict[str, Any] | None
) -> None:
    prepared(tmp_path)
    if values is None:
        write_jsonl(tmp_path / "text" / "6.jsonl", ["one more"])
    assert "already contains data of other text or settings" in refused(tmp_path, **(values or {}))


@pytest.mark.parametrize("values", [{}, {"shard_tokens": 40}])
def test_a_changed_file_of_an_unfinished_unit_is_read_again(
    tmp_path: Path, begun: Callable[..., None], values: dict[str, Any]
) -> None:
    begun(**values)
    (tmp_path / "out" / "train_00004_000099.bin").write_bytes(b"of the text before")
    write_jsonl(tmp_path / "text" / "4.jsonl", ["changed"])
    prepared(tmp_path, **values)
    prepared(tmp_path, "reference", **values)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "reference")


@pytest.mark.parametrize(("file", "dedup"), [("1", False), ("1", True), ("4", True)])
def test_a_changed_file_is_refused_if_finished_units_depend_on_it(
    tmp_path: Path, begun: Callable[..., None], file: str, dedup: bool
) -> None:
    """With --dedup, a finished unit depends on all other files."""
    begun(dedup=dedup)
    write_jsonl(tmp_path / "text" / f"{file}.jsonl", ["changed"])
    assert "has unfinished work with other text or settings" in refused(tmp_path, dedup=dedup)


@pytest.mark.parametrize("change", [lambda ts: ts[::-1], lambda ts: [ts[0] + ts[1], *ts[2:]], lambda ts: [*ts, "x"]])
def test_with_dedup_text_that_changes_between_the_passes_is_refused(
    tmp_path: Path,
    text: dict[str, list[str]],
    many_units: None,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[list[str]], list[str]],
) -> None:
    choose = prepare_run.assign_splits

    def choose_then_change(out: Path, n_units: int, config: PrepareConfig) -> None:
        choose(out, n_units, config)
        write_jsonl(tmp_path / "text" / "2.jsonl", change(text["2.jsonl"]))

    monkeypatch.setattr(prepare_run, "assign_splits", choose_then_change)
    assert "since" in refused(tmp_path, dedup=True)


def test_a_folder_with_foreign_files_is_refused_and_left_alone(tmp_path: Path, text: dict[str, list[str]]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "is not empty and was not written by" in refused(tmp_path)
    assert os.listdir(tmp_path / "out") == ["notes.txt"]


def test_a_folder_within_its_own_source_is_refused(tmp_path: Path, text: dict[str, list[str]]) -> None:
    for out in ("text/out", "text"):
        assert "is inside the source" in refused(tmp_path, out)
    assert sorted(os.listdir(tmp_path / "text")) == list(text)


def test_a_set_of_empty_documents_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "text" / "a.jsonl", ["", ""])
    write_jsonl(tmp_path / "text" / "b.jsonl", [""])
    assert refused(tmp_path) == "the sources have no text: every document is empty"


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, text: dict[str, list[str]]) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    assert "cannot create this folder (Permission denied)" in refused(tmp_path)


def corrupt_parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), sink)
    return sink.getvalue().to_pybytes()[:-9]


BAD = {
    "bad.parquet": (corrupt_parquet(), r"bad.parquet is damaged: "),
    "bad.jsonl.xz": (lzma.compress(b'{"text": "a"}\n' * 9)[:-20], r"bad.jsonl.xz is truncated: "),
    "bad.jsonl": (
        b'{"text": "a"}\n{"text": "\xff"}\n',
        r"bad.jsonl is not UTF-8 text: byte 0xff at offset 10 of line 2",
    ),
}


@pytest.mark.parametrize("dedup", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_and_after_a_fix_the_command_resumes(
    tmp_path: Path, text: dict[str, list[str]], many_units: None, name: str, dedup: bool
) -> None:
    content, said = BAD[name]
    bad = tmp_path / "text" / name
    bad.write_bytes(content)
    assert said in refused(tmp_path, dedup=dedup)
    assert not list((tmp_path / "out").glob(".*.tmp"))
    bad.unlink()
    write_jsonl(tmp_path / "text" / "mended.jsonl", ["mended"])
    mended = prepared(tmp_path, dedup=dedup)
    assert mended.manifest == prepared(tmp_path, "reference", dedup=dedup).manifest
    assert hashes(tmp_path / "out") == hashes(tmp_path / "reference")


def test_a_workers_error_is_one_line_and_the_fixed_file_is_read(
    tmp_path: Path, text: dict[str, list[str]], restomod: Command, many_units: None
) -> None:
    content, said = BAD["bad.jsonl"]
    (tmp_path / "text" / "bad.jsonl").write_bytes(content)
    process = restomod("text", "--out", "out", "--workers", "2")
    assert process.wait(timeout=60) == 2
    error = (tmp_path / "stderr").read_text()
    assert error.startswith("restomod: error: ")
    assert error.count("\n") == 1
    assert said in error
    first, *progress = (tmp_path / "stdout").read_text().splitlines()
    assert first.startswith("input: ")
    assert all(" of 7 units, " in line for line in progress)  # a slow machine prints some
    assert not list((tmp_path / "out").glob(".*.tmp"))
    write_jsonl(tmp_path / "text" / "bad.jsonl", ["mended"])
    prepared(tmp_path)
    assert nothing_but_the_shards(tmp_path / "out")


# --- a full disk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["append", "close"])
@pytest.mark.parametrize("at", [1, 4, 6])
def test_a_full_disk_leaves_finished_units_and_no_partial_shard(
    tmp_path: Path,
    text: dict[str, list[str]],
    many_units: None,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    at: int,
) -> None:
    prepared(tmp_path, "reference", val_fraction=0.2)
    shard = dataset_module._OpenShard
    real, calls = getattr(shard, call), iter(range(1, 10_000))

    def full(self: Any, *arguments: Any) -> Any:
        if next(calls) >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shard, call, full)
        said = refused(tmp_path, val_fraction=0.2)
    assert said.startswith(f"{tmp_path / 'out'}: cannot write (No space left on device); ")
    reference = hashes(tmp_path / "reference")
    left = {name: digest for name, digest in hashes(tmp_path / "out").items() if not name.startswith(".prepare/")}
    assert left.items() <= reference.items()
    prepared(tmp_path, val_fraction=0.2)
    assert hashes(tmp_path / "out") == reference


def test_a_write_that_fails_within_close_drops_the_half_written_shard(
    tmp_path: Path, restomod: Command, many_units: None
) -> None:
    """The size limit fails like a full disk: in a write, and again when the buffer is flushed at closing."""
    write_jsonl(tmp_path / "text" / "0.jsonl", ["small"] * 9)
    write_jsonl(tmp_path / "text" / "1.jsonl", texts_of(3000, seed=0))
    process = restomod("text", "--out", "out", "--workers", "1", program=PROGRAM_ON_A_FULL_DISK)
    assert process.wait(timeout=60) == 2
    error = (tmp_path / "stderr").read_text()
    assert error.startswith("restomod: error: out: cannot write (File too large); ")
    assert error.count("\n") == 1
    assert sorted(os.listdir(tmp_path / "out")) == [".prepare", "train_00000_000000.bin"]
    prepared(tmp_path)
    prepared(tmp_path, "reference")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "reference")


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_200_megabytes_are_prepared_within_one_gibibyte(tmp_path: Path) -> None:
    chance = random.Random(0)
    with open(tmp_path / "text.jsonl", "w") as f:
        while f.tell() < 200_000_000:
            words = " ".join(f"w{n}" for n in chance.choices(range(100_000), k=500))
            f.write(json.dumps({"text": words}) + "\n")
    assert peak_memory(tmp_path, "prepare", "text.jsonl", "--out", "out", "--workers", "1", "--dedup") < 2**30


@pytest.mark.parametrize(
    "name",
    [
        *(".prepare", ".prepare/lock", ".prepare/plan.json", ".prepare/hashes_00000.npy", ".prepare/keep_00000.npy"),
        *(".prepare/unit_00000.json", "train_00000_000000.bin", "manifest.json"),
    ],
)
def test_nothing_is_written_through_a_link_out_of_the_folder(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "text.jsonl", ["one text", "another", "a third"])
    (tmp_path / "theirs").mkdir()
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.symlink_to(os.path.relpath(tmp_path / ("theirs" if name == ".prepare" else "new"), path.parent))
    before = os.listdir(tmp_path)
    assert main(["prepare", str(tmp_path / "text.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (os.listdir(tmp_path), os.listdir(tmp_path / "theirs")) == (before, [])
