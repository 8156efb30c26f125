"""Commands on the device: train with validation, samples, saves and a resume; eval, sample, bench, doctor."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from restomod.checks import doctor as examine
from restomod.checks import speed
from restomod.cli import main
from restomod.engine.device import choose_device, choose_dtype, describe_device
from restomod.model.flops import peak_flops
from restomod.utils.console import CheckResult
from tests.cuda.common import DEVICE, REAL, WORDS, write_text

pytestmark = pytest.mark.cuda

SHAPE = ["--model.n-layer", "2", "--model.n-head", "1", "--model.n-embd", "64", "--model.n-positions", "64"]

Command = Callable[..., str]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs a command in this process, requires success, and returns the printed text."""

    def run(*arguments: str, codes: tuple[int, ...] = (0,)) -> str:
        start = time.perf_counter()
        code = main(list(arguments))
        printed = capsys.readouterr()
        with capsys.disabled():
            print(f"\nrestomod {' '.join(arguments[:2])}: {time.perf_counter() - start:.1f} s")
        assert code in codes, printed.out + printed.err
        return printed.out

    return run


def test_device_and_dtype_are_detected() -> None:
    print(f"\ntorch {torch.__version__}, {describe_device(DEVICE)}, CUDA {torch.version.cuda}")
    assert choose_device("auto") == DEVICE
    if REAL:
        properties = torch.cuda.get_device_properties(0)
        size, count = properties.total_memory / 1e9, properties.multi_processor_count
        print(f"cuDNN {torch.backends.cudnn.version()}, {size:.0f} GB, {count} multiprocessors")
        assert peak_flops(describe_device(DEVICE)) is not None  # required for MFU
        assert choose_dtype("auto", DEVICE) == torch.bfloat16


def records(file: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in records(run / "metrics.jsonl") if record["kind"] == kind]


def test_training_resuming_evaluation_and_sampling(command: Command, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    questions = tmp_path / "questions.jsonl"
    asked = [{"query": " ".join(WORDS[: i + 1]), "choices": ["cat sleeps", "dog"], "gold": i % 2} for i in range(4)]
    questions.write_text("".join(json.dumps(question) + "\n" for question in asked))
    flags = {
        "--batch-tokens": "512",
        "--sequence-length": "64",
        "--data.source": "text",
        "--data.path": str(text),
        "--data.val-fraction": "0.2",
        "--data.cache": str(tmp_path / "data"),
        "--optim.lr": "3e-3",
        "--optim.warmup-steps": "3",
        "--sampling.prompts": "the cat",
        "--sampling.max-tokens": "8",
        "--eval-every": "8",
        "--sample-every": "8",
        "--save-every": "8",
    }
    given = [*SHAPE, *(part for flag in flags.items() for part in flag), "--deterministic", "--compile", "off"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command("train", "quickstart", "--out", str(whole), "--steps", "24", *given)
    losses = [record["loss"] for record in metrics(whole, "train")]
    assert len(losses) == 24
    assert losses[-1] < losses[0] - 2
    assert [record["step"] for record in metrics(whole, "val")] == [0, 8, 16, 24]
    assert [record["step"] for record in records(whole / "samples.jsonl")] == [8, 16, 24]
    assert json.loads((whole / "environment.json").read_text())[0]["device"] == describe_device(DEVICE)

    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step_000024")  # the state of a run killed before this checkpoint
    command("train", "--resume", str(cut))
    assert [record["step"] for record in metrics(cut, "val")] == [0, 8, 16, 24]
    assert [record["loss"] for record in metrics(cut, "train")] == losses
    weights = "checkpoints/step_000024/model.safetensors"
    assert (cut / weights).read_bytes() == (whole / weights).read_bytes()

    printed = command("eval", str(whole), "--tasks", "validation", "--task", str(questions))
    last = metrics(whole, "val")[-1]["loss"]
    print(f"validation loss {last} while training\n{printed}")
    found = json.loads((whole / "evals" / "step_000024-validation.json").read_text())
    assert found["loss"] == pytest.approx(last, rel=1e-3)  # eval also uses the last, shorter window
    printed = command("sample", str(whole), "--prompt", "the cat", "--num-samples", "2", "--max-tokens", "12")
    assert printed.count("the cat") >= 2
    assert sum(word in printed for word in WORDS) > 3  # the model has learned some words


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.skipif(not REAL, reason="Inductor is tested on a GPU"))]
)
def test_bench_step(compiled: bool, command: Command, tmp_path: Path) -> None:
    file, trace = tmp_path / "bench.json", tmp_path / "trace.json"
    flags = ["--batch-tokens", "1024", "--sequence-length", "64", "--warmup", "1", "--timed", "2"]
    flags += ["--compile", "on" if compiled else "off"]
    command("bench", "step", "quickstart", *SHAPE, *flags, "--json", str(file), "--trace", str(trace))
    found = json.loads(file.read_text())
    print({name: found[name] for name in ("tokens_per_second", "step_ms", "peak_memory_bytes", "mfu")})
    assert found["environment"]["device"] == describe_device(DEVICE)
    events = json.loads(trace.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    print(f"trace: {len(events)} events, {len(kernels)} GPU kernels")
    assert any("training step" in str(event.get("name")) for event in events)


@pytest.fixture
def quick_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip slow checks on a CPU (large matmuls, compiler, processes), which other tests cover."""
    if not REAL:
        for check in ("compiler", "processes"):
            monkeypatch.setattr(examine, check, lambda machine, name=check: CheckResult(name, "skip", ""))
        monkeypatch.setattr(speed, "SIZES", ())
        monkeypatch.setitem(speed.COPIED_BYTES, "cpu", 2**22)


@pytest.mark.usefixtures("quick_doctor")
def test_doctor(command: Command, tmp_path: Path) -> None:
    """Only the versions check may fail, because optional packages may be missing."""
    printed = command("doctor", "--preset", "quickstart", "--out", str(tmp_path), codes=(0, 1))
    print(printed)
    assert [line for line in printed.splitlines() if line.startswith("fail") and "versions" not in line] == []
    assert describe_device(DEVICE) in printed
