"""A killed and resumed run is bit-identical to an uninterrupted run."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from restomod.config.run import Precision, RunConfig
from restomod.config.serialize import read_config
from restomod.runs import run_lock
from restomod.runs.metrics import SampleRecord, read_jsonl
from restomod.train.loop import EXIT_INTERRUPTED, train
from restomod.utils.errors import UserError
from restomod.utils.temporary import NAME

from .conftest import QUIET, flags, losses

Start = Callable[..., subprocess.Popen[str]]


def same_checkpoint(a: Path, b: Path, step: int) -> bool:
    """Return whether weights and optimizer state of two runs are bit-identical."""
    for name in ("model.safetensors", "training_state/optimizer.safetensors"):
        tensors, others = (load_file(run / "checkpoints" / f"step_{step:06d}" / name) for run in (a, b))
        assert len(tensors) > 20
        if tensors.keys() != others.keys() or not all(torch.equal(tensors[k], others[k]) for k in tensors):
            return False
    return True


def assert_same_run(a: Path, b: Path, step: int) -> None:
    """Assert equal losses and equal checkpoints of ``step``."""
    assert losses(a) == losses(b)
    assert same_checkpoint(a, b, step)


def kill_after(records: int, delay: float, process: subprocess.Popen[str], run: Path) -> None:
    """Kill a training process (SIGKILL) ``delay`` seconds after it has logged a number of new records."""
    log = run / "metrics.jsonl"
    before, new = _count_lines(log), 0
    while process.poll() is None and new < records:
        now = _count_lines(log)
        new += max(0, now - before)  # a resumed run first removes records
        before = now
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.communicate()


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def check_kills(tiny: RunConfig, tmp_path: Path, restomod: Start, kills: int, seed: int, threads: int = 1) -> None:
    """Kill and resume a run ``kills`` times, let it finish, and compare it with an uninterrupted run."""
    reference, killed = tmp_path / "runs/reference", tmp_path / "runs/killed"
    _, error = restomod("train", "quickstart", "--out", str(reference), *flags(tiny), threads=threads).communicate()
    assert (reference / "checkpoints" / f"step_{tiny.steps:06d}").exists(), error
    chance = random.Random(seed)
    for attempt in range(kills):
        arguments = ("--resume", str(killed)) if attempt else ("quickstart", "--out", str(killed), *flags(tiny))
        process = restomod("train", *arguments, threads=threads)
        kill_after(chance.randrange(1, tiny.steps), chance.uniform(0, 0.05), process, killed)
    output, error = restomod("train", "--resume", str(killed), threads=threads).communicate(timeout=120)
    assert "finished" in output or "already" in output, error
    assert_same_run(killed, reference, tiny.steps)
    assert read_jsonl(killed / "samples.jsonl", SampleRecord) == read_jsonl(reference / "samples.jsonl", SampleRecord)


def test_sigkill_at_a_random_moment_changes_nothing(tiny: RunConfig, tmp_path: Path, restomod: Start) -> None:
    seed = random.randrange(1000)
    print(f"seed {seed}")
    check_kills(tiny, tmp_path, restomod, kills=1, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "precision"), [(0, "fp32"), (1, "bf16")])
def test_several_kills_change_nothing(
    tiny: RunConfig, tmp_path: Path, restomod: Start, seed: int, precision: Precision
) -> None:
    config = dataclasses.replace(tiny, precision=precision)
    check_kills(config, tmp_path, restomod, kills=4, seed=seed, threads=2)


def test_a_kill_during_a_save_keeps_the_previous_checkpoint(tiny: RunConfig, tmp_path: Path, restomod: Start) -> None:
    reference, killed = tmp_path / "runs/reference", tmp_path / "runs/killed"
    train(tiny, reference, display=QUIET)
    die_before_second_rename = """
import os, pathlib, signal, sys
rename, calls = pathlib.Path.rename, []
def deadly(self, target):
    calls.append(target)
    if len([name for name in calls if "step_" in str(name)]) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
pathlib.Path.rename = deadly
from restomod.cli import main
sys.exit(main())
"""
    process = restomod(
        "train", "quickstart", "--out", str(killed), *flags(tiny), program=("-c", die_before_second_rename)
    )
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    left, whole = sorted((killed / "checkpoints").iterdir())
    assert NAME.fullmatch(left.name)
    assert whole.name == "step_000004"

    assert train(tiny, killed, resume=True, display=QUIET) == 0
    assert_same_run(killed, reference, tiny.steps)
    assert not list((killed / "checkpoints").glob(".*")), "the unfinished checkpoint was left behind"


def test_a_partly_deleted_checkpoint_is_removed_at_the_next_start(
    tiny: RunConfig, tmp_path: Path, restomod: Start
) -> None:
    run = tmp_path / "run"
    die_before_deleting = """
import os, shutil, signal, sys
rmtree = shutil.rmtree
def deadly(path, *more, **named):
    if str(path).endswith(".tmp") and os.listdir(path):
        os.kill(os.getpid(), signal.SIGKILL)
    return rmtree(path, *more, **named)
