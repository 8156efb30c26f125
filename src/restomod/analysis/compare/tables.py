"""Tables of a comparison: different settings, results, t-tests, curves, published results, tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from restomod.analysis.compare.axes import LABELS, Axis
from restomod.analysis.compare.groups import Comparison, Welch, hours_in_steps
from restomod.analysis.health.history import number
from restomod.evals.tasks.registry import is_whole, references
from restomod.runs.config_diff import trains_on_fineweb_edu
from restomod.runs.reader import Run
from restomod.utils.terminal import Table
from restomod.utils.text import duration, short_count

ROWS = 12  # rows of the table of curves
TASK_METRICS = ("acc", "acc_norm", "acc_token", "perplexity")
PUBLISHED_CONTEXT = 1024


def comparison_tables(found: Comparison, axis: Axis) -> list[Table]:
    """Return all non-empty tables of a comparison in reading order.

    Args:
        found: comparison to show.
        axis: axis of the table of curves.
    """
    found_tables = (_differences(found), _results(found), _against(found), _curves(found, axis), _published(found))
    return [table for table in (*found_tables, *_tasks(found)) if table.rows or table.notes]


def comparison_markdown(found: Comparison, axis: Axis, plot: Path | None = None) -> str:
    """Return all tables as Markdown.

    Args:
        found: comparison to show.
        axis: axis of the table of curves.
        plot: PNG file in the same folder, shown at the end; None: no plot.
    """
    head = f"# Comparison of runs: {found.measure}\n\n"
    picture = f"\n![{found.measure}](<{plot.name}>)\n" if plot is not None else ""
    return head + "\n".join(table.markdown() for table in comparison_tables(found, axis)) + picture


def _names(found: Comparison) -> list[str]:
    several = len(found.groups) > 1
    return [g.name + (" (baseline)" if several and i == found.baseline else "") for i, g in enumerate(found.groups)]


def _differences(found: Comparison) -> Table:
    if len(found.groups) == 1:
        return Table("", [], [])
    rows = [[name, *map(_value, values)] for name, values in found.differences().items()]
    return Table("differences", ["", *_names(found)], rows)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _results(found: Comparison) -> Table:
    headings = ["", "n", "step", "tokens", "FLOPs", "time", *(["cost"] if found.price is not None else [])]
    headings += [f"final {found.measure}", "best", "tokens to target"]
    rows = []
    for i, (name, group) in enumerate(zip(_names(found), found.groups, strict=True)):
        steps, spent = [run.updates for run in group.runs], [hours_in_steps(run) for run in group.runs]
        flops = max(run.flops_at(run.updates) for run in group.runs)
        row = [name, str(len(group.runs)), _range(steps), _range([r.tokens_at(r.updates) for r in group.runs])]
        row += [f"{flops:.3g}", duration(3600 * float(np.mean(spent)))]
        if found.price is not None:
            row.append(f"${np.mean([hours_in_steps(run, of_gpus=True) for run in group.runs]) * found.price:,.2f}")
        row += [group.final.shown() if group.final else "–", group.best.shown() if group.best else "–"]
        rows.append([*row, _to_target(found, i)])
    many = any(len(group.runs) > 1 for group in found.groups)
    target = [f"target: {found.measure} {found.target:.4f}"] if found.target is not None else []
    spread = ["mean ± standard deviation of n runs that differ only in their seed"] if many else []
    return Table("results", headings, rows, [*target, *spread, *found.notes])


def _against(found: Comparison) -> Table:
    """Return the difference of every group from the baseline after the same number of tokens."""
    headings = ["at equal tokens", "tokens", found.measure, "baseline", "difference", "95 % CI", "t", "df", "p"]
    rows = []
    for name, against in zip(_names(found), found.against, strict=True):
        if against is not None:
            row = [name, short_count(against.tokens), against.loss.shown(), against.baseline.shown()]
            rows.append([*row, f"{against.difference:+.4f}", *_test(against.test)])
    return Table("difference from the baseline", headings, rows) if rows else Table("", [], [])


def _test(test: Welch | None) -> list[str]:
    if test is None:
        return ["–", "–", "–", "–"]
    p = f"{test.p:.3f}" if test.p >= 0.001 else f"{test.p:.1e}"
    return [f"{test.low:+.4f} to {test.high:+.4f}", f"{test.t:.2f}", f"{test.df:.1f}", p]


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return short_count(low) if low == high else f"{short_count(low)} to {short_count(high)}"


def _to_target(found: Comparison, i: int) -> str:
    tokens, base = found.to_target[i], found.to_target[found.baseline]
    if tokens is None:
        return "not reached" if found.target is not None else "–"
    ratio = f" ({tokens / base:.2f}×)" if base and i != found.baseline else ""
    return f"{short_count(tokens)}{ratio}"


def _curves(found: Comparison, axis: Axis) -> Table:
    """Return the mean losses of the groups at common points of an axis."""
    curves = [found.mean(i, axis) for i in range(len(found.groups))]
    longest = max(curves, key=lambda c: float(c.x[-1]) if len(c.x) else -1.0)
    if not len(longest.x):
        return Table("", [], [], [f"no curve by {LABELS[axis]}: the runs have no losses or no times yet"])
    chosen = np.unique(np.linspace(0, len(longest.x) - 1, ROWS).round().astype(int))
    rows = []
    for x in longest.x[chosen]:
        losses = [curve.at(float(x)) for curve in curves]
        rows.append([_position(float(x), axis), *("" if loss is None else f"{loss:.4f}" for loss in losses)])
    return Table(f"{found.measure} by {LABELS[axis]}", [LABELS[axis], *_names(found)], rows)


def _position(x: float, axis: Axis) -> str:
    if axis == "time":
        return f"{x:.3g} h"
    return f"${x:.3g}" if axis == "dollars" else short_count(x)


def _published(found: Comparison) -> Table:
    """Return validation losses of GPT-2 and its public reproductions, if the data is comparable."""
    runs = [run for group in found.groups for run in group.runs]
    why_not = why_not_published(runs) if found.measure == "validation loss" else "some runs have no validation loss"
    if why_not is not None:
        return Table("", [], [], [f"published validation losses are not comparable: {why_not}"])
    rows = [[r.model, f"{r.value:.4f}", r.convention] for r in references("validation")]
    note = "measured on FineWeb-Edu; the validation documents are identical only with the published validation shard"
    return Table("published validation losses", ["", "loss", ""], rows, [note])


def why_not_published(runs: Sequence[Run]) -> str | None:
    """Return the reason why published validation losses are not comparable with these runs; None if they are."""
    others = [run.name for run in runs if not trains_on_fineweb_edu(run)]
    if others:
        return f"they were measured on FineWeb-Edu, and {_who(others, runs, 'train on other data')}"
    shorter = [run.name for run in runs if run.config.sequence_length != PUBLISHED_CONTEXT]
    if shorter:
        return (
            f"they were measured with windows of {PUBLISHED_CONTEXT} tokens, and "
            f"{_who(shorter, runs, 'have another sequence length')}"
        )
    return None


def _who(names: Sequence[str], runs: Sequence[Run], do: str) -> str:
    return f"all runs {do}" if len(names) == len(runs) > 1 else f"these runs {do}: {', '.join(names)}"


def _tasks(found: Comparison) -> list[Table]:
    """Return the newest task results of every run, with published results if a run has scored all examples."""
    newest: dict[str, list[list[str]]] = {}
    whole: set[str] = set()
    for group in found.groups:
        for run in group.runs:
            for task, (step, examples, metrics) in newest_tasks(run).items():
                numbers = [f"{metrics[m]:.4f}" if m in metrics else "" for m in TASK_METRICS]
                whole |= {task} if is_whole(task, examples) else set()
                newest.setdefault(task, []).append([f"{run.name}, step {step}", *numbers, f"{examples:,} examples"])
    made = []
    for task, rows in newest.items():
        published: dict[tuple[str, str], dict[str, str]] = {}
        for r in references(task) if task in whole else []:
            published.setdefault((r.model, r.convention), {})[r.metric] = f"{r.value:.4g}"
        others = [
            [m, *(v.get(metric, "") for metric in TASK_METRICS), convention] for (m, convention), v in published.items()
        ]
        notes = ["published results: all examples, with the convention in the last column"] if others else []
        made.append(Table(task, ["", *TASK_METRICS, ""], [*rows, *others], notes))
    return made


def newest_tasks(run: Run) -> dict[str, tuple[int, int, dict[str, float]]]:
    """Return step, number of examples and metrics of the newest result of each task.

    If there are several results of the same step, the one with the most examples is returned.
    """
    answers = []
    for record in [*run.records, *run.evaluations]:
        values = record.get("metrics", record)
        if record.get("task") and ("metrics" in record or record.get("kind") == "task"):
            known = {name: v.get("value") if isinstance(v, dict) else v for name, v in values.items()}
            metrics = {name: number(known[name]) for name in TASK_METRICS if math.isfinite(number(known.get(name)))}
            answers.append((record["task"], record.get("step") or 0, record.get("examples") or 0, metrics))
    answers.sort(key=lambda answer: answer[1:3])
    return {task: (step, examples, metrics) for task, step, examples, metrics in answers}
