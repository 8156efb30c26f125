"""`restomod plan` on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


def test_flags_of_train_count(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gpt2-124m", "--gpu", "a100", "--steps", "100"]) == 0
    out = capsys.readouterr().out
    assert "100 steps × 524,288 tokens = 52.43M tokens" in out
    assert "build-nanogpt in its lecture" in out


def test_prices_of_ones_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    step = 4 * measured["micro_batch_seconds"] + measured["update_seconds"]  # of which two were made
    assert plan["tokens_per_second"] == pytest.approx(512 / step)
    assert plan["dollars"] == pytest.approx(plan["seconds"] / 3600 * 2)
    assert measured["micro_batch_seconds"] > 0
    assert measured["update_seconds"] > 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpu", "a100", "--gpus", "3"], "cannot be shared evenly by 3 processes"),
        (["--gpu", "a100", "--gpus", "0"], "--gpus is 0; it must be at least 1"),
        (["--gpu", "a100", "--price", "-1"], "--price is -1.0; it must be 0 or more"),
        (["--gpu", "a100", "--price", "nan"], "--price is nan; it must be 0 or more"),
        (["--gpu", "a100", "--device", "cpu"], "--gpu a100 and --device cpu exclude each other"),
        (["--price", "1"], "add --gpu, for example --gpu a100"),
        (["--measure", "--gpu", "a100"], "leave --gpu and --gpus out"),
        (["--measure", "--json", "no/p.json"], "no/p.json: there is no folder no"),
        (["--prices", "none.toml"], "none.toml: cannot read the prices"),
        (["--gpu", "a100", "--json", "."], ". is a folder; name a file"),
        (["--stepz", "3"], "did you mean --steps?"),
    ],
)
def test_mistakes_are_one_line(here: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    assert main(["plan", "gpt2-124m", *flags]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("restomod: error: ")
    assert shown.err.count("\n") == 1
    assert said in shown.err
    assert os.listdir(here) == []


def test_without_a_preset_it_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 2
    assert "usage: restomod plan PRESET" in capsys.readouterr().out
    assert main(["plan", "--help"]) == 0
    assert main(["plan", "--gpu", "a100"]) == 2
    assert "name a preset first: restomod plan PRESET --gpu a100" in capsys.readouterr().err


def test_planning_needs_no_torch(here: Path) -> None:
    plan = "main(['plan', 'gpt2-124m', '--gpu', 'a100', '--json', 'p.json'])"
    code = f"from restomod.cli import main\nassert {plan} == 0\nimport sys\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
