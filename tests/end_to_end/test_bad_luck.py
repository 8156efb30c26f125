"""Runs with non-finite losses, loss spikes, damaged checkpoints and full disks."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import restomod.engine.step as step_module
from restomod.config.run import RunConfig
from restomod.data.batches import Batches, Prefetch
from restomod.engine.signals import StopSignal
from restomod.runs import async_saver as saver_module
from restomod.runs import folder as run_module
from restomod.runs.checkpoint import verify_checkpoint
from restomod.runs.metrics import read_jsonl
from restomod.train import spike_guard as guard_module
from restomod.train import step_log as journal_module
from restomod.train.loop import EXIT_INTERRUPTED, train
from restomod.utils import console as console_module
from restomod.utils.console import Display
from restomod.utils.errors import UserError
from restomod.utils.run_files import list_checkpoints

from .conftest import QUIET


@pytest.fixture
def quick(tiny: RunConfig) -> RunConfig:
    return dataclasses.replace(tiny, sanity_checks=False, eval_every=100, sample_every=100, keep_checkpoints=0)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Factor of the loss by batch."""
    factors: dict[int, float] = {}
    current = [-1]
    get, loss_of = Prefetch.get, step_module.batch_loss

    def noting(self: Prefetch, step: int) -> Any:
        current[0] = step
        return get(self, step)

    def batch_loss(*arguments: Any) -> torch.Tensor:
        return loss_of(*arguments) * factors.get(current[0], 1.0)

    monkeypatch.setattr(Prefetch, "get", noting)
    monkeypatch.setattr(step_module, "batch_loss", batch_loss)
    return factors


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records without their times."""
    found = [record for record in read_jsonl(run / "metrics.jsonl") if record["kind"] == kind]
    return [{key: value for key, value in record.items() if key != "time"} for record in found]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(run)[-1] / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def finite(run: Path) -> bool:
    return all(tensor.isfinite().all() for tensor in weights(run).values())


@pytest.fixture(params=[0, 1], ids=["read at once", "read a step late"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of steps are read immediately (CPU) or one step late (GPU)."""
    monkeypatch.setattr(journal_module, "STEPS_BEHIND", {"cpu": request.param})


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_step_that_is_not_finite_is_skipped(
    quick: RunConfig, tmp_path: Path, poisoned: dict[int, float], policy: Any
) -> None:
    poisoned[5] = float("nan")
    poisoned[9] = float("inf")
    run = tmp_path / "run"
    assert train(dataclasses.replace(quick, on_spike=policy), run, display=QUIET) == 0
    log = records(run, "train")
    assert [record["step"] for record in log] == list(range(12))
    assert [record["step"] for record in log if "skipped" in record] == [5, 9]
    assert (log[5]["loss"], log[5]["grad_norm"]) == (None, None)
    assert "the loss is nan" in log[5]["skipped"]
    assert "the loss is inf" in log[9]["skipped"]
    assert finite(run)
    state = load_file(next((list_checkpoints(run)[-1] / "training_state").glob("*.safetensors")))
    assert state["state.transformer.ln_f.bias.step"].item() == 10  # number of updates


