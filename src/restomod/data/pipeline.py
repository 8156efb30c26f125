"""Prepare any amount of text: units of work on datatrove's executors, shards and a record per unit, a manifest at last.

    DIR/.prepare/plan.json              what was begun; another plan is refused
    DIR/.prepare/unit_00012.json        unit 12 is finished: its documents, tokens, shards with their SHA-256
    DIR/train_00012_000000.bin          its shards
    DIR/manifest.json                   written last: the folder is whole

Interrupted anywhere, the same command goes on: finished units are kept, and the others are a pure function of their
files, so the bytes are those of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any

from restomod.config import PrepareConfig
from restomod.data.plan import describe, kinds_of, plan
from restomod.data.shards import MANIFEST, MANIFEST_FORMAT, SPLITS, Dataset, open_dataset
from restomod.data.steps import (
    WORK,
    HashUnit,
    PrepareUnit,
    UnitStep,
    choose_first_occurrences,
    hashes_path,
    quiet_datatrove,
    record_path,
)
from restomod.data.tokenizer import Tokenizer, gpt2_tokenizer
from restomod.errors import UserError
from restomod.files import read_json, write_json_atomically

PROGRESS_SECONDS = 2.0
FEW_VAL_TOKENS = 10_000


def prepare_folder(
    sources: tuple[str, ...],
    config: PrepareConfig,
    out: Path,
    workers: int,
    report: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """Turn text into a verified folder of token shards.

    Args:
        sources: files, folders or built-in sources, in the order in which they are to be written.
        config: how to read and cut them.
        out: the folder; it is made, or gone on with if the same was begun in it.
        workers: how many units to work on at once.
        report: told what is going on, a line at a time.

    Raises:
        UserError: the sources cannot be read, or ``out`` holds something else.
    """
    tokenizer = gpt2_tokenizer()
    for source in sources:
        if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
            raise UserError(f"{out} lies in {source}, where it would be read as text; choose another folder with --out")
    units = plan(sources, config, _begun(out))
    description = describe(sources, config, units, tokenizer.sha256)
    if (out / MANIFEST).exists():
        return _finished(out, description, tokenizer)
    _begin(out, description)
    left = [i for i in range(len(units)) if not record_path(out, i).exists()]
    if len(left) < len(units):
        report(f"going on: {len(units) - len(left)} of {len(units)} units are finished")
    report(f"reading {kinds_of(units)}, in {len(units):,} unit{'' if len(units) == 1 else 's'}")
    try:
        if config.dedup:
            report("looking for duplicates …")
            _run(HashUnit(config, units, out), len(units), workers, out)
            choose_first_occurrences(out, len(units))
        with _progress(out, len(units), report):
            _run(PrepareUnit(config, units, out), len(units), workers, out)
    except KeyboardInterrupt:
        report("finished units stay; the same command goes on with the others")
        raise
    finally:
        _drop_temporaries(out)  # of workers that were stopped because another one failed
    _finish(out, description, tokenizer, len(units))
    return open_dataset(out, tokenizer.sha256)


def prepare_and_report(
    sources: tuple[str, ...], config: PrepareConfig, out: Path, workers: int, report: Callable[[str], None]
) -> None:
    """`prepare_folder`, and then report what came of it and how fast."""
    there = (out / MANIFEST).exists()
    gone_on = any((out / WORK).glob("unit_*.json"))  # then the time is not that of all of it
    start = time.perf_counter()
    dataset = prepare_folder(sources, config, out, workers, report)
    seconds, manifest = time.perf_counter() - start, dataset.manifest
    duplicates = f", {manifest['duplicates']:,} duplicates left out" if manifest["duplicates"] else ""
    report(f"{out}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens{duplicates}")
    for split, part in manifest["splits"].items():
        shards = f"{len(part['shards']):,} shard{'' if len(part['shards']) == 1 else 's'}"
        report(f"  {split:<6}{part['tokens']:,} tokens in {shards}")
    val = manifest["splits"]["val"]["tokens"]
    if config.val_fraction and val < FEW_VAL_TOKENS and not sources[0].startswith("pretokenized:"):
        report(f"warning: {val:,} tokens are few for validation; raise --val-fraction, which is {config.val_fraction}")
    if there:
        report("it was prepared already; every shard has the SHA-256 of the manifest")
    elif not gone_on:
        text_bytes = sum(split["text_bytes"] for split in manifest["splits"].values())
        report(
            f"{seconds:.1f} s: {text_bytes / seconds / 1e6:,.1f} MB/s of text, "
            f"{manifest['tokens'] / seconds:,.0f} tokens/s, {manifest['documents'] / seconds:,.0f} documents/s"
        )
    report(f"train on it: restomod train PRESET --data.source tokens --data.path {quote(str(out))}")


@contextlib.contextmanager
def _progress(out: Path, units: int, report: Callable[[str], None]) -> Iterator[None]:
    """Report finished units while they come, from a thread that looks for their records."""
    over = threading.Event()
    start, before = time.perf_counter(), _tokens(out, units)

    def watch() -> None:
        seen = len(before)
        while not over.wait(PROGRESS_SECONDS):
            now = _tokens(out, units)
            if seen < len(now) < units:
                seen, tokens = len(now), sum(now) - sum(before)
                speed = tokens / (time.perf_counter() - start)
                report(f"{seen:,} of {units:,} units, {sum(now):,} tokens, {speed:,.0f} tokens/s")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _tokens(out: Path, units: int) -> list[int]:
    """The tokens of each finished unit."""
    paths = (record_path(out, unit) for unit in range(units))
    records = [read_json(path, "record of a finished unit") for path in paths if path.exists()]
    return [sum(split["tokens"] for split in record["splits"].values()) for record in records]


def _finished(out: Path, description: dict[str, Any], tokenizer: Tokenizer) -> Dataset:
    dataset = open_dataset(out, tokenizer.sha256)
    if dataset.manifest.get("plan") != description:
        raise UserError(f"{out} holds other data already (other text or settings); choose another folder with --out")
    _clean(out)  # after a kill between the manifest and this
    return dataset


def _begun(out: Path) -> dict[str, Any] | None:
    """The plan that was begun, or finished, in a folder; None where there is none."""
    if (out / MANIFEST).exists():
        manifest = read_json(out / MANIFEST, "manifest of token shards")
        found = manifest.get("plan") if isinstance(manifest, dict) else None
    else:
        path = out / WORK / "plan.json"
        found = read_json(path, "plan of this folder") if path.exists() else None
    return found if isinstance(found, dict) and isinstance(found.get("datasets"), dict) else None


def _begin(out: Path, description: dict[str, Any]) -> None:
    begun = out / WORK / "plan.json"
    if begun.exists():
        before = read_json(begun, "plan of this folder")
        if before != description:
            _drop_changed_units(out, before, description)
            write_json_atomically(begun, description)
        _drop_temporaries(out)
        return
    if out.exists() and any(path.name != WORK for path in out.iterdir()):
        raise UserError(f"{out} is not empty, and nothing was begun there; choose another folder with --out")
    try:
        begun.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(begun, description)
    except OSError as e:
        raise UserError(f"{out}: cannot make this folder ({e.strerror})") from None


def _drop_changed_units(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Let a setting or a file be mended on the way: forget what was begun of units that have changed.

    Without a finished unit everything may change.

    Raises:
        UserError: the settings or a finished unit have changed, or finished units depend on the changed ones.
    """
    a, b = before["units"], now["units"]
    finished = {i for i in range(len(a)) if record_path(out, i).exists()}
    if not finished:
        shutil.rmtree(out / WORK)
        for shard in out.glob("*.bin"):
            shard.unlink()
        (out / WORK).mkdir()
        return
    changed = {i for i in range(max(len(a), len(b))) if a[i : i + 1] != b[i : i + 1]}
    entangled = bool(finished) and (now["settings"]["dedup"] or 1 in (len(a), len(b)))
    if before | {"units": b} != now or finished & changed or entangled:
        raise UserError(
            f"{out} was begun with other text or settings; give those again to go on, or choose another --out"
        )
    for i in changed:
        hashes_path(out, i).unlink(missing_ok=True)
        for split in SPLITS:
            for shard in out.glob(f"{split}_{i:05d}_*.bin"):
                shard.unlink()


