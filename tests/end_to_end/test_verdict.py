"""Training says along the way, and at its end, whether the run is healthy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from restomod.cli import main
from restomod.config.run import RunConfig
from restomod.runs.reader import open_run
from restomod.train.loop import train
from restomod.utils.console import Display


def reference_lines(config: RunConfig, folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert train(config, folder, display=Display(interactive=False)) == 0
    return capsys.readouterr().out.splitlines()


def test_a_healthy_run_ends_with_its_verdict(
    tiny: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = reference_lines(tiny, tmp_path / "run", capsys)
    assert [line for line in said if "verdict" in line] == [
        f"verdict: healthy; `restomod verdict {tmp_path / 'run'}` says what was looked for"
    ]
    warnings = [line for line in said if line.startswith("warning")]
    assert [w for w in warnings if not w.startswith("warning: kernel shapes")] == []
    assert main(["verdict", str(tmp_path / "run")]) == 0


def test_a_symptom_is_a_warning_at_every_validation_and_in_the_verdict(
    tiny: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(tiny, optim=dataclasses.replace(tiny.optim, warmup_steps=0), sanity_checks=False)
    said = reference_lines(config, tmp_path / "run", capsys)
    warnings = [line for line in said if line.startswith("warning: no warm-up: the learning rate is 0.003 from")]
    assert len(warnings) == 2, "at steps 5 and 10, and at the end only the verdict"
    (last,) = [line for line in said if line.startswith("verdict")]
    assert last == f"verdict: not healthy: no warm-up; `restomod verdict {tmp_path / 'run'}` says what to do"
    assert main(["verdict", str(tmp_path / "run")]) == 1


def test_looking_for_symptoms_writes_nothing(tiny: RunConfig, tmp_path: Path) -> None:
    train(tiny, tmp_path / "run", display=Display(interactive=False))
    kinds = {record["kind"] for record in open_run(tmp_path / "run").records}
    assert kinds == {"train", "val"}
