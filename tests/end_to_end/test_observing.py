"""Evaluation and sampling do not change a run, compiled or eager."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from restomod.config.run import RunConfig, SamplingConfig
from restomod.runs.metrics import SampleRecord, read_jsonl
from restomod.train.loop import train

from .conftest import QUIET
from .test_resume import same_checkpoint

SAMPLING = SamplingConfig(prompts=("the cat", "", "a dog runs under the old tree and"), max_tokens=40, top_p=0.9)


def runs(tiny: RunConfig, folder: Path, task: Path, **values: Any) -> tuple[Path, Path]:
    """Train two runs: one with frequent evaluation, samples and checkpoints, the other with these at the end only."""
    config = dataclasses.replace(tiny, sampling=SAMPLING, sanity_checks=False, **values)
    watched, alone = folder / "watched", folder / "alone"
    often = dataclasses.replace(config, eval_every=5, sample_every=5, save_every=1, eval_tasks=(str(task),))
    train(often, watched, display=QUIET)
    torch.manual_seed(99)  # a run must not depend on the random state of the process
    train(dataclasses.replace(config, eval_every=1000, sample_every=1000, save_every=1000), alone, display=QUIET)
    assert [r["step"] for r in read_jsonl(watched / "metrics.jsonl") if r["kind"] == "val"] == [0, 5, 10, 12]
    assert [r["step"] for r in read_jsonl(watched / "samples.jsonl", SampleRecord)] == [
        step for step in (5, 10, 12) for _ in range(3)
    ]
    assert {r["step"] for r in read_jsonl(alone / "samples.jsonl", SampleRecord)} == {12}
    return watched, alone


def training_losses(run: Path) -> list[float]:
    return [r["loss"] for r in read_jsonl(run / "metrics.jsonl") if r["kind"] == "train"]


def check_equal(watched: Path, alone: Path, steps: int) -> None:
    assert training_losses(watched) == training_losses(alone)
    assert same_checkpoint(watched, alone, steps)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluating_and_sampling_change_nothing(
    tiny: RunConfig, questions: Path, tmp_path: Path, precision: str
) -> None:
    check_equal(*runs(tiny, tmp_path, questions, precision=precision), tiny.steps)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluating_and_sampling_change_nothing_in_a_compiled_run(
    tiny: RunConfig, questions: Path, tmp_path: Path, precision: str
) -> None:
    torch.compiler.reset()
    watched, alone = runs(tiny, tmp_path, questions, precision=precision, compile="on")
    check_equal(watched, alone, tiny.steps)
    train(dataclasses.replace(tiny, precision=precision), tmp_path / "eager", display=QUIET)

    tolerance = 1e-4 if precision == "fp32" else 1e-2
    assert training_losses(watched) == pytest.approx(training_losses(tmp_path / "eager"), rel=tolerance)


def graphs(config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the number of graphs that a compiled run passes to its backend, including recompilations."""
    torch.compiler.reset()
    counter, compile = CompileCounter(), torch.nn.Module.compile
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda self, **how: compile(self, backend=counter, **how))
        train(dataclasses.replace(config, compile="on", sanity_checks=False), folder, display=QUIET)
    torch.compiler.reset()
    return counter.frame_count


def test_evaluating_and_sampling_compile_nothing(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(tiny, sampling=SAMPLING)
    watched = graphs(config, tmp_path / "watched", monkeypatch)
    monkeypatch.setattr("restomod.train.loop.evaluate", lambda *a: None)
    monkeypatch.setattr("restomod.train.loop.write_samples", lambda *a: None)
    assert watched == graphs(config, tmp_path / "alone", monkeypatch) == 1
