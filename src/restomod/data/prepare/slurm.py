"""Submits the units of `restomod prepare` to Slurm: job arrays on datatrove's executor, then a job for the manifest.

    prepare ─────────────────────── finish      one task per unit; afterwards one that writes the manifest
    hash ── assign ── prepare ───── finish      with --dedup, which has to know all documents before it writes any

Every stage waits for the one before it, and Slurm cancels it if that one fails. Only the folder's records say what is
finished: the same command reports the progress, and once no job is left submits what is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any

from datatrove.executor.slurm import SlurmPipelineExecutor

from restomod.config.prepare import PrepareConfig, SlurmConfig
from restomod.data.dataset import Dataset
from restomod.data.prepare.executors import standard_error_aside
from restomod.data.prepare.folder import (
    Work,
    begin,
    finish_folder,
    finished,
    job_name,
    locked_folder,
    planned,
    remove_working_folder,
    slurm_jobs,
    unfinished,
)
from restomod.data.prepare.worker import (
    SLURM,
    WORK,
    HashUnit,
    PrepareUnit,
    UnitStep,
    assign_splits,
    failure_path,
    hashes_path,
    quiet_datatrove,
    record_path,
)
from restomod.utils.errors import UserError
from restomod.utils.files import write_json_atomically
from restomod.utils.json_files import read_json
from restomod.utils.text import counted

MAX_ARRAY = 1000  # tasks of an array, below Slurm's default of MaxArraySize; beyond it a task does several units


def submit_folder(
    sources: tuple[str, ...],
    config: PrepareConfig,
    out: Path,
    workers: int,
    slurm: SlurmConfig,
    report: Callable[[str], None],
) -> Dataset | None:
    """Submit the units that are left, or report the progress; arguments as of `prepare_folder`.

    The sources and ``out`` must have the same paths on every machine of the cluster.

    Returns:
        the data once the folder is finished, None before.

    Raises:
        UserError: as `prepare_folder`; a job could not prepare its unit; or Slurm refuses.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--engine slurm needs Slurm's commands, and there is no sbatch here; run this on the cluster")
    quiet_datatrove()
    work = planned(sources, config, out)
    if (dataset := finished(work)) is not None:
        return dataset
    with locked_folder(out):
        if (dataset := finished(work)) is not None:
            return dataset
        submitted = (out / WORK / SLURM).exists()
        if submitted and (states := slurm_jobs(out)):
            done = sum(record_path(out, unit).exists() for unit in range(len(work.units)))
            running = len(states) - states.count("PENDING")
            report(f"Slurm is at work on it: {running} tasks running, {states.count('PENDING')} waiting")
            report(f"{done:,} of {len(work.units):,} units are finished")
            report(_how_to_look(out))
            return None
        begin(work)
        _raise_failure(work)
        left = unfinished(work, report)
        if not left:
            finish_folder(work)
            return finished(work)
        if submitted:
            report(f"its jobs have ended without the others: out of time or memory? See {out / WORK / 'slurm'}")
        _submit(work, left, workers, slurm, report)
        report(_how_to_look(out))
    return None


def _how_to_look(out: Path) -> str:
    name = job_name(out)
    return f"how far it is: the same command again; the queue: squeue --name={name}; to stop it: scancel --name={name}"


def _raise_failure(work: Work) -> None:
    """Raise, once, the error that a failed job has left; the next command submits its unit again."""
    failures = sorted((work.out / WORK).glob("failed_*.json"))
    if failures:
        error = read_json(failures[0], "failure of a job", dict[str, str]).get("error", "no reason is given")
        for path in failures:
            path.unlink()
        raise UserError(f"{error} (fix it and run the same command again, which submits what is left)")


