"""Tests of `restomod bench step`: its steps equal those of training and its phases add up. No test checks speed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from restomod.bench import step as bench
from restomod.bench.measure import PHASES, PhaseClock, Steps, measure, peak_memory
from restomod.cli import main
from restomod.data.batches import Prefetch
from restomod.data.tokenizer import gpt2_tokenizer
from restomod.engine.distributed import SINGLE, Processes
from restomod.engine.step import BatchLoss, ComputeConfig
from tests.models import CPU
from tests.trainee import Trainee, assert_identical, make_trainee

SMALL = (
    *("--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "32", "--sequence-length", "64"),
    *("--batch-tokens", "256", "--micro-batch", "2", "--device", "cpu", "--precision", "fp32"),
    *("--warmup", "1", "--timed", "2"),
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bench_step(*flags: str) -> int:
    return main(["bench", "step", "quickstart", *SMALL, *flags])


def steps_of(trainee: Trainee, loss_of: nn.Module | None = None) -> Steps:
    """Return the training steps of a trainee, each with four micro-batches."""
    compute = ComputeConfig(CPU, torch.float32, 2)
    data = Prefetch(trainee.batches, 2, 20)
    loss_of = loss_of or BatchLoss(trainee.model, compute)
    return Steps(trainee.config, data, loss_of, trainee.optimizer, compute, SINGLE)


# --- the steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "by_phase"])
def test_a_measured_step_equals_a_training_step(kind: str) -> None:
    measured, trained = make_trainee(), make_trainee()
    steps = steps_of(measured)
    with steps.data:
        for i in range(3):
            getattr(steps, kind)(i)
    trained.train(0, 3, micro_batch=2)
    assert_identical(measured.tensors(), trained.tensors())


def test_whole_steps_and_steps_by_phase_alternate_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []
    monkeypatch.setattr(Steps, "whole", lambda self, step: made.append(("whole", step)) or float(step))
    monkeypatch.setattr(Steps, "by_phase", lambda self, step: made.append(("by phase", step)) or {"data": float(step)})
    timings = measure(steps_of(make_trainee()), warmup=2, timed=2)
    assert made == [("whole", 0), ("whole", 1), ("whole", 2), ("by phase", 3), ("whole", 4), ("by phase", 5)]
    assert (timings.whole, timings.phases) == ([2, 4], [{"data": 3}, {"data": 5}])  # the warm-up does not count
    assert timings.peak_bytes is not None


# --- phases -------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return [seconds], a clock that only the test advances."""
    now = [0.0]
    monkeypatch.setattr(PhaseClock.__init__, "__defaults__", (lambda: now[0],))
    return now


class _SlowLoss(BatchLoss):
    """Loss that takes 3 seconds forward and 5 seconds backward on the clock of the test."""

    def __init__(self, trainee: Trainee, now: list[float]) -> None:
        super().__init__(trainee.model, ComputeConfig(CPU, torch.float32, 2))
        self.now = now

    def forward(self, tokens: Tensor, targets: Tensor, *rest: Any) -> Tensor:
        loss = super().forward(tokens, targets, *rest)
        self.now[0] += 3
        loss.register_hook(lambda gradient: self.now.__setitem__(0, self.now[0] + 5))
        return loss


def test_every_second_of_a_step_is_counted_in_its_phase(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    trainee = make_trainee()
    steps = steps_of(trainee, _SlowLoss(trainee, clock))
    get, update = steps.data.get, trainee.optimizer.parts[0].step

    def slow_get(step: int) -> object:
        clock[0] += 2
        return get(step)

    def slow_update() -> None:
        clock[0] += 7
        update()

    monkeypatch.setattr(steps.data, "get", slow_get)
    monkeypatch.setattr(trainee.optimizer.parts[0], "step", slow_update)
    with steps.data:
        seconds = steps.by_phase(0)
    assert seconds == {"data": 2, "forward": 4 * 3, "backward": 4 * 5, "update": 7}
    assert sum(seconds.values()) == clock[0], "time was lost or counted twice"


def test_real_phases_add_up_to_the_step() -> None:
    steps = steps_of(make_trainee())
    with steps.data:
        start = time.perf_counter()
        seconds = steps.by_phase(0)
        around = time.perf_counter() - start
    assert list(seconds) == list(PHASES)
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds.values()) <= around


