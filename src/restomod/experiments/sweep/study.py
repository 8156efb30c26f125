"""Folder of a sweep: its plan and its trials, which Optuna keeps in a journal file.

SWEEP/
    plan.json       the plan; the same command resumes the sweep
    journal.jsonl   the trials, written by Optuna's JournalStorage
    locks/          locks of workers and trials
    logs/           output of each trial
    trials/NAME/    run of each trial
    sweep.json      results, best first

A worker holds `locks/sweep` while it looks for a trial, and `locks/NAME.worker` while it works on one; the training
process inherits `locks/NAME.run`. A trial that was started and whose worker's lock is free is taken over by the next
worker, once its training process has ended.
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
    """What a sweep varies, and how."""

    preset: str
    flags: tuple[str, ...]
    """Flags of `restomod train` shared by all trials."""
    method: Method
    space: tuple[str, ...]
    """NAME=VALUES of every swept field."""
    trials: int
    """Number of configurations."""
    seeds: int
    """Runs per configuration, with consecutive seeds."""
    first_seed: int
    search_seed: int
    """Seed of the sampler."""
    prune: Pruning
    prune_from: int
    """First step at which trials may be pruned."""
    prune_every: int
    """Steps between validations."""
    steps: int

    @property
    def runs(self) -> int:
        """Number of trials in all."""
        return self.trials * self.seeds


@dataclass
class Claim:
    """A trial that this process works on, with its locks."""

    number: int
    trial_id: int
    name: str
    parameters: dict[str, Value]
    seed: int
    worker: FileLock
    run: FileLock
    attempts: list[list[Any]]
    """Start, end (None: running or killed), in seconds since 1970, and `gpu_in_use` of each attempt."""


class Store:
    """The trials of a sweep, shared by all workers."""

    def __init__(self, folder: Path, plan: SweepPlan) -> None:
        self.folder, self.plan = folder, plan
        self._dimensions = [parse_dimension(text, plan.method) for text in plan.space]
        if folder.exists() and any(not (path.name in PARTS or NAME.fullmatch(path.name)) for path in folder.iterdir()):
            raise UserError(f"{folder} is not a sweep, and holds other files; choose another folder with --out")
        require_inside(folder, *(folder / part for part in PARTS))
        for part in ("locks", "logs", "trials"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(folder / "locks" / "sweep")
        with self.lock:
            if not self.lock.enforced:
                raise UserError(
                    f"a sweep needs file locks (flock), and {folder} is on a file system without them (or this is "
                    f"Windows, where WSL has them); choose another --out"
                )
            self._agree()
            self._study = self._open()

    def _agree(self) -> None:
        """Check that the folder is of this sweep; the number of trials may grow."""
        path = self.folder / "plan.json"
        if path.exists():
            old = from_dict(read_json(path, "sweep's plan"), SweepPlan, str(path))
            for field in dataclasses.fields(SweepPlan):
                before, now = getattr(old, field.name), getattr(self.plan, field.name)
                if before != now and field.name != "trials":
                    raise UserError(
                        f"{self.folder} holds another sweep ({field.name}: {_shown(before)} there, {_shown(now)} now); "
                        f"choose another folder with --out"
                    )
            if self.plan.trials < old.trials:
                raise UserError(f"{self.folder} is a sweep of {old.trials} trials already, not {self.plan.trials}")
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
        except Exception as e:  # of what Optuna makes of a line
            raise journal.damaged(one_line(e)) from None
        runs = {run.name for run in (self.folder / "trials").iterdir() if not run.name.startswith(".")}
        if lost := sorted(runs - {*journal.names}):
            raise UserError(f"{path} lacks {lost[0]}, which is in trials/; restore it from a copy, or delete that run")
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
        """All trials started so far, by number."""
        trials: list[FrozenTrial] = self._study.get_trials(deepcopy=False)
        return trials

    def claim(self) -> Claim | None:
        """Claim a trial: an abandoned one, or else a new one; None if there is none."""
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
        """Record a new trial, with all its parameters in one line of the journal."""
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
        """Parameters of a trial, determined by the plan and the earlier trials, so that a killed sweep can resume."""
        import optuna

        if self.plan.method == "grid":
            return grid(self._dimensions)[number // self.plan.seeds]
        trials = self._study.get_trials()
        if number % self.plan.seeds:  # another seed of the same configuration
            return dict(trials[number - number % self.plan.seeds].params)
        scratch = optuna.create_study(sampler=self._sampler(number))  # in memory: the journal gets all or nothing
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
        """Record the start of work on a trial; a killed attempt ended with its last activity."""
        ended = [[start, end or self._last_activity(claim.name, start), gpu] for start, end, gpu in claim.attempts]
        claim.attempts = [*ended, [time.time(), None, gpu_in_use()]]
        self.note(claim, attempts=claim.attempts)

    def end_attempt(self, claim: Claim) -> None:
        """Record the end of work on a trial."""
        claim.attempts[-1][1] = time.time()
        self.note(claim, attempts=claim.attempts)

    def times(self) -> TrialTimes:
        """Time of each trial so far."""
        now, spans = time.time(), []
        with self.lock:  # so that probing a worker's lock does not prevent others from taking it
            trials = self.trials()
            for trial in trials:
                name = trial.user_attrs["name"]
                for start, end, gpu in trial.user_attrs.get("attempts", []):
                    until = end or (now if self.at_work(name) else self._last_activity(name, start))
                    spans.append(Interval(trial.number, start, until, gpu, self._processes(name, until)))
        return TrialTimes.from_intervals(range(len(trials)), spans)

    def _processes(self, name: str, until: float) -> int:
        """Number of processes that trained a trial before ``until``; 1 where unknown."""
        run = self.folder / "trials" / name
        require_run_inside(run)
        sessions = [start for start in read_environments(run, print_error) if (start_time(start) or 0.0) <= until]
        return process_count(sessions[-1]) if sessions else 1

    def at_work(self, name: str) -> bool:
        """Whether a process works on a trial. Requires the sweep's lock."""
        lock = FileLock(self.folder / "locks" / f"{name}.worker")
        free = lock.acquire(wait=False)
        lock.release()
        return not free

    def _last_activity(self, name: str, start: float) -> float:
        """Time of the last output of a trial, in seconds since 1970."""
        files = self.folder / "logs" / f"{name}.log", self.folder / "trials" / name / "metrics.jsonl"
        return max([start, *(path.stat().st_mtime for path in files if path.exists())])

    # --- results -------------------------------------------------------------------------------------------

    def note(self, claim: Claim, **values: Any) -> None:
        """Record attributes of a trial."""
        for key, value in values.items():
            self._storage.set_trial_user_attr(claim.trial_id, key, value)

    def report(self, claim: Claim, losses: dict[int, float]) -> int | None:
        """Record validation losses by step. Returns the step at which to prune the trial, or None."""
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
        """Record the result of a trial."""
        import optuna

        self._study.tell(claim.number, loss, optuna.trial.TrialState[state])


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
