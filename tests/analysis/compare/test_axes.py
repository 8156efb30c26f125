"""Loss curves by steps, tokens, FLOPs, time and cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from restomod.analysis.compare.axes import Curve, loss_curve, mean_curve, measured_losses
from restomod.runs.reader import open_run
from tests.runs.made_runs import SMALL, simple, train, val, write_run


def line(*points: tuple[float, float]) -> Curve:
    x, loss = np.array(points, dtype=float).T
    return Curve(x, loss)


def test_every_axis_measures_the_same_points(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "a", SMALL, simple({0: 10.8, 50: 6.0, 100: 5.0}, ms=36_000)))
    points = {
        axis: loss_curve(run, "validation loss", axis, 2.0).x.tolist()
        for axis in ("steps", "tokens", "time", "dollars")
    }
    assert points == {
        "steps": [0, 50, 100],
        "tokens": [0, 50 * 512, 100 * 512],
        "time": pytest.approx([0, 0.5, 1.0]),  # steps of 36 s
        "dollars": pytest.approx([0, 1.0, 2.0]),
    }
    flops = loss_curve(run, "validation loss", "flops").x
    assert flops.tolist() == [0, run.flops_at(50), run.flops_at(100)]


def test_time_counts_the_steps_before(tmp_path: Path) -> None:
    records = [
        train(0, 9.0, 3.6e6),
        train(1, 9.0, 7.2e6),
        train(2, 9.0) | {"ms": None},
        val(0, 9),
        val(1, 8),
        val(3, 7),
    ]
    run = open_run(write_run(tmp_path / "a", SMALL, records))
    assert loss_curve(run, "validation loss", "time").x.tolist() == [0, 1, 3]


def test_a_run_without_times_has_no_curve_by_time(tmp_path: Path) -> None:
    records = [{"kind": "train", "step": 0, "loss": 9.0}, val(0, 9), val(1, 8)]
    run = open_run(write_run(tmp_path / "a", SMALL, records))
    assert len(loss_curve(run, "validation loss", "time").x) == 0
    assert len(loss_curve(run, "validation loss", "tokens").x) == 2


def test_training_losses_are_means_over_blocks_that_end_with_the_last_step(tmp_path: Path) -> None:
    losses = np.random.default_rng(0).normal(5, 1, 130)
    records = [train(s, float(loss)) for s, loss in enumerate(losses)]
    steps, loss = measured_losses(open_run(write_run(tmp_path / "a", SMALL, records)), "training loss")
    assert steps[-2:].tolist() == [127, 130]  # 130 steps in 60 points or fewer: blocks of 3
    assert loss[-1] == pytest.approx(losses[127:].mean())
    assert len(steps) == 43


def test_losses_that_are_not_finite_are_skipped(tmp_path: Path) -> None:
    records = [train(0, None), train(1, 8.0)]
    steps, loss = measured_losses(open_run(write_run(tmp_path / "a", SMALL, records)), "training loss")
    assert (steps.tolist(), loss.tolist()) == ([2], [8.0])


def test_a_curve_is_interpolated_linearly_and_unknown_outside_the_measurements() -> None:
    c = line((0, 10), (100, 6), (200, 5))
    assert (c.at(50), c.at(100), c.at(150)) == (8, 6, 5.5)
    assert (c.at(-1), c.at(201)) == (None, None)


@pytest.mark.parametrize(("target", "x"), [(8.0, 50), (6.0, 100), (5.5, 150), (5.0, 200), (4.9, None), (11.0, 0)])
def test_the_first_position_below_a_target(target: float, x: float | None) -> None:
    assert line((0, 10), (100, 6), (200, 5)).first_below(target) == x


def test_the_first_time_counts_where_a_loss_rises_again() -> None:
    assert line((0, 10), (100, 5), (200, 9), (300, 4)).first_below(6) == pytest.approx(80)


def test_a_mean_curve_covers_the_common_range() -> None:
    mean = mean_curve([line((0, 10), (100, 6), (200, 4)), line((50, 9), (150, 5))])
    assert mean.x.tolist() == [50, 100, 150]
    assert mean.loss.tolist() == [(8 + 9) / 2, (6 + 7) / 2, (5 + 5) / 2]