def test_a_mark_waits_for_the_device() -> None:
    """Asynchronous work of the device counts for the phase that started it."""
    now, pending = [0.0], [0.0]

    def wait() -> None:
        now[0] += pending[0]
        pending[0] = 0

    clock = PhaseClock(wait, lambda: now[0])
    pending[0] = 4
    clock.mark("forward")
    clock.mark("backward")
    assert (clock.seconds["forward"], clock.seconds["backward"]) == (4, 0)


def test_hooks_are_removed() -> None:
    steps = steps_of(make_trainee())
    with steps.data:
        steps.by_phase(0)
    assert not steps.loss_of._forward_hooks
    assert not steps.loss_of._forward_pre_hooks


def test_peak_memory_grows_with_an_allocation() -> None:
    before = peak_memory(CPU)
    assert before is not None
    needed = before + 2**26
    torch.ones(needed // 4)
    assert needed <= (peak_memory(CPU) or 0) < needed + before + 2**26


# --- the command -----------------------------------------------------------------------------------------------


def test_it_prints_results_and_writes_no_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_step() == 0
    shown = capsys.readouterr().out
    assert "batch           256 tokens = gradient accumulation 2 × micro-batch 2 × sequence length 64, syn" in shown
    for row in ("tokens/s ", "step ", *(f"  {phase} " for phase in PHASES), "peak memory ", "compute ", "MFU "):
        assert re.search(rf"^{row}", shown, re.MULTILINE), row
    assert os.listdir(here) == []


def test_json_and_trace(here: Path) -> None:
    assert bench_step("--json", "r.json", "--trace", "t.json") == 0
    read = json.loads((here / "r.json").read_text())
    assert (read["preset"], read["tokens"], read["tokens_per_step"]) == ("quickstart", "synthetic", 256)
    assert (read["warmup_steps"], read["timed_steps"], len(read["step_ms"]["all"])) == (1, 2, 2)
    assert read["tokens_per_second"]["median"] == pytest.approx(
        (256e3 / read["step_ms"]["all"][0] + 256e3 / read["step_ms"]["all"][1]) / 2
    )
    environment = read["environment"]
    assert (environment["torch"], environment["threads"], environment["processes"]) == (torch.__version__, 1, 1)
    assert {"device", "git_revision", "command"} <= environment.keys()
    assert read["config"]["model"]["n_embd"] == 32
    events = json.loads((here / "t.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"training step", "aten::linear", "aten::_fused_adamw_"} <= names


def test_real_tokens_are_those_of_the_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "A text that is long enough to be trained on.\n" * 200
    (here / "text.txt").write_text(text)
    seen: list[list[int]] = []
    measured = bench.measure

    def spy(steps: Steps, warmup: int, timed: int) -> object:
        seen.append(steps.data.batches.streams[0].read(0, 20).tolist())
        return measured(steps, warmup, timed)

    monkeypatch.setattr(bench, "measure", spy)
    assert bench_step("--tokens", "real", "--data.source", "text", "--data.path", "text.txt") == 0
    assert bench_step() == 0
    real, synthetic = seen
    assert real == gpt2_tokenizer().encode(text)[:20].tolist()
    assert len(set(synthetic)) > 15
    assert os.listdir(here / "data")
    assert not (here / "runs").exists()


def test_synthetic_tokens_are_in_the_vocabulary_and_fill_a_window() -> None:
    stream = bench.synthetic_tokens(97, 16, seed=0)
    assert stream.read(0, len(stream)).max() == 96
    assert len(bench.synthetic_tokens(97, 2**21, seed=0)) == 2**21 + 1
    assert bench.synthetic_tokens(60_000, 16, seed=0).read(0, 2**20).max() == 50256  # the loader rejects larger ones


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--json", "nowhere/r.json"), "nowhere/r.json: there is no folder nowhere; create it first"),
        (("--trace", "."), ". is a folder; name a file"),
        (("--warmup", "-1"), "--warmup is -1"),
        (("--timed", "0"), "--timed is 0"),
        (("--tokens", "fake"), "invalid choice 'fake' for argument '--tokens'"),
        (("--micro-batch", "3"), "micro_batch 3 does not divide the 4 sequences"),
        (("--parallel", "fsdp"), "--parallel fsdp needs several processes: start two or more with torchrun"),
        (("--tokens", "real", "--data.source", "text", "--data.path", "none.txt"), "none.txt: no such file or folder"),
        (("--tokens", "real", "--model.vocab-size", "100"), "model.vocab_size is 100, but the data's"),
        (("--optim.lr", "1e30", "--optim.warmup-steps", "0", "--timed", "9"), "the loss is "),
    ],
)
def test_mistakes_are_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    assert bench_step(*flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("restomod: error: ")
    assert said in error
    assert error.count("\n") == 1


def test_an_unknown_benchmark_or_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "stepp"]) == 2
    assert capsys.readouterr().err == "restomod: error: unknown benchmark 'stepp'; did you mean 'step'?\n"
    assert main(["bench", "step", "quikstart"]) == 2
    assert capsys.readouterr().err == "restomod: error: unknown preset 'quikstart'; did you mean 'quickstart'?\n"


