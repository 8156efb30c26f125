"""Speed and memory of a training step of GPT-2 124M: forward, backward, gradient clipping, AdamW."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.contenders import Contender, Measured, Round, Worker
from benchmarks.harness import BenchPlan, compare, together
from benchmarks.peers import Shape, Step, StepInputs
from benchmarks.records import Comparison, Item, Metric
from restomod.bench.measure import peak_memory
from restomod.checks.machine import Machine, available_bytes
from restomod.checks.tools import compiler
from restomod.config.presets import preset

METRICS = [Metric("tokens/s", "", "higher"), Metric("peak memory", "GB", "lower")]
OURS, EAGER = "restomod, compiled", "restomod, eager"
SMALL = Shape(2, 2, 64, 1024)
CASES = {"full": [(8, 64), (2, 256), (1, 1024)], "smoke": [(2, 16)], "gpu": [(32, 1024), (128, 256), (512, 64)]}
NANOCHAT = 256
NEEDS = 4e9  # bytes per process on a CPU: weights, gradients, AdamW state, activations, freed memory of the C library


def measure(plan: BenchPlan) -> Item:
    """Measure steps on the same random tokens, each contender in a separate process."""
    notes: list[str] = []
    left_out = [f"{name}: no --peer {name}=PATH given" for name in peers.CHECKOUTS.keys() - plan.peers]
    ours = [EAGER]
    if plan.device == "cuda":
        result = compiler(Machine(plan.device, "auto", "gpt2-124m", preset("gpt2-124m"), plan.scratch))  # type: ignore[arg-type]
        if result.status == "pass":
            ours = [OURS, EAGER]
        else:
            left_out.append(f"{OURS}: {result.reason}")
    else:
        notes.append(
            "restomod is not compiled, the default of `restomod train` on a CPU, where torch.compile gains little"
        )
    if "nanochat" in plan.peers:
        notes.append("nanochat trains its own, larger architecture with Muon, at the same width and depth")
        if plan.device == "cpu":
            notes.append(f"nanochat runs only with sequences of {NANOCHAT} tokens, as its steps are long on a CPU")
    names = [*ours, *peers.PACKAGES, *(name for name in peers.CHECKOUTS if name in plan.peers)]
    shape = plan.pick(Shape(), SMALL)
    comparisons: list[Comparison] = []
    cases = plan.pick(CASES["full"], CASES["smoke"], CASES["gpu"])
    for number, (batch, length) in enumerate(cases):
        if plan.late() and comparisons:
            left_out.append(f"{batch} × {length} tokens: time limit reached")
            continue
        repeat = 10 if plan.device == "cuda" else 1
        contenders: list[Contender] = [
            Worker(name, rounds, (name, plan.peers.get(name), shape, batch, length, plan.device, repeat))
            for name in names
            if name != "nanochat" or plan.device == "cuda" or length in (NANOCHAT, CASES["smoke"][0][1])
        ]
        case = f"{batch} × {length} tokens per step"
        group = None
        if plan.device == "cpu" and not plan.smoke:
            needs = NEEDS * (1.25 if batch * length > 512 else 1)
            group = together(len(contenders), needs, available_bytes(torch.device("cpu")))
        share = plan.part(len(cases) - number)
        comparisons.append(compare(share, case, contenders, METRICS, plan.pick(3, 2, 8), together=group))
    return Item("Training step of GPT-2 124M", comparisons, notes=notes, left_out=sorted(left_out))


def rounds(name: str, path: Path | None, shape: Shape, batch: int, length: int, device: str, repeat: int) -> Round:
    """Return a round of ``repeat`` steps, for a `Worker`.

    On a GPU all contenders keep their weights in memory. Memory for activations is released after each round and
    allocated again by an untimed step before the next.
    """
    task = task_of(path, shape, batch, length, device)
    if name in (OURS, EAGER):
        return timed(peers.restomod(task, name == OURS), task, repeat)
    return timed((peers.PACKAGES | peers.CHECKOUTS)[name](task), task, repeat)


def task_of(path: Path | None, shape: Shape, batch: int, length: int, device: str) -> StepInputs:
    """Return random tokens on the device, equal in every process."""
    tokens = torch.randint(50257, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    x, y = (part.contiguous().to(device) for part in (tokens[:, :-1], tokens[:, 1:]))
    return StepInputs(shape, x, y, path)


def timed(step: Step, task: StepInputs, repeat: int) -> Round:
    """Return a round of ``repeat`` steps."""
    on_gpu = task.device.type == "cuda"

    def one_round() -> Measured:
        if on_gpu:
            step()  # reads the loss, which synchronises with the device
        start = time.perf_counter()
        for _ in range(repeat):
            loss = step()
        seconds = time.perf_counter() - start
        peak = peak_memory(task.device) or 0
        if on_gpu:
            torch.cuda.empty_cache()
        return Measured({"tokens/s": repeat * task.x.numel() / seconds, "peak memory": peak / 1e9, "loss": loss})

    return one_round