def test_reading_results_late_changes_nothing(
    quick: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations, samples, checkpoints and a target loss wait for all results."""
    config = dataclasses.replace(quick, eval_every=5, sample_every=7, save_every=3)
    runs = []
    for behind in (0, 1, 3):
        monkeypatch.setattr(journal_module, "STEPS_BEHIND", {"cpu": behind})
        runs.append(tmp_path / f"behind {behind}")
        assert train(config, runs[-1], display=QUIET) == 0
    kept = [
        [(r["kind"], r["step"], r.get("loss"), r.get("grad_norm")) for r in read_jsonl(run / "metrics.jsonl")]
        for run in runs
    ]
    assert kept[0] == kept[1] == kept[2]
    for run in runs[1:]:
        assert same_weights(run, runs[0])
    target = kept[0][6][2]  # loss of an early step
    monkeypatch.setattr(journal_module, "STEPS_BEHIND", {"cpu": 1})
    stopped = tmp_path / "stopped"
    assert train(dataclasses.replace(config, target_loss=target), stopped, display=QUIET) == 0
    assert 0 < len(records(stopped, "train")) < 12
    assert records(stopped, "train")[-2]["loss"] <= target or records(stopped, "train")[-1]["loss"] <= target


@pytest.mark.usefixtures("reading")
def test_repeated_skips_roll_back_and_skip_the_data(
    quick: RunConfig, tmp_path: Path, poisoned: dict[int, float], capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned.update(dict.fromkeys((6, 7, 8), float("nan")))
    run = tmp_path / "run"
    assert train(quick, run, display=Display(interactive=False)) == 0
    said = capsys.readouterr().out
    assert "warning: step 8: the loss is nan" in said
    assert "rolled back to step 4; the batches of 5 steps are skipped" in said
    assert records(run, "rollback") == [{"kind": "rollback", "step": 4, "failed_step": 8, "data_offset": 5}]
    log = records(run, "train")
    assert [record["step"] for record in log] == list(range(12))
    assert not any("skipped" in record for record in log)
    # from step 4 on it equals a run on batches 0 to 3 and 9 to 16
    order = [*range(4), *range(9, 17)]
    load = Batches.micro_batches
    other = tmp_path / "other"
    poisoned.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Batches, "micro_batches", lambda self, step, *a: load(self, order[step] if step < 12 else step, *a)
        )
        assert train(quick, other, display=QUIET) == 0
    assert [r["loss"] for r in records(other, "train")] == [r["loss"] for r in log]
    assert same_weights(run, other)


def test_a_stopped_run_resumes_after_a_rollback(quick: RunConfig, tmp_path: Path, poisoned: dict[int, float]) -> None:
    poisoned.update(dict.fromkeys((6, 7, 8), float("nan")))
    assert train(quick, tmp_path / "whole", display=QUIET) == 0
    assert train(dataclasses.replace(quick, steps=12), tmp_path / "parts", display=QUIET) == 0
    for later in list_checkpoints(tmp_path / "parts")[2:]:  # resume from step 8, after the rollback
        subprocess.run(["rm", "-r", str(later)], check=True)
    assert train(quick, tmp_path / "parts", resume=True, display=QUIET) == 0
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert records(tmp_path / "parts", "rollback") == records(tmp_path / "whole", "rollback")


def test_too_many_rollbacks_end_the_run(quick: RunConfig, tmp_path: Path, poisoned: dict[int, float]) -> None:
    poisoned.update(dict.fromkeys(range(6, 100), float("nan")))
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"step \d+: the loss is nan .*, and rolling back to step 4 did not help"):
        train(quick, run, display=QUIET)
    assert [folder.name for folder in list_checkpoints(run)] == ["step_000004"]
    assert finite(run)
    poisoned.clear()
    assert train(quick, run, resume=True, display=QUIET) == 0


def test_without_a_checkpoint_no_rollback_is_possible(
    quick: RunConfig, tmp_path: Path, poisoned: dict[int, float]
) -> None:
    poisoned.update(dict.fromkeys((0, 1, 2), float("nan")))
    with pytest.raises(UserError, match=r"step 2: the loss is nan .*, and there is no checkpoint to roll back to"):
        train(quick, tmp_path / "run", display=QUIET)


def test_a_spike_never_reaches_the_weights(
    quick: RunConfig, tmp_path: Path, poisoned: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_module, "MIN_LOSSES", 4)
    poisoned[9] = 3.0
    config = dataclasses.replace(quick, optim=dataclasses.replace(quick.optim, lr=1e-5))
    assert train(config, tmp_path / "run", display=QUIET) == 0
    (skipped,) = [r for r in records(tmp_path / "run", "train") if "skipped" in r]
    assert skipped["step"] == 9
    assert skipped["loss"] > 30
    assert "standard deviations above the recent mean" in skipped["skipped"]
    with pytest.raises(UserError, match="step 9: the loss is 3"):
        train(dataclasses.replace(config, on_spike="stop"), tmp_path / "stopped", display=QUIET)


@pytest.mark.usefixtures("reading")
def test_a_save_due_at_a_skipped_step_is_deferred(quick: RunConfig, tmp_path: Path, poisoned: dict[int, float]) -> None:
    poisoned.update({3: float("nan"), 7: float("nan"), 8: float("nan")})  # before steps 4, 8 and 9
    assert train(quick, tmp_path / "run", display=QUIET) == 0
    names = [folder.name for folder in list_checkpoints(tmp_path / "run")]
    assert names == ["step_000005", "step_000010", "step_000012"]


@pytest.mark.parametrize("first", [1, 6])
def test_a_stop_among_skipped_steps_resumes_from_the_last_checkpoint(
    quick: RunConfig,
    tmp_path: Path,
    poisoned: dict[int, float],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    first: int,
) -> None:
    poisoned.update({first: float("nan"), first + 1: float("nan")})
    assert train(quick, tmp_path / "whole", display=QUIET) == 0
    get = Prefetch.get

    def interrupted(self: Prefetch, step: int) -> Any:
        if step == first + 1:
            signal.raise_signal(signal.SIGTERM)
        return get(self, step)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Prefetch, "get", interrupted)
        assert train(quick, tmp_path / "run", display=Display(interactive=False)) == EXIT_INTERRUPTED
    said = capsys.readouterr().out
    saved = [folder.name for folder in list_checkpoints(tmp_path / "run")]
    assert saved == ([] if first == 1 else ["step_000004"])
    assert ("stopped after 3 steps without a checkpoint" if first == 1 else "newest checkpoint: step 4") in said
    assert train(quick, tmp_path / "run", resume=True, display=QUIET) == 0
    assert [r["loss"] for r in records(tmp_path / "run", "train")] == [
        r["loss"] for r in records(tmp_path / "whole", "train")
    ]
    assert same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_rollback_to_step_0_restarts_with_later_data(
    quick: RunConfig, tmp_path: Path, poisoned: dict[int, float], optimizer: Any, precision: Any
) -> None:
    """The run then equals a run on the later batches only."""
    optim = dataclasses.replace(quick.optim, optimizer=optimizer)
    config = dataclasses.replace(quick, optim=optim, precision=precision, save_every=100, steps=6)
    config = dataclasses.replace(config, batch_tokens=32, micro_batch=1, eval_tokens=32)  # fp16 is slow on a CPU
    run, other = tmp_path / "run", tmp_path / "other"
    assert stopped_before_the_first_step(config, run) == EXIT_INTERRUPTED
    assert [folder.name for folder in list_checkpoints(run)] == ["step_000000"]
    poisoned.update(dict.fromkeys((2, 3, 4), float("nan")))
    assert train(config, run, resume=True, display=QUIET) == 0
    poisoned.clear()
    assert records(run, "rollback") == [{"kind": "rollback", "step": 0, "failed_step": 4, "data_offset": 5}]
    load = Batches.micro_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "micro_batches", lambda self, step, *a: load(self, step + 5, *a))
        assert train(config, other, display=QUIET) == 0
    assert [r["loss"] for r in records(run, "train")] == [r["loss"] for r in records(other, "train")]
    for name in ("model.safetensors", "training_state/optimizer.safetensors"):
        ours, theirs = (load_file(list_checkpoints(r)[-1] / name) for r in (run, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def stopped_before_the_first_step(config: RunConfig, run: Path) -> int:
    class Requested(StopSignal):
        def __enter__(self) -> StopSignal:
            self.requested = True
            return super().__enter__()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("restomod.train.loop.StopSignal", Requested)
        return train(config, run, display=QUIET)


# --- checkpoints ---------------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_renamed_and_the_result_is_the_same(
    quick: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(quick, whole, display=QUIET) == 0
    assert train(dataclasses.replace(quick, steps=12), run, display=QUIET) == 0
    subprocess.run(["rm", "-r", str(run / "checkpoints/step_000012")], check=True)
    path = run / "checkpoints/step_000008/training_state"
    shard = next(path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    capsys.readouterr()
    assert train(quick, run, resume=True, display=Display(interactive=False)) == 0
    said = capsys.readouterr().out
    assert "warning: unusable checkpoint renamed: " in said
    assert "step_000008" in said
    assert "resuming from step 4" in said
    assert (run / "checkpoints/step_000008.damaged").is_dir()
    assert same_weights(run, whole)
    verify_checkpoint(run / "checkpoints/step_000008")


def test_checkpoints_are_saved_by_time(quick: RunConfig, tmp_path: Path) -> None:
    often = dataclasses.replace(quick, save_every=100, save_every_minutes=1e-6)
    assert train(often, tmp_path / "run", display=QUIET) == 0
    assert len(list_checkpoints(tmp_path / "run")) == 12  # after every step
    never = dataclasses.replace(quick, save_every=100, save_every_minutes=60.0)
    assert train(never, tmp_path / "other", display=QUIET) == 0
    assert len(list_checkpoints(tmp_path / "other")) == 1


def test_the_best_checkpoint_is_kept(quick: RunConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    spoiling = dataclasses.replace(quick.optim, lr=0.5, warmup_steps=8)  # the later, the worse
    config = dataclasses.replace(quick, optim=spoiling, eval_every=4, keep_checkpoints=1, on_spike="skip")
    assert train(config, run, display=QUIET) == 0
    losses = {record["step"]: record["loss"] for record in records(run, "val") if record["step"]}
    best = min(losses, key=losses.__getitem__)
    assert [folder.name for folder in list_checkpoints(run)] == [f"step_{s:06d}" for s in sorted({best, 12})]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk_loses_no_checkpoint(
    quick: RunConfig, tmp_path: Path, policy: str, restomod: Callable, text: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=46m", "tmpfs", str(disk)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted only by root on Linux")
    try:  # a checkpoint has 21 MB
        from tests.end_to_end.conftest import flags

        out = disk / "run"
        process = restomod(
            "train",
            "quickstart",
            "--out",
            str(out),
            *flags(quick),
            "--keep-checkpoints",
            "0",
            "--on-save-error",
            policy,
        )
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2, errors  # at least the last checkpoint is missing
        assert errors.startswith("restomod: error: cannot save ")
        assert "No space left on device" in errors
        assert errors.count("\n") == 1
        if policy == "continue":
            assert len(records(out, "train")) == 12
        whole = list_checkpoints(out)
        assert whole
        for folder in whole:
            verify_checkpoint(folder)
        assert not list((out / "checkpoints").glob(".*"))
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        process = restomod("train", "--resume", str(out), "--steps", "14")
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert len(records(out, "train")) == 14
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def unsaved(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make saving fail at these steps."""
    write = saver_module.write_checkpoint

    def refuse(run: Path, step: int, *arguments: Any) -> Path:
        if step in steps:
            raise UserError("cannot save: No space left on device")
        return write(run, step, *arguments)

    monkeypatch.setattr(saver_module, "write_checkpoint", refuse)


def test_a_run_without_its_last_checkpoint_fails(
    quick: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(quick, on_save_error="continue")
    unsaved(monkeypatch, 8)
    assert train(config, tmp_path / "passing", display=QUIET) == 0
    unsaved(monkeypatch, 8, 12)
    with pytest.raises(UserError, match="No space left"):
        train(config, tmp_path / "lacking", display=QUIET)
    assert [r["step"] for r in records(tmp_path / "lacking", "train")] == list(range(12))


# --- output and logs -----------------------------------------------------------------------------------------


class Broken(io.StringIO):
    """Standard output that fails after a text was written."""

    def __init__(self, error: Exception, after: str) -> None:
        super().__init__()
        self.error, self.after = error, after

    def write(self, text: str) -> int:
        super().write(text)
        if self.after in self.getvalue():
            raise self.error
        return len(text)


@pytest.mark.parametrize(
    ("error", "code", "steps"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 0, 12),
        (OSError(errno.EIO, "Input/output error"), 0, 12),
        (ValueError("I/O operation on closed file"), 0, 12),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 75, 7),  # detected in the next step
    ],
)
@pytest.mark.parametrize("interactive", [False, True])
def test_failing_output_loses_no_checkpoint(
    quick: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    steps: int,
    interactive: bool,
) -> None:
    """The run continues without output; if the reader has exited, it stops with a checkpoint."""
    if interactive and code == 75:
        pytest.skip("a progress bar is drawn when it likes")
    monkeypatch.setattr(console_module, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stdout", Broken(error, "Step" if interactive else "step 6/"))
    assert train(quick, tmp_path / "run", display=Display(interactive)) == code
    assert [r["step"] for r in records(tmp_path / "run", "train")] == list(range(steps))
    verify_checkpoint(tmp_path / "run/checkpoints" / f"step_{steps:06d}")
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count("standard output") == (0 if interactive else 1)


@pytest.mark.parametrize("lasting", [True, False])
def test_a_log_that_cannot_be_written_stops_the_run_with_a_checkpoint(
    quick: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lasting: bool
) -> None:
    """If the next write succeeds, no record is lost."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(quick, whole, display=QUIET) == 0
    append, refused = run_module.append_jsonl, []

    def full(path: Path, record: dict[str, Any]) -> None:
        if record["step"] == 5 and (lasting or not refused):
            refused.append(record)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        append(path, record)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "append_jsonl", full)
        if lasting:
            with pytest.raises(UserError, match=r"metrics\.jsonl: No space left on device.*--resume") as caught:
                train(quick, run, display=QUIET)
            assert "\n" not in str(caught.value)
            verify_checkpoint(run / "checkpoints/step_000007")
        else:
            assert train(quick, run, display=QUIET) == 0
    if lasting:
        assert train(quick, run, resume=True, display=QUIET) == 0
    else:
        assert [r["step"] for r in records(run, "train")] == list(range(12))
    assert same_weights(run, whole)


# --- memory --------------------------------------------------------------------------------------------------


def test_out_of_memory_halves_the_micro_batch(
    quick: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes: list[int] = []
    loss_of = step_module.batch_loss

    def limited(model: Any, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(sizes) >= 20 and len(tokens) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        sizes.append(len(tokens))
        return loss_of(model, tokens, *rest)

    config = dataclasses.replace(quick, micro_batch=4, batch_tokens=256)
    assert train(config, tmp_path / "whole", display=QUIET) == 0
    monkeypatch.setattr(step_module, "batch_loss", limited)
    assert train(config, tmp_path / "run", display=Display(interactive=False)) == 0
    said = capsys.readouterr().out
    assert said.count("out of memory") == 2
    assert "out of memory; the micro-batch is now 2" in said
    assert "out of memory; the micro-batch is now 1" in said
    assert sizes[:20] == [4] * 20
    assert set(sizes[20:]) == {1}
    for ours, theirs in zip(records(tmp_path / "run", "train"), records(tmp_path / "whole", "train"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_out_of_memory_with_one_sequence_is_one_line(
    quick: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_of, calls = step_module.batch_loss, []

    def limited(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return loss_of(*arguments)

    monkeypatch.setattr(step_module, "batch_loss", limited)
    with pytest.raises(
        UserError, match=r"step 0: out of memory with a micro-batch of 1 .*--gradient-checkpointing"
    ) as caught:
        train(quick, tmp_path / "run", display=QUIET)
    assert "\n" not in str(caught.value)


def test_gradient_checkpointing_changes_no_loss(quick: RunConfig, tmp_path: Path) -> None:
    for name, checkpointed in (("stored", False), ("recomputed", True)):
        assert (
            train(dataclasses.replace(quick, gradient_checkpointing=checkpointed), tmp_path / name, display=QUIET) == 0
        )
    assert [r["loss"] for r in records(tmp_path / "stored", "train")] == [
        r["loss"] for r in records(tmp_path / "recomputed", "train")
    ]


def test_deterministic_enables_deterministic_algorithms(quick: RunConfig, tmp_path: Path) -> None:
    try:
        assert train(dataclasses.replace(quick, deterministic=True), tmp_path / "run", display=QUIET) == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
