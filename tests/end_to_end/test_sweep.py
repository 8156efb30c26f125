"""Sweeps of real runs: killed, disk full, invalid configuration, several processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from restomod.config.run import RunConfig
from tests.end_to_end.conftest import flags
from tests.experiments.sweep.sweeping import losses, outcomes, run, start, trials

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture
def shared_flags(tiny: RunConfig) -> list[str]:
    """Return the flags of `tiny` without swept settings and without sanity checks."""
    given = flags(tiny)
    for name in ("--optim.lr", "--model.n-embd", "--eval-tokens"):
        at = given.index(name)
        del given[at : at + 2]
    return [*given, "--no-sanity-checks"]


def test_failed_trials_are_recorded_and_the_others_finish(tmp_path: Path, shared_flags: list[str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        # the checkpoint of width 512 has 300 MB, the others at most 25 MB
        space = ("--grid", "model.n_embd=32,40,33,512,24")
        folder = disk / "sweep"
        process = start(folder, *space, *shared_flags, "--keep-checkpoints", "1", "--no-keep-best", real=True)
        second = folder / "trials" / "001-model.n_embd-40"
        until = time.monotonic() + 400
        while not (second / "metrics.jsonl").exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        (training,) = [
            int(pid)
            for pid in os.listdir("/proc")
            if pid.isdigit() and str(second).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(training, signal.SIGKILL)
        said, _ = process.communicate(timeout=1000)
        assert process.returncode == 0, said
        found = trials(folder)
        assert [t["state"] for t in found] == ["finished", "failed", "failed", "failed", "finished"], said
        assert found[1]["reason"].startswith("killed by SIGKILL")
        assert "model.n_embd 33 is not a multiple of model.n_head 2" in found[2]["reason"]
        assert "No space left on device" in found[3]["reason"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_sweep_killed_at_random_equals_an_uninterrupted_one(tmp_path: Path, shared_flags: list[str]) -> None:
    arguments = ("--grid", "optim.lr=1e-3,3e-3", *shared_flags)
    began = time.monotonic()
    code, said = run(tmp_path / "whole", *arguments, real=True)
    assert code == 0, said
    whole = time.monotonic() - began
    chance, kills = random.Random(5), 0
    while True:
        process = start(tmp_path / "killed", *arguments, real=True)
        try:
            said, _ = process.communicate(timeout=chance.uniform(0.3, 0.8) * whole if kills < 3 else 600)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert process.returncode == 0, said
    assert kills > 0
    assert outcomes(tmp_path / "killed") == outcomes(tmp_path / "whole")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_two_processes_share_a_sweep(tmp_path: Path, shared_flags: list[str]) -> None:
    arguments = ("--grid", "optim.lr=1e-3,2e-3,3e-3", *shared_flags)
    folder = tmp_path / "shared"
    processes = [start(folder, *arguments, real=True) for _ in range(2)]
    said = [process.communicate(timeout=1000)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert [text.count(" starts: ") > 0 for text in said] == [True, True], said
    assert "".join(said).count(" starts: ") == 3
    assert "".join(said).count(" resumes: ") == 0
    assert [t["state"] for t in trials(folder)] == ["finished"] * 3
    assert all(len([k for k, _, _ in run if k == "train"]) == 12 for run in losses(folder).values())


def test_a_trial_equals_the_run_of_train(tmp_path: Path, shared_flags: list[str]) -> None:
    code, said = run(tmp_path / "sweep", "--grid", "optim.lr=2e-3", *shared_flags, real=True)
    assert code == 0, said
    command = ["train", "quickstart", *shared_flags, "--optim.lr", "2e-3", "--out", str(tmp_path / "trials" / "alone")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "restomod", *command], check=True, cwd=tmp_path, env=environment)
    (ours,) = losses(tmp_path / "sweep").values()
    assert ours == losses(tmp_path)["alone"]
    assert trials(tmp_path / "sweep")[0]["loss"] == ours[-1][2]
