"""Curves of a run for a page: thinned to few points, all spikes kept."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from restomod.analysis.compare.axes import Clock
from restomod.analysis.health.history import number
from restomod.runs.reader import Record, Run

POINTS = 1600  # points of a curve: more than a screen has columns, and tens of kilobytes
MEANS = 400  # points of a moving mean
DIGITS = 6  # significant digits


def thin(y: np.ndarray, points: int = POINTS) -> np.ndarray:
    """Choose about ``points`` of a curve to keep: minimum and maximum of each range, the first and the last point.

    Takes values (n,), NaN where there is none; returns increasing indices, (m,), m <= points + 2.
    """
    n = len(y)
    if n <= points:
        return np.arange(n)
    kept = {0, n - 1}
    edges = np.linspace(0, n, max(1, points // 2) + 1).astype(int)
    for a, b in itertools.pairwise(edges):
        part = y[a:b]
        if np.isnan(part).all():
            kept.add(int(a))  # the gap stays a gap
        else:
            kept |= {int(a + np.nanargmin(part)), int(a + np.nanargmax(part))}
    return np.array(sorted(kept))


def centred_mean(y: np.ndarray, width: int) -> np.ndarray:
    """Centred moving mean over ``width`` values, (n,), NaN ignored; the window shrinks symmetrically at both ends."""
    n, good = len(y), ~np.isnan(y)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(good, y, 0.0), good))
    at = np.arange(n)
    half = np.minimum(width // 2, np.minimum(at, n - 1 - at))
    start, end = at - half, at + half + 1
    found = counts[end] - counts[start]
    return np.where(found > 0, (sums[end] - sums[start]) / np.maximum(found, 1), np.nan)


def curve_as_json(steps: np.ndarray, y: np.ndarray, clock: Clock) -> dict[str, list[Any]]:
    """A thinned curve: steps ``x``, values ``y`` (None where there is none) and hours ``h``."""
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
    """Curves by name: training metrics, moving means of noisy ones, and ``val``; empty ones are left out."""
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
    """Accuracies during training, by task, from validations and from `restomod eval`.

    Points are ordered by number of examples, then by step; a point without a value separates different numbers of
    examples, so that no line joins them. ``metric_of`` has the metric to show, by task.
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
    """The curve of a task from its points, by number of examples (0: unknown) and step."""
    sizes = {n for n, _ in points if n}
    if len(sizes) == 1:  # points of unknown size are assumed to have the only known one
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
    """Numbers of examples of a task's points: "200 and 10,042 examples"; empty where unknown."""
    sizes = [f"{n:,}" for n in sorted(set(points["examples"]) - {0})]
    return f"{' and '.join(sizes)} examples" if sizes else ""
