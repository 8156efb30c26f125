"""Curves of a run for the report, downsampled so that all spikes remain."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from restomod.analysis.compare.axes import Clock
from restomod.analysis.health.history import number
from restomod.runs.reader import Record, Run

POINTS = 1600  # points per curve: enough for the width of a screen, tens of kilobytes
MEANS = 400  # points per moving mean
DIGITS = 6  # significant digits


def thin(y: np.ndarray, points: int = POINTS) -> np.ndarray:
    """Choose about ``points`` points of a curve: minimum and maximum of equal ranges, the first and the last point.

    Args:
        y: values, (n,); NaN: no value.
        points: approximate number of points.

    Returns:
        Increasing indices into ``y``, (m,), m <= points + 2.
    """
    n = len(y)
    if n <= points:
        return np.arange(n)
    kept = {0, n - 1}
    edges = np.linspace(0, n, max(1, points // 2) + 1).astype(int)
    for a, b in itertools.pairwise(edges):
        part = y[a:b]
        if np.isnan(part).all():
            kept.add(int(a))  # keeps the gap in the line
        else:
            kept |= {int(a + np.nanargmin(part)), int(a + np.nanargmax(part))}
    return np.array(sorted(kept))


def centred_mean(y: np.ndarray, width: int) -> np.ndarray:
    """Compute the centred moving mean over ``width`` values, (n,), ignoring NaN.

    The window becomes symmetrically smaller at both ends.
    """
    n, good = len(y), ~np.isnan(y)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(good, y, 0.0), good))
    at = np.arange(n)
    half = np.minimum(width // 2, np.minimum(at, n - 1 - at))
    start, end = at - half, at + half + 1
    found = counts[end] - counts[start]
    return np.where(found > 0, (sums[end] - sums[start]) / np.maximum(found, 1), np.nan)


def curve_as_json(steps: np.ndarray, y: np.ndarray, clock: Clock) -> dict[str, list[Any]]:
    """Return a downsampled curve as JSON values: steps ``x``, values ``y`` (None: no value) and hours ``h``."""
    kept = thin(y)
    return {
        "x": steps[kept].tolist(),
        "y": [rounded(value) for value in y[kept]],
        "h": [rounded(value) for value in clock.hours_at(steps[kept])],
    }


def rounded(value: float) -> float | None:
    """Round to `DIGITS` significant digits; None for NaN."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def run_curves(run: Run) -> dict[str, Any]:
    """Return the non-empty curves of a run by name.

    The names are those of the training metrics ("loss", "lr", …), "<metric>_mean" for moving means, and "val" for the
    validation loss.
    """
    train = run.train
    steps = np.array([record["step"] for record in train], dtype=np.int64)
    clock = Clock(run)
    made: dict[str, Any] = {}
    for name in ("loss", "lr", "grad_norm", "tokens_per_second", "mfu"):
        y = np.array([number(record.get(name)) for record in train])
        if not len(y) or np.isnan(y).all():
            continue
        made[name] = curve_as_json(steps, y, clock)
        width = len(y) // 100 | 1
        if name != "lr" and width > 1:
            kept = np.unique(np.linspace(0, len(y) - 1, MEANS).astype(int))
            made[f"{name}_mean"] = curve_as_json(steps[kept], centred_mean(y, width)[kept], clock) | {"over": width}
    val = run.val
    if val:
        at = np.array([record["step"] for record in val], dtype=np.int64)
        made["val"] = curve_as_json(at, np.array([number(record.get("loss")) for record in val]), clock)
    return made


def task_curves(run: Run, metric_of: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return the accuracies of each task, measured during training or by `restomod eval`.

    Points are ordered by number of examples, then by step. A point without a value separates different numbers of
    examples, so that no line joins them.

    Args:
        run: run to read.
        metric_of: metric to show for each task; other tasks show "acc_norm" or "acc".
    """
    clock = Clock(run)
    found: dict[str, dict[tuple[int, int], tuple[float, float]]] = {}
    for record in [*run.records, *run.evaluations]:
        task, step = record.get("task"), record.get("step")
        if task is None or step is None or task == "validation":
            continue
        known: Record = record.get("metrics", record)
        name = metric_of.get(task, "acc_norm" if "acc_norm" in known else "acc")
        value: Any = known.get(name)
        error: Any = known.get(f"{name}_stderr")
        if isinstance(value, dict):
            value, error = value.get("value"), value.get("stderr")
        if math.isfinite(number(value)):
            n = record.get("examples")
            found.setdefault(task, {})[n or 0, step] = (number(value), number(error))
    return {task: _task_curve(points, metric_of.get(task, "acc_norm"), clock) for task, points in found.items()}


def _task_curve(points: dict[tuple[int, int], tuple[float, float]], metric: str, clock: Clock) -> dict[str, Any]:
    """Return the curve of a task from its points, keyed by number of examples (0: unknown) and step."""
    sizes = {n for n, _ in points if n}
    if len(sizes) == 1:  # unknown numbers of examples are assumed to be the only known one
        points = {(max(sizes), step): value for (_, step), value in sorted(points.items())}
    made: dict[str, Any] = {"metric": metric, "x": [], "y": [], "error": [], "examples": []}
    kept: list[tuple[int, int]] = []
    for _, same_size in itertools.groupby(sorted(points), key=lambda point: point[0]):
        keys = list(same_size)
        kept += [keys[i] for i in thin(np.array([points[key][0] for key in keys]))]
    for n, step in kept:
        value, error = points[n, step]
        if made["examples"] and made["examples"][-1] != n:
            for name, gap in (("x", step), ("y", None), ("error", 0.0), ("examples", n)):
                made[name].append(gap)
        for name, shown in (("x", step), ("y", rounded(value)), ("error", rounded(error) or 0.0), ("examples", n)):
            made[name].append(shown)
    made["h"] = [rounded(hours) for hours in clock.hours_at(np.array(made["x"], dtype=np.int64))]
    return made


def sample_sizes(points: dict[str, Any]) -> str:
    """Format the numbers of examples of a task's points: "200 and 10,042 examples"; empty if unknown."""
    sizes = [f"{n:,}" for n in sorted(set(points["examples"]) - {0})]
    return f"{' and '.join(sizes)} examples" if sizes else ""
