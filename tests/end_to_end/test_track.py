"""Runs with experiment trackers."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from restomod.cli import main
from restomod.config.run import RunConfig
from restomod.config.serialize import read_config
from restomod.runs import trackers
from restomod.runs.metrics import read_jsonl
from restomod.train.loop import train
from restomod.utils.console import Display
from tests.end_to_end.conftest import flags
from tests.runs.test_trackers import Quiet, events, hangs, raises

QUIET = Display(muted=True)


@pytest.fixture
def quick(tiny: RunConfig) -> RunConfig:
    return dataclasses.replace(tiny, sanity_checks=False, sample_every=100)


def test_a_run_and_its_resumption_are_in_tensorboard(quick: RunConfig, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    assert train(dataclasses.replace(quick, track=("tensorboard",)), run, display=QUIET) == 0
    assert train(dataclasses.replace(read_config(run), steps=14), run, resume=True, display=QUIET) == 0
    found, records = events(run / "tensorboard"), read_jsonl(run / "metrics.jsonl")
    for kind, count in (("train", 14), ("val", 5)):
        expected = [(r["step"], r["loss"]) for r in records if r["kind"] == kind]
        assert [(step, value) for step, value, _ in found[f"{kind}/loss"]] == [
            (step, pytest.approx(loss, rel=1e-6)) for step, loss in expected
        ]
        assert len(expected) == count
    assert {"train/grad_norm", "train/lr", "train/tokens_per_second"} <= set(found)


@pytest.mark.parametrize("fault", [raises, hangs])
def test_a_faulty_tracker_changes_nothing_in_a_run(
    quick: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: object
) -> None:
    monkeypatch.setattr(trackers, "CLOSING", 0.5)
    monkeypatch.setitem(trackers.OPENERS, "tensorboard", type("Faulty", (Quiet,), {"write": fault}))
    monkeypatch.setattr(trackers, "require_installed", lambda names: None)
    assert train(quick, tmp_path / "without", display=QUIET) == 0
    config = dataclasses.replace(quick, track=("tensorboard",))
    assert train(config, tmp_path / "with", display=Display(interactive=False)) == 0
    assert capsys.readouterr().out.count("warning: tracker tensorboard is dropped") == 1
    with_, without = (
        [(r["kind"], r["step"], r["loss"]) for r in read_jsonl(tmp_path / name / "metrics.jsonl")]
        for name in ("with", "without")
    )
    assert with_ == without


def test_a_missing_tracker_is_refused_before_files_are_written(
    quick: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else found(name, *a))
    before = set(tmp_path.iterdir())
    given = [*flags(dataclasses.replace(quick, eval_tokens=64)), "--out", str(tmp_path / "run"), "--track", "wandb"]
    assert main(["train", "quickstart", *given]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install -c constraints.txt -e '.[track]'" in error
    assert set(tmp_path.iterdir()) == before


def test_no_tracker_is_imported_unless_it_is_asked_for() -> None:
    code = (
        "import sys, restomod.train.loop; assert not {'tensorboard', 'wandb', 'trackio', 'optuna'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
