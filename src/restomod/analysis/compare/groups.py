"""Comparison of runs: groups of runs with different seeds, tested against a baseline group."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from restomod.analysis.compare.axes import (
    AXES,
    TRAIN_POINTS,
    Axis,
    Clock,
    Curve,
    Measure,
    loss_curve,
    mean_curve,
    measured_losses,
)
from restomod.runs.config_diff import Settings, differing, settings
from restomod.runs.reader import Run
from restomod.utils.errors import UserError
from restomod.utils.text import counted

SEED = "seed"
TRIAL = re.compile(r"\d+-(.+)-seed-\d+")  # names of the trials of `restomod sweep`


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation of values."""

    n: int
    """Number of values."""
    mean: float
    sd: float | None
    """Sample standard deviation (n - 1); None for a single value."""

    def shown(self) -> str:
        """Format the mean ± standard deviation."""
        return f"{self.mean:.4f}" + (f" ± {self.sd:.4f}" if self.sd is not None else "")


@dataclass(frozen=True)
class Welch:
    """Result of Welch's t-test of the difference of two means."""

    difference: float
    """Second mean minus first mean."""
    t: float
    """t statistic."""
    df: float
    """Degrees of freedom from the Welch-Satterthwaite equation."""
    p: float
    """Two-sided p-value."""
    low: float
    """Lower end of the 95 % confidence interval of the difference."""
    high: float
    """Upper end of the 95 % confidence interval of the difference."""


