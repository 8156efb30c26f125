"""The verb `compare_runs`: runs in groups that differ in more than their seed, measured against one of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from restomod.analysis.compare.axes import AXES, Axis, Curve, Measure, hours_at, loss_curve, mean_curve, measured
from restomod.analysis.compare.statistics import Summary, Welch, summarize, welch
from restomod.runs.config_diff import Settings, differing, settings
from restomod.runs.reader import Run
from restomod.utils.errors import UserError

SEED = "seed"
TRIAL = re.compile(r"\d+-(.+)-seed-\d+")  # as `restomod sweep` names its runs


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only."""

    runs: list[Run]
    settings: Settings
    curves: list[Curve]
    """By tokens, of each run."""
    name: str = ""

    @property
    def known(self) -> list[Curve]:
        """The curves that have a point."""
        return [c for c in self.curves if len(c.x)]

    @property
    def final(self) -> Summary | None:
        """The last losses of its runs, wherever they are."""
        return summarize([float(c.loss[-1]) for c in self.known]) if self.known else None

    @property
    def best(self) -> Summary | None:
        """The lowest losses of its runs."""
        return summarize([float(c.loss.min()) for c in self.known]) if self.known else None

    def at(self, tokens: float) -> list[float]:
        """The loss of each run after so many tokens, of those that have got there."""
        found = [c.at(tokens) for c in self.curves]
        return [loss for loss in found if loss is not None]

    @property
    def tokens(self) -> float:
        """As far as all of its runs have got, as measured; 0 where nothing is known."""
        return min((float(c.x[-1]) for c in self.known), default=0.0)


@dataclass(frozen=True)
class Against:
    """A group beside the baseline, after as many tokens as all runs of both have seen."""

    tokens: float
    loss: Summary
    baseline: Summary
    test: Welch | None

    @property
    def difference(self) -> float:
        """Mean loss minus that of the baseline."""
        return self.loss.mean - self.baseline.mean


@dataclass(frozen=True)
class Comparison:
    """All that is known of several runs beside each other."""

    groups: list[Group]
    baseline: int
    """Which of the groups."""
    measure: Measure
    target: float | None
    """The loss whose tokens are counted; None where the baseline has none yet."""
    price: float | None
    against: list[Against | None]
    """By group; None of the baseline itself, and where there is nothing to compare."""
    to_target: list[float | None]
    """By group: tokens after which its mean curve is at or below the target."""
    notes: list[str] = field(default_factory=list)

    def differences(self) -> dict[str, list[Any]]:
        """The settings that are not the same in all groups, with the value of each group."""
        return differing([group.settings for group in self.groups], without=(SEED,))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
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
        steps, loss = measured(run, self.measure)
        curves = {
            axis: loss_curve(run, self.measure, axis, self.price).x.tolist()
            for axis in AXES
            if axis != "dollars" or self.price is not None
        }
        return {
            "folder": str(run.folder),
            "seed": run.config.seed,
            "step": made(run),
            "steps": run.config.steps,
            "tokens": run.tokens_at(made(run)),
            "flops": run.flops_at(made(run)),
            "hours_in_steps": spent_hours(run),
            "dollars": spent_hours(run, of_gpus=True) * self.price if self.price is not None else None,
            "tokens_to_target": by_tokens.first_below(self.target) if self.target is not None else None,
            "curve": {"updates": steps.tolist(), "loss": loss.tolist(), **curves},
        }

    def mean(self, i: int, axis: Axis) -> Curve:
        """The mean curve of a group along an axis."""
        return mean_curve([loss_curve(run, self.measure, axis, self.price) for run in self.groups[i].runs])


def made(run: Run) -> int:
    """Updates that a run has made so far."""
    return run.train[-1]["step"] + 1 if run.train else 0


def spent_hours(run: Run, of_gpus: bool = False) -> float:
    """Hours in steps so far, each step once; those of all its GPUs added up, if asked for."""
    return float(hours_at(run, np.array([float(made(run))]), of_gpus)[0])


def compare_runs(
    runs: Sequence[Run], baseline: Run | None = None, target: float | None = None, price: float | None = None
) -> Comparison:
    """Group runs, and measure every group against one of them.

    Args:
        runs: at least one; finished or not, of any lengths.
        baseline: one of them, whose group is the baseline; None: the first.
        target: the loss whose tokens are counted; None: the last that the baseline has.
        price: US dollars for one GPU and one hour.

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
    against = [_against(group, base) if i != chosen else None for i, group in enumerate(groups)]
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
    return [
        dataclasses.replace(group, name=point if point and points.count(point) == 1 else _first(group.runs))
        for group, point in zip(groups, points, strict=True)
    ]


def _first(runs: Sequence[Run]) -> str:
    """The name of the first run, and how many others there are."""
    return runs[0].name + (f" +{len(runs) - 1}" if len(runs) > 1 else "")


def _point(runs: Sequence[Run]) -> str | None:
    """What the trials of a sweep (`003-optim.lr-1e-3-seed-7`) have in common; None if that is not what the runs are."""
    found = {match[1] if (match := TRIAL.fullmatch(run.name)) else None for run in runs}
    point = found.pop()
    return f"{point}, {len(runs)} seeds" if point and not found and len(runs) > 1 else None


def _against(group: Group, base: Group) -> Against | None:
    if not group.known or not base.known:
        return None
    tokens = min(group.tokens, base.tokens)
    mine, theirs = group.at(tokens), base.at(tokens)
    if not mine or not theirs:
        return None
    return Against(tokens, summarize(mine), summarize(theirs), welch(theirs, mine))


def _notes(
    runs: Sequence[Run], groups: Sequence[Group], against: Sequence[Against | None], measure: Measure
) -> list[str]:
    notes = []
    without = [run.name for run in runs if not run.val]
    if without:
        notes.append(
            f"{', '.join(without)}: no validation, so what is compared is the training loss "
            f"(a mean over the last sixtieth of the steps)"
        )
    for run in runs:
        if made(run) < run.config.steps:
            notes.append(
                f"{run.name} is at step {made(run):,} of {run.config.steps:,}: its learning rate is not down yet"
            )
    for group in groups:
        seeds = [run.config.seed for run in group.runs]
        if len(set(seeds)) < len(seeds):
            notes.append(f"{group.name}: runs with the same seed are no independent samples")
    if len({str(group.settings.get("data")) for group in groups}) > 1:
        notes.append("the groups have other data: their validation losses are of other texts")
    for name in ("eval_tokens", "sequence_length"):
        if measure == "validation loss" and len({str(group.settings.get(name)) for group in groups}) > 1:
            notes.append(f"{name} differs: the validation losses are of other windows")
    tested = sum(a is not None and a.test is not None for a in against)
    if len(groups) > 1 and tested < sum(a is not None for a in against):
        notes.append("p needs two seeds or more on both sides")
    if tested > 1:
        notes.append(f"each p is of one test by itself; {tested} were made")
    return notes
