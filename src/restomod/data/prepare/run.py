"""Command `prepare`: runs units of work, then writes the manifest of the folder.

An interrupted preparation is resumed by the same command. Finished units are kept. The shards of a unit are a pure
function of its files, so an interruption does not change a byte.
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
from restomod.data.prepare.folder import (
    begin_folder,
    finish_folder,
    locked_folder,
    open_finished,
    plan_folder,
    unfinished_units,
)
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
    """Prepare text as a verified folder of token shards.

    Args:
        sources: files, folders, built-in sources or datasets on the hub, in the order of the shards.
        config: settings of the preparation.
        out: output folder, which is created or resumed.
        workers: number of units at the same time; 0 on Ray: no limit.
        report: function that receives lines about the progress.
        engine: local processes or a Ray cluster; see `submit_folder` for Slurm.

    Returns:
        Dataset of the finished folder.

    Raises:
        UserError: the sources cannot be read, ``out`` contains other data, or another process is writing it.
    """
    from restomod.data.prepare.executors import require_engine, run_units, started_engine

    require_engine(engine)
    work = plan_folder(sources, config, out)
    if (dataset := open_finished(work)) is not None:
        return dataset
    with locked_folder(out):
        if (dataset := open_finished(work)) is not None:  # another process has finished it since
            return dataset
        begin_folder(work)
        left = unfinished_units(work, report)
        step_out = out if engine == "local" else out.absolute()  # Ray workers have another current folder
        try:
            with started_engine(engine if left else "local", report):
                if config.dedup and left:
                    report("finding duplicate documents")
                    unhashed = [i for i in range(len(work.units)) if not hashes_path(out, i).exists()]
                    run_units(engine, HashUnit(config, work.units, step_out, unhashed), workers)
                    assign_splits(out, len(work.units), config)
                with _progress(out, len(work.units), report):
                    run_units(engine, PrepareUnit(config, work.units, step_out, left), workers)
        except KeyboardInterrupt:
            report("interrupted: finished units are kept; run the same command again to resume")
            raise
        finally:
            remove_leftovers(out)  # from workers that were stopped
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
    """Prepare a folder on this machine, on Ray or on Slurm, and report the result and the speed.

    Args:
        sources: files, folders, built-in sources or datasets on the hub, in the order of the shards.
        config: settings of the preparation.
        out: output folder, which is created or resumed.
        workers: number of units at the same time; 0 on a cluster: no limit.
        report: function that receives the lines to print.
        engine: local processes, Ray or Slurm.
        slurm: options of Slurm jobs.

    Raises:
        UserError: the preparation fails (see `prepare_folder`), or Slurm options are given for another engine.
    """
    if engine != "slurm" and slurm not in (None, SlurmConfig()):
        raise UserError(f"--slurm-partition, --slurm-time and --slurm-mem-gb need --engine slurm, not {engine}")
    there = (out / MANIFEST).exists()
    resumed = any((out / WORK).glob("unit_*.json"))  # then the elapsed time covers only a part
    start = time.perf_counter()
    if engine == "slurm":
        from restomod.data.prepare.slurm import submit_folder

        submitted = submit_folder(sources, config, out, workers, slurm or SlurmConfig(), report)
        if submitted is None:  # jobs are pending
            return
        dataset, resumed = submitted, True
    else:
        dataset = prepare_folder(sources, config, out, workers, report, engine)
    seconds, manifest = time.perf_counter() - start, dataset.manifest
    duplicates = f", {n:,} duplicates dropped" if (n := manifest["duplicates"]) else ""
    report(f"{out}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens{duplicates}")
    for split, part in manifest["splits"].items():
        report(f"  {split:<6}{part['tokens']:,} tokens in {counted(len(part['shards']), 'shard')}")
    for line in summary_lines(manifest):
        report(line)
    val = manifest["splits"]["val"]["tokens"]
    if config.val_fraction and val < FEW_VAL_TOKENS and not sources[0].startswith("pretokenized:"):
        few = f"only {val:,} validation tokens" if val else "no document in the validation split"
        report(f"warning: {few}; raise --val-fraction (now {config.val_fraction})")
    if there:
        report("already prepared; verified: SHA-256 of all shards")
    elif not resumed:
        text_bytes = sum(split["text_bytes"] for split in manifest["splits"].values())
        report(
            f"time: {seconds:.1f} s, {text_bytes / seconds / 1e6:,.1f} MB/s of text, "
            f"{manifest['tokens'] / seconds:,.0f} tokens/s, {manifest['documents'] / seconds:,.0f} documents/s"
        )
    report(f"to train: restomod train PRESET --data.source tokens --data.path {quote(str(out))}")


@contextlib.contextmanager
def _progress(out: Path, units: int, report: Callable[[str], None]) -> Iterator[None]:
    """Report the number of finished units from a background thread, every `PROGRESS_SECONDS`."""
    over = threading.Event()
    start, before = time.perf_counter(), _tokens(out, units)

    def watch() -> None:
        seen = len(before)
        while not over.wait(PROGRESS_SECONDS):
            now = _tokens(out, units)
            if seen < len(now) < units:
                seen, tokens = len(now), sum(now) - sum(before)
                speed = tokens / (time.perf_counter() - start)
                with contextlib.suppress(OSError, ValueError):  # the main thread reports failures of printing
                    report(f"{seen:,} of {units:,} units, {sum(now):,} tokens, {speed:,.0f} tokens/s")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _tokens(out: Path, units: int) -> list[int]:
    """Return the number of tokens of each finished unit."""
    paths = (record_path(out, unit) for unit in range(units))
    records = [read_unit(path)["splits"] for path in paths if path.exists()]
    return [splits["train"]["tokens"] + splits["val"]["tokens"] for splits in records]


@contextlib.contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Convert SIGTERM and SIGINT into KeyboardInterrupt, also where the signal causes another error first."""
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
