"""The training loop: evaluate, sample, save, step, log.

At step s the weights have been updated s times. All random numbers are functions of (seed, step), so a run that is
killed and resumed is identical to an uninterrupted run.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from pathlib import Path

from restomod.config.run import RunConfig
from restomod.config.serialize import read_config
from restomod.data.batches import Prefetch
from restomod.engine.distributed import Processes, join_processes
from restomod.engine.signals import StopSignal
from restomod.model.hf_format import is_exportable
from restomod.runs.async_saver import Saver
from restomod.runs.folder import refuse_existing
from restomod.runs.metrics import read_jsonl
from restomod.runs.run_lock import RunLock
from restomod.runs.trackers import Trackers, require_installed
from restomod.train.console_lines import (
    missing_checkpoint,
    next_commands,
    result_rows,
    run_summary,
    run_warnings,
    stop_line,
)
from restomod.train.evaluate import Health, evaluate, write_samples
from restomod.train.rollback import roll_back, train_step_retrying_oom
from restomod.train.setup import Training, set_up
from restomod.train.step_log import StepLog
from restomod.utils.console import Display
from restomod.utils.errors import UserError, describe_os_error
from restomod.utils.output import print_error
from restomod.utils.run_files import list_checkpoints, step_of
from restomod.utils.text import shell_quoted

EXIT_FINISHED = 0
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: stopped by a signal; the run can be resumed


def train(config: RunConfig, folder: Path, resume: bool = False, display: Display | None = None) -> int:
    """Train a new run, or resume an existing one from its newest checkpoint.

    Args:
        config: run configuration.
        folder: folder of the run.
        resume: whether the folder holds a run to be resumed; otherwise the folder must not exist.
        display: console output. None: standard output of the main process.

    Returns:
        0 if the run is finished. 75 if a signal stopped it; a checkpoint is saved first, except among skipped steps.

    Raises:
        UserError: invalid configuration, data, device or checkpoint; the message names the problem and the fix.
    """
    with join_processes("resume with `restomod train --resume RUN`") as processes:
        display = display or Display(muted=not processes.main)
        display.on_failure = lambda reason: print_error(
            f"warning: standard output cannot be written ({reason}); training continues without console output"
        )
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):  # torchrun restarts the same command
            resume = resume or processes.from_main((folder / "config.json").exists)
        processes.run_on_all_ranks(lambda: require_installed(config.track))
        lock = RunLock(folder, display.line)
        try:
            processes.from_main(lambda: _lock(lock, folder, resume))
            return _train(config, folder, resume, display, processes, lock)
        finally:
            lock.release()


def _lock(lock: RunLock, folder: Path, resume: bool) -> None:
    """Lock a run's folder before its files are read or changed."""
    if resume:
        read_config(folder)  # raises UserError if the folder holds no run
    else:
        refuse_existing(folder)
    lock.take(resume)
    if not resume:
        refuse_existing(folder)  # another process may have created it meanwhile


def _train(config: RunConfig, folder: Path, resume: bool, display: Display, processes: Processes, lock: RunLock) -> int:
    display.line("preparing data and model …", style="dim")
    training = processes.run_on_all_ranks(lambda: set_up(config, folder, resume, processes, display.line))
    processes.from_main(lock.move_into_folder)
    if training.nothing_left is not None:
        display.line(training.nothing_left)
        return EXIT_FINISHED
    display.table(run_summary(training))
    for warning in run_warnings(training):
        display.warn(warning)
    if training.start.step > 0:
        display.line(f"resuming from step {training.start.step} ({training.start.checkpoint})")

    started = time.perf_counter()
    micro_batch, rank, count = training.compute.micro_batch, processes.rank, processes.world_size
    with (
        StopSignal(lock.stopping) as stop,
        Trackers(folder, config, display.line, processes.main) as trackers,
        Saver(folder, config, processes) as saver,
        Prefetch(training.data.batches, micro_batch, config.steps, rank, count, training.compute.device) as batches,
    ):
        training = dataclasses.replace(training, run=dataclasses.replace(training.run, trackers=trackers))
        health = Health(training)
        gc.collect()
        gc.freeze()  # excludes long-lived objects from garbage collection
        display.start(training.start.step, config.steps)
        try:
            finished = _loop(training, batches, saver, health, display, stop)
        finally:
            gc.unfreeze()
            display.stop()
    if processes.main:
        records, newest = read_jsonl(folder / "metrics.jsonl"), list_checkpoints(folder)[-1:]
        last = "finished" if finished else stop_line(folder, newest, records)
        if display.closed:
            print_error(f"standard output was closed\n{last}")
        display.line(last, style="bold")
        if finished:
            seconds, verdict = time.perf_counter() - started, health.verdict()
            display.table(result_rows(config, newest, records, seconds, verdict, is_exportable(config.model)))
            for warning in missing_checkpoint(newest, records):
                display.warn(warning)
            display.lines(next_commands(folder, config))
    return EXIT_FINISHED if finished else EXIT_INTERRUPTED


