"""A comparison as tables: what differs, how it ended, the curves, and published results beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from restomod.analysis.compare.axes import LABELS, Axis
from restomod.analysis.compare.groups import Comparison, Group, made, spent_hours
from restomod.analysis.compare.statistics import Welch
from restomod.evals.tasks.registry import is_whole, references
from restomod.runs.config_diff import trains_on_fineweb_edu
from restomod.runs.reader import Run
from restomod.utils.terminal import Table

ROWS = 12  # of a table of curves
TASK_METRICS = ("acc", "acc_norm", "acc_token", "perplexity")
PUBLISHED_CONTEXT = 1024


def tables(found: Comparison, axis: Axis) -> list[Table]:
    """All tables, in the order in which they are read; those that would be empty are left out."""
    made_of = [
        _differences(found),
        _results(found),
        _against(found),
        _curves(found, axis),
        _published(found),
        *_tasks(found),
    ]
    return [table for table in made_of if table.rows or table.notes]


def markdown(found: Comparison, axis: Axis, plot: Path | None = None) -> str:
    """All tables as Markdown; with the picture, if there is one."""
    head = f"# Runs compared: {found.measure}\n\n"
    picture = f"\n![{found.measure}](<{plot.name}>)\n" if plot is not None else ""
    return head + "\n".join(table.markdown() for table in tables(found, axis)) + picture


def short_number(x: float) -> str:
    """A count in few digits: 1,234, 2.5M, 10B, 5.1e18."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if size <= x < 1000 * size:
            return f"{x / size:.4g}{unit}"
    return f"{x:,.0f}" if x < 1e6 else f"{x:.3g}"


def hours(x: float) -> str:
    """Hours for people."""
    return f"{x:.2f} h" if x >= 1 else f"{60 * x:.1f} min"


def _names(found: Comparison) -> list[str]:
    several = len(found.groups) > 1
    return [g.name + (" (baseline)" if several and i == found.baseline else "") for i, g in enumerate(found.groups)]


def _differences(found: Comparison) -> Table:
    if len(found.groups) == 1:
        return Table("", [], [])
    rows = [[name, *map(_value, values)] for name, values in found.differences().items()]
    return Table("what differs", ["", *_names(found)], rows)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _results(found: Comparison) -> Table:
    headings = ["", "n", "step", "tokens", "FLOPs", "time", *(["cost"] if found.price is not None else [])]
    headings += [f"{found.measure} at the end", "best", "tokens to target"]
    rows = []
    for i, (name, group) in enumerate(zip(_names(found), found.groups, strict=True)):
        steps, spent = [made(run) for run in group.runs], [spent_hours(run) for run in group.runs]
        flops = max(run.flops_at(made(run)) for run in group.runs)
        row = [name, str(len(group.runs)), _range(steps), _range([r.tokens_at(made(r)) for r in group.runs])]
        row += [f"{flops:.3g}", hours(float(np.mean(spent)))]
        if found.price is not None:
            row.append(f"${np.mean([spent_hours(run, of_gpus=True) for run in group.runs]) * found.price:,.2f}")
        row += [group.final.shown() if group.final else "–", group.best.shown() if group.best else "–"]
        rows.append([*row, _to_target(found, i)])
    target = [f"target: {found.measure} {found.target:.4f}"] if found.target is not None else []
    spread = ["mean ± standard deviation of n runs that differ in their seed only"] if _seeds(found.groups) else []
    return Table("results", headings, rows, [*target, *spread, *found.notes])


def _against(found: Comparison) -> Table:
    """Every group beside the baseline, after equal tokens."""
    headings = ["at equal tokens", "tokens", found.measure, "baseline", "difference", "95 %", "t", "df", "p"]
    rows = []
    for name, against in zip(_names(found), found.against, strict=True):
        if against is not None:
            row = [name, short_number(against.tokens), against.loss.shown(), against.baseline.shown()]
            rows.append([*row, f"{against.difference:+.4f}", *_test(against.test)])
    return Table("against the baseline", headings, rows) if rows else Table("", [], [])


def _test(test: Welch | None) -> list[str]:
    if test is None:
        return ["–", "–", "–", "–"]
    p = f"{test.p:.3f}" if test.p >= 0.001 else f"{test.p:.1e}"
    return [f"{test.low:+.4f} to {test.high:+.4f}", f"{test.t:.2f}", f"{test.df:.1f}", p]


def _seeds(groups: Sequence[Group]) -> bool:
    return any(len(group.runs) > 1 for group in groups)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return short_number(low) if low == high else f"{short_number(low)} to {short_number(high)}"


def _to_target(found: Comparison, i: int) -> str:
    tokens, base = found.to_target[i], found.to_target[found.baseline]
    if tokens is None:
        return "not reached" if found.target is not None else "–"
    beside = f" ({tokens / base:.2f}×)" if base and i != found.baseline else ""
    return f"{short_number(tokens)}{beside}"


