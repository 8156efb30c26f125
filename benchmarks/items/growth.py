"""Growth of step time and memory over a long run, and the speed-up of two processes."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from benchmarks.contenders import Absent, Command, Contender, Measured
from benchmarks.harness import BenchPlan, compare
from benchmarks.items.startup import TINY, has_step, training
from benchmarks.records import Comparison, Item, Metric, Series
from benchmarks.texts import training_text
from restomod.runs.metrics import read_jsonl
from restomod.utils.process_memory import status_bytes

SAMPLES_A_SECOND = 4
OF = 20
SMALL = ["--model.n-layer", "2", "--model.n-head", "2", "--model.n-embd", "32", "--model.n-positions", "32"]
SMALL += ["--batch-tokens", "64", "--sequence-length", "32", "--precision", "fp32"]


def measure(plan: BenchPlan) -> Item:
    """Measure a training run with validation, samples and checkpoints; on a CPU with a small model."""
    data, what = training_text(plan)
    steps = plan.pick(10_000, 8, 2_000)
    where = ["--data.source", data.source, "--data.cache", data.cache]
    where += ["--data.path", data.path] if data.path else []
    sizes = ["--device", plan.device, *plan.pick(SMALL, TINY, [])]
    often = [f"--{act}-every={max(1, steps // 20)}" for act in ("eval", "sample", "save")]
    run = plan.scratch / "run"
    words = ["train", "quickstart", "--out", str(run), "--steps", str(steps), "--eval-tokens", "4096", *often]
    memory = watched([*words, *where, *sizes], run / "metrics.jsonl")
    times = [(float(r["step"]), float(r["ms"])) for r in read_jsonl(run / "metrics.jsonl") if r["kind"] == "train"]
    case = f"{steps:,} steps, " + plan.pick("1.6M parameters", "tiny model", "quickstart")
    series = [Series(case, "step", f"ms per step, median of {OF}", medians(times, OF))]
    left_out = []
    if memory:
        series.append(Series(case, "seconds since the first step", "resident memory, GB", memory))
    else:
        left_out.append("memory over time: the system does not report the memory of another process")
    comparisons = []
    if plan.device == "cpu":
        comparisons.append(processes(plan))
    else:
        left_out.append("two processes: the machine has one GPU")
    return Item("Long runs", comparisons, series, left_out, [what])


def medians(points: list[tuple[float, float]], of: int) -> list[tuple[float, float]]:
    """Reduce a curve: for each ``of`` consecutive points return the first x and the median y."""
    groups = [points[i : i + of] for i in range(0, len(points), of)]
    return [(group[0][0], statistics.median(y for _, y in group)) for group in groups]


def watched(words: list[str], metrics: Path) -> list[tuple[float, float]]:
    """Run a training to its end and return pairs of seconds since its first step and resident memory in GB.

    Raises:
        Absent: the training failed.
    """
    memory: list[tuple[float, float]] = []
    start = 0.0
    with training(words) as process:
        while process.poll() is None:
            time.sleep(1 / SAMPLES_A_SECOND)
            if not start and has_step(metrics):
                start = time.perf_counter()
            held = status_bytes("VmRSS", process.pid)
            if start and held:
                memory.append((time.perf_counter() - start, held / 1e9))
        if process.returncode:
            raise Absent(f"`restomod train` ended with code {process.returncode}")
    return memory


def processes(plan: BenchPlan) -> Comparison:
    """Compare steps of one process and of two under torchrun, one thread each."""
    metrics = [Metric("tokens/s", "", "higher"), Metric("peak memory", "GB, largest process", "lower")]
    sizes = TINY if plan.smoke else ["--batch-tokens", "2048"]
    contenders: list[Contender] = [
        Bench(f"{n} process{'es' if n > 1 else ''}, one thread each", n, plan, sizes) for n in (2, 1)
    ]
    notes = ["`restomod bench step quickstart` under torchrun, gloo; the ideal speed-up is 2"]
    case = "two processes, compared with one"
    return compare(plan, case, contenders, metrics, plan.pick(3, 1), warmup=0, notes=notes)


class Bench(Command):
    """Contender `restomod bench step` under torchrun; tokens/s are the ones that it reports."""

    def __init__(self, name: str, count: int, plan: BenchPlan, sizes: list[str]) -> None:
        self.report = plan.scratch / f"bench-{count}.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        words = ["-m", "restomod", "bench", "step", "quickstart", "--json", str(self.report), "--micro-batch", "1"]
        steps = ["--warmup", str(plan.pick(2, 1)), "--timed", str(plan.pick(5, 1))]
        command = [*launcher, *words, *steps, "--device", "cpu", *sizes]
        super().__init__(name, command, environment={"OMP_NUM_THREADS": "1"})

    def round(self) -> Measured:
        """Run the benchmark and add its tokens/s."""
        found = super().round()
        speed = json.loads(self.report.read_text())["tokens_per_second"]["median"]
        return Measured(found.values | {"tokens/s": speed})
