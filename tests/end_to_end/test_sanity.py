"""Sanity checks before the first step, which do not change the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from restomod.cli import main
from restomod.config.run import RunConfig
from restomod.train.loop import train
from restomod.utils.errors import UserError
from tests.checks.faults import QUICK_FAULTS, Plant

from .conftest import QUIET, flags, losses

NOTHING_IS_MASKED: Plant = QUICK_FAULTS["a mask that hides nothing"][0]


def test_sanity_checks_change_no_bit_of_a_run(tiny: RunConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny, steps=4)
    train(config, tmp_path / "with", display=QUIET)
    train(dataclasses.replace(config, sanity_checks=False), tmp_path / "without", display=QUIET)
    assert len(losses(tmp_path / "with")) == 4 + 2
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    for name in ("model.safetensors", "training_state/optimizer.safetensors"):
        a, b = (load_file(tmp_path / run / "checkpoints/step_000004" / name) for run in ("with", "without"))
        assert len(a) > 20
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key].view(torch.int32), b[key].view(torch.int32)) for key in a)


def test_only_a_new_run_lists_its_sanity_checks(
    tiny: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(dataclasses.replace(tiny, steps=1), tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    (initial,) = [i for i, line in enumerate(lines) if line.startswith("initial loss ")]
    assert lines[initial + 1].split(maxsplit=2)[2] == "passed: targets, causality, gradients, tied lm_head"
    assert "warning: kernel shapes: n_embd 32 is not a multiple of 64: training is slower" in lines
    train(dataclasses.replace(tiny, steps=2), tmp_path / "run", resume=True)
    assert "initial loss" not in (out := capsys.readouterr().out)
    assert "sanity checks" not in out


def test_a_planted_fault_stops_a_run_before_files_are_written(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    NOTHING_IS_MASKED(monkeypatch)
    run = tmp_path / "runs" / "mine"
    assert main(["train", "quickstart", "--out", str(run), *flags(tiny)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("restomod: error: sanity check 'causality' failed: changing token 16 of 32 changes earlier")
    assert "`restomod check` shows all checks; --no-sanity-checks trains anyway" in error
    assert error.count("\n") == 1
    assert not run.parent.exists()


def test_a_flag_disables_the_checks(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    NOTHING_IS_MASKED(monkeypatch)
    run, config = tmp_path / "run", dataclasses.replace(tiny, steps=1)
    assert main(["train", "quickstart", "--out", str(run), *flags(config), "--no-sanity-checks"]) == 0
    assert len(losses(run)) == 1 + 2
    assert "initial loss" not in (out := capsys.readouterr().out)
    assert "sanity checks" not in out


def test_a_run_resumed_at_step_0_is_checked(tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("restomod.train.loop.evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny, tmp_path / "run", display=QUIET)
    NOTHING_IS_MASKED(monkeypatch)
    with pytest.raises(UserError, match="sanity check 'causality' failed"):
        train(tiny, tmp_path / "run", resume=True, display=QUIET)
