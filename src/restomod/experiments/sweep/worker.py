"""Worker of a sweep: trains the trials one after the other, and resumes where it was stopped.

Every trial is a run, trained by `restomod train` in its own process. All state is in the run's folder and in the
sweep's journal, so that a worker may be killed at any moment, and several may share a sweep.
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
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL, as of a run: the same command resumes
POLL = 1.0  # seconds between looks at a trial
PATIENCE = 60.0  # seconds to wait for room on a full disk
TRAIN = (sys.executable, "-m", "restomod", "train")
LINES_KEPT = 40
ERROR = "restomod: error: "

Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Limits:
    """Limits of all trials together, on all machines."""

    hours: float | None = None
    dollars: float | None = None
    price: float | None = None
    """US dollars for one GPU and one hour."""

    def used(self, seconds: float, gpu_seconds: float) -> float:
        """Used share of the nearer limit: 1 at the limit, 0 without limits."""
        shares = [seconds / 3600 / self.hours] if self.hours is not None else []
        if self.dollars is not None and self.price:
            shares.append(gpu_seconds / 3600 * self.price / self.dollars)
        return max(shares, default=0.0)

    def spent(self, seconds: float, gpu_seconds: float) -> str:
        """Time, and dollars where there is a price."""
        return duration(seconds) + (f" (${gpu_seconds / 3600 * self.price:.2f})" if self.price else "")

    def __str__(self) -> str:
        """The limits themselves."""
        limits = [] if self.hours is None else [duration(3600 * self.hours)]
        return " and ".join([*limits, *([] if self.dollars is None else [f"${self.dollars:.2f}"])])


def sweep(plan: SweepPlan, folder: Path, limits: Limits) -> int:
    """Run the remaining trials of the sweep in ``folder``, which is new or of the same plan.

    No trial is started that would exceed the limits; a running one is stopped with a checkpoint.

    Returns:
        0 when no trial is left, 1 if none has a result, 75 when a signal or a limit stopped the sweep.

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
        print_if_possible(f"no trial is left to start; other processes still work on {running}")
    return EXIT_FINISHED if running or any(r.state == "finished" for r in found) else EXIT_ALL_FAILED


class TrainingProcess:
    """`restomod train` in its own process, which can crash without ending the sweep.

    Its output is appended to ``log``. It inherits the lock of an open file, and so holds it for as long as it lives.
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
            start_new_session=True,  # Ctrl-C in the terminal is passed on once, by the sweep
            preexec_fn=stop_with_parent,  # a killed sweep: finish the step, save, end
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
        """The exit code, negative for a signal; None if it still runs after ``seconds``."""
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
        """Reason of a failure, in one line."""
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
        """Run trials until none is left, or a signal or limit stops the sweep."""
        while not self._stopped():
            claim = patiently(self.store.claim)
            if claim is None:
                return
            try:
                if self._is_free(claim) and self._may_begin(claim):
                    self._train(claim)
            finally:
                claim.run.release()
                claim.worker.release()

    def write(self) -> list[SweepResult]:
        """Update `sweep.json`."""

        def collect() -> list[SweepResult]:
            times = self.store.times()
            with self.store.lock:
                found = collect_results(self.store, times)
                write_results(found, self.store, self.limits.price)
            return found

        return patiently(collect)

    def _stopped(self) -> bool:
        if self.stop.requested and not self.stopped_by:
            self.stopped_by = "stopped"
        return bool(self.stopped_by)

    def _is_free(self, claim: Claim) -> bool:
        """Wait until the training process of a killed worker has ended; False if stopped meanwhile."""
        told = False
        while not claim.run.acquire(wait=False):
            if self._stopped():
                return False
            if not told:
                print_if_possible(f"{claim.name}: waiting for the training process of a killed worker")
            told = True
            time.sleep(0.2)
        return True

    def _may_begin(self, claim: Claim) -> bool:
        """Whether a trial is expected to end within the limits, judged by the mean of the finished ones."""
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
            f"and {label(claim.parameters)} would take about {limits.spent(*more)}"
        )
        return False

    # --- one trial -------------------------------------------------------------------------------------------

    def _train(self, claim: Claim) -> None:
        """Train a trial, from its newest checkpoint if it has one, and record the result."""
        store, run = self.store, self.store.folder / "trials" / claim.name
        if (run / "config.json").exists():
            arguments, how = ["--resume", str(run)], "resumes"
        else:
            own = flags({"seed": claim.seed} | claim.parameters)
            arguments, how = [self.plan.preset, *self.plan.flags, *own, "--out", str(run)], "starts"
        shown = label(claim.parameters | ({"seed": claim.seed} if self.plan.seeds > 1 else {}))
        print_if_possible(f"trial {claim.number + 1} of {self.plan.runs} {how}: {shown}  →  {run}")
        patiently(lambda: store.begin_attempt(claim))
        log = store.folder / "logs" / f"{claim.name}.log"
        assert claim.run.fd is not None
        process = TrainingProcess(arguments, log, claim.run.fd)
        try:
            code, pruned = self._watch(claim, process, run)
        finally:
            process.end()  # where something went wrong here
        patiently(lambda: store.end_attempt(claim))
        if code != EXIT_FINISHED and pruned is None and (self._stopped() or code == EXIT_INTERRUPTED):
            self.stopped_by = self.stopped_by or "the training was stopped by a signal"
            newest = newest_checkpoint(run)
            print_if_possible(f"  stopped {f'with {newest}' if newest else 'before its first checkpoint'}; log: {log}")
            return
        patiently(lambda: self._settle(claim, run, code, pruned, process.reason(code)))

    def _watch(self, claim: Claim, process: TrainingProcess, run: Path) -> tuple[int, int | None]:
        """Wait for a training process. Returns its exit code and the step at which it was pruned, or None."""
        asked, pruned, losses = False, None, ValidationLosses(run)
        while True:
            code = process.wait(POLL)
            if self.plan.prune != "none" and pruned is None:
                pruned = patiently(lambda: self.store.report(claim, losses.after_start()))
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
        """Record the result of a trial."""
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
            reason = "it has no finite validation loss" if code == EXIT_FINISHED else reason
            store.note(claim, reason=reason)
            store.finish(claim, "FAIL")
            print_if_possible(f"  failed after {took}: {reason}")
        self.write()


def patiently(work: Callable[[], Returned]) -> Returned:
    """Call ``work``, which writes into the sweep's folder, again and again while the disk is full.

    Raises:
        UserError: the disk is still full after `PATIENCE`, or another error.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return work()
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT) or time.monotonic() > until:
                raise UserError(
                    f"{describe_os_error(e)}; once that is repaired, the same command resumes the sweep"
                ) from e
        time.sleep(POLL)
