"""The training loop: evaluate, sample, save, step, log.

At step s the weights have been updated s times. Whatever is random follows from (seed, step), so a run that was
killed and resumed equals one that was not.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import time
from pathlib import Path
from shlex import quote

from restomod.config.run import RunConfig
from restomod.config.serialize import read_config
from restomod.data.batches import Prefetch
from restomod.engine.distributed import Processes, join_processes
from restomod.engine.signals import StopSignal
from restomod.model.hf_format import is_exportable
from restomod.runs.async_saver import Saver
from restomod.runs.folder import refuse_existing
from restomod.runs.run_lock import RunLock
from restomod.runs.trackers import Trackers, require_installed
from restomod.train.console_lines import check_lines, closing_lines, length_warnings, run_summary
from restomod.train.evaluate import Health, evaluate, write_samples
from restomod.train.rollback import roll_back, train_step_retrying_oom
from restomod.train.setup import Training, set_up
from restomod.train.step_log import StepLog
from restomod.utils.console import Display
from restomod.utils.errors import UserError, describe_os_error
from restomod.utils.output import print_error
from restomod.utils.run_files import list_checkpoints, step_of

EXIT_FINISHED = 0
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: stopped by a signal; the run can be resumed


def train(config: RunConfig, folder: Path, resume: bool = False, display: Display | None = None) -> int:
    """Train a new run, or with ``resume`` the existing one in ``folder`` from its newest checkpoint.

    Returns:
        0 when the run is finished, 75 when a signal stopped it (after a checkpoint, except among skipped steps).

    Raises:
        UserError: something is wrong that the user can mend; the message says what and how.
    """
    with join_processes("resume with `restomod train --resume RUN`") as processes:
        display = display or Display(muted=not processes.main)
        display.on_failure = lambda reason: print_error(
            f"standard output cannot be written ({reason}); training continues without it"
        )
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):  # torchrun repeats the command after a failure
            resume = resume or processes.from_main((folder / "config.json").exists)
        processes.run_on_all_ranks(lambda: require_installed(config.track))
        lock = RunLock(folder, display.line)
        try:
            processes.from_main(lambda: _lock(lock, folder, resume))
            return _train(config, folder, resume, display, processes, lock)
        finally:
            lock.release()


def _lock(lock: RunLock, folder: Path, resume: bool) -> None:
    """Take the lock of a run before anything of it is read or changed."""
    if resume:
        read_config(folder)  # it is a run
    else:
        refuse_existing(folder)
    lock.take(resume)
    if not resume:
        refuse_existing(folder)  # another start may just have made it


def _train(config: RunConfig, folder: Path, resume: bool, display: Display, processes: Processes, lock: RunLock) -> int:
    print_line = functools.partial(display.line, style="dim")
    print_line("preparing the data and the model …")
    training = processes.run_on_all_ranks(lambda: set_up(config, folder, resume, processes, print_line))
    processes.from_main(lock.move_into_folder)
    if training.nothing_left is not None:
        display.line(training.nothing_left)
        return EXIT_FINISHED
    display.table(run_summary(training))
    display.lines([f"warning: {text}" for text in [*training.warnings, *length_warnings(training)]])
    if training.start.step > 0:
        display.line(f"resuming from step {training.start.step} ({training.start.checkpoint})")
    display.lines(check_lines(training.check_results))

    started = time.perf_counter()
    micro_batch, rank, count = training.compute.micro_batch, processes.rank, processes.world_size
    with (
        StopSignal(lock.stopping) as stop,
        Trackers(folder, config, lambda text: display.line(text, style="bold yellow"), processes.main) as trackers,
        Saver(folder, config, processes) as saver,
        Prefetch(training.data.batches, micro_batch, config.steps, rank, count, training.compute.device) as batches,
    ):
        training = dataclasses.replace(training, run=dataclasses.replace(training.run, trackers=trackers))
        health = Health(training)
        gc.collect()
        gc.freeze()  # Python's collector need not scan these objects again and again
        display.start(training.start.step, config.steps)
        try:
            finished = _loop(training, batches, saver, health, display, stop)
        finally:
            gc.unfreeze()
            display.stop()
    if processes.main:
        newest = list_checkpoints(folder)[-1:]
        closing = closing_lines(folder, newest, time.perf_counter() - started, finished, is_exportable(config.model))
        if display.closed:
            print_error("\n".join(["standard output was closed", *closing]))
        if finished:
            display.line(health.verdict_line())
        display.lines(closing)
    return EXIT_FINISHED if finished else EXIT_INTERRUPTED


def _loop(
    training: Training, batches: Prefetch, saver: Saver, health: Health, display: Display, stop: StopSignal
) -> bool:
    """Run all remaining steps. Returns whether the run is finished (False: it was stopped)."""
    config, processes = training.config, training.processes
    log = StepLog(training, display)
    guard = log.guard
    step, offset, micro_batch = training.start.step, training.start.data_offset, training.compute.micro_batch
    saved_at = time.monotonic()
    save_deferred = False  # because the steps before it were skipped

    while True:
        # display.closed: its reader has left, as in `restomod train ... | head`
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
        at_checkpoint = step == log.first_step and step > 0  # evaluated, sampled and saved already

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
        elif save_wanted and not at_checkpoint:  # never a checkpoint to roll back to among skipped steps
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
    """Raise UserError if records, or the checkpoint of ``step`` (None: none is needed), are not on the disk."""
    run, processes = training.run, training.processes
    failure, unlogged = saver.failure(), run.write_records()
    there = step is None or any(step_of(folder) == step for folder in list_checkpoints(run.folder))
    unsaved, incomplete = processes.any(failure is not None and not there, unlogged is not None)
    if unsaved:
        raise processes.error(str(failure))
    if incomplete:
        raise processes.error(
            f"{describe_os_error(unlogged) if unlogged else 'a record'}: cannot be written, so the run has stopped; "
            f"mend it, then resume with `restomod train --resume {quote(str(run.folder))}`"
        )
    _print_save_failure(display, failure)


def _print_save_failure(display: Display, failure: UserError | None) -> None:
    """Show a warning if a checkpoint could not be written."""
    if failure is not None:
        display.line(f"warning: {failure}", style="bold yellow")


def save_is_due(config: RunConfig, step: int, minutes: float) -> bool:
    """Whether a checkpoint is due by time, ``minutes`` after the last one.

    At a validation it is due after half the time, so that on a fast device checkpoints have a validation loss, by which
    the best one is kept.
    """
    if config.save_every_minutes is None:
        return False
    return minutes > config.save_every_minutes / (2 if step % config.eval_every == 0 else 1)
