"""Trains a run for every point of a sweep, one after the other, and goes on where it was stopped.

Every trial is a run of its own, trained by `restomod train` in a process of its own. What has become of it is in its
folder and in the sweep's journal, so that this process may be killed at any moment, and several may share a sweep.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from restomod.analysis.report.config import newest_checkpoint
from restomod.engine.signals import StopSignal
from restomod.experiments.sweep.results import SweepResult, results, show_results, write_results
from restomod.experiments.sweep.space import flags, label
from restomod.experiments.sweep.study import Claim, Store, SweepPlan
from restomod.experiments.sweep.trial_process import TrainingProcess
from restomod.runs.metrics import ValidationLosses
from restomod.utils.console import duration
from restomod.utils.errors import UserError, describe_os_error
from restomod.utils.output import print_if_possible

EXIT_FINISHED = 0
EXIT_ALL_FAILED = 1
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL, as of a run: the same command goes on
POLL = 1.0  # seconds between looks at a trial
PATIENCE = 60.0  # seconds to wait for room on a full disk

Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Limits:
    """How much all trials together may take, on all machines."""

    hours: float | None = None
    dollars: float | None = None
    price: float | None = None
    """US dollars for one GPU and one hour."""

    def used(self, seconds: float, gpu_seconds: float) -> float:
        """The part of the nearer limit that is used: 1 at the limit, 0 where there is none."""
        shares = [seconds / 3600 / self.hours] if self.hours is not None else []
        if self.dollars is not None and self.price:
            shares.append(gpu_seconds / 3600 * self.price / self.dollars)
        return max(shares, default=0.0)

    def spent(self, seconds: float, gpu_seconds: float) -> str:
        """Hours, and dollars where there is a price."""
        return duration(seconds) + (f" (${gpu_seconds / 3600 * self.price:.2f})" if self.price else "")

    def __str__(self) -> str:
        """The limits themselves."""
        limits = [] if self.hours is None else [duration(3600 * self.hours)]
        return " and ".join([*limits, *([] if self.dollars is None else [f"${self.dollars:.2f}"])])


def sweep(plan: SweepPlan, folder: Path, limits: Limits) -> int:
    """Run the trials of a sweep that are left.

    Args:
        plan: what is swept.
        folder: of the sweep; a new one, or one of the same plan.
        limits: no trial is begun that would go beyond them, and one that does is stopped with a checkpoint.

    Returns:
        0 when no trial is left, 1 if none of them has a result; 75 when a signal or a limit stopped it.

    Raises:
        UserError: the folder is of another sweep.
    """
    worker = _Worker(Store(folder, plan), limits)
    with StopSignal() as worker.stop:
        worker.work()
    found = worker.write()
    show_results(found, folder, plan)
    running = sum(result.state == "running" for result in found)
    if worker.stopped_by:
        print_if_possible(f"{worker.stopped_by}; the same command goes on")
        return EXIT_INTERRUPTED
    if running:
        print_if_possible(f"nothing is left to begin; other processes are still at work on {running}")
    return EXIT_FINISHED if running or any(r.state == "finished" for r in found) else EXIT_ALL_FAILED


class _Worker:
    """A process that works on a sweep."""

    def __init__(self, store: Store, limits: Limits) -> None:
        self.store, self.limits, self.plan = store, limits, store.plan
        self.stop = StopSignal()
        self.stopped_by = ""

    def work(self) -> None:
        """Take one trial after the other until none is left, or something stops it."""
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
        """Bring `sweep.json` up to date."""

        def collect() -> list[SweepResult]:
            taken = self.store.taken()
            with self.store.lock:
                found = results(self.store, taken)
                write_results(found, self.store, self.limits.price)
            return found

        return patiently(collect)

    def _stopped(self) -> bool:
        if self.stop.requested and not self.stopped_by:
            self.stopped_by = "stopped"
        return bool(self.stopped_by)

    def _is_free(self, claim: Claim) -> bool:
        """Wait until a training process that has lost its worker has saved and ended."""
        told = False
        while not claim.run.acquire(wait=False):
            if self._stopped():
                return False
            if not told:
                print_if_possible(f"{claim.name}: waiting for its training to end, whose sweep was killed")
            told = True
            time.sleep(0.2)
        return True

    def _may_begin(self, claim: Claim) -> bool:
        """Whether a trial is expected to end within the limits, as far as the finished ones tell."""
        taken, trials = self.store.taken(), self.store.trials()
        finished = [t.number for t in trials if t.state.name == "COMPLETE"]
        begun = [
            t.number
            for t in trials
            if not t.state.is_finished() and (taken.seconds[t.number] or t.number == claim.number)
        ]

        def needed(by_trial: dict[int, float]) -> float:
            typical = sum(by_trial[number] for number in finished) / len(finished) if finished else 0.0
            return sum(max(0.0, typical - by_trial[number]) for number in begun)

        spent, more = taken.totals, (needed(taken.seconds), needed(taken.gpu_seconds))
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
        """Train a trial, from its newest checkpoint if it has one, and write down what has become of it."""
        store, run = self.store, self.store.folder / "trials" / claim.name
        if (run / "config.json").exists():
            arguments, how = ["--resume", str(run)], "goes on"
        else:
            arguments, how = [*self._flags(claim), "--out", str(run)], "begins"
        print_if_possible(f"trial {claim.number + 1} of {self.plan.runs} {how}: {self._label(claim)}  →  {run}")
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

    def _label(self, claim: Claim) -> str:
        seed = {"seed": claim.seed} if self.plan.seeds > 1 else {}
        return label({**claim.parameters, **seed})

    def _flags(self, claim: Claim) -> list[str]:
        seed = {} if "seed" in claim.parameters else {"seed": claim.seed}
        return [self.plan.preset, *self.plan.flags, *flags({**claim.parameters, **seed})]

    def _watch(self, claim: Claim, process: TrainingProcess, run: Path) -> tuple[int, int | None]:
        """Wait for the end of a training. Returns its exit code, and the step at which it was pruned, if it was."""
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
                and self.limits.used(*self.store.taken().totals) >= 1
            ):
                self.stopped_by = f"stopped: {self.limits} are used"
            if (pruned is not None or self._stopped()) and not asked:
                process.stop()
                asked = True

    def _settle(self, claim: Claim, run: Path, code: int, pruned: int | None, reason: str) -> None:
        """Write the result of a trial down."""
        store, losses = self.store, ValidationLosses(run).after_start()
        took = duration(store.taken().seconds[claim.number])
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
    """Do what writes into the sweep's folder; while the disk is full, which a trial may mend by ending, try again.

    Raises:
        UserError: it is still full after a minute, or something else is wrong with it.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return work()
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT) or time.monotonic() > until:
                raise UserError(f"{describe_os_error(e)}; mend it, and the same command goes on") from e
        time.sleep(POLL)
