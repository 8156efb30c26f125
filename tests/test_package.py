"""What the package's own docstring promises."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path
from typing import Any

import pytest

import restomod
from restomod import presets
from restomod.config import DataConfig, ModelConfig, RunConfig, SamplingConfig


def test_the_example_in_the_docstring_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands there, on a model that trains in a second."""
    assert restomod.__doc__ is not None
    example = textwrap.dedent("\n".join(line for line in restomod.__doc__.splitlines() if line.startswith("    ")))
    (tmp_path / "text.txt").write_text("the quick brown fox " * 200)
    tiny = RunConfig(
        steps=2,
        batch_tokens=32,
        sequence_length=16,
        model=ModelConfig(n_layer=1, n_head=2, n_embd=32, n_positions=32),
        data=DataConfig(source="text", path=str(tmp_path / "text.txt"), cache=str(tmp_path / "data")),
        sampling=SamplingConfig(max_tokens=2),
        device="cpu",
        precision="fp32",
    )
    quickstart = presets.PRESETS["quickstart"]
    monkeypatch.setitem(presets.PRESETS, "quickstart", lambda: dataclasses.replace(tiny, optim=quickstart().optim))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["config"].steps == 2
    assert (tmp_path / "runs/mine/checkpoints/step_000002/COMPLETE").exists()
    assert len(names["texts"]) == 3
