"""Time of a micro-batch of GPT-2 124M by part and with other settings of the training step.

    python -m benchmarks.gpu.variants --out variants.json --kernels kernels.txt [--seconds 120] [--smoke]

Variants are attention backends, chunk sizes of the loss, Inductor's mix-order reductions and a residual stream in bf16.
The kernels of a micro-batch are listed by time. The file is written after every comparison.

Shapes: B = sequences, T = tokens of each, H = heads, K = head size, D = H * K.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import peers, records, table
from benchmarks.contenders import Contender, InProcess, Measured, Round, Worker, reason
from benchmarks.gpu.collect import PARTS
from benchmarks.harness import BenchPlan, compare
from benchmarks.items.loss import close
from benchmarks.items.step import METRICS, SMALL, Shape, task_of, timed
from benchmarks.machine import environment
from benchmarks.records import Comparison, Item, Metric
from restomod.bench.measure import peak_memory
from restomod.config.presets import preset
from restomod.engine.device import REDUCTIONS, avoid_wrong_reductions, choose_dtype, compile_module, synchronize
from restomod.engine.step import ComputeConfig, batch_loss
from restomod.model.gpt import GPT, build_model
from restomod.utils.files import write_text_atomically

BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CHUNKS = (16_384, 4096, 8192, 32_768)  # tokens; the first is the baseline
MILLISECONDS = Metric("time", "ms", "lower")
ROWS = 60  # rows in the table of kernels


def measure(plan: BenchPlan, kernels: Path, write: Callable[[Item], None]) -> None:
    """Run all comparisons; ``write`` is called after each with all results so far."""
    shape, (batch, length) = plan.pick(Shape(), SMALL), plan.pick((64, 1024), (2, 16))
    about = environment(plan) | {"command": "python -m benchmarks.gpu.variants"}
    item = Item(PARTS["variants"].title, environment=about)
    comparisons: list[Comparison] = []

    def add(comparison: Comparison) -> None:
        comparisons.append(without_ratios(comparison))
        write(dataclasses.replace(item, comparisons=list(comparisons)))

    add(attention_backends(plan.part(6), shape, batch, length))
    micro_batch = MicroBatch(plan, shape, batch, length)
    add(loss_chunks(plan.part(2), micro_batch))
    try:
        found = micro_batch.kernels()
    except Exception as e:  # some drivers do not support the profiler
        found = f"no table of kernels: {reason(e)}\n"
    write_text_atomically(kernels, found)
    del micro_batch
    if plan.device == "cuda":
        torch.cuda.empty_cache()
    add(settings(plan, shape, batch, length))


def without_ratios(comparison: Comparison) -> Comparison:
    """Return a comparison without ratios, as all contenders are settings of restomod."""
    entries = [dataclasses.replace(entry, paired={}) for entry in comparison.entries]
    return dataclasses.replace(comparison, entries=entries)


def attention_backends(plan: BenchPlan, shape: Shape, batch: int, length: int) -> Comparison:
    """Compare backends of causal attention, forward and backward for all layers."""
    backends = {"math": SDPBackend.MATH} if plan.device == "cpu" else BACKENDS
    contenders: list[Contender] = [
        InProcess(name, functools.partial(attention_round, plan.device, shape, batch, length, backend))
        for name, backend in backends.items()
    ]
    case = f"attention forward and backward, {shape.n_layer} layers, {batch} × {length} tokens"
    return compare(plan, case, contenders, [MILLISECONDS], plan.pick(10, 2), warmup=plan.pick(3, 1))


def attention_round(device_type: str, shape: Shape, batch: int, length: int, backend: SDPBackend) -> Round:
    """Return a round of attention forward and backward of one layer, with its time multiplied by the layers."""
    device, H = torch.device(device_type), shape.n_head
    dtype = choose_dtype("auto", device)
    D = shape.n_embd
    qkv = torch.randn(batch, length, 3 * D, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(batch, length, D, device=device, dtype=dtype)

    def one_round() -> Measured:
        synchronize(device)
        start = time.perf_counter()
        with sdpa_kernel(backend):
            q, k, v = (x.unflatten(-1, (H, D // H)).transpose(1, 2) for x in qkv.chunk(3, -1))  # (B, H, T, K)
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2).backward(grad)
        synchronize(device)
        return Measured({"time": 1000 * shape.n_layer * (time.perf_counter() - start)})

    return one_round


class MicroBatch:
    """Forward and backward of a micro-batch, compiled on a GPU."""

    def __init__(self, plan: BenchPlan, shape: Shape, batch: int, length: int) -> None:
        self.device = torch.device(plan.device)
        self.compiled = plan.device == "cuda"
        self.task = task_of(None, shape, batch, length, plan.device)
        config = dataclasses.replace(preset("gpt2-124m").model, **dataclasses.asdict(shape))
        self.model = build_model(config, 1, self.device)
        if self.compiled:
            compile_module(self.model.transformer, self.device)

    def run(self, chunk: int) -> float:
        """Run the micro-batch with ``chunk`` tokens per chunk of the loss, and return the loss."""
        dtype = choose_dtype("auto", self.device)
        compute = ComputeConfig(self.device, dtype, len(self.task.x), self.compiled, chunk=chunk)
        loss = batch_loss(self.model, self.task.x, self.task.y, compute)
        loss.backward()
        return float(loss.item())

    def round(self, chunk: int, repeat: int) -> Measured:
        """Measure ``repeat`` micro-batches after one for warm-up."""
        self.run(chunk)
        synchronize(self.device)
        if self.compiled:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        for _ in range(repeat):
            loss = self.run(chunk)
        synchronize(self.device)
        seconds = (time.perf_counter() - start) / repeat
        values = {"time": 1000 * seconds, "tokens/s": self.task.x.numel() / seconds}
        return Measured(values | {"peak memory": (peak_memory(self.device) or 0) / 1e9}, loss)

    def kernels(self) -> str:
        """Return a table of the kernels of one micro-batch, slowest first."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.compiled:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds) as profile:
            self.run(CHUNKS[0])
            synchronize(self.device)
        order = f"self_{'device' if self.compiled else 'cpu'}_time_total"
        return profile.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=90)


