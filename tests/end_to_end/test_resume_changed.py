"""Resuming with other settings, another precision, or files of another run."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from restomod.cli import main
from restomod.config.run import DataConfig, ModelConfig, OptimConfig, Precision, RunConfig, SamplingConfig
from restomod.config.serialize import read_config
from restomod.runs.checkpoint import progress
from restomod.runs.config_diff import FIXED
from restomod.runs.metrics import read_jsonl
from restomod.train.loop import train
from restomod.utils.console import Display
from restomod.utils.errors import UserError
from restomod.utils.files import sha256_file
from restomod.utils.run_files import list_checkpoints
from tests.processes import launch

from .conftest import QUIET, WORDS


def short(folder: Path) -> RunConfig:
    """Two steps of a one-layer GPT-2 on text in ``folder``."""
    return RunConfig(
        steps=2,
        batch_tokens=64,
        sequence_length=16,
        micro_batch=1,
        model=ModelConfig(n_layer=1, n_head=2, n_embd=32, n_positions=16),
        data=DataConfig(source="text", path=str(folder / "text"), val_fraction=0.2, cache=str(folder / "data")),
        optim=OptimConfig(lr=3e-3, warmup_steps=1),
        sampling=SamplingConfig(prompts=("the",), max_tokens=2),
        eval_tokens=32,
        precision="fp32",
        sanity_checks=False,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only folder with a text and a run of two steps."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text").mkdir()
    chance = random.Random(0)
    for i in range(4):
        (folder / "text" / f"{i}.txt").write_text(" ".join(chance.choices(WORDS.split(), k=300)))
    train(short(folder), folder / "run", display=QUIET)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of that run in another folder."""
    return shutil.copytree(made / "run", tmp_path / "run")


