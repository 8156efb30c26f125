"""Tables of a run's evaluations: results of `restomod eval` next to published results."""

from __future__ import annotations

import math
from typing import Any

from restomod.analysis.health.history import number
from restomod.data.manifest import is_fineweb_edu
from restomod.evals.tasks.registry import TASKS, is_whole, references
from restomod.evals.tasks.task import GPT2
from restomod.runs.config_diff import trains_on_fineweb_edu
from restomod.runs.reader import Record, Run

HEADLINES = {name: task.headline for name, task in TASKS.items()}
VALIDATION = {"loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}


def _on_fineweb_edu(values: Record, run: Run) -> bool:
    """Return whether a validation loss was measured on FineWeb-Edu. Without a data entry, it used the run's data."""
    data = values.get("data")
    if data is None or data.get("fingerprint") == run.manifest.get("fingerprint"):
        return trains_on_fineweb_edu(run)
    return is_fineweb_edu(data)


def reference_lines(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Return published values to draw as lines, by chart.

    They are GPT-2's loss if the run trains on FineWeb-Edu, GPT-2's accuracy on tasks of which the run has scored all
    examples, and the accuracy of random choices.
    """
    whole = {task for v in [*run.records, *run.evaluations] if is_whole(task := str(v.get("task")), v.get("examples"))}
    found: dict[str, list[dict[str, Any]]] = {}
    for task, metric in {"validation": "loss", **HEADLINES}.items():
        if task == "validation" and not trains_on_fineweb_edu(run):
            continue
        published = references(task) if task == "validation" or task in whole else []
        lines = [{"name": r.model, "value": r.value} for r in published if r.model == GPT2 and r.metric == metric]
        if task in TASKS and TASKS[task].chance is not None:
            lines.append({"name": "chance", "value": TASKS[task].chance})
        if lines:
            found["loss" if task == "validation" else task] = lines
    return found


def evaluation_tables(run: Run) -> list[dict[str, Any]]:
    """Return one table per task: evaluations of the run, newest step first, then published results.

    Returns:
        Tables with ``task``, ``columns`` (metrics), ``rows`` (name, one value per column, remark) and ``own``, the
        number of rows that are results of the run.
    """
    by_task: dict[str, list[Record]] = {}
    for values in run.evaluations:
        by_task.setdefault(values["task"], []).append(values)
    tables = []
    for task, found in sorted(by_task.items(), key=lambda item: (item[0] != "validation", item[0])):
        found.sort(key=lambda values: number(values.get("step")), reverse=True)
        measured = [_metrics(values) for values in found]
        columns = list(dict.fromkeys(name for metrics in measured for name in metrics))
        mine = [
            [_at(values, run), *(metrics.get(name, "") for name in columns), _scope(values, run)]
            for values, metrics in zip(found, measured, strict=True)
        ]
        published: dict[tuple[str, str], dict[str, str]] = {}
        if any(_on_fineweb_edu(v, run) if task == "validation" else is_whole(task, v.get("examples")) for v in found):
            for r in references(task):
                published.setdefault((r.model, r.convention), {})[r.metric] = f"{r.value:.4f}"
        others = [
            [model, *(v.get(name, "") for name in columns), convention] for (model, convention), v in published.items()
        ]
        tables.append(
            {
                "task": task,
                "columns": [VALIDATION.get(name, name) for name in columns],
                "rows": mine + others,
                "own": len(mine),
            }
        )
    return tables


def _metrics(values: Record) -> dict[str, str]:
    """Format the metrics of a result with their standard errors."""
    metrics = values.get("metrics")
    given = {name: values.get(name) for name in VALIDATION if name in values} if metrics is None else metrics
    shown = {}
    for name, metric in given.items():
        value, error = (metric.get("value"), metric.get("stderr")) if isinstance(metric, dict) else (metric, None)
        if math.isfinite(number(value)):
            digits = 4 if abs(number(value)) < 100 else 1
            plus = f" ± {number(error):,.{digits}f}" if math.isfinite(number(error)) else ""
            shown[name] = f"{number(value):,.{digits}f}{plus}"
    return shown


def _at(values: Record, run: Run) -> str:
    step = values.get("step")
    return f"{run.name}, step {step:,}" if step is not None else run.name


def _scope(values: Record, run: Run) -> str:
    examples, tokens = values.get("examples"), values.get("tokens")
    parts = [f"{examples:,} examples"] if examples is not None else []
    parts += [f"{tokens:,} tokens"] if tokens is not None else []
    data = values.get("data")
    if data is not None and data.get("fingerprint") != run.manifest.get("fingerprint"):
        parts.append(f"other data than the run: {data.get('name')}")
    parts += [str(values["convention"])] if values.get("convention") else []
    return "; ".join(parts)
