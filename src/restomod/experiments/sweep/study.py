"""Folder of a sweep, with its plan and with its trials in an Optuna journal.

SWEEP/
    plan.json       settings of the sweep; the same command resumes it
    journal.jsonl   trials, written by Optuna's JournalStorage
    locks/          locks of workers and trials
    logs/           output of each trial
    trials/NAME/    run of each trial
    sweep.json      results, best first

A worker holds `locks/sweep` while it selects a trial and `locks/NAME.worker` while it trains one. The training process
inherits `locks/NAME.run`. If a worker is killed, its lock becomes free, and the next worker continues the trial after
its training process has ended.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from restomod.config.serialize import from_dict, to_dict
from restomod.experiments.sweep.gpu_time import Interval, TrialTimes, gpu_in_use
from restomod.experiments.sweep.space import Method, Value, grid, parse_dimension
from restomod.runs.reader import process_count, read_environments, start_time
from restomod.utils.errors import UserError, one_line
from restomod.utils.files import require_inside, require_regular, write_json_atomically
from restomod.utils.json_files import read_json
from restomod.utils.locks import FileLock
from restomod.utils.output import print_error
from restomod.utils.run_files import require_run_inside
from restomod.utils.temporary import NAME

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

Pruning = Literal["none", "median", "hyperband"]

PARTS = "plan.json", "journal.jsonl", "locks", "logs", "trials", "sweep.json"


@dataclass(frozen=True)
class SweepPlan:
    """Settings of a sweep."""

    preset: str
    """Name of the preset."""
    flags: tuple[str, ...]
    """Flags of `restomod train` shared by all trials."""
    method: Method
    """Search method: grid, random or tpe."""
    space: tuple[str, ...]
    """Swept fields, each as NAME=VALUES."""
    trials: int
    """Number of configurations."""
    seeds: int
    """Runs per configuration, with consecutive seeds."""
    first_seed: int
    """Seed of the first run of a configuration."""
    search_seed: int
    """Seed of the sampler."""
    prune: Pruning
    """Rule that stops trials early."""
    prune_from: int
    """First step at which trials can be pruned."""
    prune_every: int
    """Steps between validations."""
    steps: int
    """Training steps of a run."""

    @property
    def runs(self) -> int:
        """Total number of runs: configurations times seeds."""
        return self.trials * self.seeds


@dataclass
class Claim:
    """Trial that this process trains, with its locks."""

    number: int
    """Number of the trial, from 0."""
    trial_id: int
    """Optuna's id of the trial."""
    name: str
    """Name of the trial's folder."""
    parameters: dict[str, Value]
    """Swept fields and their values."""
    seed: int
    """Seed of the run."""
    worker: FileLock
    """Lock that the worker holds."""
    run: FileLock
    """Lock that the training process inherits."""
    attempts: list[list[Any]]
    """Start, end and GPU of each attempt: seconds since 1970 (end None if running or killed), `gpu_in_use`."""


