"""Tests of sweeps with `stand_in` in place of training; tests/end_to_end/test_sweep.py trains for real."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from restomod.cli import main
from restomod.commands.sweep import split
from restomod.experiments.sweep import worker as worker_module
from restomod.experiments.sweep.gpu_time import Interval, TrialTimes, gpu_in_use
from restomod.experiments.sweep.journal import drop_torn_line
from restomod.experiments.sweep.worker import Limits, retry_while_disk_full
from restomod.utils.errors import UserError
from tests.experiments.sweep.stand_in import CRASHED, DIVERGED, KILLED, SILENT
from tests.experiments.sweep.sweeping import losses, outcomes, run, start, starts, trials

SIX = "optim.lr=0.1,0.2,0.3,0.4,0.5,0.6"


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until ``condition`` is true, at most ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def test_failing_trials_are_recorded_and_the_others_finish(tmp_path: Path) -> None:
    rates = ["0.1", KILLED, DIVERGED, CRASHED, SILENT, "0.2"]
    code, said = run(tmp_path / "s", "--grid", f"optim.lr={','.join(rates)}", "--steps", "4")
    assert code == 0, said
    found = trials(tmp_path / "s")
    assert [t["state"] for t in found] == ["finished", *["failed"] * 4, "finished"]
    assert [t["parameters"]["optim.lr"] for t in found] == rates
    assert found[1]["reason"] == "killed by SIGKILL (out of memory?)"
    assert found[2]["reason"] == "step 3: the loss is nan, so nothing was updated"
    assert found[3]["reason"] == "exit code 1: RuntimeError: a fault"
    assert found[4]["reason"] == "no finite validation loss"
    for t in (found[0], found[-1]):
        rate = float(t["parameters"]["optim.lr"])
        assert (t["loss"], t["step"]) == (pytest.approx(stand_in_loss(rate, 4)), 4)
    best = min((found[0], found[-1]), key=lambda t: t["loss"])
    assert json.loads((tmp_path / "s" / "sweep.json").read_text())["trials"][0] == best
    shown = [line for line in said.splitlines() if line.startswith(("1 ", "2 "))]
    assert [f"optim.lr={best['parameters']['optim.lr']}" in line for line in shown] == [True, False]


def test_a_sweep_without_any_result_exits_with_1(tmp_path: Path) -> None:
    assert run(tmp_path / "s", "--grid", f"optim.lr={DIVERGED}", "--steps", "4")[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "space",
    [("--grid", "optim.lr=0.1,0.2", "--seeds", "2"), ("--tpe", "optim.lr=0.01..1", "--trials", "4")],
    ids=["grid", "tpe"],
)
def test_a_sweep_that_is_killed_repeatedly_has_the_results_of_an_undisturbed_one(
    tmp_path: Path, space: tuple[str, ...]
) -> None:
    arguments = (*space, "--steps", "8", "--prune", "median")
    code, said = run(tmp_path / "whole", *arguments, pause=0.06)
    assert code == 0, said
    chance = random.Random(space[0])
    folder, kills = tmp_path / "killed", 0

    def logged() -> int:
        return sum(path.read_text().count("\n") for path in folder.glob("trials/*/metrics.jsonl"))

    for _ in range(5):  # kill by progress, not by time: machines differ in speed
        process = start(folder, *arguments, pause=0.06)
        enough = logged() + chance.randint(0, 5)
        until(lambda enough=enough, process=process: logged() >= enough or process.poll() is not None)  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    code, said = run(folder, *arguments, pause=0.06)
    assert code == 0, said
    assert kills >= 2
    assert outcomes(folder) == outcomes(tmp_path / "whole")
    assert losses(folder) == losses(tmp_path / "whole")
    assert len(outcomes(folder)) == 4


def test_a_signal_stops_the_trial_with_a_checkpoint_and_the_same_command_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    process = start(folder, "--grid", "optim.lr=0.1", "--steps", "40", pause=0.1)
    metrics = folder / "trials" / "000-optim.lr-0.1" / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "the same command resumes" in said
    assert trials(folder)[0]["state"] == "stopped"
    reached = json.loads((metrics.parent / "checkpoint.json").read_text())[0]
    assert reached >= 3
    before = metrics.read_text().splitlines()
    code, said = run(folder, "--grid", "optim.lr=0.1", "--steps", "40")
    assert code == 0, said
    assert "resumes" in said
    assert metrics.read_text().splitlines()[: len(before)] == before
    assert starts(folder) == {"000-optim.lr-0.1": 2}
    assert len(losses(folder)["000-optim.lr-0.1"]) == 40


def test_two_processes_share_a_sweep_and_run_every_trial_once(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    processes = [start(folder, "--grid", SIX, "--steps", "5", pause=0.2) for _ in range(2)]
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert all(" starts: " in text for text in said), "one process trained all trials"
    assert list(starts(folder).values()) == [1] * 6
    assert [t["state"] for t in trials(folder)] == ["finished"] * 6


@pytest.mark.slow
def test_a_worker_continues_the_trial_of_a_killed_worker(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    arguments = ("--grid", "optim.lr=0.1,0.2,0.3", "--steps", "60")
    first = start(folder, *arguments, pause=0.5)
    metrics = folder / "trials" / "000-optim.lr-0.1" / "metrics.jsonl"
    until(metrics.exists)
    second = start(folder, *arguments, pause=0.02)
    until((folder / "trials" / "001-optim.lr-0.2" / "metrics.jsonl").exists)
    first.kill()
    first.communicate()
    said, _ = second.communicate(timeout=100)
    assert second.returncode == 0, said
    assert "trial 1 of 3 resumes" in said
    assert [t["state"] for t in trials(folder)] == ["finished"] * 3
    assert starts(folder) == {"000-optim.lr-0.1": 2, "001-optim.lr-0.2": 1, "002-optim.lr-0.3": 1}
    assert [step for _, step, _ in losses(folder)["000-optim.lr-0.1"]] == list(range(1, 61))


def test_seeds_are_repetitions_with_a_mean_and_a_standard_deviation(tmp_path: Path) -> None:
    code, said = run(tmp_path / "s", "--random", "optim.lr=0.01..1", "--trials", "2", "--seeds", "3", "--steps", "3")
    assert code == 0, said
    found = trials(tmp_path / "s")
    assert [t["seed"] for t in found] == [1337, 1338, 1339] * 2
    assert [t["parameters"] for t in found] == [found[0]["parameters"]] * 3 + [found[3]["parameters"]] * 3
    assert found[0]["parameters"] != found[3]["parameters"]
    rows = json.loads((tmp_path / "s" / "sweep.json").read_text())["configurations"]
    assert rows[0]["mean"] < rows[1]["mean"]
    for row in rows:
        own = [t["loss"] for t in found if t["parameters"] == row["parameters"]]
        assert (row["n"], row["mean"]) == (3, pytest.approx(sum(own) / 3))
        assert row["sd"] == pytest.approx(statistics.stdev(own))
        assert f"{row['mean']:.4f} ± {row['sd']:.4f} (standard deviation), 3 seeds" in said


@pytest.mark.slow
def test_a_trial_above_the_median_is_pruned_after_the_warm_up(tmp_path: Path) -> None:
    rates = "0.1,0.11,0.12,0.13,0.14,9"  # only the last is worse than the median
    arguments = ("--grid", f"optim.lr={rates}", "--steps", "12", "--optim.warmup-steps", "4", "--prune", "median")
    code, said = run(tmp_path / "s", *arguments, pause=0.05)
    assert code == 0, said
    found = trials(tmp_path / "s")
    assert [t["state"] for t in found] == ["finished"] * 5 + ["pruned"]
    assert found[-1]["step"] == 4
    assert found[-1]["loss"] == next(loss for _, s, loss in losses(tmp_path / "s")[found[-1]["name"]] if s == 4)


def stand_in_loss(rate: float, steps: int) -> float:
    """Return the validation loss of `stand_in` after ``steps`` steps."""
    return 10 - steps + rate + sum(math.sin(1000 * rate + 1337 + s) / s for s in range(1, steps + 1))


@pytest.mark.parametrize("method", ["median", "hyperband"])
def test_pruning_equals_that_of_optuna(tmp_path: Path, method: str) -> None:
    rates = ["0.5", "0.1", "0.9", "0.3", "0.2", "0.8", "0.7", "2", "3"]
    arguments = ("--steps", "9", "--optim.warmup-steps", "1", "--eval-every", "1", "--prune", method)
    code, said = run(tmp_path / "s", "--grid", f"optim.lr={','.join(rates)}", *arguments)
    assert code == 0, said

    def objective(trial: optuna.Trial) -> float:
        rate = float(rates[trial.number])
        for step in range(1, 10):
            trial.report(stand_in_loss(rate, step), step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return stand_in_loss(rate, 9)

    pruners = optuna.pruners
    pruner = pruners.MedianPruner(n_warmup_steps=1) if method == "median" else pruners.HyperbandPruner(1, 9)
    study = optuna.create_study(study_name="sweep", pruner=pruner)
    study.optimize(objective, n_trials=len(rates))
    expected = [("finished" if t.state.name == "COMPLETE" else "pruned", t.last_step) for t in study.trials]
    assert {state for state, _ in expected} == {"finished", "pruned"}
    assert [(t["state"], t["step"]) for t in trials(tmp_path / "s")] == expected
    assert [t["loss"] for t in trials(tmp_path / "s")] == pytest.approx([t.value for t in study.trials])


@pytest.mark.slow
def test_a_trial_that_would_exceed_the_limit_is_not_started(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    arguments = ("--grid", "optim.lr=0.1,0.2,0.3,0.4", "--steps", "10")
    code, said = run(folder, *arguments, "--max-dollars", "5", "--price", str(5 * 3600 / 9), pause=0.4)
    assert code == 75, said
    states = [t["state"] for t in trials(folder)]
    done = states.count("finished")  # each takes 4 s plus start-up, within a limit of 9 s
    assert 1 <= done <= 2, said
    assert all(t["seconds"] >= 4 for t in trials(folder)[:done])
    assert "would take about" in said
    assert sum(t["seconds"] for t in trials(folder)) < 9
    spent = json.loads((folder / "sweep.json").read_text())["dollars"]
    assert spent == pytest.approx(5 / 9 * sum(t["seconds"] for t in trials(folder)))
    code, said = run(folder, *arguments)
    assert (code, [t["state"] for t in trials(folder)]) == (0, ["finished"] * 4)


def test_a_running_trial_is_stopped_at_the_limit_with_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    arguments = ("--grid", "optim.lr=0.1", "--steps", "50")
    code, said = run(folder, *arguments, "--max-hours", str(2 / 3600), pause=0.2)
    assert code == 75, said
    assert "are used" in said
    (trial,) = trials(folder)
    assert trial["state"] == "stopped"
    assert 2 <= trial["seconds"] < 8
    code, said = run(folder, *arguments)
    assert code == 0, said
    assert starts(folder) == {"000-optim.lr-0.1": 2}
    assert len(losses(folder)["000-optim.lr-0.1"]) == 50


def test_the_closest_limit_counts() -> None:
    assert Limits(hours=2.0, dollars=3.0, price=3.0).used(3600, 3600) == 1.0
    assert Limits(hours=0.5, dollars=3.0, price=3.0).used(900, 900) == 0.5
    assert Limits(dollars=3.0, price=1.5).used(3600, 8 * 3600) == 4.0  # 8 GPUs
    assert Limits(hours=2.0).used(3600, 8 * 3600) == 0.5
    assert Limits().used(3600, 3600) == 0.0


def test_gpu_time_counts_processes_and_a_shared_gpu_once() -> None:
    spans = [
        Interval(0, 0.0, 10.0, "a", 1),
        Interval(1, 4.0, 10.0, "a", 1),  # shares 6 s of the same GPU: 3 s for each
        Interval(2, 0.0, 10.0, "b", 8),
        Interval(2, 20.0, 20.0, "b", 8),  # killed immediately
        Interval(2, 30.0, 31.0, "b", 1),  # resumed on one GPU
    ]
    taken = TrialTimes.from_intervals(range(4), spans)
    assert taken.seconds == {0: 10.0, 1: 6.0, 2: 11.0, 3: 0.0}
    assert taken.gpu_seconds == {0: 7.0, 1: 3.0, 2: 81.0, 3: 0.0}


def test_different_gpus_have_different_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    first = gpu_in_use()
    for name, value, same in (("CUDA_VISIBLE_DEVICES", "0,1", True), ("CUDA_VISIBLE_DEVICES", "1", False)):
        monkeypatch.setenv(name, value)
        assert (gpu_in_use() == first) is same
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert gpu_in_use() != first


def test_a_sweep_under_torchrun_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main(["sweep", "quickstart", "--grid", "optim.lr=1,2", "--out", str(tmp_path / "s")]) == 2
    assert "torchrun" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


# --- errors --------------------------------------------------------------------------------------------------


def test_a_folder_of_another_sweep_or_with_other_files_is_unchanged(tmp_path: Path) -> None:
    assert run(tmp_path / "s", "--grid", "optim.lr=0.1", "--steps", "2")[0] == 0
    before = outcomes(tmp_path / "s")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    for folder, words in (
        ("s", "another sweep (space is optim.lr=0.1 there and optim.lr=0.2 here)"),
        ("other", "is not a sweep and has other files"),
    ):
        code, said = run(tmp_path / folder, "--grid", "optim.lr=0.2", "--steps", "2")
        assert (code, words in said) == (2, True), said
    assert outcomes(tmp_path / "s") == before
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["config.json"]


def test_flags_of_the_sweep_are_separated_from_flags_of_the_trials() -> None:
    shared = ["--steps", "3", "--data.path", "x", "y", "--compile"]
    own, others = split([*shared[:2], "--grid", "a=1", "b=2", *shared[2:], "--max_hours=2", "--seeds", "3"])
    assert own == ["--grid", "a=1", "--grid", "b=2", "--max_hours=2", "--seeds", "3"]
    assert others == shared


# --- a full disk ---------------------------------------------------------------------------------------------


def test_an_incomplete_last_line_of_the_journal_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    for content, kept in ((b"", b""), (b"a\nb\n", b"a\nb\n"), (b"a\nb", b"a\n"), (b"ab", b"")):
        path.write_bytes(content)
        drop_torn_line(path)
        assert path.read_bytes() == kept


def test_a_write_to_a_full_disk_is_repeated_until_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "POLL", 0.01)
    monkeypatch.setattr(worker_module, "DISK_FULL_TIMEOUT", 0.1)
    problems = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "journal")] * 3

    def work() -> str:
        if problems:
            raise problems.pop()
        return "done"

    assert retry_while_disk_full(work) == "done"
    problems.extend([OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "journal")] * 1000)
    with pytest.raises(UserError, match="journal: No space left on device"):
        retry_while_disk_full(work)


def test_a_sweep_needs_no_torch() -> None:
    code = "import restomod.experiments.sweep.worker, sys; assert not {'torch', 'optuna'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["locks", "logs", "trials", "plan.json", "journal.jsonl", "sweep.json"])
def test_a_link_to_a_path_outside_the_sweep_is_rejected(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / name).symlink_to("../theirs" if "." not in name else "../new")
    assert main(["sweep", "quickstart", "--grid", "seed=1,2", "--out", str(tmp_path / "sweep")]) == 2
    assert f"{name} is a link out of" in capsys.readouterr().err
    assert os.listdir(tmp_path / "theirs") == []
    assert not (tmp_path / "new").exists()
