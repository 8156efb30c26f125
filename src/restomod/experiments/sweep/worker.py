"""Worker of a sweep, which trains the trials sequentially and resumes after an interruption.

Each trial is a run, trained by `restomod train` in a separate process. All state is in the run's folder and in the
sweep's journal, so a worker can be killed at any time and several workers can share a sweep.
"""

from __future__ import annotations

import contextlib
import errno
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from restomod.engine.signals import StopSignal, stop_with_parent
from restomod.experiments.sweep.results import SweepResult, collect_results, show_sweep_results, write_results
from restomod.experiments.sweep.space import flags, label
from restomod.experiments.sweep.study import Claim, Store, SweepPlan
from restomod.runs.metrics import ValidationLosses
from restomod.runs.reader import newest_checkpoint
from restomod.utils.errors import UserError, describe_os_error
from restomod.utils.files import open_to_append
from restomod.utils.output import print_if_possible
from restomod.utils.text import duration

EXIT_FINISHED = 0
EXIT_ALL_FAILED = 1
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL, as for a run: the same command resumes
POLL = 1.0  # seconds between checks of a running trial
DISK_FULL_TIMEOUT = 60.0  # seconds
TRAIN = (sys.executable, "-m", "restomod", "train")
LINES_KEPT = 40
ERROR = "restomod: error: "

Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Limits:
    """Limits for all trials together, on all machines."""

    hours: float | None = None
    """Maximum training time in hours; None for no limit."""
    dollars: float | None = None
    """Maximum cost in US dollars; None for no limit."""
    price: float | None = None
    """US dollars per GPU and hour."""

    def used(self, seconds: float, gpu_seconds: float) -> float:
        """Return the used share of the limit that is closest: 1 at the limit, 0 without limits."""
        shares = [seconds / 3600 / self.hours] if self.hours is not None else []
        if self.dollars is not None and self.price:
            shares.append(gpu_seconds / 3600 * self.price / self.dollars)
        return max(shares, default=0.0)

    def spent(self, seconds: float, gpu_seconds: float) -> str:
        """Format a time, and its cost if there is a price."""
        return duration(seconds) + (f" (${gpu_seconds / 3600 * self.price:.2f})" if self.price else "")

    def __str__(self) -> str:
        """Format the limits."""
        limits = [] if self.hours is None else [duration(3600 * self.hours)]
        return " and ".join([*limits, *([] if self.dollars is None else [f"${self.dollars:.2f}"])])


def sweep(plan: SweepPlan, folder: Path, limits: Limits) -> int:
    """Run the remaining trials of a sweep, and print and write the results.

    A trial that would exceed the limits is not started. A trial that reaches a limit is stopped with a checkpoint.

    Args:
        plan: settings of the sweep.
        folder: folder of the sweep, new or with the same plan.
        limits: limits for all trials together.

    Returns:
        Exit code: 75 if a signal or a limit stopped the sweep. Otherwise 0 if a trial has finished or another process
            still trains one, and 1 if no trial has finished.

    Raises:
        UserError: the folder belongs to another sweep.
    """
    worker = _Worker(Store(folder, plan), limits)
    with StopSignal() as worker.stop:
        worker.work()
    found = worker.write()
    show_sweep_results(found, folder, plan)
    running = sum(result.state == "running" for result in found)
    if worker.stopped_by:
        print_if_possible(f"{worker.stopped_by}; the same command resumes the sweep")
        return EXIT_INTERRUPTED
    if running:
        print_if_possible(f"all trials are started; other processes still train {running} of them")
    return EXIT_FINISHED if running or any(r.state == "finished" for r in found) else EXIT_ALL_FAILED


