"""The training loop: evaluate, sample, save, step, log.

At step s the weights have been updated s times. Whatever is random follows from (seed, step), so a run that was
killed and resumed is the run that was not.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from restomod.config import RunConfig
from restomod.data.prefetch import Prefetch
from restomod.train.checkpoint import list_checkpoints
from restomod.train.console import Display, closing_lines, sanity_lines
from restomod.train.distributed import Processes, joined
from restomod.train.guard import Guard
from restomod.train.metrics import read_jsonl
from restomod.train.observe import evaluate, log_step, write_samples
from restomod.train.recover import roll_back, step_that_fits, warn
from restomod.train.run import refuse_existing
from restomod.train.saver import Saver
from restomod.train.setup import Training, set_up, summary
from restomod.train.signals import StopSignal

EXIT_FINISHED = 0
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: stopped by a signal, with a checkpoint; the run can go on


def train(config: RunConfig, folder: Path, resume: bool = False, display: Display | None = None) -> int:
    """Train a run from its start, or from its newest checkpoint.

    Args:
        config: the complete run.
        folder: the run's folder: a new one, or with ``resume`` an existing one.
        resume: go on with the run in ``folder``.
        display: where to print; by default a progress bar in a terminal and plain lines elsewhere.

    Returns:
        0 when the run is finished, 75 when SIGINT or SIGTERM stopped it (after a checkpoint).

    Raises:
        UserError: something is not as it should be and the user can mend it; the message says what and how.
    """
    with joined("go on with `restomod train --resume RUN`") as processes:
        return _train(config, folder, resume, display or Display(muted=not processes.main), processes)


def _train(config: RunConfig, folder: Path, resume: bool, display: Display, processes: Processes) -> int:
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):  # torchrun repeats the command after a failure
        resume = resume or (folder / "config.json").exists()
    if not resume:
        processes.together(lambda: refuse_existing(folder))
    display.line("preparing the data and the model …", style="dim")
    training = processes.together(lambda: set_up(config, folder, resume, processes))
    if training.first_step >= config.steps:
        display.line(f"{folder} has made its {config.steps} steps already; --steps N goes on to step N")
        return EXIT_FINISHED
    display.table(summary(training))
    display.lines([f"warning: set aside: {problem}" for problem in training.damaged])
    if training.first_step > 0:
        display.line(f"going on from step {training.first_step}")
    display.lines(sanity_lines(training.verdicts))

    started = time.perf_counter()
    pin_memory = training.compute.device.type == "cuda"
    micro_batch, rank, count = training.compute.micro_batch, processes.rank, processes.count
    with (
        StopSignal() as stop,
        Saver(folder, config, processes) as saver,
        Prefetch(training.batches, micro_batch, config.steps, rank, count, pin_memory) as data,
    ):
        display.start(training.first_step, config.steps)
        try:
            finished = _loop(training, data, saver, display, stop)
        finally:
            display.stop()
    if processes.main:
        newest = list_checkpoints(folder)[-1:]
        closing = closing_lines(folder, newest, time.perf_counter() - started, finished)
        if display.closed:
            print("\n".join(["standard output was closed", *closing]), file=sys.stderr)
        display.lines(closing)
    return EXIT_FINISHED if finished else EXIT_INTERRUPTED


def _loop(training: Training, data: Prefetch, saver: Saver, display: Display, stop: StopSignal) -> bool:
    """Run every step that is left. Returns whether the run is finished (and not only stopped)."""
    run, config, processes = training.run, training.config, training.processes
    guard = Guard(config, read_jsonl(run.folder / "metrics.jsonl"))
    began, step, offset = training.first_step, training.first_step, training.data_offset
    saved, seconds_in_steps, reached_target = time.monotonic(), 0.0, False
    micro_batch = training.compute.micro_batch

    while True:
        finished = reached_target or step == config.steps
        # display.closed: its reader has left, as in `restomod train ... | head`
        overdue = config.save_every_minutes is not None and time.monotonic() - saved > 60 * config.save_every_minutes
        failure = saver.failure()
        stopping, due, failed = processes.any(stop.requested or display.closed, overdue, failure is not None)
        if failed and config.on_save_error == "stop":
            raise processes.error(str(failure))
        warn(display, failure)
        at_checkpoint = step == began and step > 0  # its evaluation, samples and checkpoint exist already

        if not at_checkpoint and (finished or step % config.eval_every == 0):
            evaluate(training, step, display)
        if not at_checkpoint and step > 0 and (finished or step % config.sample_every == 0):
            write_samples(training, step, display)
        wanted = stopping or (step > 0 and (due or step % config.save_every == 0))
        if not at_checkpoint and (finished or (wanted and guard.skipped == 0)):  # to go back to from among bad steps
            saver.save(step, training.model, training.optimizer, offset)
            saved = time.monotonic()
        if finished or stopping:
            saver.finish()
            warn(display, saver.failure())
            return finished

        start = time.perf_counter()
        micro_batches, waited = data.get(step + offset)
        made, micro_batch = step_that_fits(training, step, micro_batches, micro_batch, guard.problem, display)
        loss, grad_norm, problem = made
        record = log_step(training, step, loss, grad_norm, problem, time.perf_counter() - start, waited)
        seconds_in_steps += record["ms"] / 1000
        action = guard.judge(loss, problem)
        if problem is not None:
            display.line(f"step {step}  {problem}: no update", style="bold yellow")
        if action == "update":
            display.step(record, seconds_left=(config.steps - step - 1) * seconds_in_steps / (step + 1 - began))
        elif action == "stop":
            raise processes.error(
                f"step {step}: {problem}, so nothing was updated; "
                f"lower --optim.lr or raise --optim.warmup-steps in a new run (the checkpoints saved so far are whole)"
            )
        elif action == "rollback":
            began, offset = roll_back(training, saver, guard, step, f"{problem}", offset, display)
            step, seconds_in_steps = began, 0.0
            continue
        reached_target = problem is None and config.target_loss is not None and loss <= config.target_loss
        if reached_target:
            display.line(f"step {step}  training loss {loss:.4f} is at or below the target {config.target_loss}")
        step += 1