def summarize(values: Sequence[float]) -> Summary:
    """Compute mean and standard deviation of at least one value."""
    return Summary(len(values), statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def welch(first: Sequence[float], second: Sequence[float]) -> Welch | None:
    """Compute Welch's t-test of the difference of two means, for unequal variances and sample sizes.

    Source: Welch, "The generalization of Student's problem when several different population variances are involved",
    1947.

    Returns:
        Test of ``second`` minus ``first``; None if a side has fewer than two values, or neither side varies.
    """
    if min(len(first), len(second)) < 2 or statistics.pvariance(first) + statistics.pvariance(second) == 0:
        return None
    from scipy import stats

    found = stats.ttest_ind(second, first, equal_var=False)
    interval = found.confidence_interval(0.95)
    values = [float(v) for v in (found.statistic, found.df, found.pvalue, interval.low, interval.high)]
    if not all(map(math.isfinite, values)):
        return None
    return Welch(statistics.fmean(second) - statistics.fmean(first), *values)


@dataclass
class Group:
    """Runs that differ only in their seed."""

    runs: list[Run]
    settings: Settings
    curves: list[Curve]
    """Loss of each run as a function of its tokens."""
    name: str = ""
    """Name for tables and plots."""

    @property
    def known(self) -> list[Curve]:
        """Curves with at least one point."""
        return [c for c in self.curves if len(c.x)]

    @property
    def final(self) -> Summary | None:
        """Final loss of the runs, which may have different lengths; None: no losses."""
        return summarize([float(c.loss[-1]) for c in self.known]) if self.known else None

    @property
    def best(self) -> Summary | None:
        """Lowest loss of the runs; None: no losses."""
        return summarize([float(c.loss.min()) for c in self.known]) if self.known else None

    def at(self, tokens: float) -> list[float]:
        """Return the losses after ``tokens`` tokens, without runs that have not reached them."""
        found = [c.at(tokens) for c in self.curves]
        return [loss for loss in found if loss is not None]

    @property
    def tokens(self) -> float:
        """Tokens that all runs have reached; 0 if there are no losses."""
        return min((float(c.x[-1]) for c in self.known), default=0.0)


@dataclass(frozen=True)
class GroupDifference:
    """Difference of a group from the baseline, at the largest number of tokens that all runs of both have reached."""

    tokens: float
    """Tokens at which the losses are compared."""
    loss: Summary
    """Loss of the group."""
    baseline: Summary
    """Loss of the baseline."""
    test: Welch | None
    """t-test; None if a group has fewer than two losses, or neither group varies."""

    @property
    def difference(self) -> float:
        """Mean loss of the group minus mean loss of the baseline."""
        return self.loss.mean - self.baseline.mean


@dataclass(frozen=True)
class Comparison:
    """Comparison of groups of runs."""

    groups: list[Group]
    baseline: int
    """Index of the baseline group."""
    measure: Measure
    """Compared loss."""
    target: float | None
    """Target loss; None: the baseline has no loss yet."""
    price: float | None
    """US dollars per GPU hour; None: unknown."""
    against: list[GroupDifference | None]
    """Difference of each group from the baseline; None for the baseline and for groups without losses."""
    to_target: list[float | None]
    """Tokens until the mean curve of each group reaches the target; None: not reached."""
    notes: list[str] = field(default_factory=list)
    """Warnings about the comparison, such as different data."""

    def differences(self) -> dict[str, list[Any]]:
        """Return the settings that differ between groups, with the value of each group."""
        return differing([group.settings for group in self.groups], without=(SEED,))

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {
            "measure": self.measure,
            "baseline": self.groups[self.baseline].name,
            "target_loss": self.target,
            "dollars_per_gpu_hour": self.price,
            "differences": self.differences(),
            "groups": [self._group(i) for i in range(len(self.groups))],
            "notes": self.notes,
        }

    def _group(self, i: int) -> dict[str, Any]:
        group, against = self.groups[i], self.against[i]
        return {
            "name": group.name,
            "final": asdict(group.final) if group.final else None,
            "best": asdict(group.best) if group.best else None,
            "tokens": group.tokens,
            "against_baseline": asdict(against) | {"difference": against.difference} if against else None,
            "tokens_to_target": self.to_target[i],
            "runs": [self._run(run, c) for run, c in zip(group.runs, group.curves, strict=True)],
        }

    def _run(self, run: Run, by_tokens: Curve) -> dict[str, Any]:
        steps, loss = measured_losses(run, self.measure)
        curves = {
            axis: loss_curve(run, self.measure, axis, self.price).x.tolist()
            for axis in AXES
            if axis != "dollars" or self.price is not None
        }
        return {
            "folder": str(run.folder),
            "seed": run.config.seed,
            "step": run.updates,
            "steps": run.config.steps,
            "tokens": run.tokens_at(run.updates),
            "flops": run.flops_at(run.updates),
            "hours_in_steps": hours_in_steps(run),
            "dollars": hours_in_steps(run, of_gpus=True) * self.price if self.price is not None else None,
            "tokens_to_target": by_tokens.first_below(self.target) if self.target is not None else None,
            "curve": {"updates": steps.tolist(), "loss": loss.tolist(), **curves},
        }

    def mean(self, i: int, axis: Axis) -> Curve:
        """Return the mean curve of group ``i`` along an axis."""
        return mean_curve([loss_curve(run, self.measure, axis, self.price) for run in self.groups[i].runs])


def hours_in_steps(run: Run, of_gpus: bool = False) -> float:
    """Return the hours in steps so far, or the GPU hours with ``of_gpus``; every step counts once."""
    return float(Clock(run, of_gpus).hours_at(np.array([run.updates]))[0])


def compare_runs(
    runs: Sequence[Run], baseline: Run | None = None, target: float | None = None, price: float | None = None
) -> Comparison:
    """Group runs that differ only in their seed and compare every group with a baseline.

    Args:
        runs: one or more runs, finished or in progress, of any length.
        baseline: run in the baseline group; None: the first run.
        target: target loss for the number of tokens to target; None: the final loss of the baseline.
        price: US dollars per GPU hour; None: unknown.

    Raises:
        UserError: a run is given twice, or a manifest is damaged.
    """
    folders = [run.folder.resolve() for run in runs]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise UserError(f"{twice[0]} is given twice; name each run once")
    measure: Measure = "validation loss" if all(run.val for run in runs) else "training loss"
    groups = _grouped(runs, measure)
    wanted = (baseline or runs[0]).folder.resolve()
    chosen = next(i for i, g in enumerate(groups) if wanted in [run.folder.resolve() for run in g.runs])
    base = groups[chosen]
    if target is None and base.known:
        target = summarize(base.at(base.tokens)).mean
    against = [_difference(group, base) if i != chosen else None for i, group in enumerate(groups)]
    to_target = [mean_curve(g.curves).first_below(target) if target is not None else None for g in groups]
    return Comparison(
        groups, chosen, measure, target, price, against, to_target, _notes(runs, groups, against, measure)
    )


def _grouped(runs: Sequence[Run], measure: Measure) -> list[Group]:
    groups: list[Group] = []
    for run in runs:
        mine = settings(run)
        same = next((g for g in groups if not differing([g.settings, mine], without=(SEED,))), None)
        if same is None:
            same = Group([], mine, [])
            groups.append(same)
        same.runs.append(run)
        same.curves.append(loss_curve(run, measure))
    points = [_point(group.runs) for group in groups]
    for group, point in zip(groups, points, strict=True):
        others = f" (+{counted(len(group.runs) - 1, 'run')})" if len(group.runs) > 1 else ""
        group.name = point if point and points.count(point) == 1 else f"{group.runs[0].name}{others}"
    return groups


def _point(runs: Sequence[Run]) -> str | None:
    """Return the common settings in the names of sweep trials (`003-optim.lr-1e-3-seed-7`); None for other runs."""
    found = {match[1] if (match := TRIAL.fullmatch(run.name)) else None for run in runs}
    point = found.pop()
    return f"{point}, {len(runs)} seeds" if point and not found and len(runs) > 1 else None


def _difference(group: Group, base: Group) -> GroupDifference | None:
    if not group.known or not base.known:
        return None
    tokens = min(group.tokens, base.tokens)
    mine, theirs = group.at(tokens), base.at(tokens)
    if not mine or not theirs:
        return None
    return GroupDifference(tokens, summarize(mine), summarize(theirs), welch(theirs, mine))


def _notes(
    runs: Sequence[Run], groups: Sequence[Group], against: Sequence[GroupDifference | None], measure: Measure
) -> list[str]:
    notes = []
    without = [run.name for run in runs if not run.val]
    if without:
        notes.append(
            f"{', '.join(without)}: no validation, so training losses are compared (means over 1/{TRAIN_POINTS} of the "
            f"steps)"
        )
    for run in runs:
        if run.updates < run.config.steps:
            notes.append(
                f"{run.name} is at step {run.updates:,} of {run.config.steps:,}: its learning rate is not yet decayed"
            )
    for group in groups:
        seeds = [run.config.seed for run in group.runs]
        if len(set(seeds)) < len(seeds):
            notes.append(f"{group.name}: runs with the same seed are not independent samples")
    if len({str(group.settings.get("data")) for group in groups}) > 1:
        notes.append("the groups have different data: validation losses on different text are not comparable")
    for name in ("eval_tokens", "sequence_length"):
        if measure == "validation loss" and len({str(group.settings.get(name)) for group in groups}) > 1:
            notes.append(f"{name} differs: the validation losses were measured on different windows")
    tested = sum(a is not None and a.test is not None for a in against)
    if len(groups) > 1 and tested < sum(a is not None for a in against):
        notes.append("a p-value needs at least two seeds in both groups")
    if tested > 1:
        notes.append(f"p-values are not corrected for multiple tests ({tested})")
    return notes
