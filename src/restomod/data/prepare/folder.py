"""Output folder of `restomod prepare`: lock, plan, resuming, manifest.

DIR/.prepare/plan.json              plan of the folder; other plans are refused
DIR/.prepare/lock                   locked while a process writes the folder
DIR/.prepare/unit_00012.json        record of finished unit 12: documents, tokens, shards with their SHA-256
DIR/train_00012_000000.bin          shard of unit 12
DIR/manifest.json                   written last; marks a complete folder
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from restomod.config.prepare import PrepareConfig
from restomod.data.dataset import SPLITS, Dataset, open_dataset
from restomod.data.manifest import (
    MANIFEST,
    MANIFEST_FORMAT,
    READ,
    Prepared,
    merge_counts,
    read_manifest,
    read_plan,
    read_unit,
)
from restomod.data.prepare.units import Unit, describe, describe_files, plan_units
from restomod.data.prepare.worker import SLURM, WORK, failure_path, hashes_path, record_path
from restomod.data.read_counts import ReadCounts
from restomod.data.tokenizer import Tokenizer
from restomod.utils.errors import UserError
from restomod.utils.files import require_inside, write_json_atomically
from restomod.utils.json_files import checked
from restomod.utils.locks import FileLock
from restomod.utils.temporary import remove_leftovers
from restomod.utils.text import counted

LOCK = "lock"
PLAN = "plan.json"


@dataclasses.dataclass(frozen=True)
class Work:
    """Plan of a folder and everything needed to execute it."""

    out: Path
    config: PrepareConfig
    units: list[Unit]
    description: dict[str, Any]
    """Plan as JSON values, stored in the manifest."""
    counts: ReadCounts
    """Counts of skipped files in the folders of the sources."""


def plan_folder(sources: tuple[str, ...], config: PrepareConfig, out: Path) -> Work:
    """Plan the contents of a folder without writing.

    Args:
        sources: files, folders, built-in sources or datasets on the hub.
        config: settings of the preparation.
        out: output folder.

    Raises:
        UserError: the sources cannot be read, ``out`` is inside a source, or ``out`` contains other files.
    """
    for source in sources:
        if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
            raise UserError(f"{out} is inside the source {source}; choose another folder with --out")
    begun = None
    if there := (out / MANIFEST).exists():
        begun = read_manifest(out).get("plan")
    elif there := (out / WORK / PLAN).exists():
        begun = read_plan(out / WORK / PLAN)
    counts = ReadCounts()
    units = plan_units(sources, config, begun, counts)
    if not there and out.exists() and any(path.name != WORK for path in out.iterdir()):
        raise UserError(
            f"{out} is not empty and was not written by `restomod prepare`; choose another folder with --out"
        )
    return Work(out, config, units, describe(sources, config, units), counts)


@contextlib.contextmanager
def locked_folder(out: Path) -> Iterator[None]:
    """Lock a folder for this process. The operating system releases the lock when the process ends or is killed.

    Raises:
        UserError: another process has locked the folder, it cannot be created, or a link in it leads out of it.
    """
    for folder in (out, out / WORK):  # writes and deletions must not follow links to other places
        if folder.is_dir():
            require_inside(out, *(Path(entry) for entry in os.scandir(folder) if entry.is_symlink()))
    lock = FileLock(out / WORK / LOCK)
    try:
        (out / WORK).mkdir(parents=True, exist_ok=True)
        free = lock.acquire(wait=False)
    except OSError as e:
        raise UserError(f"{out}: cannot create this folder ({e.strerror})") from None
    if not free:
        raise UserError(f"another `restomod prepare` is writing {out}; wait for it or stop it")
    try:
        yield
    finally:
        lock.release()


def unfinished_units(work: Work, report: Callable[[str], None]) -> list[int]:
    """Report the progress and the input files, and return the indices of unfinished units."""
    n = len(work.units)
    left = [i for i in range(n) if not record_path(work.out, i).exists()]
    if len(left) < n:
        report(f"resuming: {n - len(left)} of {n} units finished")
    report(f"input: {describe_files(work.units)}; {counted(n, 'unit')} of work")
    return left


def open_finished(work: Work) -> Dataset | None:
    """Open and verify a finished folder; return None if the folder is unfinished.

    Raises:
        UserError: the folder contains other data, or a file is damaged.
    """
    if not (work.out / MANIFEST).exists():
        return None
    dataset = open_dataset(work.out, work.description["tokenizer"], verify="all")
    if dataset.manifest.get("plan") != work.description:
        raise UserError(f"{work.out} already contains data of other text or settings; choose another folder with --out")
    checked(dataset.manifest, Prepared, f"{work.out / MANIFEST} is damaged: the manifest of token shards")
    remove_working_folder(work.out)  # left over if the process was killed after the manifest was written
    return dataset


def begin_folder(work: Work) -> None:
    """Write the plan into a locked folder, or resume the plan in it.

    Raises:
        UserError: the folder has another plan, or Slurm jobs are working on it.
    """
    out, description = work.out, work.description
    if (out / WORK / SLURM).exists():
        if jobs := slurm_jobs(out):
            raise UserError(
                f"{len(jobs)} Slurm jobs are working on {out}; wait for them, or cancel them: "
                f"scancel --name={job_name(out)}"
            )
        (out / WORK / SLURM).unlink()
    begun = out / WORK / PLAN
    before = read_plan(begun) if begun.exists() else None
    if before is not None and before != description:
        _drop_changed_units(out, before, description)
    if before != description:
        write_json_atomically(begun, description, out)
    remove_leftovers(out)


def _drop_changed_units(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Delete the working files of units whose plan has changed, so that the user can correct settings or files.

    If no unit is finished, any part of the plan may change.

    Raises:
        UserError: the settings or a finished unit have changed, or finished units depend on changed units.
    """
    a, b = before["units"], now["units"]
    finished = {i for i in range(len(a)) if record_path(out, i).exists()}
    if not finished:
        for path in [*(out / WORK).iterdir(), *out.glob("*.bin")]:
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:  # locked by this process
                path.unlink()
        return
    changed = {i for i in range(max(len(a), len(b))) if a[i : i + 1] != b[i : i + 1]}
    entangled = now["settings"]["dedup"] or 1 in (len(a), len(b))
    if before | {"units": b} != now or finished & changed or entangled:
        raise UserError(
            f"{out} has unfinished work with other text or settings; repeat those to resume, or choose another --out"
        )
    for i in changed:
        shards = (shard for split in SPLITS for shard in out.glob(f"{split}_{i:05d}_*.bin"))
        for path in (hashes_path(out, i), failure_path(out, i), *shards):
            path.unlink(missing_ok=True)