class TrainingProcess:
    """`restomod train` in a separate process, so that a crash does not end the sweep.

    Args:
        arguments: arguments of `restomod train`.
        log: file to which the output is appended.
        lock: file descriptor of the run's lock; the process inherits it and holds the lock until it ends.
    """

    def __init__(self, arguments: list[str], log: Path, lock: int) -> None:
        self._log = log
        self._last: deque[str] = deque(maxlen=LINES_KEPT)
        self._process = subprocess.Popen(
            [*TRAIN, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=(lock,),
            start_new_session=True,  # the sweep, not the terminal, forwards Ctrl-C
            preexec_fn=stop_with_parent,  # if the sweep is killed: finish the step, save, exit
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._last.append(line.rstrip())
            with contextlib.suppress(OSError), open_to_append(self._log) as f:  # the disk may be full
                f.write(line.encode())

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, negative for a signal; None if the process still runs after ``seconds``."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(5)
        return code

    def stop(self) -> None:
        """Ask the process to finish its step, save a checkpoint and exit."""
        self._process.terminate()

    def end(self) -> None:
        """Kill the process if it still runs."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
            self._process.kill()
            self._process.wait()

    def reason(self, code: int) -> str:
        """Return the reason of a failure in one line, from the last output and the exit code."""
        lines = [line for line in self._last if line.strip()]
        said = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
        if said:
            return said[-1]
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        return f"exit code {code}" + (f": {lines[-1].strip()}" if lines else "")


class _Worker:
    """Runs the trials of a sweep in this process."""

    def __init__(self, store: Store, limits: Limits) -> None:
        self.store, self.limits, self.plan = store, limits, store.plan
        self.stop = StopSignal()
        self.stopped_by = ""

    def work(self) -> None:
        """Run trials until none is left to start or continue, or a signal or limit stops the sweep."""
        while not self._stopped():
            claim = retry_while_disk_full(self.store.claim)
            if claim is None:
                return
            try:
                if self._is_free(claim) and self._may_begin(claim):
                    self._train(claim)
            finally:
                claim.run.release()
                claim.worker.release()

    def write(self) -> list[SweepResult]:
        """Update `sweep.json` and return the results."""

        def collect() -> list[SweepResult]:
            times = self.store.times()
            with self.store.lock:
                found = collect_results(self.store, times)
                write_results(found, self.store, self.limits.price)
            return found

        return retry_while_disk_full(collect)

    def _stopped(self) -> bool:
        if self.stop.requested and not self.stopped_by:
            self.stopped_by = "stopped"
        return bool(self.stopped_by)

    def _is_free(self, claim: Claim) -> bool:
        """Wait until the training process of a killed worker has ended; return False if the sweep was stopped first."""
        printed = False
        while not claim.run.acquire(wait=False):
            if self._stopped():
                return False
            if not printed:
                print_if_possible(f"{claim.name}: waiting for the training process of a killed worker")
            printed = True
            time.sleep(0.2)
        return True

    def _may_begin(self, claim: Claim) -> bool:
        """Return whether a trial is expected to end within the limits, from the mean time of finished trials."""
        times, trials = self.store.times(), self.store.trials()
        finished = [t.number for t in trials if t.state.name == "COMPLETE"]
        started = [
            t.number
            for t in trials
            if not t.state.is_finished() and (times.seconds[t.number] or t.number == claim.number)
        ]

        def needed(by_trial: dict[int, float]) -> float:
            typical = sum(by_trial[number] for number in finished) / len(finished) if finished else 0.0
            return sum(max(0.0, typical - by_trial[number]) for number in started)

        spent, more = times.totals, (needed(times.seconds), needed(times.gpu_seconds))
        limits = self.limits
        if limits.used(*spent) < 1 and limits.used(spent[0] + more[0], spent[1] + more[1]) <= 1:
            return True
        self.stopped_by = (
            f"stopped: {limits.spent(*spent)} of {limits} are used, "
            f"and the trial {label(claim.parameters)} would take about {limits.spent(*more)}"
        )
        return False

    # --- one trial -------------------------------------------------------------------------------------------

    def _train(self, claim: Claim) -> None:
        """Train a trial, from its newest checkpoint if there is one, and record the result."""
        store, run = self.store, self.store.folder / "trials" / claim.name
        if (run / "config.json").exists():
            arguments, how = ["--resume", str(run)], "resumes"
        else:
            own = flags({"seed": claim.seed} | claim.parameters)
            arguments, how = [self.plan.preset, *self.plan.flags, *own, "--out", str(run)], "starts"
        shown = label(claim.parameters | ({"seed": claim.seed} if self.plan.seeds > 1 else {}))
        print_if_possible(f"trial {claim.number + 1} of {self.plan.runs} {how}: {shown}  →  {run}")
        retry_while_disk_full(lambda: store.begin_attempt(claim))
        log = store.folder / "logs" / f"{claim.name}.log"
        assert claim.run.fd is not None
        process = TrainingProcess(arguments, log, claim.run.fd)
        try:
            code, pruned = self._watch(claim, process, run)
        finally:
            process.end()  # still running only after an exception
        retry_while_disk_full(lambda: store.end_attempt(claim))
        if code != EXIT_FINISHED and pruned is None and (self._stopped() or code == EXIT_INTERRUPTED):
            self.stopped_by = self.stopped_by or "the training was stopped by a signal"
            newest = newest_checkpoint(run)
            print_if_possible(f"  stopped {f'at {newest}' if newest else 'before its first checkpoint'}; log: {log}")
            return
        retry_while_disk_full(lambda: self._settle(claim, run, code, pruned, process.reason(code)))

    def _watch(self, claim: Claim, process: TrainingProcess, run: Path) -> tuple[int, int | None]:
        """Wait for a training process and return its exit code, and the step at which it was pruned or None."""
        asked, pruned, losses = False, None, ValidationLosses(run)
        while True:
            code = process.wait(POLL)
            if self.plan.prune != "none" and pruned is None:
                pruned = retry_while_disk_full(lambda: self.store.report(claim, losses.after_start()))
            if code is not None:
                return code, pruned
            if (
                self.limits != Limits(price=self.limits.price)
                and not self._stopped()
                and self.limits.used(*self.store.times().totals) >= 1
            ):
                self.stopped_by = f"stopped: {self.limits} are used"
            if (pruned is not None or self._stopped()) and not asked:
                process.stop()
                asked = True

    def _settle(self, claim: Claim, run: Path, code: int, pruned: int | None, reason: str) -> None:
        """Record and print the result of a trial."""
        store, losses = self.store, ValidationLosses(run).after_start()
        took = duration(store.times().seconds[claim.number])
        if pruned is not None:
            store.note(claim, step=pruned, reason=f"pruned at step {pruned}")
            store.finish(claim, "PRUNED")
            print_if_possible(f"  pruned at step {pruned} after {took}")
        elif code == EXIT_FINISHED and losses:
            step = max(losses)
            store.note(claim, step=step)
            store.finish(claim, "COMPLETE", losses[step])
            print_if_possible(f"  validation loss {losses[step]:.4f} at step {step} in {took}")
        else:
            reason = "no finite validation loss" if code == EXIT_FINISHED else reason
            store.note(claim, reason=reason)
            store.finish(claim, "FAIL")
            print_if_possible(f"  failed after {took}: {reason}")
        self.write()


def retry_while_disk_full(work: Callable[[], Returned]) -> Returned:
    """Call ``work``, which writes to the sweep's folder, and repeat the call while the disk is full.

    Raises:
        UserError: the disk is still full after `DISK_FULL_TIMEOUT`, or the system reports another error.
    """
    until = time.monotonic() + DISK_FULL_TIMEOUT
    while True:
        try:
            return work()
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT) or time.monotonic() > until:
                raise UserError(
                    f"{describe_os_error(e)}; fix this, then run the same command to resume the sweep"
                ) from e
        time.sleep(POLL)