def loss_chunks(plan: BenchPlan, micro_batch: MicroBatch) -> Comparison:
    """Compare the micro-batch with several chunk sizes of the loss."""
    repeat = plan.pick(5, 1)

    def contender(chunk: int) -> Contender:
        return InProcess(f"{chunk:,} tokens", lambda: lambda: micro_batch.round(chunk, repeat))

    contenders = [contender(chunk) for chunk in plan.pick(CHUNKS, (16, 32))]
    metrics = [MILLISECONDS, *METRICS]
    return compare(plan, "micro-batch by chunk size of the loss", contenders, metrics, plan.pick(3, 2), agree=close)


def switch_mix_order_reduction(model: GPT) -> None:
    """Switch Inductor's fusion of row and column reductions to the opposite of restomod's setting, in this process.

    restomod enables it except in releases of torch that compute wrong results (`avoid_wrong_reductions`).
    """
    from torch._inductor import config

    off = avoid_wrong_reductions()
    os.environ[REDUCTIONS] = str(int(off))  # overrides restomod's choice
    config.triton.mix_order_reduction = off


def residual_in_bf16(model: GPT) -> None:
    """Set the dtype of the residual stream to bf16, as `--residual-dtype bf16`."""
    model.transformer.residual_dtype = torch.bfloat16


SETTINGS: dict[str, Callable[[GPT], None]] = {
    "default": lambda model: None,
    "mix-order reductions switched": switch_mix_order_reduction,
    "residual stream in bf16": residual_in_bf16,
}


def settings(plan: BenchPlan, shape: Shape, batch: int, length: int) -> Comparison:
    """Compare settings of the whole training step, each in a separate process with its own compilation."""
    sizes = (shape, batch, length, plan.device, plan.pick(5, 1))
    contenders: list[Contender] = [Worker(name, setting_rounds, (name, *sizes)) for name in SETTINGS]
    case = f"training step by setting, {batch} × {length} tokens"
    return compare(plan, case, contenders, METRICS, plan.pick(4, 2))


def setting_rounds(name: str, shape: Shape, batch: int, length: int, device: str, repeat: int) -> Round:
    """Return a round with a setting, for a `Worker`; compilation happens here, in all workers at the same time."""
    task = task_of(None, shape, batch, length, device)
    step = peers.restomod(task, device == "cuda", SETTINGS[name])
    step()
    if device == "cuda":
        torch.cuda.empty_cache()
    return timed(step, task, repeat)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all comparisons and return the exit code 0."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.variants", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--kernels", type=Path, required=True, help="text file for the table of kernels")
    parser.add_argument("--seconds", type=float, default=120, help="time after which no round starts")
    parser.add_argument("--smoke", action="store_true", help="smoke test with tiny sizes on a CPU")
    given = parser.parse_args(words)

    def write(item: Item) -> None:
        records.write(given.out, {"variants": item})
        print(table.body(dataclasses.replace(item, comparisons=item.comparisons[-1:])), flush=True)

    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
        deadline = time.monotonic() + given.seconds
        plan = BenchPlan(Path(scratch), "cpu" if given.smoke else "cuda", given.smoke, deadline=deadline, command=words)
        measure(plan, given.kernels, write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
