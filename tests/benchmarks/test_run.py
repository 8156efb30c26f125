"""Tests of the runner: selection of items, time limits, kept results, user errors, and a smoke test of all items."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from benchmarks import records, run
from benchmarks.harness import BenchPlan
from benchmarks.records import Item

ROOT = Path(run.__file__).parents[1]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, BenchPlan]:
    """Replace all items by ones without measurement, `loss` by one that fails, and return their plans."""
    plans: dict[str, BenchPlan] = {}

    def module(name: str) -> types.SimpleNamespace:
        def measure(plan: BenchPlan) -> Item:
            plans[name] = plan
            (plan.scratch / "large").write_text("x")
            if name.endswith("loss"):
                raise RuntimeError("no")
            return Item(name)

        return types.SimpleNamespace(measure=measure)

    monkeypatch.setattr("benchmarks.run.importlib", types.SimpleNamespace(import_module=module))
    return plans


def test_every_item_has_a_file_and_a_time_limit_per_device() -> None:
    files = {path.stem for path in (ROOT / "benchmarks" / "items").glob("*.py")} - {"__init__"}
    assert files == set(run.ITEMS) == set(run.MINUTES["cpu"]) == set(run.MINUTES["cuda"])
    assert sum(minutes for name, minutes in run.MINUTES["cpu"].items() if name not in run.ON_REQUEST) <= 30


def test_long_items_run_only_on_request() -> None:
    assert "shakespeare" not in run.chosen_items(None, "cpu")
    assert list(run.chosen_items("shakespeare,step", "cuda")) == ["step", "shakespeare"]


def test_other_items_continue_after_a_failure_and_earlier_results_are_kept(
    fake: dict[str, BenchPlan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records.write(tmp_path / "cpu.json", {"bench": Item("of benchmarks.gpu")})
    assert run.main(["--only", "step", "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert run.main(["--only", "loader,loss,growth", "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert list(records.read(tmp_path / "cpu.json")) == ["loader", "growth", "step", "bench"]
    assert "loss failed (RuntimeError: no); the others continue" in capsys.readouterr().err
    step = records.read(tmp_path / "cpu.json")["step"]
    assert step.environment["command"].startswith("python -m benchmarks.run --only step")
    assert step.environment["torch"]
    assert (tmp_path / "cpu.md").read_text().startswith("## ")
    assert not any(plan.scratch.exists() for plan in fake.values()), "temporary files are deleted"


def test_time_is_divided_in_proportion(fake: dict[str, BenchPlan], tmp_path: Path) -> None:
    import time

    start = time.monotonic()
    run.main(["--only", "hellaswag,step", "--minutes", "23", "--out", str(tmp_path), "--device", "cpu"])
    hellaswag, step = (fake[f"benchmarks.items.{name}"].deadline - start for name in ("hellaswag", "step"))
    first, second = run.MINUTES["cpu"]["hellaswag"], run.MINUTES["cpu"]["step"]
    assert hellaswag == pytest.approx(60 * 23 * first / (first + second), abs=30)
    assert step == pytest.approx(60 * 23, abs=30), "the next item gets unused time"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--only", "stepp"], "unknown item 'stepp'; did you mean 'step'?"),
        (["--peer", "nanogptt=/"], "unknown peer 'nanogptt'; did you mean 'nanogpt'?"),
        (["--peer", "nanogpt=/nowhere"], "no such folder; clone the project"),
        (["--peer", "nanogpt"], "no such folder; clone the project"),
        (["--data", "/nowhere"], "/nowhere: no such folder"),
        (["--out", "/dev/null/x"], "cannot create this folder"),
    ],
)
def test_a_user_error_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], error: str) -> None:
    assert run.main([*arguments, "--device", "cpu"] if "--out" in arguments else ["--out", "/tmp", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks: error: ")
    assert error in line


def check_all(file: Path, names: set[str]) -> None:
    """Assert that every item has results of restomod and of all contenders that are not absent."""
    items = json.loads(file.read_text())["items"]
    assert set(items) == names
    for name, item in items.items():
        assert item["comparisons"] or item["series"], name
        for comparison in item["comparisons"]:
            ours, *others = comparison["entries"]
            assert ours["absent"] is None, (name, ours)
            for entry in [ours, *others]:
                assert entry["values"] or entry["absent"], (name, entry)
                assert all(v > 0 for values in entry["values"].values() for v in values), (name, entry)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_items_run_without_peers_or_data(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.run", "--smoke", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout + done.stderr
    check_all(tmp_path / "cpu.json", set(run.ITEMS) - set(run.ON_REQUEST))
    assert "nanogpt: no --peer nanogpt=PATH given" in done.stdout
    assert "--data has no" in done.stdout