def _submit(work: Work, left: list[int], workers: int, slurm: SlurmConfig, report: Callable[[str], None]) -> None:
    """Submit the stages, each waiting for the one before it."""
    out = work.out.absolute()
    work = dataclasses.replace(work, out=out)
    # before the jobs, which must not be forgotten in a crash
    write_json_atomically(out / WORK / SLURM, {"name": job_name(out)}, out)
    stages: list[tuple[str, Any]] = []
    if work.config.dedup:
        unhashed = [unit for unit in range(len(work.units)) if not hashes_path(out, unit).exists()]
        if unhashed:
            stages.append(("hash", HashUnit(work.config, work.units, out, unhashed)))
        stages.append(("assign", functools.partial(_assign, work)))
    stages.append(("prepare", PrepareUnit(work.config, work.units, out, left)))
    stages.append(("finish", functools.partial(_finish, work)))
    before = None
    for name, step in stages:
        tasks, units = (
            (len(step.todo), f" {counted(len(step.todo), 'unit')}") if isinstance(step, UnitStep) else (1, "")
        )
        executor = SlurmExecutor(out, name, step, tasks, workers, slurm, before)
        with _refusal_in_one_line(before):
            executor.launch_job()
        before = str(executor.job_id)
        report(f"submitted job {before}: {name}{units}")


def _assign(work: Work, data: Any, rank: int, world_size: int) -> list[Any]:
    """A datatrove step for one task: find duplicates, between the stages that hash and that prepare."""
    assign_splits(work.out, len(work.units), work.config)
    return []


def _finish(work: Work, data: Any, rank: int, world_size: int) -> list[Any]:
    """A datatrove step for one task: write the manifest."""
    finish_folder(work)
    return []


class SlurmExecutor(SlurmPipelineExecutor):
    """datatrove's executor for Slurm, for one stage of a folder.

    Against datatrove's: no further job that merges statistics, paths with spaces are quoted, the Python that submits
    is the Python that runs, on PATH or not, and a failure is left where the same command finds it.
    """

    def __init__(
        self, out: Path, stage: str, step: Any, tasks: int, workers: int, slurm: SlurmConfig, after: str | None
    ) -> None:
        super().__init__(
            pipeline=[step],
            tasks=tasks,
            tasks_per_job=math.ceil(tasks / MAX_ARRAY),
            workers=workers or -1,
            time=slurm.slurm_time,
            partition=slurm.slurm_partition,
            mem_per_cpu_gb=slurm.slurm_mem_gb,
            qos=None,
            job_name=job_name(out),
            depends_job_id=after,
            sbatch_args={"kill-on-invalid-dep": "yes"},
            logging_dir=str(out / WORK / "slurm" / stage),
            skip_completed=False,
            with_srun=False,
        )
        self.out, self.stage, self.step = out, stage, step

    def launch_merge_stats(self) -> None:
        """Nothing: the units' records hold what there is to know."""

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        given = {key: value for key, value in super().get_sbatch_args(max_array).items() if value is not None}
        return {key: f'"{value}"' if " " in str(value) else value for key, value in given.items()}

    def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
        pickled = self.logging_dir.resolve_paths("executor.pik")
        command = f"{quote(sys.executable)} -m datatrove.tools.launch_pickled_pipeline {quote(pickled)}"
        return str(super().get_launch_file_contents(sbatch_args, command))

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        try:
            stats = super()._run_for_rank(rank, local_rank, node_rank)
        except Exception as e:
            unit = self.step.todo[rank] if isinstance(self.step, UnitStep) else 0
            error = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
            write_json_atomically(failure_path(self.out, unit), {"error": error}, self.out)
            raise
        if self.stage == "finish":  # again: datatrove has left its log and statistics there since
            remove_working_folder(self.out)
        return stats


@contextlib.contextmanager
def _refusal_in_one_line(before: str | None) -> Iterator[None]:
    """Turn a refusal by sbatch into a UserError of one line; datatrove lets it write to our standard error."""
    with standard_error_aside() as said:
        try:
            yield
        except (subprocess.CalledProcessError, IndexError):
            said.seek(0)
            stays = f"; job {before} stays in the queue" if before else ""
            raise UserError(f"sbatch refuses the job: {' '.join(said.read().split())}{stays}") from None
