"""The folder that `restomod prepare` writes: its lock, its plan, resuming it, its manifest.

DIR/.prepare/plan.json              what was begun; another plan is refused
DIR/.prepare/lock                   held while a process is at work on it
DIR/.prepare/unit_00012.json        unit 12 is finished: its documents, tokens, shards with their SHA-256
DIR/train_00012_000000.bin          its shards
DIR/manifest.json                   written last: the folder is whole
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
from restomod.data.prepare.units import Unit, describe, kinds_of, plan_units
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
    """Work to do in a folder."""

    out: Path
    config: PrepareConfig
    units: list[Unit]
    description: dict[str, Any]
    """The plan, as the manifest will hold it."""
    counts: ReadCounts
    """Files of the sources' folders that were skipped."""


def planned(sources: tuple[str, ...], config: PrepareConfig, out: Path) -> Work:
    """Plan the contents of a folder without writing anything.

    Raises:
        UserError: the sources cannot be read, or ``out`` is no place for them.
    """
    for source in sources:
        if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
            raise UserError(f"{out} lies in {source}, where it would be read as text; choose another folder with --out")
    begun = None
    if there := (out / MANIFEST).exists():
        begun = read_manifest(out).get("plan")
    elif there := (out / WORK / PLAN).exists():
        begun = read_plan(out / WORK / PLAN)
    counts = ReadCounts()
    units = plan_units(sources, config, begun, counts)
    if not there and out.exists() and any(path.name != WORK for path in out.iterdir()):
        raise UserError(f"{out} is not empty, and nothing was begun there; choose another folder with --out")
    return Work(out, config, units, describe(sources, config, units), counts)


@contextlib.contextmanager
def locked_folder(out: Path) -> Iterator[None]:
    """Lock a folder for this process. The system releases the lock when the process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    for folder in (out, out / WORK):  # what links to elsewhere name would be written and deleted
        if folder.is_dir():
            require_inside(out, *(Path(entry) for entry in os.scandir(folder) if entry.is_symlink()))
    lock = FileLock(out / WORK / LOCK)
    try:
        (out / WORK).mkdir(parents=True, exist_ok=True)
        free = lock.acquire(wait=False)
    except OSError as e:
        raise UserError(f"{out}: cannot make this folder ({e.strerror})") from None
    if not free:
        raise UserError(f"another `restomod prepare` is at work on {out}; let it finish, or stop it first")
    try:
        yield
    finally:
        lock.release()


def unfinished(work: Work, report: Callable[[str], None]) -> list[int]:
    """Report the progress and what is read; return the units that are still to be done."""
    n = len(work.units)
    left = [i for i in range(n) if not record_path(work.out, i).exists()]
    if len(left) < n:
        report(f"resuming: {n - len(left)} of {n} units are finished")
    report(f"reading {kinds_of(work.units)}, in {counted(n, 'unit')}")
    return left


def finished(work: Work) -> Dataset | None:
    """The data of a finished folder; None: it is not finished. Raises UserError for other data, or damaged data."""
    if not (work.out / MANIFEST).exists():
        return None
    dataset = open_dataset(work.out, work.description["tokenizer"], verify="all")
    if dataset.manifest.get("plan") != work.description:
        raise UserError(
            f"{work.out} holds other data already (other text or settings); choose another folder with --out"
        )
    checked(dataset.manifest, Prepared, f"{work.out / MANIFEST} is damaged: the manifest of token shards")
    remove_working_folder(work.out)  # after a kill between the manifest and this
    return dataset


def begin(work: Work) -> None:
    """Write the plan into a locked folder, or resume what was begun there.

    Raises:
        UserError: something else was begun there, or jobs of Slurm are at work on it.
    """
    out, description = work.out, work.description
    if (out / WORK / SLURM).exists():
        if jobs := slurm_jobs(out):
            raise UserError(
                f"{len(jobs)} jobs of Slurm are at work on {out}; let them finish, or stop them: "
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
    """Allow settings or files to be corrected: delete what was begun of units that have changed.

    Without a finished unit everything may change.

    Raises:
        UserError: the settings or a finished unit have changed, or finished units depend on the changed ones.
    """
    a, b = before["units"], now["units"]
    finished = {i for i in range(len(a)) if record_path(out, i).exists()}
    if not finished:
        for path in [*(out / WORK).iterdir(), *out.glob("*.bin")]:
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:  # we hold it
                path.unlink()
        return
    changed = {i for i in range(max(len(a), len(b))) if a[i : i + 1] != b[i : i + 1]}
    entangled = now["settings"]["dedup"] or 1 in (len(a), len(b))
    if before | {"units": b} != now or finished & changed or entangled:
        raise UserError(
            f"{out} was begun with other text or settings; give those again to resume, or choose another --out"
        )
    for i in changed:
        shards = (shard for split in SPLITS for shard in out.glob(f"{split}_{i:05d}_*.bin"))
        for path in (hashes_path(out, i), failure_path(out, i), *shards):
            path.unlink(missing_ok=True)


def finish_folder(work: Work) -> None:
    """Write the manifest from the units' records, and remove the working files. Raises UserError without any text."""
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
        raise UserError("the sources hold no text: every document is empty")
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
    """Remove the working files."""
    shutil.rmtree(out / WORK, ignore_errors=True)
    remove_leftovers(out)


def slurm_jobs(out: Path) -> list[str]:
    """The states of the jobs that are in Slurm's queue for a folder, such as RUNNING or PENDING; none once all ended.

    Raises:
        UserError: Slurm cannot be asked.
    """
    name = job_name(out)
    try:
        asked = subprocess.run(
            ["squeue", "--noheader", "--array", f"--name={name}", "--format=%T"], capture_output=True, text=True
        )
    except FileNotFoundError:
        raise UserError(
            f"jobs of Slurm were submitted for {out}, and there is no squeue here to ask whether they have ended; "
            f"run this on the cluster"
        ) from None
    if asked.returncode:
        raise UserError(f"squeue cannot tell whether jobs are at work on {out}: {' '.join(asked.stderr.split())}")
    return asked.stdout.split()


def job_name(out: Path) -> str:
    """The name of the jobs for a folder, by which they are found again."""
    return f"restomod-{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:8]}"
