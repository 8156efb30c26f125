"""Runs under torchrun: stop signals, killed ranks, restarts."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from restomod.config.run import RunConfig
from restomod.runs.checkpoint import verify_checkpoint
from restomod.runs.metrics import read_jsonl
from restomod.train.loop import train
from restomod.utils.run_files import list_checkpoints
from tests.processes import results

from .conftest import QUIET, flags
from .test_processes import NEVER, resume, same_curve, succeeded, train_quietly
from .test_resume import assert_same_run

pytestmark = pytest.mark.slow

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def torchrun(tmp_path: Path) -> Start:
    """Function that starts `restomod train` on two ranks with torchrun."""

    def start(*arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
        return subprocess.Popen(
            [sys.executable, *torchrun, "-m", "restomod", "train", *arguments],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def workers(torchrun: subprocess.Popen[str]) -> list[int]:
    """Return the process ids of torchrun's ranks, in order."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(torchrun.pid)], capture_output=True, text=True).stdout
    by_rank = {}
    for pid in map(int, listed.split()):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks = [int(e.removeprefix(b"RANK=")) for e in environment if e.startswith(b"RANK=")]
        by_rank |= dict.fromkeys(ranks, pid)
    return [by_rank[rank] for rank in sorted(by_rank)]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.005)


def trained(run: Path) -> int:
    """Return the number of logged steps of a run."""
    return sum(r["kind"] == "train" for r in read_jsonl(run / "metrics.jsonl"))


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("restomod: error:")]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_stops_all_after_the_same_step(
    shared: RunConfig, tmp_path: Path, torchrun: Start, sent: signal.Signals
) -> None:
    """Ctrl-C in a terminal reaches torchrun only, because its ranks are in separate sessions."""
    run, reference = tmp_path / "run", tmp_path / "reference"
    config = dataclasses.replace(shared, steps=200, save_every=NEVER)
    assert train_two(config, reference)
    process = torchrun("quickstart", "--out", str(run), *flags(config))
    wait_for(lambda: trained(run) >= 4, process)
    process.send_signal(sent)
    output, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert not errors(error)
    assert f"resume with: restomod train --resume {run}" in output
    (checkpoint,) = list_checkpoints(run)
    assert checkpoint.name == f"step_{trained(run):06d}"
    assert trained(run) < config.steps
    succeeded(resume(2, run))
    assert_same_run(run, reference, config.steps)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_killing_torchrun_itself_stops_its_processes_with_a_checkpoint(
    shared: RunConfig, tmp_path: Path, torchrun: Start
) -> None:
    run, reference = tmp_path / "run", tmp_path / "reference"
    config = dataclasses.replace(shared, steps=200, save_every=NEVER)
    assert train_two(config, reference)
    process = torchrun("quickstart", "--out", str(run), *flags(config))
    wait_for(lambda: trained(run) >= 4, process)
    started = workers(process)
    assert len(started) == 2
    process.kill()
    try:
        output, error = process.communicate(timeout=30)  # until all ranks have closed their output
        end = time.monotonic() + 10  # a process closes its files before it ends
        while any(map(alive, started)):
            assert time.monotonic() < end, "they live on"
            time.sleep(0.01)
    finally:
        for pid in filter(alive, started):
            os.kill(pid, signal.SIGKILL)
    assert not errors(error)
    assert f"resume with: restomod train --resume {run}" in output
    (checkpoint,) = list_checkpoints(run)
    verify_checkpoint(checkpoint)
    assert checkpoint.name == f"step_{trained(run):06d}"
    assert trained(run) < config.steps
    succeeded(resume(2, run))
    assert_same_run(run, reference, config.steps)


@pytest.mark.parametrize("save_every", [NEVER, 20], ids=["without a checkpoint", "from a checkpoint"])
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_a_killed_run(
    shared: RunConfig, tmp_path: Path, torchrun: Start, rank: int, save_every: int
) -> None:
    reference, run = tmp_path / "reference", tmp_path / "run"
    config = dataclasses.replace(shared, steps=100, save_every=save_every)
    assert train_two(config, reference)
    process = torchrun("quickstart", "--out", str(run), *flags(config), restarts=3)
    saves = save_every < config.steps
    # A step is logged before its checkpoint is complete, because checkpoints are saved asynchronously.
    wait_for(lambda: bool(list_checkpoints(run)) if saves else trained(run) >= 1, process)
    os.kill(workers(process)[rank], signal.SIGKILL)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert_same_run(run, reference, config.steps)
    assert ("resuming from step " in output) == saves


def train_two(config: RunConfig, run: Path) -> bool:
    return results(2, train_quietly, config, run) == [0, 0]


def test_torchrun_restarts_a_run_after_every_kill(shared: RunConfig, tmp_path: Path, torchrun: Start) -> None:
    reference, run = tmp_path / "reference", tmp_path / "run"
    config = dataclasses.replace(shared, steps=100)
    assert train_two(config, reference)
    process = torchrun("quickstart", "--out", str(run), *flags(config), restarts=3)
    killed: set[int] = set()
    for at in (1, 5, 9):
        wait_for(lambda at=at: trained(run) >= at and not killed & set(workers(process)), process)
        killed.update(workers(process))
        os.kill(random.choice(workers(process)), signal.SIGKILL)
        time.sleep(0.5)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert_same_run(run, reference, config.steps)


@pytest.mark.parametrize("rank", [0, 1])
def test_without_restarts_a_kill_ends_in_one_line(
    shared: RunConfig, tmp_path: Path, torchrun: Start, rank: int
) -> None:
    run = tmp_path / "run"
    process = torchrun("quickstart", "--out", str(run), *flags(dataclasses.replace(shared, steps=NEVER)))
    wait_for(lambda: trained(run) >= 5, process)
    os.kill(workers(process)[rank], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(errors(error)) == 1, error
    assert "another process of this run was lost" in errors(error)[0]
    assert errors(error)[0].endswith("; resume with `restomod train --resume RUN`")
    assert error.count("Traceback") == 1, "torchrun's own, which it prints last"


def test_an_error_is_one_line_among_torchruns(shared: RunConfig, tmp_path: Path, torchrun: Start) -> None:
    run = tmp_path / "run"
    run.mkdir()
    process = torchrun("quickstart", "--out", str(run), *flags(shared))
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = errors(error)
    assert "already exists" in line


def test_one_rank_under_torchrun_equals_a_single_process(shared: RunConfig, tmp_path: Path) -> None:
    run, reference = tmp_path / "run", tmp_path / "reference"
    command = ["-m", "torch.distributed.run", "--standalone", "-m", "restomod", "train", "quickstart"]
    done = subprocess.run([sys.executable, *command, "--out", str(run), *flags(shared)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert train(shared, reference, display=QUIET) == 0
    same_curve(run, reference)


def test_random_kills_change_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.kills", "--kills", "8"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit for bit" in done.stdout
