"""--price is the price of one GPU for one hour in every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from restomod.analysis.report.usage import HourlyRates, run_usage, usage_rows
from restomod.cli import main
from restomod.runs.reader import open_run
from tests.experiments.sweep.sweeping import run, trials
from tests.runs.made_runs import START, make_run, stamp

PRICE = 1800.0  # US dollars per GPU-hour: 0.5 dollars per second


def started_with(folder: Path, *starts: dict[str, Any], at: tuple[float, ...] = (0,)) -> None:
    """Write the starts of a run: seconds after `START`, and additional values."""
    first = json.loads((folder / "environment.json").read_text())[0]
    written = [first | {"started": stamp(START + s)} | more for s, more in zip(at, starts, strict=True)]
    (folder / "environment.json").write_text(json.dumps(written))


def compared(folder: Path, out: Path) -> dict[str, Any]:
    """Return the record that `compare` writes about a run at `PRICE`."""
    assert main(["compare", str(folder), "--price", str(PRICE), "--json", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())["groups"][0]["runs"][0]
    return found


@pytest.mark.parametrize("gpus", [1, 8])
def test_every_command_counts_every_gpu(
    gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.json"
    assert main(["plan", "gpt2-124m", "--gpu", "a100", "--gpus", str(gpus), "--price", "2", "--json", str(out)]) == 0
    plan = json.loads(out.read_text())
    assert plan["dollars"] == pytest.approx(plan["seconds"] / 3600 * 2 * gpus)

    folder = make_run(tmp_path / "r", steps=40)  # 40 s in steps, 45 s in all
    started_with(folder, {"processes": gpus})
    assert compared(folder, out)["dollars"] == pytest.approx(20 * gpus)
    assert compared(folder, out)["curve"]["dollars"][-1] == pytest.approx(20 * gpus)
    assert f"${20 * gpus:.2f}" in capsys.readouterr().out
    page = tmp_path / "r.md"
    flags = ["--price", str(PRICE), "--out", str(tmp_path / "r.html"), "--markdown", str(page)]
    assert main(["report", str(folder), *flags]) == 0
    assert f"${22.5 * gpus:.2f}" in page.read_text().replace("\\", "")

    monkeypatch.setenv("STAND_IN_PROCESSES", str(gpus))
    code, said = run(tmp_path / "s", "--grid", "optim.lr=0.1", "--steps", "2", "--price", str(PRICE), pause=0.1)
    assert code == 0, said
    (trial,) = trials(tmp_path / "s")
    dollars = json.loads((tmp_path / "s" / "sweep.json").read_text())["dollars"]
    assert dollars == pytest.approx(trial["seconds"] * 0.5 * gpus, abs=0.01)


def test_a_dollar_limit_counts_every_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_PROCESSES", "8")  # four dollars a second: 40 steps of 0.2 s would cost 32
    flags = ("--grid", "optim.lr=0.1", "--steps", "40", "--price", str(PRICE), "--max-dollars", "6")
    code, said = run(tmp_path / "s", *flags, pause=0.2)
    assert code == 75, said
    assert "$6.00 are used" in said
    (trial,) = trials(tmp_path / "s")
    assert trial["state"] == "stopped"
    assert 1.5 <= trial["seconds"] < 6


def test_a_run_resumed_on_other_gpus_costs_the_sum_of_its_sessions(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", steps=40)  # its first step begins after 5 s, each takes 1 s
    started_with(folder, *({"processes": n} for n in (8, 2, 4)), at=(0, 25, 35))  # 20, 10 and 10 steps
    used = run_usage(open_run(folder))
    assert used.gpu_seconds == pytest.approx(25 * 8 + 10 * 2 + 10 * 4)
    assert used.overhead_gpu_seconds == pytest.approx(5 * 8)
    assert compared(folder, tmp_path / "o.json")["dollars"] == pytest.approx((20 * 8 + 10 * 2 + 10 * 4) / 2)
    rows = {name: value for name, value, _ in usage_rows(used, HourlyRates(per_hour=PRICE))}
    assert (rows["Cost"], rows["Cost of overhead"]) == ("$130.00", "$20.00")


@pytest.mark.parametrize(
    ("count", "seconds"),
    [
        ({}, 45),  # absent: one process
        *(({"processes": bad}, 40) for bad in (None, 0, "8", -3)),  # ignored: 40 steps with one process
    ],
)
def test_starts_with_an_unknown_or_impossible_count(count: dict[str, Any], seconds: float, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", steps=40)
    started_with(folder, count)
    assert run_usage(open_run(folder)).gpu_seconds == pytest.approx(seconds)


def test_records_without_a_time_belong_to_the_first_session(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", steps=40, timed=False)
    started_with(folder, {"processes": 8})
    assert run_usage(open_run(folder)).cost(PRICE) == pytest.approx(160)
    assert compared(folder, tmp_path / "o.json")["dollars"] == pytest.approx(160)