def content(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def trained(run: Path) -> list[int]:
    return [r["step"] for r in read_jsonl(run / "metrics.jsonl") if r["kind"] == "train"]


def rewrite_hash(checkpoint: Path, name: str) -> None:
    """Update the SHA-256 of a file in `COMPLETE`."""
    record = json.loads((checkpoint / "COMPLETE").read_text())
    file = checkpoint / name
    record["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    (checkpoint / "COMPLETE").write_text(json.dumps(record))


# --- settings ------------------------------------------------------------------------------------------------

CHANGED: dict[str, dict[str, Any]] = {
    "steps": {},  # every case makes a third step
    "target_loss": {"target_loss": 0.1},
    "micro_batch": {"micro_batch": 2},
    "eval_every": {"eval_every": 1},
    "eval_tokens": {"eval_tokens": None},
    "eval_tasks": {"eval_tasks": "a file of passages"},
    "eval_limit": {"eval_limit": 1},
    "sample_every": {"sample_every": 1},
    "sampling": {"sampling": SamplingConfig(prompts=("a", "b"), max_tokens=1, top_p=0.5)},
    "save_every": {"save_every": 1},
    "save_every_minutes": {"save_every_minutes": None},
    "keep_checkpoints": {"keep_checkpoints": 1},
    "keep_best": {"keep_best": False},
    "keep_every": {"keep_every": 2},
    "keep_gb": {"keep_gb": 1e-9},
    "track": {"track": ("tensorboard",)},
    "on_save_error": {"on_save_error": "continue"},
    "on_spike": {"on_spike": "stop"},
    "spike_sigmas": {"spike_sigmas": 0.0},
    "device": {"device": "cpu"},
    "precision": {"precision": "bf16"},
    "parallel": {"parallel": "fsdp"},  # two ranks
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "deterministic": {"deterministic": True},
    "compile": {"compile": "off"},
    "residual_dtype": {"residual_dtype": "bf16", "precision": "bf16"},
    "sanity_checks": {"sanity_checks": True},
    "data": {"data": "another cache"},
}


def test_every_changeable_setting_is_tested() -> None:
    assert CHANGED.keys() == {field.name for field in dataclasses.fields(RunConfig)} - set(FIXED)


@pytest.mark.parametrize("name", sorted(CHANGED))
def test_a_run_resumes_with_another_setting(name: str, run: Path, made: Path, tmp_path: Path) -> None:
    if name == "parallel":
        ended = launch(2, resume_in_parallel, run)
        assert [e.code for e in ended] == [0, 0], [e.error for e in ended]
    else:
        if name == "track":
            pytest.importorskip("tensorboard")
        change = CHANGED[name]
        if name == "data":
            change = {"data": dataclasses.replace(short(made).data, cache=str(tmp_path / "elsewhere"))}
        if name == "eval_tasks":
            (tmp_path / "passages.jsonl").write_text('{"text": "the cat sleeps"}\n')
            change = {"eval_tasks": (f"lambada={tmp_path / 'passages.jsonl'}",)}
        before = torch.are_deterministic_algorithms_enabled()
        try:
            config = dataclasses.replace(read_config(run), steps=3, **change)
            assert train(config, run, resume=True, display=QUIET) == 0
        finally:
            torch.use_deterministic_algorithms(before)
        assert getattr(read_config(run), name) == getattr(config, name)
    assert trained(run) == [0, 1, 2]
    assert progress(list_checkpoints(run)[-1])[0] == 3


def resume_in_parallel(run: Path) -> None:
    """Train on one of two ranks that shard the model."""
    raise SystemExit(main(["train", "--resume", str(run), "--steps", "3", "--parallel", "fsdp"]))


# --- precision -----------------------------------------------------------------------------------------------

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("before", PRECISIONS)
def test_a_run_resumes_in_any_precision(made: Path, tmp_path: Path, before: Precision, optimizer: Any) -> None:
    """The optimizer state is kept in both directions; only fp16 has a loss scale."""
    optim = dataclasses.replace(short(made).optim, optimizer=optimizer)
    config = dataclasses.replace(short(made), optim=optim, precision=before, keep_checkpoints=0)
    run = tmp_path / "run"
    assert train(config, run, display=QUIET) == 0
    for steps, precision in enumerate((*(p for p in PRECISIONS if p != before), before), start=3):
        config = dataclasses.replace(config, steps=steps, precision=precision)
        assert train(config, run, resume=True, display=QUIET) == 0
        states = [load_file(c / "training_state/optimizer.safetensors") for c in list_checkpoints(run)]
        scale = {name: value.item() for name, value in states[-1].items() if name.startswith("loss_scale")}
        fresh = {"loss_scale.factor": 2.0**16, "loss_scale.finite_steps": 1.0}
        assert scale == (fresh if precision == "fp16" else {})
        assert states[-1]["state.transformer.ln_f.bias.step"] == steps
    assert trained(run) == list(range(steps))


# --- checkpoints that are not the run's own ------------------------------------------------------------------


def test_a_checkpoint_of_another_seed_is_renamed(run: Path, made: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train(dataclasses.replace(short(made), seed=1, steps=4), other, display=QUIET)
    shutil.copytree(other / "checkpoints/step_000004", run / "checkpoints/step_000004")
    said: list[str] = []
    assert train(dataclasses.replace(read_config(run), steps=6), run, resume=True, display=heard(said)) == 0
    assert any("step_000004 belongs to another run: seed is 1, not 1337" in line for line in said)
    assert any("resuming from step 2" in line for line in said)
    assert trained(run) == list(range(6))
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(other / "checkpoints", run / "checkpoints")
    before = content(run)
    with pytest.raises(UserError, match="step_000004 belongs to another run: seed is 1, not 1337"):
        train(dataclasses.replace(read_config(run), steps=8), run, resume=True, display=QUIET)
    assert content(run) == before


@pytest.mark.parametrize("what", ["optim.lr", "document_mask", "data fingerprint"])
def test_a_checkpoint_of_other_settings_or_data_is_refused(what: str, run: Path, made: Path, tmp_path: Path) -> None:
    config = short(made)
    changes: dict[str, dict[str, Any]] = {
        "optim.lr": {"optim": dataclasses.replace(config.optim, lr=2e-3)},
        "document_mask": {"document_mask": True},
        "data fingerprint": {"data": dataclasses.replace(config.data, glob="[012].txt")},
    }
    train(dataclasses.replace(config, **changes[what]), tmp_path / "other", display=QUIET)
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(tmp_path / "other/checkpoints", run / "checkpoints")
    with pytest.raises(UserError, match=f"step_000002 belongs to another run: {what} is"):
        train(dataclasses.replace(read_config(run), steps=3), run, resume=True, display=QUIET)


def test_a_renamed_checkpoint_is_refused_by_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints/step_000002").rename(run / "checkpoints/step_000090")
    for arguments in (["train", "--resume", str(run), "--steps", "100"], ["sample", str(run)]):
        assert main(arguments) == 2
        assert "step_000090 contains step 2, not 90" in capsys.readouterr().err
    assert trained(run) == [0, 1]


@pytest.mark.parametrize("key", ["step", "data_offset", "run", "format"])
def test_a_state_that_lacks_a_value_is_refused(key: str, run: Path) -> None:
    state = run / "checkpoints/step_000002/training_state/state.json"
    values = json.loads(state.read_text())
    del values[key]
    state.write_text(json.dumps(values))
    rewrite_hash(run / "checkpoints/step_000002", "training_state/state.json")
    with pytest.raises(UserError, match=rf"state\.json is damaged: .*{key}"):
        train(dataclasses.replace(read_config(run), steps=3), run, resume=True, display=QUIET)


@pytest.mark.parametrize("name", ["model.safetensors", "training_state/optimizer.safetensors"])
def test_a_checkpoint_that_is_not_finite_is_renamed(name: str, run: Path, made: Path) -> None:
    assert train(dataclasses.replace(read_config(run), steps=3), run, resume=True, display=QUIET) == 0
    file = run / "checkpoints/step_000003" / name
    tensors = load_file(file)
    first = next(n for n in sorted(tensors) if tensors[n].ndim == 2)
    tensors[first][0, 0] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    rewrite_hash(run / "checkpoints/step_000003", name)
    said: list[str] = []
    assert train(dataclasses.replace(read_config(run), steps=4), run, resume=True, display=heard(said)) == 0
    assert any(f"unusable checkpoint renamed: {file}: {first} has values that are not finite" in line for line in said)
    assert any("resuming from step 2" in line for line in said)
    assert trained(run) == [0, 1, 2, 3]


# --- what a resumption leaves alone --------------------------------------------------------------------------


def test_fewer_steps_are_refused_and_equal_steps_are_finished(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(run)
    assert main(["train", "--resume", str(run), "--steps", "1"]) == 2
    error = capsys.readouterr().err
    assert "is already at step 2" in error
    assert error.count("\n") == 1
    assert main(["train", "--resume", str(run), "--steps", "2", "--eval-every", "7"]) == 0
    assert "already" in capsys.readouterr().out
    assert content(run) == before


def test_a_refused_resumption_changes_no_file(run: Path, made: Path) -> None:
    shutil.copytree(run / "checkpoints/step_000002", run / "checkpoints/step_000003")  # to be set aside
    before = content(run)
    config = read_config(run)
    for change in ({"seed": 1}, {"eval_tasks": ("lambada=nowhere",)}, {"steps": 1}):
        with pytest.raises(UserError):
            train(dataclasses.replace(config, **({"steps": 4} | change)), run, resume=True, display=QUIET)
        assert content(run) == before


def test_a_run_that_has_reached_its_target_makes_no_more_steps(made: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = dataclasses.replace(short(made), steps=9, target_loss=20.0)
    assert train(config, run, display=QUIET) == 0
    assert trained(run) == [0]
    before = content(run)
    said: list[str] = []
    for steps in (9, 12):
        assert train(dataclasses.replace(config, steps=steps), run, resume=True, display=heard(said)) == 0
        assert content(run) == before
    assert any("has already reached its target loss 20.0 at step 0" in line for line in said)
    assert train(dataclasses.replace(config, steps=2, target_loss=0.1), run, resume=True, display=QUIET) == 0
    assert trained(run) == [0, 1]


def test_damaged_lines_in_the_log_are_reported_and_kept(run: Path) -> None:
    log = run / "metrics.jsonl"
    first, *others = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(first + b'{"kind": "tr\xff\n' + b"".join(others) + b'{"kind": "train", "st')
    said: list[str] = []
    assert train(dataclasses.replace(read_config(run), steps=3), run, resume=True, display=heard(said)) == 0
    assert any(f"{log}: 1 of {len(others) + 3} lines cannot be read" in line and "line 2" in line for line in said)
    assert trained(run) == [0, 1, 2]
    assert log.read_bytes().splitlines()[1] == b'{"kind": "tr\xff'


@pytest.mark.parametrize("kept", [slice(0), slice(0, 2), slice(2, None)])
def test_missing_steps_in_the_log_are_reported(kept: slice, run: Path) -> None:
    log = run / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[kept]))
    lacking = 2 - len(trained(run))
    said: list[str] = []
    assert train(dataclasses.replace(read_config(run), steps=3), run, resume=True, display=heard(said)) == 0
    assert lacking
    assert f"warning: {log} lacks {lacking} of the 2 steps before the checkpoint" in said


def heard(said: list[str]) -> Display:
    """Return a display that appends its lines to ``said``."""

    class Heard(Display):
        def line(self, text: str, style: str = "") -> None:
            said.append(text)

    return Heard(interactive=False)
