"""Downsampling, moving means and clocks compared with direct computations."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from restomod.analysis.report.curves import centred_mean, number, run_curves, sample_sizes, task_curves, thin
from restomod.runs.reader import open_run
from tests.runs.made_runs import add_task, loss_at, make_run

NUMBERS = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=200)


def test_a_spike_of_one_step_in_a_hundred_thousand_remains() -> None:
    y = 3 + 0.01 * np.sin(np.arange(100_000))
    y[[12_345, 12_346, 70_001]] = 9.5, 0.5, 11.0
    kept = thin(y)
    assert {12_345, 12_346, 70_001, 0, 99_999} <= set(kept.tolist())
    assert len(kept) <= 1602


@given(NUMBERS, st.integers(2, 60))
def test_thinning_keeps_the_extremes_of_every_range(values: list[float], points: int) -> None:
    y = np.array(values)
    kept = thin(y, points)
    assert list(kept) == sorted(set(kept))
    assert {0, len(y) - 1} <= set(kept.tolist())
    assert len(kept) <= max(points + 2, len(y) if len(y) <= points else 0)
    if not np.isnan(y).all():
        assert np.nanmax(y[kept]) == np.nanmax(y)
        assert np.nanmin(y[kept]) == np.nanmin(y)


def test_a_long_gap_remains() -> None:
    y = np.ones(10_000)
    y[4000:6000] = np.nan
    kept = thin(y, 100)
    assert np.isnan(y[kept[(kept > 4100) & (kept < 5900)]]).all()
    assert ((kept > 4100) & (kept < 5900)).any()


@given(NUMBERS, st.integers(1, 30))
def test_moving_means_equal_a_direct_computation(values: list[float], width: int) -> None:
    n = len(values)
    for i, mean in enumerate(centred_mean(np.array(values), width)):
        half = min(width // 2, i, n - 1 - i)
        near = [v for v in values[i - half : i + half + 1] if not math.isnan(v)]
        assert math.isnan(mean) if not near else mean == pytest.approx(sum(near) / len(near), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("value", [None, "3", math.inf, math.nan, True, [1]])
def test_values_that_are_not_finite_numbers_become_nan(value: object) -> None:
    assert math.isnan(number(value))


def test_curves_of_a_run(tmp_path: Path) -> None:
    made = run_curves(open_run(make_run(tmp_path / "r", steps=40, spikes={7: math.nan})))
    assert made["loss"]["x"] == list(range(40))
    assert made["loss"]["y"][7] is None
    assert made["loss"]["y"][39] == pytest.approx(loss_at(39), abs=1e-4)
    assert made["loss"]["h"][36] == pytest.approx(36 / 3600, rel=1e-4)
    assert made["val"]["x"] == [0, 10, 20, 30, 40]
    assert made["val"]["h"][-1] == pytest.approx(40 / 3600, rel=1e-4)
    assert "mfu" not in made  # unknown


def test_a_long_run_has_means(tmp_path: Path) -> None:
    made = run_curves(open_run(make_run(tmp_path / "r", steps=2000)))
    assert made["loss_mean"]["over"] == 21
    at = made["loss_mean"]["x"].index(0)
    assert made["loss_mean"]["y"][at] == pytest.approx(loss_at(0), abs=1e-3)
    middle = made["loss_mean"]["x"][200]
    expected = sum(loss_at(s) for s in range(middle - 10, middle + 11)) / 21
    assert made["loss_mean"]["y"][200] == pytest.approx(expected, rel=1e-5)


def test_accuracies_of_training_and_of_evaluations(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    record = {"kind": "task", "step": 20, "task": "hellaswag", "acc": 0.2, "acc_token": 0.27, "acc_token_stderr": 0.01}
    with open(folder / "metrics.jsonl", "a") as f:
        f.write(json.dumps(record) + "\n")
    add_task(folder, step=40)
    points = task_curves(open_run(folder), {"hellaswag": "acc_token"})["hellaswag"]
    assert (points["x"], points["y"], points["error"]) == ([20, 40], [0.27, 0.31], [0.01, 0.02])


def test_accuracies_of_many_validations_are_thinned(tmp_path: Path) -> None:
    run = open_run(make_run(tmp_path / "r"))
    asked = {"kind": "task", "task": "hellaswag", "examples": 200, "acc": 0.25}
    records = [asked | {"step": step} for step in range(20_000)]
    records[12_345]["acc"] = 0.75
    run = dataclasses.replace(run, records=[*run.records, *records])
    points = task_curves(run, {"hellaswag": "acc"})["hellaswag"]
    assert len(points["x"]) <= 1602
    assert (points["x"][0], points["x"][-1]) == (0, 19_999)
    assert points["y"][points["x"].index(12_345)] == 0.75


def test_points_of_different_sample_sizes_are_not_joined(tmp_path: Path) -> None:
    """Check 200 examples, 500 after a resume, and all examples by `restomod eval`, partly at the same steps."""
    folder = make_run(tmp_path / "r")
    with open(folder / "metrics.jsonl", "a") as f:
        for step, n, share in ((30, 500, 0.3), (10, 200, 0.1), (20, 200, 0.2), (40, 500, 0.4)):
            f.write(json.dumps({"kind": "task", "step": step, "task": "hellaswag", "examples": n, "acc": share}) + "\n")
    metrics = {"acc": {"value": 0.25, "stderr": 0.01}}
    for step in (20, 40):
        add_task(folder, step=step, examples=10_042, metrics=metrics)
    points = task_curves(open_run(folder), {"hellaswag": "acc"})["hellaswag"]
    lines: list[list[tuple[int, int, float]]] = [[]]  # lines of a plot end at a point without a value
    for x, n, y in zip(points["x"], points["examples"], points["y"], strict=True):
        lines = [*lines, []] if y is None else [*lines[:-1], [*lines[-1], (x, n, y)]]
    assert lines == [
        [(10, 200, 0.1), (20, 200, 0.2)],
        [(30, 500, 0.3), (40, 500, 0.4)],
        [(20, 10_042, 0.25), (40, 10_042, 0.25)],
    ]
    assert len(points["error"]) == len(points["h"]) == len(points["x"])
    assert sample_sizes(points) == "200 and 500 and 10,042 examples"
