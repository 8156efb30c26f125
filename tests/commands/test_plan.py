"""`restomod plan` on the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from restomod.cli import main

SMALL = ("--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "32", "--sequence-length", "64")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_plan_is_printed_and_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--gpu", "a100", "--gpus", "8", "--price", "1.79", "--compile", "off", "--json", "p.json")
    assert main(["plan", "gpt2-124m", *flags]) == 0
    out = capsys.readouterr().out
    assert "\ntime                2 h 41 min, " in out
    assert "\ncost                $38.5" in out
    assert out.endswith("\nwritten: p.json\n")
    plan = json.loads((here / "p.json").read_text())
    assert (plan["parameters"], plan["gpus"], plan["micro_batch"]) == (124_439_808, 8, 64)
    assert os.listdir(here) == ["p.json"]


def test_flags_of_train_are_accepted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gpt2-124m", "--gpu", "a100", "--steps", "100"]) == 0
    out = capsys.readouterr().out
    assert "100 steps × 524,288 tokens = 52.43M tokens" in out
    assert "build-nanogpt in its lecture" in out


def test_prices_from_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = 'provider="Mine"\ngpu="a100"\ngpus=1\ndollars_per_gpu_hour=1\ndate=2026-01-01\nsource="here"\n'
    (here / "o.toml").write_text(f"[[price]]\n{entry}")
    assert main(["plan", "gpt2-124m", "--prices", "o.toml"]) == 0
    out = capsys.readouterr().out
    assert "Mine        1 × a100 " in out
    assert "Lambda" not in out
    assert "speed               unknown: name a GPU with --gpu" in out


def test_this_machine_is_measured(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch = ("--batch-tokens", "512", "--micro-batch", "2", "--precision", "fp32", "--device", "cpu")
    assert main(["plan", "quickstart", *SMALL, *batch, "--measure", "--price", "2", "--json", "p.json"]) == 0
    assert "tokens/s, measured on " in capsys.readouterr().out
    plan = json.loads((here / "p.json").read_text())
    measured = plan["measured"]
    step = 4 * measured["micro_batch_seconds"] + measured["update_seconds"]  # the plan assumes four micro-batches
    assert plan["tokens_per_second"] == pytest.approx(512 / step)
    assert plan["dollars"] == pytest.approx(plan["seconds"] / 3600 * 2)
    assert measured["micro_batch_seconds"] > 0
    assert measured["update_seconds"] > 0
