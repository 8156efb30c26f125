"""The warm-up of a preset is proportional to --steps; a warm-up of all steps or more causes a warning."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest

from restomod.cli import main
from restomod.commands.parsing import parse_run
from restomod.commands.sweep import SweepArguments, build_plan
from restomod.commands.train import TrainArguments, parse_arguments
from restomod.config.presets import PRESETS, preset
from restomod.config.run import RunConfig
from restomod.engine.lr_schedule import learning_rate, schedule_warnings

TINY = (
    *("--data.source", "text", "--data.path", "text.txt", "--sequence-length", "64", "--batch-tokens", "128"),
    *("--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "32", "--eval-tokens", "64"),
    *("--device", "cpu", "--precision", "fp32", "--sampling.max-tokens", "2", "--no-sanity-checks"),
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("A text that is long enough to be trained on.\n" * 200)
    return tmp_path


def config_of(name: str, *flags: str) -> RunConfig:
    """Return the configuration that `restomod train` builds from a preset and flags."""
    return parse_arguments([name, *flags])[0]


@pytest.mark.parametrize("name", [*PRESETS, "modern-d6"])
@pytest.mark.parametrize("steps", [1, 10, 100, 40_000])
def test_a_presets_warm_up_is_a_constant_fraction_of_the_steps(name: str, steps: int) -> None:
    base = preset(name)
    share = Fraction(base.optim.warmup_steps, base.steps)
    assert config_of(name, "--steps", str(steps)).optim.warmup_steps == max(1, math.ceil(share * steps))
    assert config_of(name, "--steps", str(base.steps)) == base == config_of(name)


@pytest.mark.parametrize("flags", [("--optim.warmup-steps", "7"), ("--optim.warmup_steps=7",)])
def test_an_explicit_warm_up_is_not_scaled(flags: tuple[str, ...]) -> None:
    assert config_of("gpt2-124m", "--steps", "100", *flags).optim.warmup_steps == 7


def test_a_preset_without_warm_up_gets_none() -> None:
    none = config_of("quickstart", "--optim.warmup-steps", "0")
    assert parse_run(TrainArguments(none, out=""), ["--steps", "9000"], "").config.optim.warmup_steps == 0


def test_plan_prints_warm_up_and_warning(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gpt2-124m", "--steps", "1000", "--json", "p.json"]) == 0
    said = capsys.readouterr().out
    assert "38 steps of 1,000" in said
    assert "warning" not in said
    assert json.loads((here / "p.json").read_text())["config"]["optim"]["warmup_steps"] == 38
    assert main(["plan", "gpt2-124m", "--steps", "10", "--optim.warmup-steps", "40"]) == 0
    said = capsys.readouterr().out
    assert "longer than the run" in said
    assert "rises to 0.00015 instead of 0.0006" in " ".join(said.split())


def test_training_prints_it_before_the_first_step_and_resume_keeps_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "quickstart", *TINY, "--steps", "30", "--out", "a"]) == 0
    said = capsys.readouterr().out
    assert "2 steps of 30" in said
    assert "warning" not in said
    assert main(["train", "--resume", "a", "--steps", "40"]) == 0
    assert "2 steps of 40" in capsys.readouterr().out
    assert json.loads((here / "a" / "config.json").read_text())["optim"]["warmup_steps"] == 2

    assert main(["train", "quickstart", *TINY, "--steps", "3", "--optim.warmup-steps", "9", "--out", "b"]) == 0
    said = capsys.readouterr().out
    (warning,) = [line for line in said.splitlines() if line.startswith("warning: the warm-up")]
    assert said.index(warning) < said.index("step 1/3")
    rates = [json.loads(line).get("lr") for line in (here / "b" / "metrics.jsonl").read_text().splitlines()]
    assert f"rises to {max(rate for rate in rates if rate):.4g} instead of 0.002" in warning


def test_a_batch_larger_than_the_data_is_reported(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "quickstart", *TINY, "--batch-tokens", "6400", "--steps", "1", "--out", "a"]) == 0
    assert "lower --batch-tokens" in capsys.readouterr().out


@pytest.mark.parametrize(("steps", "warmup"), [(10, 9), (10, 10), (10, 11), (1, 1), (1, 2), (2, 2), (5, 0)])
def test_the_warning_is_true(steps: int, warmup: int) -> None:
    config = config_of("quickstart", "--steps", str(steps), "--optim.warmup-steps", str(warmup))
    rates = [learning_rate(config.optim, step, steps) for step in range(steps)]
    warnings = schedule_warnings(config)
    if warmup >= steps > 1:
        (warning,) = warnings
        assert rates == sorted(rates)  # no decay
        assert f"rises to {rates[-1]:.4g}" in warning
        assert ("longer" in warning) is (rates[-1] < config.optim.lr)
    else:
        assert not warnings


def test_a_keep_every_beyond_the_last_step_is_reported() -> None:
    assert "keep_every 901" in schedule_warnings(config_of("quickstart", "--keep-every", "901"))[0]
    assert not schedule_warnings(config_of("quickstart", "--keep-every", "900"))


@pytest.mark.parametrize(
    ("space", "flags", "steps", "warmup"),
    [
        ("steps=90,1800", [], 1800, 90),
        ("steps=90,1800", ["--optim.warmup-steps", "7"], 1800, 7),
        ("optim.warmup_steps=7,70", [], 900, 70),
        ("optim.lr=1,2", ["--steps", "90"], 90, 5),
    ],
)
def test_a_sweep_does_not_prune_during_the_warm_up(space: str, flags: list[str], steps: int, warmup: int) -> None:
    plan = build_plan("quickstart", preset("quickstart"), SweepArguments(grid=(space,), out="s"), flags)
    assert (plan.steps, plan.prune_from, plan.flags) == (steps, warmup, tuple(flags))


def test_a_sweep_over_steps_is_planned_for_the_largest_value() -> None:
    given = SweepArguments(random=("steps=90..1800",), trials=3, out="s")
    plan = build_plan("quickstart", preset("quickstart"), given, [])
    assert (plan.steps, plan.prune_from) == (1800, 90)