def _curves(found: Comparison, axis: Axis) -> Table:
    """The mean losses of the groups at the same points of an axis, those of the group that went furthest."""
    curves = [found.mean(i, axis) for i in range(len(found.groups))]
    longest = max(curves, key=lambda c: float(c.x[-1]) if len(c.x) else -1.0)
    if not len(longest.x):
        return Table("", [], [], [f"no curve by {LABELS[axis]}: nothing is measured yet, or no times are known"])
    chosen = np.unique(np.linspace(0, len(longest.x) - 1, ROWS).round().astype(int))
    rows = []
    for x in longest.x[chosen]:
        losses = [curve.at(float(x)) for curve in curves]
        rows.append([_position(float(x), axis), *("" if loss is None else f"{loss:.4f}" for loss in losses)])
    return Table(f"{found.measure} by {LABELS[axis]}", [LABELS[axis], *_names(found)], rows)


def _position(x: float, axis: Axis) -> str:
    if axis == "time":
        return hours(x)
    return f"${x:.3g}" if axis == "dollars" else short_number(x)


def _published(found: Comparison) -> Table:
    """GPT-2 and its public reproductions, where the validation losses are of comparable text."""
    runs = [run for group in found.groups for run in group.runs]
    why_not = published_differ(runs) if found.measure == "validation loss" else "no validation loss is known here"
    if why_not is not None:
        return Table("", [], [], [f"published validation losses are not comparable: {why_not}"])
    rows = [[r.model, f"{r.value:.4f}", r.convention] for r in references("validation")]
    note = "FineWeb-Edu like here, but validation documents are the same only with the published validation shard"
    return Table("published validation losses", ["", "loss", ""], rows, [note])


def published_differ(runs: Sequence[Run]) -> str | None:
    """Why published validation losses say nothing about these runs; None if they do."""
    others = [run.name for run in runs if not trains_on_fineweb_edu(run)]
    if others:
        return f"they are of FineWeb-Edu, and {_who(others, runs)} trained on other text"
    shorter = [run.name for run in runs if run.config.sequence_length != PUBLISHED_CONTEXT]
    if shorter:
        return f"they are of windows of {PUBLISHED_CONTEXT} tokens, and {_who(shorter, runs)} has others"
    return None


def _who(names: Sequence[str], runs: Sequence[Run]) -> str:
    return "every run here" if len(names) == len(runs) > 1 else ", ".join(names)


def _tasks(found: Comparison) -> list[Table]:
    """The newest answers of every run; published ones beside them where a task was asked as a whole, as those are."""
    newest: dict[str, list[list[str]]] = {}
    whole: set[str] = set()
    for group in found.groups:
        for run in group.runs:
            for task, (step, examples, metrics) in newest_tasks(run).items():
                numbers = [f"{metrics[m]:.4f}" if m in metrics else "" for m in TASK_METRICS]
                whole |= {task} if is_whole(task, examples) else set()
                newest.setdefault(task, []).append([f"{run.name}, step {step}", *numbers, f"{examples:,} examples"])
    made_of = []
    for task, rows in newest.items():
        published: dict[tuple[str, str], dict[str, str]] = {}
        for r in references(task) if task in whole else []:
            published.setdefault((r.model, r.convention), {})[r.metric] = f"{r.value:.4g}"
        others = [
            [model, *(numbers.get(metric, "") for metric in TASK_METRICS), whose]
            for (model, whose), numbers in published.items()
        ]
        notes = ["published numbers are of all examples, by the convention named beside them"] if others else []
        made_of.append(Table(task, ["", *TASK_METRICS, ""], [*rows, *others], notes))
    return made_of


def newest_tasks(run: Run) -> dict[str, tuple[int, int, dict[str, float]]]:
    """Of each task that a run was asked: step, number of examples and metrics, the newest (of a step, the most)."""
    answers: list[tuple[str, int, int, dict[str, float]]] = []
    for record in run.records:
        if record.get("kind") == "task" and isinstance(record.get("task"), str):
            answers.append((record["task"], record["step"], record.get("examples", 0), _numbers(record)))
    for record in run.evaluations:
        values = record.get("metrics")
        if isinstance(values, dict) and isinstance(record.get("task"), str):
            metrics = {name: v["value"] for name, v in values.items() if isinstance(v, dict) and "value" in v}
            answers.append((record["task"], record.get("step") or 0, record.get("examples", 0), metrics))
    answers.sort(key=lambda answer: answer[1:3])
    return {task: (step, examples, metrics) for task, step, examples, metrics in answers}


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {name: record[name] for name in TASK_METRICS if isinstance(record.get(name), int | float)}
