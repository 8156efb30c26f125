"""The training loop: evaluate, sample, save, step, log.

At step s the weights have been updated s times. Whatever is random follows from (seed, step), so a run that was
killed and resumed is the run that was not.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from restomod.config import RunConfig
from restomod.data.prefetch import Prefetch
from restomod.errors import UserError
from restomod.evals.heldout import heldout_loss
from restomod.generate import continuations
from restomod.model.flops import mfu
from restomod.train.checkpoint import list_checkpoints, load_checkpoint, newest_whole
from restomod.train.console import Display, closing_lines, sanity_lines
from restomod.train.distributed import Processes, joined, whole
from restomod.train.guard import Guard
from restomod.train.metrics import read_jsonl
from restomod.train.run import refuse_existing
from restomod.train.saver import Saver
from restomod.train.schedule import learning_rate
from restomod.train.setup import Training, set_up, summary
from restomod.train.step import train_step

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
    with joined() as processes:
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
        loss, grad_norm, problem = train_step(
            training.loss_of, training.optimizer, micro_batches, config, step, processes, guard.problem
        )
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
            began, offset = roll_back(training, saver, guard, step, offset, display)
            step, seconds_in_steps = began, 0.0
            continue
        reached_target = problem is None and config.target_loss is not None and loss <= config.target_loss
        if reached_target:
            display.line(f"step {step}  training loss {loss:.4f} is at or below the target {config.target_loss}")
        step += 1


def log_step(
    training: Training, step: int, loss: float, grad_norm: float, problem: str | None, seconds: float, waited: float
) -> dict[str, Any]:
    """Log a step, with what it took; what is not finite as null."""
    config = training.config
    speed = config.batch_tokens / seconds
    return training.run.log(
        "train",
        step,
        loss=loss if math.isfinite(loss) else None,
        lr=learning_rate(config.optim, step, config.steps),
        grad_norm=grad_norm if math.isfinite(grad_norm) else None,
        ms=1000 * seconds,
        data_ms=1000 * waited,
        tokens_per_second=speed,
        mfu=mfu(speed, training.flops_per_token, training.peak_flops),
        **({"skipped": problem} if problem is not None else {}),
    )


def warn(display: Display, failure: UserError | None) -> None:
    """Tell of a checkpoint that could not be written."""
    if failure is not None:
        display.line(f"warning: {failure}", style="bold yellow")


def roll_back(
    training: Training, saver: Saver, guard: Guard, step: int, offset: int, display: Display
) -> tuple[int, int]:
    """Go back to the newest checkpoint. Returns its step, and the offset at which the data goes on after ``step``.

    Raises:
        UserError: there is none, or it has been gone back to too often.
    """
    run, processes = training.run, training.processes
    saver.finish()
    checkpoint, _ = processes.from_main(lambda: newest_whole(run.folder))
    if checkpoint is None:
        raise processes.error(f"step {step}: no checkpoint to go back to; lower --optim.lr in a new run")
    back = load_checkpoint(checkpoint, training.model, training.optimizer)
    records = read_jsonl(run.folder / "metrics.jsonl")
    if not guard.rolled_back(back, (record for record in records if record["step"] < back)):
        raise processes.error(
            f"step {step}: going back to step {back} has not helped; lower --optim.lr in a new run "
            f"(the checkpoints saved so far are whole)"
        )
    if run.writes:
        run.rewind(back)
    run.log("rollback", back, failed_step=step, data_offset=offset + step + 1 - back)
    display.line(f"back to step {back}, past the data of {step + 1 - back} steps", style="bold yellow")
    return back, offset + step + 1 - back


def evaluate(training: Training, step: int, display: Display) -> None:
    """Log and show the loss on the validation split, if there is one; of a mix, the mean by share, and that of each."""
    config, compute, processes = training.config, training.compute, training.processes
    sources = [source for source in training.dataset.sources if len(source.dataset.val)]
    if not sources:
        return
    model = whole(training.model)
    shares, losses, tokens = [], {}, 0
    for source in sources:
        shares.append(float(source.share / sum(s.share for s in sources)))
        limit = (
            None if config.eval_tokens is None else max(config.sequence_length, int(shares[-1] * config.eval_tokens))
        )
        losses[source.name], n = heldout_loss(
            model,
            source.dataset.val,
            config.sequence_length,
            compute.device,
            compute.dtype,
            limit,
            processes=processes,
        )
        tokens += n
    loss = sum(share * part for share, part in zip(shares, losses.values(), strict=True))
    parts = {"sources": losses} if training.dataset.parts else {}
    training.run.log("val", step, loss=loss, tokens=tokens, **parts)
    of = ", ".join(f"{name} {part:.4f}" for name, part in losses.items()) if parts else ""
    display.line(f"step {step}  validation loss {loss:.4f}{f' ({of})' if of else ''}", style="bold cyan")


def write_samples(training: Training, step: int, display: Display) -> None:
    """Log and show one continuation of each prompt."""
    sampling, model = training.config.sampling, whole(training.model)
    if not training.processes.main:
        return
    display.line(f"step {step}  samples", style="bold cyan")
    for i, prompt in enumerate(sampling.prompts):
        (text,) = continuations(
            model,
            training.tokenizer,
            prompt,
            1,
            sampling,
            training.config.seed + step + i,
            training.compute.dtype,
        )
        training.run.log_sample(step, prompt, text)
        display.sample(prompt, text)


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a request to stop after the present step; a second one acts as usual."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            self._before = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        # not print: the signal may have interrupted one
        os.write(2, b"\nstopping after this step, with a checkpoint (once more: stop at once)\n")
