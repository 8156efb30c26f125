"""Memorising TinyShakespeare: GPT-2 124M to a training loss of 0.09, in hours on a CPU or minutes on a GPU.

The settings equal those of a published run (preset `tinyshakespeare`), whose curve is compared.
"""

from __future__ import annotations

import shutil
import time

from benchmarks.contenders import Absent
from benchmarks.harness import BenchPlan
from benchmarks.items.startup import TINY, training
from benchmarks.records import Comparison, Entry, Item, Metric, Series
from benchmarks.texts import SHAKESPEARE
from restomod.experiments.plan.expected_loss import TINYSHAKESPEARE
from restomod.runs.metrics import read_jsonl

NEVER = 10**9  # steps
METRICS = [
    Metric("seconds", "including start-up", "lower"),
    Metric("steps", "of 4,096 tokens", "lower"),
    Metric("training loss", "nats", "lower"),
]


def measure(plan: BenchPlan) -> Item:
    """Run `restomod train tinyshakespeare` once and copy its metrics.jsonl to the folder of the results."""
    title, text = "TinyShakespeare to a loss of 0.09", plan.file(SHAKESPEARE)
    if text is None:
        return Item(title, left_out=[f"complete run: --data has no {SHAKESPEARE}"])
    run = plan.scratch / "run"
    words = ["train", "tinyshakespeare", "--out", str(run), "--device", plan.device, "--data.path", str(text)]
    words += ["--data.cache", str(plan.scratch / "tokens")]
    # no checkpoint or sample before the last step, as their time is not measured here
    words += [f"--save-every={NEVER}", "--save-every-minutes=None", f"--sample-every={NEVER}"]
    if plan.smoke:
        words += [*TINY, "--steps", "3", "--sequence-length", "64"]
    left_out = []
    start = time.perf_counter()
    with training(words) as process:
        while process.poll() is None:
            if plan.late():
                left_out.append("rest of the run: time limit reached")
                break
            time.sleep(0.1)
        if process.returncode:
            raise Absent(f"`restomod train` ended with code {process.returncode}")
    seconds = time.perf_counter() - start
    records = [r for r in read_jsonl(run / "metrics.jsonl") if r["kind"] == "train"]
    if not records:
        return Item(title, left_out=["complete run: time limit reached before the first step"])
    if plan.out is not None:
        shutil.copy(run / "metrics.jsonl", plan.out / "shakespeare.jsonl")
    values = {"seconds": [seconds], "steps": [float(len(records))], "training loss": [float(records[-1]["loss"])]}
    losses = [(float(r["step"]), float(r["loss"])) for r in records]
    published = [(float(step), loss) for step, loss in TINYSHAKESPEARE]
    curve = Series("TinyShakespeare", "step", "training loss, nats", losses, published)
    return Item(title, [Comparison("one run", METRICS, [Entry("restomod", values)], 0)], [curve], left_out)