def _run(step: UnitStep, units: int, workers: int, out: Path) -> None:
    """Run a step for every unit on datatrove's local processes."""
    from datatrove.executor.local import LocalPipelineExecutor

    quiet_datatrove()
    if min(workers, units) > 1:
        _start_fork_server()
    executor = LocalPipelineExecutor(
        pipeline=[step],
        tasks=units,
        workers=min(workers, units),
        logging_dir=str(out / WORK / "datatrove"),
        skip_completed=False,  # a unit's own record, written with its shards, says whether it is finished
    )
    try:
        executor.run()
    except (ConnectionError, EOFError):
        raise UserError("a process of this preparation was killed; run the same command again to go on") from None


def _start_fork_server() -> None:
    """Start the process that workers are forked from, so that they ignore Ctrl-C: their parent ends them."""
    import multiprocess.forkserver

    if threading.current_thread() is threading.main_thread():  # signals can be set in no other
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            multiprocess.forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, before)


def _finish(out: Path, description: dict[str, Any], tokenizer: Tokenizer, units: int) -> None:
    """Write the manifest from the units' records."""
    records = [read_json(record_path(out, unit), "record of a finished unit") for unit in range(units)]
    splits = {}
    for split in SPLITS:
        parts = [record["splits"][split] for record in records]
        splits[split] = {
            **{key: sum(part[key] for part in parts) for key in ("tokens", "documents", "text_bytes")},
            "shards": [shard for part in parts for shard in part["shards"]],
        }
    documents = sum(record["documents"] for record in records)
    if documents == 0:
        raise UserError("the sources hold no text: every document is empty")
    digest = hashlib.sha256(tokenizer.sha256.encode())
    for split in SPLITS:
        for shard in splits[split]["shards"]:
            digest.update(f"{split} {shard['sha256']}".encode())
    write_json_atomically(
        out / MANIFEST,
        {
            "format": MANIFEST_FORMAT,
            "name": description["name"],
            "fingerprint": digest.hexdigest(),
            "tokenizer": {
                "name": tokenizer.name,
                "vocab_size": tokenizer.vocab_size,
                "sha256": tokenizer.sha256,
            },
            "documents": documents,
            "duplicates": sum(record["duplicates"] for record in records),
            "tokens": sum(split["tokens"] for split in splits.values()),
            "splits": splits,
            "plan": description,
        },
    )
    _clean(out)


def _clean(out: Path) -> None:
    """Drop what was only needed on the way."""
    shutil.rmtree(out / WORK, ignore_errors=True)
    _drop_temporaries(out)


def _drop_temporaries(out: Path) -> None:
    """Drop the half-written files of workers that were killed."""
    for leftover in out.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