class Store:
    """Trials of a sweep, shared by all workers.

    Args:
        folder: folder of the sweep, which is created if it is missing.
        plan: settings of the sweep.

    Raises:
        UserError: the folder has other files or another sweep, its file system has no locks, or a file is damaged.
    """

    def __init__(self, folder: Path, plan: SweepPlan) -> None:
        self.folder, self.plan = folder, plan
        self._dimensions = [parse_dimension(text, plan.method) for text in plan.space]
        if folder.exists() and any(not (path.name in PARTS or NAME.fullmatch(path.name)) for path in folder.iterdir()):
            raise UserError(f"{folder} is not a sweep and has other files; choose another folder with --out")
        require_inside(folder, *(folder / part for part in PARTS))
        for part in ("locks", "logs", "trials"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(folder / "locks" / "sweep")
        with self.lock:
            if not self.lock.enforced:
                raise UserError(
                    f"{folder}: a sweep needs file locks (flock), and this file system has none; choose another --out "
                    f"(on Windows, use WSL)"
                )
            self._agree()
            self._study = self._open()

    def _agree(self) -> None:
        """Check that the folder has the same plan, and write the plan; the number of trials may grow."""
        path = self.folder / "plan.json"
        if path.exists():
            old = from_dict(read_json(path, "sweep's plan"), SweepPlan, str(path))
            for field in dataclasses.fields(SweepPlan):
                before, now = getattr(old, field.name), getattr(self.plan, field.name)
                if before != now and field.name != "trials":
                    raise UserError(
                        f"{self.folder} is another sweep ({field.name} is {_shown(before)} there and {_shown(now)} "
                        f"here); choose another folder with --out"
                    )
            if self.plan.trials < old.trials:
                raise UserError(
                    f"{self.folder} already has {old.trials} trials, more than {self.plan.trials}; raise --trials"
                )
            if self.plan == old:
                return
        write_json_atomically(path, to_dict(self.plan))

    def _open(self) -> Any:
        import optuna
        from optuna.storages import JournalStorage

        from restomod.experiments.sweep.journal import STUDY, CheckedJournal

        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        path = self.folder / "journal.jsonl"
        require_regular(path)
        journal = CheckedJournal(path, {d.name: d.distribution() for d in self._dimensions})
        try:
            self._storage = JournalStorage(journal)
            pruner = self._pruner()
            study = optuna.create_study(storage=self._storage, study_name=STUDY, pruner=pruner, load_if_exists=True)
        except (UserError, OSError):
            raise
        except Exception as e:  # Optuna raises many types for an invalid line
            raise journal.damaged(one_line(e)) from None
        runs = {run.name for run in (self.folder / "trials").iterdir() if not run.name.startswith(".")}
        if lost := sorted(runs - {*journal.names}):
            raise UserError(
                f"{path} has no trial {lost[0]}, which is in trials/; restore the file from a copy, or delete that run"
            )
        return study

    def _pruner(self) -> BasePruner:
        from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner

        plan = self.plan
        if plan.prune == "median":
            return MedianPruner(n_warmup_steps=plan.prune_from)
        if plan.prune == "hyperband":
            least = min(plan.steps, max(plan.prune_every, plan.prune_from))
            return HyperbandPruner(min_resource=least, max_resource=plan.steps)
        return NopPruner()

    # --- trials ----------------------------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        """Return all trials started so far, by number."""
        trials: list[FrozenTrial] = self._study.get_trials(deepcopy=False)
        return trials

    def claim(self) -> Claim | None:
        """Claim the first trial whose worker was killed or stopped, or else a new one; None if none is left."""
        with self.lock:
            trials = self.trials()
            for trial in trials:
                claim = None if trial.state.is_finished() else self._claimed(trial)
                if claim is not None:
                    return claim
            if len(trials) >= self.plan.runs:
                return None
            self._begin(len(trials))
            return self._claimed(self.trials()[-1])

    def _claimed(self, trial: FrozenTrial) -> Claim | None:
        name = trial.user_attrs["name"]
        worker, run = (FileLock(self.folder / "locks" / f"{name}.{kind}") for kind in ("worker", "run"))
        if not worker.acquire(wait=False):
            return None
        attempts = [list(attempt) for attempt in trial.user_attrs.get("attempts", [])]
        return Claim(
            trial.number, trial._trial_id, name, dict(trial.params), trial.user_attrs["seed"], worker, run, attempts
        )

    def _begin(self, number: int) -> None:
        """Record a new trial, with all parameters in one line of the journal."""
        import optuna

        parameters = self._parameters(number)
        seed = self.plan.first_seed + number % self.plan.seeds
        name = f"{number:03d}"
        for key, value in ({**parameters, "seed": seed} if self.plan.seeds > 1 else parameters).items():
            name += f"-{key.rpartition('.')[2]}-{value:.4g}" if isinstance(value, float) else f"-{key}-{value}"
        name = "".join(c if c.isalnum() or c in "-_.+" else "_" for c in name)[:100]
        self._study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params=parameters,
                distributions={d.name: d.distribution() for d in self._dimensions},
                user_attrs={"name": name, "seed": seed},
            )
        )

    def _parameters(self, number: int) -> dict[str, Value]:
        """Return the parameters of a trial.

        They depend only on the plan and on earlier trials, so a killed sweep can resume.
        """
        import optuna

        if self.plan.method == "grid":
            return grid(self._dimensions)[number // self.plan.seeds]
        trials = self._study.get_trials()
        if number % self.plan.seeds:  # another seed of the same configuration
            return dict(trials[number - number % self.plan.seeds].params)
        scratch = optuna.create_study(sampler=self._sampler(number))  # in memory, so the journal gets whole trials
        scratch.add_trials(trials)
        return dict(scratch.ask({d.name: d.distribution() for d in self._dimensions}).params)

    def _sampler(self, number: int) -> BaseSampler:
        from optuna.samplers import RandomSampler, TPESampler

        seed = self.plan.search_seed * 1_000_003 + number
        if self.plan.method == "random":
            return RandomSampler(seed=seed)
        return TPESampler(seed=seed, constant_liar=True)  # so that concurrent trials differ

    # --- time ------------------------------------------------------------------------------------------------

    def begin_attempt(self, claim: Claim) -> None:
        """Record the start of an attempt; attempts that were killed get the time of their last output as end."""
        ended = [[start, end or self._last_activity(claim.name, start), gpu] for start, end, gpu in claim.attempts]
        claim.attempts = [*ended, [time.time(), None, gpu_in_use()]]
        self.note(claim, attempts=claim.attempts)

    def end_attempt(self, claim: Claim) -> None:
        """Record the end of an attempt."""
        claim.attempts[-1][1] = time.time()
        self.note(claim, attempts=claim.attempts)

    def times(self) -> TrialTimes:
        """Return the training time of each trial so far."""
        now, spans = time.time(), []
        with self.lock:  # testing a worker's lock takes it for a moment
            trials = self.trials()
            for trial in trials:
                name = trial.user_attrs["name"]
                for start, end, gpu in trial.user_attrs.get("attempts", []):
                    until = end or (now if self.is_running(name) else self._last_activity(name, start))
                    spans.append(Interval(trial.number, start, until, gpu, self._processes(name, until)))
        return TrialTimes.from_intervals(range(len(trials)), spans)

    def _processes(self, name: str, until: float) -> int:
        """Return the number of processes that trained a trial before ``until``; 1 if unknown."""
        run = self.folder / "trials" / name
        require_run_inside(run)
        sessions = [start for start in read_environments(run, print_error) if (start_time(start) or 0.0) <= until]
        return process_count(sessions[-1]) if sessions else 1

    def is_running(self, name: str) -> bool:
        """Return whether a process trains a trial. The caller must hold the sweep's lock."""
        lock = FileLock(self.folder / "locks" / f"{name}.worker")
        free = lock.acquire(wait=False)
        lock.release()
        return not free

    def _last_activity(self, name: str, start: float) -> float:
        """Return the time of a trial's last output, in seconds since 1970."""
        files = self.folder / "logs" / f"{name}.log", self.folder / "trials" / name / "metrics.jsonl"
        return max([start, *(path.stat().st_mtime for path in files if path.exists())])

    # --- results -------------------------------------------------------------------------------------------

    def note(self, claim: Claim, **values: Any) -> None:
        """Record user attributes of a trial."""
        for key, value in values.items():
            self._storage.set_trial_user_attr(claim.trial_id, key, value)

    def report(self, claim: Claim, losses: dict[int, float]) -> int | None:
        """Record validation losses, in nats per token by step, and return the step at which to prune or None."""
        import optuna

        known = self.trials()[claim.number].last_step or 0  # a resumed trial repeats steps
        trial = optuna.trial.Trial(self._study, claim.trial_id)
        for step in sorted(step for step in losses if step >= known):
            if step > known:
                trial.report(losses[step], step)
            if trial.should_prune():
                return step
        return None

    def finish(self, claim: Claim, state: Literal["COMPLETE", "PRUNED", "FAIL"], loss: float | None = None) -> None:
        """Record the final state of a trial, and its loss in nats per token."""
        import optuna

        self._study.tell(claim.number, loss, optuna.trial.TrialState[state])


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
