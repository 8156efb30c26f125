"""Submission of `restomod prepare` to Slurm: a job array for the units, then a job for the manifest.

    prepare ─────────────────────── finish      one task per unit, then one task that writes the manifest
    hash ── assign ── prepare ───── finish      with --dedup, which compares all documents first

Every stage depends on the previous one, and Slurm cancels it if the previous one fails. The records in the folder
define which units are finished. The same command reports the progress; when no job is left, it submits the missing
units.
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
from restomod.data.prepare.executors import redirected_stderr
from restomod.data.prepare.folder import (
    Work,
    begin_folder,
    finish_folder,
    job_name,
    locked_folder,
    open_finished,
    plan_folder,
    remove_working_folder,
    slurm_jobs,
    unfinished_units,
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

MAX_ARRAY = 1000  # tasks per array, below Slurm's default MaxArraySize; with more units, each task runs several


def submit_folder(
    sources: tuple[str, ...],
    config: PrepareConfig,
    out: Path,
    workers: int,
    slurm: SlurmConfig,
    report: Callable[[str], None],
) -> Dataset | None:
    """Submit the unfinished units of a folder to Slurm, or report the progress of submitted jobs.

    Args:
        sources: files, folders, built-in sources or datasets on the hub, with the same paths on all nodes.
        config: settings of the preparation.
        out: output folder, with the same path on all nodes.
        workers: maximum number of running tasks; 0: no limit.
        slurm: options of the jobs.
        report: function that receives lines about the progress.

    Returns:
        Dataset of the finished folder; None while units are unfinished.

    Raises:
        UserError: the sources cannot be read, ``out`` contains other data, a job has failed, or sbatch fails.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "--engine slurm needs sbatch, which is not installed on this machine; run the command on the cluster"
        )
    quiet_datatrove()
    work = plan_folder(sources, config, out)
    if (dataset := open_finished(work)) is not None:
        return dataset
    with locked_folder(out):
        if (dataset := open_finished(work)) is not None:
            return dataset
        submitted = (out / WORK / SLURM).exists()
        if submitted and (states := slurm_jobs(out)):
            done = sum(record_path(out, unit).exists() for unit in range(len(work.units)))
            running = len(states) - states.count("PENDING")
            report(f"Slurm tasks: {running} running, {states.count('PENDING')} pending")
            report(f"{done:,} of {len(work.units):,} units finished")
            report(_job_commands(out))
            return None
        begin_folder(work)
        _raise_failure(work)
        left = unfinished_units(work, report)
        if not left:
            finish_folder(work)
            return open_finished(work)
        if submitted:
            report(
                f"warning: the jobs ended with unfinished units, possibly at a time or memory limit; "
                f"logs: {out / WORK / 'slurm'}"
            )
        _submit(work, left, workers, slurm, report)
        report(_job_commands(out))
    return None


def _job_commands(out: Path) -> str:
    name = job_name(out)
    return f"progress: run the same command again; queue: squeue --name={name}; cancel: scancel --name={name}"


def _raise_failure(work: Work) -> None:
    """Raise the error of a failed job, and delete it so that the next command submits the unit again.

    Raises:
        UserError: a job has failed since the last command.
    """
    failures = sorted((work.out / WORK).glob("failed_*.json"))
    if failures:
        error = read_json(failures[0], "failure of a job", dict[str, str]).get("error", "no reason was recorded")
        for path in failures:
            path.unlink()
        raise UserError(f"{error}; fix it and run the same command again to submit the unfinished units")


def _submit(work: Work, left: list[int], workers: int, slurm: SlurmConfig, report: Callable[[str], None]) -> None:
    """Submit the stages, each with a dependency on the previous one."""
    out = work.out.absolute()
    work = dataclasses.replace(work, out=out)
    # written before the submission, so that a crash cannot lose track of the jobs
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
        with _sbatch_errors(before):
            executor.launch_job()
        before = str(executor.job_id)
        report(f"submitted job {before}: {name}{units}")


def _assign(work: Work, data: Any, rank: int, world_size: int) -> list[Any]:
    """Assign documents to splits and find duplicates, as a datatrove step of one task."""
    assign_splits(work.out, len(work.units), work.config)
    return []


def _finish(work: Work, data: Any, rank: int, world_size: int) -> list[Any]:
    """Write the manifest, as a datatrove step of one task."""
    finish_folder(work)
    return []


class SlurmExecutor(SlurmPipelineExecutor):
    """Slurm executor of datatrove for one stage of a folder.

    Differences from datatrove: no additional job that merges statistics, quoted paths with spaces, jobs with the
    Python interpreter of the submission, and errors written to a file for the next command.
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
        """Submit no job for statistics; the units' records contain all counts."""

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        """Return the options of sbatch, without unset ones and with quoted spaces."""
        given = {key: value for key, value in super().get_sbatch_args(max_array).items() if value is not None}
        return {key: f'"{value}"' if " " in str(value) else value for key, value in given.items()}

    def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
        """Return the batch script, which runs the pickled pipeline with the current Python interpreter."""
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
        if self.stage == "finish":  # again, because datatrove writes its log and statistics after the step
            remove_working_folder(self.out)
        return stats


@contextlib.contextmanager
def _sbatch_errors(before: str | None) -> Iterator[None]:
    """Convert the failure of sbatch, which writes to standard error, into a UserError of one line."""
    with redirected_stderr() as said:
        try:
            yield
        except (subprocess.CalledProcessError, IndexError):
            said.seek(0)
            stays = f"; job {before} stays in the queue" if before else ""
            raise UserError(f"sbatch failed: {' '.join(said.read().split())}{stays}") from None
