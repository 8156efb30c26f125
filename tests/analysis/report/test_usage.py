"""FLOPs, hours, downtime, cost and energy of runs with known times."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

from restomod.analysis.report.usage import HourlyRates, flops_text, run_usage, usage_rows
from restomod.config.presets import preset
from restomod.runs.reader import open_run
from tests.runs.made_runs import START, make_run, stamp


def test_a_run_of_known_seconds(tmp_path: Path) -> None:
    used = run_usage(open_run(make_run(tmp_path / "r", steps=40)))
    assert (used.steps, used.tokens) == (40, 40 * 512)
    assert used.in_steps == pytest.approx(40)
    assert used.wall == pytest.approx(45)  # 5 s before the first step
    assert used.overhead == pytest.approx(5)
    assert used.downtime == 0
    assert used.cost(3600.0) == pytest.approx(45)
    assert used.energy(1000.0) == pytest.approx(45 / 3600)


def test_flops_are_those_of_gpt2(tmp_path: Path) -> None:
    config = dataclasses.replace(preset("gpt2-124m"), batch_tokens=2048)
    used = run_usage(open_run(make_run(tmp_path / "r", 10, config)))
    head_and_blocks = 50257 * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768  # the matrices, biases and norms
    assert used.flops == 10 * 2048 * (6 * head_and_blocks + 12 * 12 * 768 * 1024)


def test_time_between_sessions_is_downtime_without_energy(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", steps=40)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["step"] >= 20 and record["kind"] == "train":  # an hour later
            record["time"] += 3600
    records = [r for r in records if r["kind"] == "train"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    first = json.loads((folder / "environment.json").read_text())[0]
    again = first | {"started": stamp(START + 3600 + 20)}
    (folder / "environment.json").write_text(json.dumps([first, again]))
    used = run_usage(open_run(folder))
    assert used.sessions == 2
    assert used.wall == pytest.approx(3645)
    assert used.overhead == pytest.approx(3605)
    assert used.downtime == pytest.approx(3600 + 20 - 25)  # from the last record, at second 25
    assert used.energy(1000.0) == pytest.approx((3645 - 3595) / 3600)


def test_a_run_of_many_sessions_takes_linear_time(tmp_path: Path) -> None:
    """Check a preemptible machine: 8,000 sessions of 10 steps, one minute apart."""
    one = open_run(make_run(tmp_path / "r", steps=2))
    sessions, second = [one.environments[0] | {"started": stamp(START + 60 * i)} for i in range(8000)], one.train[0]
    records = [second | {"step": i, "time": START + 60 * (i // 10) + 1 + i % 10} for i in range(80_000)]
    began = time.process_time()
    used = run_usage(dataclasses.replace(one, environments=sessions, records=records))
    assert time.process_time() - began < 3
    assert used.downtime == pytest.approx(7999 * (60 - 10))


def test_records_without_times(tmp_path: Path) -> None:
    used = run_usage(open_run(make_run(tmp_path / "r", timed=False)))
    assert used.wall is None
    assert used.overhead is None
    rows = {name: (value, remark) for name, value, remark in usage_rows(used, HourlyRates(per_hour=90.0))}
    assert rows["Wall clock"][0] == "unknown"
    assert rows["Cost"][0] == "$1.00"
    assert "$90" in rows["Cost"][1]
    assert rows["Energy"][0] == "unknown"


def test_rows_with_prices(tmp_path: Path) -> None:
    used = run_usage(open_run(make_run(tmp_path / "r")))
    rows = {name: value for name, value, _ in usage_rows(used, HourlyRates(per_hour=80.0, watts=200.0))}
    assert rows["Cost"] == "$1.00"
    assert rows["Cost of overhead"] == "$0.11"
    assert rows["Energy"] == "0.0025 kWh"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (8.55e18, "8.55 × 10¹⁸"), (1, "1.00 × 10⁰"), (10**12, "1.00 × 10¹²")]
)
def test_flops(value: float, text: str) -> None:
    assert flops_text(value) == text