shutil.rmtree = deadly
from restomod.cli import main
sys.exit(main())
"""
    config = dataclasses.replace(tiny, steps=2, save_every=1, keep_checkpoints=1)
    more = ("--no-keep-best",)
    process = restomod(
        "train", "quickstart", "--out", str(run), *flags(config), *more, program=("-c", die_before_deleting)
    )
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    left, whole = sorted((run / "checkpoints").iterdir())
    assert NAME.fullmatch(left.name)
    assert whole.name == "step_000002"
    assert train(read_config(run), run, resume=True, display=QUIET) == 0
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_000002"]


SELDOM = [signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]


@pytest.mark.parametrize(
    "sent", [signal.SIGINT, signal.SIGTERM, *(pytest.param(s, marks=pytest.mark.slow) for s in SELDOM)]
)
def test_a_stop_signal_saves_a_checkpoint_and_prints_how_to_resume(
    tiny: RunConfig, tmp_path: Path, restomod: Start, sent: signal.Signals
) -> None:
    run = tmp_path / "run"
    config = dataclasses.replace(tiny, steps=100_000, eval_every=100_000, sample_every=100_000, save_every=100_000)
    process = restomod("train", "quickstart", "--out", str(run), *flags(config))
    while len(read_jsonl(run / "metrics.jsonl")) < 5 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(sent)
    output, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED, error
    assert f"restomod train --resume {run}" in output
    (checkpoint,) = (run / "checkpoints").iterdir()
    trained = [r for r in read_jsonl(run / "metrics.jsonl") if r["kind"] == "train"]
    assert checkpoint.name == f"step_{len(trained):06d}"


def test_a_signal_while_text_is_prepared_leaves_nothing_behind(
    tiny: RunConfig, tmp_path: Path, restomod: Start
) -> None:
    slow = """
import sys, time
from restomod.data.prepare import worker
encoded = worker.encoded
def waiting(*arguments):
    yield next(encoded(*arguments))
    open("began", "w").close()
    time.sleep(60)
worker.encoded = waiting
from restomod.cli import main
sys.exit(main())
"""
    process = restomod("train", "quickstart", "--out", "runs/new", *flags(tiny), program=("-c", slow))
    while not (tmp_path / "began").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    assert len(list((tmp_path / "data").iterdir())) == 2  # partial file and its lock
    process.terminate()
    _, error = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM
    assert "Traceback" not in error
    assert list((tmp_path / "data").iterdir()) == []
    assert not (tmp_path / "runs").exists()


def test_a_run_in_training_is_locked(tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(run_lock, "PATIENCE", 0.2)
    assert train(tiny, run, display=QUIET) == 0
    (run / "checkpoints" / f".restomod.{'0' * 16}.tmp").mkdir()  # simulates a write in progress
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"kind": "train", "step": 12, "loss": 1.0}\n')
    with open(run / "config.json", "a") as f:
        f.write("\n")

    def state() -> dict[Path, bytes | None]:
        return {path: path.read_bytes() if path.is_file() else None for path in run.rglob("*")}

    lock = run_lock.RunLock(run)
    lock.take(resume=True)
    before = state()
    with pytest.raises(UserError, match=f"process {os.getpid()} on "):
        train(dataclasses.replace(tiny, steps=14), run, resume=True, display=QUIET)
    assert state() == before
    lock.release()
    assert train(dataclasses.replace(tiny, steps=14), run, resume=True, display=QUIET) == 0
    assert [r["step"] for r in read_jsonl(run / "metrics.jsonl") if r["kind"] == "train"] == list(range(14))


def test_a_stop_before_the_first_step_can_be_resumed_too(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import restomod.train.loop as loop_module

    def interrupted(*arguments: object) -> None:
        evaluate(*arguments)  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGINT)

    evaluate = loop_module.evaluate
    monkeypatch.setattr(loop_module, "evaluate", interrupted)
    assert train(tiny, tmp_path / "stopped", display=QUIET) == EXIT_INTERRUPTED
    monkeypatch.undo()
    assert train(tiny, tmp_path / "stopped", resume=True, display=QUIET) == 0
    train(tiny, tmp_path / "reference", display=QUIET)
    assert_same_run(tmp_path / "stopped", tmp_path / "reference", tiny.steps)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("metrics.jsonl", b"5\n\xff\xfe{"),
        ("samples.jsonl", b"[]\n{"),
        ("environment.json", b"garbage"),
        ("data.json", b"garbage"),
        ("config.json", b"["),
    ],
)
def test_a_damaged_record_is_skipped_or_refused_in_one_line(
    tiny: RunConfig, tmp_path: Path, name: str, damage: bytes
) -> None:
    run = tmp_path / "run"
    train(dataclasses.replace(tiny, steps=2), run, display=QUIET)
    with open(run / name, "ab") as f:
        f.write(damage)
    if name.endswith(".jsonl"):
        assert train(dataclasses.replace(tiny, steps=4), run, resume=True, display=QUIET) == 0
        assert [step for kind, step, _ in losses(run) if kind == "train"] == [0, 1, 2, 3]
    else:
        with pytest.raises(UserError, match=f"{name} is damaged"):
            train(read_config(run), run, resume=True, display=QUIET)


def test_a_run_stops_with_a_checkpoint_when_the_reader_of_its_output_exits(
    tiny: RunConfig, tmp_path: Path, restomod: Start
) -> None:
    run = tmp_path / "run"
    process = restomod("train", "quickstart", "--out", str(run), *flags(dataclasses.replace(tiny, steps=100_000)))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == EXIT_INTERRUPTED
    assert f"restomod train --resume {run}" in process.stderr.read()
    assert len(list((run / "checkpoints").iterdir())) == 1
