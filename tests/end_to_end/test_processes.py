"""Runs of several ranks: numbers and files equal those of one rank."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from restomod.cli import main
from restomod.config.run import Parallel, RunConfig
from restomod.data.batches import Batches
from restomod.data.prepare.text_cache import prepare_text
from restomod.runs.checkpoint import verify_checkpoint
from restomod.runs.metrics import SampleRecord, read_jsonl
from restomod.train.loop import train
from tests.processes import Ended, error_lines, launch, results

from .conftest import QUIET, flags, losses
from .test_resume import assert_same_run, same_checkpoint

NEVER = 10**6


def command(*arguments: str) -> None:
    """Run the command line on one of several ranks."""
    sys.exit(main(["train", *arguments]))


def new_run(count: int, config: RunConfig, run: Path, *more: str) -> list[Ended]:
    return launch(count, command, "quickstart", "--out", str(run), *flags(config), *more)


def resume(count: int, run: Path, *more: str) -> list[Ended]:
    return launch(count, command, "--resume", str(run), *more)


def succeeded(ended: list[Ended]) -> None:
    assert [e.code for e in ended] == [0] * len(ended), [e.error for e in ended]
    assert [e.output for e in ended[1:]] == [""] * (len(ended) - 1), "only the main process prints"
    assert not any("error" in line.lower() for line in error_lines(ended))


def same_curve(ours: Path, theirs: Path) -> None:
    """Assert equal records and losses within 1e-4; gradient norms have larger rounding errors."""
    records, expected = (read_jsonl(run / "metrics.jsonl") for run in (ours, theirs))
    assert [(r["kind"], r["step"]) for r in records] == [(r["kind"], r["step"]) for r in expected]
    for key, tolerance in (("loss", 1e-4), ("grad_norm", 5e-4)):
        numbers = [r[key] for r in records if key in r]
        assert numbers == pytest.approx([r[key] for r in expected if key in r], rel=tolerance)


def close_weights(a: Path, b: Path, step: int) -> None:
    name = f"checkpoints/step_{step:06d}/model.safetensors"
    ours, theirs = load_file(a / name), load_file(b / name)
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        if not key.endswith("c_attn.bias"):  # the bias of the keys has no effect on the loss, so it may drift
            assert (ours[key] - expected).norm() <= 1e-3 * expected.norm(), key


# --- the numbers of one process ------------------------------------------------------------------------------


def recorded(config: RunConfig, run: Path) -> dict[int, list[int]]:
    """Train, and return the windows that this rank loads for each step."""
    seen: dict[int, list[int]] = {}
    micro_batches, load = Batches.micro_batches, Batches.load

    def of_step(self: Batches, step: int, *arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:  # all in the prefetching thread

            def kept(self: Batches, windows: Any) -> Any:
                if threading.current_thread().name.startswith("prefetch"):
                    seen.setdefault(step, []).extend(windows.tolist())
                return load(self, windows)

            patch.setattr(Batches, "load", kept)
            return micro_batches(self, step, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "micro_batches", of_step)
        assert train(config, run, display=QUIET) == 0
    return seen


SOME = [(2, 2, "ddp")]
ALL = [(n, b, way) for n in (1, 2, 4) for b in (1, 2, 4) for way in ("ddp", "fsdp") if n > 1 or way == "ddp"]


@pytest.mark.parametrize(
    ("count", "micro_batch", "parallel"),
    [*SOME, *(pytest.param(*way, marks=pytest.mark.slow) for way in ALL if way not in SOME)],
)
def test_a_run_of_several_ranks_equals_that_of_one(
    shared: RunConfig, tmp_path: Path, count: int, micro_batch: int, parallel: Parallel
) -> None:
    config = dataclasses.replace(shared, batch_tokens=256, steps=20)
    whole = dataclasses.replace(config, micro_batch=16)
    (expected,) = results(1, recorded, whole, tmp_path / "one")
    split = dataclasses.replace(config, micro_batch=micro_batch, parallel=parallel)
    found = results(count, recorded, split, tmp_path / "several")
    same_curve(tmp_path / "several", tmp_path / "one")
    close_weights(tmp_path / "several", tmp_path / "one", 20)
    assert sorted(expected) == list(range(20))
    for step, windows in expected.items():
        assert [w for rank in found for w in rank[step]] == windows
    trained = [r["loss"] for r in read_jsonl(tmp_path / "several" / "metrics.jsonl") if r["kind"] == "train"]
    assert trained[-1] < trained[0] - 0.5


def opened(config: RunConfig, run: Path, resume: bool) -> list[str]:
    """Train, and return the files of the run that this rank opens."""
    found: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(f"{run}/"):
            found.append(str(arguments[0]))

    sys.addaudithook(hook)
    assert train(config, run, resume, display=QUIET) == 0
    return found


def test_only_the_main_process_opens_files_of_the_run(shared: RunConfig, tmp_path: Path) -> None:
    config, run = dataclasses.replace(shared, steps=4, save_every=2), tmp_path / "run"
    for steps in (4, 8):
        main_process, other = results(2, opened, dataclasses.replace(config, steps=steps), run, steps > 4)
        assert any(name.endswith("metrics.jsonl") for name in main_process)
        assert other == [], "another process may find them as they were before, or half written"


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_evaluation_and_sampling_change_nothing(
    shared: RunConfig, questions: Path, tmp_path: Path, parallel: Parallel
) -> None:
    shared = dataclasses.replace(shared, eval_tasks=(str(questions),))
    for name, often in (("seldom", NEVER), ("often", 2)):
        config = dataclasses.replace(shared, eval_every=often, sample_every=often, save_every=NEVER, parallel=parallel)
        results(2, train_quietly, config, tmp_path / name)
    often, seldom = tmp_path / "often", tmp_path / "seldom"
    assert [r for r in losses(often) if r[0] == "train"] == [r for r in losses(seldom) if r[0] == "train"]
    assert same_checkpoint(often, seldom, shared.steps)
    assert (
        len(read_jsonl(often / "samples.jsonl", SampleRecord))
        > len(read_jsonl(seldom / "samples.jsonl", SampleRecord))
        > 0
    )
    one = dataclasses.replace(shared, eval_every=2, sample_every=2, save_every=NEVER)
    train(one, tmp_path / "one", display=QUIET)
    same_curve(often, tmp_path / "one")
    assert read_jsonl(often / "samples.jsonl", SampleRecord) == read_jsonl(tmp_path / "one/samples.jsonl", SampleRecord)
    assert tasks(often) == tasks(tmp_path / "one")


def tasks(run: Path) -> list[dict[str, Any]]:
    """Return the task records of a run without their durations."""
    kept = [r for r in read_jsonl(run / "metrics.jsonl") if r["kind"] == "task"]
    assert len(kept) > 2
    return [{key: value for key, value in r.items() if key not in ("seconds", "time")} for r in kept]


def train_quietly(config: RunConfig, run: Path, resume: bool = False) -> int:
    return train(config, run, resume, display=QUIET)


# --- checkpoints ---------------------------------------------------------------------------------------------


def beginning(run: Path, of: Path, step: int) -> Path:
    """Copy a run as it was at the checkpoint of ``step``."""
    shutil.copytree(of, run)
    for saved in (run / "checkpoints").iterdir():
        if int(saved.name.removeprefix("step_")) > step:
            shutil.rmtree(saved)
    return run


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_ranks(shared: RunConfig, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    assert train(shared, reference, display=QUIET) == 0
    ways: list[tuple[int, Parallel]] = [(2, "ddp"), (4, "fsdp"), (2, "fsdp"), (1, "ddp"), (4, "ddp")]
    run = beginning(tmp_path / "run", reference, 4)
    for i, (count, parallel) in enumerate(ways):  # each part resumes from the checkpoint of the previous part
        if i:
            run = beginning(tmp_path / f"run{i}", run, 4 if i % 2 == 0 else 8)
        config = dataclasses.replace(shared, parallel=parallel)
        assert results(count, train_quietly, config, run, True) == [0] * count
        same_curve(run, reference)
        close_weights(run, reference, shared.steps)
        for saved in (run / "checkpoints").iterdir():
            verify_checkpoint(saved)
            names = sorted(str(f.relative_to(saved)) for f in saved.rglob("*"))
            like = reference / "checkpoints" / saved.name
            assert names == sorted(str(f.relative_to(like)) for f in like.rglob("*"))
    starts = json.loads((run / "environment.json").read_text())
    assert [start["processes"] for start in starts] == [1, *(count for count, _ in ways)]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_resuming_with_the_same_number_of_ranks_is_bit_identical(
    shared: RunConfig, tmp_path: Path, parallel: Parallel
) -> None:
    reference = tmp_path / "reference"
    config = dataclasses.replace(shared, parallel=parallel)
    assert results(2, train_quietly, config, reference) == [0, 0]
    run = beginning(tmp_path / "run", reference, 4)
    succeeded(resume(2, run))
    assert_same_run(run, reference, shared.steps)
    assert read_jsonl(run / "samples.jsonl", SampleRecord) == read_jsonl(reference / "samples.jsonl", SampleRecord)


def test_transformers_reads_the_checkpoints_of_an_fsdp_run(shared: RunConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = dataclasses.replace(shared, steps=3, parallel="fsdp", eval_tokens=None)
    assert results(2, train_quietly, config, run) == [0, 0]
    folder = run / "checkpoints" / "step_000003"
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    stream = prepare_text(config.data).val
    batches = Batches(stream, config.sequence_length, 1, seed=0)
    tokens, targets = batches.load(np.arange(batches.n_windows))
    with torch.no_grad():
        theirs = F.cross_entropy(model.eval()(tokens).logits.flatten(0, 1), targets.flatten()).item()
    ours = [r["loss"] for r in read_jsonl(run / "metrics.jsonl") if r["kind"] == "val"][-1]
    assert theirs == pytest.approx(ours, rel=1e-5)


def test_one_rank_resumes_an_fsdp_run_with_parallel_ddp(shared: RunConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = dataclasses.replace(shared, steps=4, parallel="fsdp")
    assert results(2, train_quietly, config, run) == [0, 0]
    (line,) = error_lines(resume(1, run, "--steps", "5"))
    assert "--parallel ddp" in line
    succeeded(resume(1, run, "--steps", "5", "--parallel", "ddp"))