def finish_folder(work: Work) -> None:
    """Write the manifest from the records of all units, and remove the working files.

    Raises:
        UserError: all documents are empty.
    """
    out, description = work.out, work.description
    records = [read_unit(record_path(out, unit)) for unit in range(len(work.units))]
    splits = {}
    for split in SPLITS:
        parts = [record["splits"][split] for record in records]
        splits[split] = {
            **{key: sum(part[key] for part in parts) for key in ("tokens", "documents", "text_bytes")},
            "shards": [shard for part in parts for shard in part["shards"]],
        }
    documents = sum(record["documents"] for record in records)
    if documents == 0:
        raise UserError("the sources have no text: every document is empty")
    shards = "".join(f"{split} {shard['sha256']}" for split in SPLITS for shard in splits[split]["shards"])
    read = merge_counts([work.counts.to_dict(), *(record[READ] for record in records if READ in record)])
    write_json_atomically(
        out / MANIFEST,
        {
            "format": MANIFEST_FORMAT,
            "name": description["name"],
            "fingerprint": hashlib.sha256((Tokenizer.sha256 + shards).encode()).hexdigest(),
            "tokenizer": {key: getattr(Tokenizer, key) for key in ("name", "vocab_size", "sha256")},
            "documents": documents,
            "duplicates": sum(record["duplicates"] for record in records),
            "tokens": sum(split["tokens"] for split in splits.values()),
            "splits": splits,
            **({READ: read} if read else {}),
            "plan": description,
        },
        out,
    )
    remove_working_folder(out)


def remove_working_folder(out: Path) -> None:
    """Remove the working files of a folder."""
    shutil.rmtree(out / WORK, ignore_errors=True)
    remove_leftovers(out)


def slurm_jobs(out: Path) -> list[str]:
    """Return the states of a folder's jobs in Slurm's queue, such as RUNNING or PENDING; empty when all have ended.

    Raises:
        UserError: squeue is missing or fails.
    """
    name = job_name(out)
    try:
        asked = subprocess.run(
            ["squeue", "--noheader", "--array", f"--name={name}", "--format=%T"], capture_output=True, text=True
        )
    except FileNotFoundError:
        raise UserError(
            f"Slurm jobs were submitted for {out}, but squeue is not installed on this machine; "
            f"run the command on the cluster"
        ) from None
    if asked.returncode:
        raise UserError(f"squeue cannot list the jobs of {out}: {' '.join(asked.stderr.split())}")
    return asked.stdout.split()


def job_name(out: Path) -> str:
    """Return the name of the Slurm jobs for a folder; equal paths have equal names."""
    return f"restomod-{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:8]}"