def _loop(
    training: Training, batches: Prefetch, saver: Saver, health: Health, display: Display, stop: StopSignal
) -> bool:
    """Run the remaining steps. Return True if the run is finished, False if it was stopped."""
    config, processes = training.config, training.processes
    log = StepLog(training, display)
    guard = log.guard
    step, offset, micro_batch = training.start.step, training.start.data_offset, training.compute.micro_batch
    saved_at = time.monotonic()
    save_deferred = False  # a due checkpoint waits until a step is not skipped

    while True:
        # display.closed: the reader of a pipe has exited, as in `restomod train ... | head`
        overdue = save_is_due(config, step, minutes=(time.monotonic() - saved_at) / 60)
        failure = saver.failure()
        stop_here = stop.requested or display.closed or training.run.write_records() is not None
        stopping, overdue, failed = processes.any(stop_here, overdue, failure is not None)
        if failed and config.on_save_error == "stop":
            raise processes.error(str(failure))
        _print_save_failure(display, failure)

        save_due = save_deferred or overdue or (config.save_every is not None and step % config.save_every == 0)
        read_all = stopping or save_due or step == config.steps
        read_all = read_all or any(step % every == 0 for every in (config.eval_every, config.sample_every))
        failed_step = log.read(everything=read_all)
        if failed_step is not None:
            step, offset = roll_back(training, saver, guard, *failed_step, offset, display)
            log.restart_from(step)
            save_deferred = False
        finished = log.reached_target or step == config.steps
        at_checkpoint = step == log.first_step and step > 0  # already evaluated, sampled and saved

        if not at_checkpoint and (finished or step % config.eval_every == 0):
            evaluate(training, step, display)
            if step > 0 and not finished:
                health.print_warnings(display)
        if not at_checkpoint and step > 0 and (finished or step % config.sample_every == 0):
            write_samples(training, step, display)
        save_wanted = stopping or (step > 0 and save_due)
        if not at_checkpoint and (finished or (save_wanted and guard.skipped == 0)):
            saver.save(step, training.model, training.optimizer, offset)
            saved_at = time.monotonic()
            save_deferred = False
        elif save_wanted and not at_checkpoint:  # a rollback must not load a checkpoint from a loss spike
            save_deferred = True
        if finished or stopping:
            saver.finish()
            _require_saved(training, step if finished or guard.skipped == 0 else None, saver, display)
            return finished

        started = time.perf_counter()
        micro_batches, waited = batches.get(step + offset)
        pending, micro_batch = train_step_retrying_oom(
            training, step, micro_batches, micro_batch, guard.loss_limit(), display
        )
        log.add(step, pending, started, waited)
        step += 1


def _require_saved(training: Training, step: int | None, saver: Saver, display: Display) -> None:
    """Raise UserError if records or the checkpoint of ``step`` (None: no checkpoint is needed) could not be written."""
    run, processes = training.run, training.processes
    failure, unlogged = saver.failure(), run.write_records()
    there = step is None or any(step_of(folder) == step for folder in list_checkpoints(run.folder))
    unsaved, incomplete = processes.any(failure is not None and not there, unlogged is not None)
    if unsaved:
        raise processes.error(str(failure))
    if incomplete:
        raise processes.error(
            f"{describe_os_error(unlogged) if unlogged else 'a record'}: cannot be written, so the run has stopped; "
            f"fix the cause, then resume with `restomod train --resume {shell_quoted(str(run.folder))}`"
        )
    _print_save_failure(display, failure)


def _print_save_failure(display: Display, failure: UserError | None) -> None:
    """Print a warning if a checkpoint could not be written."""
    if failure is not None:
        display.warn(str(failure))


def save_is_due(config: RunConfig, step: int, minutes: float) -> bool:
    """Return whether a checkpoint is due by time.

    At a validation, a checkpoint is due after half of ``save_every_minutes``. Most checkpoints then have a validation
    loss, which selects the best checkpoint to keep.

    Args:
        config: run configuration.
        step: current step.
        minutes: time since the last checkpoint.
    """
    if config.save_every_minutes is None:
        return False
    return minutes > config.save_every_minutes / (2 if step % config.eval_every == 0 else 1)