@pytest.mark.parametrize("problem", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), "allocator"])
def test_too_little_memory_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, problem: Exception | str
) -> None:
    def fail(*arguments: object) -> None:
        if problem == "allocator":
            torch.empty(2**60)  # raises the error of the CPU's allocator
        raise problem  # type: ignore[misc]

    monkeypatch.setattr("restomod.engine.step.linear_cross_entropy", fail)
    assert bench_step() == 2
    error = capsys.readouterr().err
    assert error.startswith("restomod: error: out of memory with a micro-batch of 1 (")
    assert error.count("\n") == 1


def test_another_runtime_error_is_not_reported_as_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr("restomod.engine.step.linear_cross_entropy", fail)
    with pytest.raises(RuntimeError, match="multiplied"):
        bench_step()


def test_a_rank_gets_its_part_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the second of two ranks runs; collectives are replaced."""
    monkeypatch.setattr(Processes, "run_on_all_ranks", lambda self, work, one_first=False: work())
    monkeypatch.setattr(Processes, "any", lambda self, *flags: list(flags))
    monkeypatch.setattr("restomod.train.setup.distribute", lambda loss, *_: loss)
    config = dataclasses.replace(make_trainee().config, micro_batch=2, device="cpu", precision="fp32")
    steps, _ = bench._steps(config, "synthetic", 3, Processes(rank=1, world_size=2, local_rank=1), print)
    with steps.data as data:
        mine, _ = data.get(0)
    whole = [tokens for tokens, _ in data.batches.micro_batches(0, 2)]
    assert [tokens.tolist() for tokens, _ in mine] == [tokens.tolist() for tokens in whole[2:]]


def test_two_processes_share_a_step_and_one_prints(here: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "restomod"]
    arguments = ["bench", "step", "quickstart", *SMALL, "--json", "r.json", "--trace", "t.json"]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "256 tokens = 2 processes × gradient accumulation 1 × micro-batch 2 × sequence length 64" in done.stdout
    assert (done.stdout.count("tokens/s "), done.stdout.count("batch  ")) == (1, 1)
    read = json.loads((here / "r.json").read_text())
    assert read["environment"]["processes"] == 2
    assert 256e3 / read["step_ms"]["max"] == pytest.approx(read["tokens_per_second"]["min"])  # both ranks together
    assert json.loads((here / "t.json").read_text())["traceEvents"]
    assert "profiler" not in done.stderr
