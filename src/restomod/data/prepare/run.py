"""Command `prepare`: units of work on datatrove's executors, shards and a record per unit, a manifest at the end.

Interrupted anywhere, the same command resumes: finished units are kept, and the others are a pure function of their
files, so the bytes are those of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from types import FrameType

from restomod.config.prepare import Engine, PrepareConfig, SlurmConfig
from restomod.data.dataset import Dataset, open_dataset
from restomod.data.manifest import MANIFEST, read_unit
from restomod.data.prepare.folder import begin, finish_folder, finished, locked_folder, planned, unfinished
from restomod.data.prepare.worker import WORK, HashUnit, PrepareUnit, assign_splits, hashes_path, record_path
from restomod.data.read_counts import summary_lines
from restomod.utils.errors import UserError
from restomod.utils.temporary import remove_leftovers
from restomod.utils.text import counted

PROGRESS_SECONDS = 2.0
FEW_VAL_TOKENS = 10_000


def prepare_folder(
    sources: tuple[str, ...],
    config: PrepareConfig,
    out: Path,
    workers: int,
    report: Callable[[str], None] = lambda line: None,
    engine: Engine = "local",
) -> Dataset:
    """Turn text into a verified folder of token shards.

    Args:
        sources: files, folders, built-in sources or datasets of the hub, in the order in which they are written.
        config: how to read and cut them.
        out: the folder; it is made, or resumed if the same was begun in it.
        workers: number of units to work on at once; on Ray 0 is as many as there is room for.
        report: gets lines about the progress.
        engine: local processes or a Ray cluster (for Slurm: slurm.py).

    Raises:
        UserError: the sources cannot be read, ``out`` holds something else, or another process is at work on it.
    """
    from restomod.data.prepare.executors import require_engine, run_units, started_engine

    require_engine(engine)
    work = planned(sources, config, out)
    if (dataset := finished(work)) is not None:
        return dataset
    with locked_folder(out):
        if (dataset := finished(work)) is not None:  # by another process, meanwhile
            return dataset
        begin(work)
        left = unfinished(work, report)
        step_out = out if engine == "local" else out.absolute()  # workers elsewhere are in another folder
        try:
            with started_engine(engine if left else "local", report):
                if config.dedup and left:
                    report("looking for duplicates …")
                    unhashed = [i for i in range(len(work.units)) if not hashes_path(out, i).exists()]
                    run_units(engine, HashUnit(config, work.units, step_out, unhashed), workers)
                    assign_splits(out, len(work.units), config)
                with _progress(out, len(work.units), report):
                    run_units(engine, PrepareUnit(config, work.units, step_out, left), workers)
        except KeyboardInterrupt:
            report("finished units are kept; the same command resumes with the others")
            raise
        finally:
            remove_leftovers(out)  # of workers that were stopped because another one failed
        finish_folder(work)
        return open_dataset(out, work.description["tokenizer"], verify="all")


def prepare_and_report(
    sources: tuple[str, ...],
    config: PrepareConfig,
    out: Path,
    workers: int,
    report: Callable[[str], None],
    engine: Engine = "local",
    slurm: SlurmConfig | None = None,
) -> None:
    """Prepare a folder here or on Slurm, and report the result and the speed.

    Raises:
        UserError: as `prepare_folder`; or settings of Slurm are given for another engine.
    """
    if engine != "slurm" and slurm not in (None, SlurmConfig()):
        raise UserError(f"--slurm-partition, --slurm-time and --slurm-mem-gb are for --engine slurm, not {engine}")
    there = (out / MANIFEST).exists()
    resumed = any((out / WORK).glob("unit_*.json"))  # then the time is not that of all of it
    start = time.perf_counter()
    if engine == "slurm":
        from restomod.data.prepare.slurm import submit_folder

        submitted = submit_folder(sources, config, out, workers, slurm or SlurmConfig(), report)
        if submitted is None:  # its jobs are not done yet
            return
        dataset, resumed = submitted, True
    else:
        dataset = prepare_folder(sources, config, out, workers, report, engine)
    seconds, manifest = time.perf_counter() - start, dataset.manifest
    duplicates = f", {n:,} duplicates left out" if (n := manifest["duplicates"]) else ""
    report(f"{out}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens{duplicates}")
    for split, part in manifest["splits"].items():
        report(f"  {split:<6}{part['tokens']:,} tokens in {counted(len(part['shards']), 'shard')}")
    for line in summary_lines(manifest):
        report(line)
    val = manifest["splits"]["val"]["tokens"]
    if config.val_fraction and val < FEW_VAL_TOKENS and not sources[0].startswith("pretokenized:"):
        few = f"{val:,} tokens are few for validation" if val else "no document is in the validation split"
        report(f"warning: {few}; raise --val-fraction, which is {config.val_fraction}")
    if there:
        report("it was prepared already; every shard has the SHA-256 of the manifest")
    elif not resumed:
        text_bytes = sum(split["text_bytes"] for split in manifest["splits"].values())
        report(
            f"{seconds:.1f} s: {text_bytes / seconds / 1e6:,.1f} MB/s of text, "
            f"{manifest['tokens'] / seconds:,.0f} tokens/s, {manifest['documents'] / seconds:,.0f} documents/s"
        )
    report(f"train on it: restomod train PRESET --data.source tokens --data.path {quote(str(out))}")


@contextlib.contextmanager
def _progress(out: Path, units: int, report: Callable[[str], None]) -> Iterator[None]:
    """Report finished units from a thread that looks for their records."""
    over = threading.Event()
    start, before = time.perf_counter(), _tokens(out, units)

    def watch() -> None:
        seen = len(before)
        while not over.wait(PROGRESS_SECONDS):
            now = _tokens(out, units)
            if seen < len(now) < units:
                seen, tokens = len(now), sum(now) - sum(before)
                speed = tokens / (time.perf_counter() - start)
                with contextlib.suppress(OSError, ValueError):  # where printing fails, the main thread will meet it
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
    records = [read_unit(path)["splits"] for path in paths if path.exists()]
    return [splits["train"]["tokens"] + splits["val"]["tokens"] for splits in records]


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, and ignore errors that follow from the signal in other processes."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Exception:
        if received:
            raise KeyboardInterrupt from None
        raise
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
