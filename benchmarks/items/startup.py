"""Start-up times of `--help`, of imports and of the quickstart until its first step."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.contenders import Absent, Command, Contender, InProcess, Measured, Round
from benchmarks.harness import BenchPlan, compare
from benchmarks.records import Item, Metric

SECONDS, MEMORY = Metric("seconds", "", "lower"), Metric("peak memory", "GB", "lower")
TIMEOUT = 300.0  # seconds
SHAPE = ["--model.n-layer", "2", "--model.n-head", "2", "--model.n-embd", "32"]
TINY = [*SHAPE, "--batch-tokens", "512", "--precision", "fp32"]


def measure(plan: BenchPlan) -> Item:
    """Measure new processes; the warm-up round has read their files into the page cache."""

    def python(name: str, *words: str) -> Command:
        return Command(name, [sys.executable, *words], timeout=TIMEOUT)

    rounds = plan.pick(3, 1)
    helped: list[Contender] = [
        python("restomod --help", "-m", "restomod", "--help"),
        python("litgpt --help", "-m", "litgpt", "--help"),
        python("empty Python program", "-c", "pass"),
    ]
    imported: list[Contender] = [
        python("import restomod", "-c", "import restomod"),
        python("import torch", "-c", "import torch"),
        python("import transformers.GPT2LMHeadModel", "-c", "from transformers import GPT2LMHeadModel"),
    ]
    cache = plan.scratch / "data"
    begun: list[Contender] = [
        InProcess("cached tokens", lambda: first_step(plan, cache, lambda: None)),
        InProcess("empty cache", lambda: first_step(plan, cache, functools.partial(shutil.rmtree, cache, True))),
    ]
    return Item(
        "Start-up",
        [
            compare(plan, "time of --help", helped, [SECONDS, MEMORY], rounds),
            compare(plan, "time of an import", imported, [SECONDS, MEMORY], rounds),
            compare(plan, "`restomod train quickstart` until its first step", begun, [SECONDS], plan.pick(3, 1)),
        ],
    )


def first_step(plan: BenchPlan, cache: Path, before: Callable[[], None]) -> Round:
    """Return a round that starts a run, waits until its first step is logged, and kills it."""
    numbers = itertools.count()

    def one_round() -> Measured:
        before()
        run = plan.scratch / f"run-{id(numbers)}-{next(numbers)}"
        words = ["train", "quickstart", "--out", str(run), "--data.cache", str(cache), "--eval-tokens", "256"]
        start = time.perf_counter()
        with training([*words, "--device", plan.device, *(TINY if plan.smoke else [])]) as process:
            while not has_step(run / "metrics.jsonl"):
                if process.poll() is not None:
                    raise Absent(f"`restomod train` ended with code {process.returncode}")
                if time.perf_counter() - start > TIMEOUT:
                    raise Absent(f"no step after {TIMEOUT:g} s")
                time.sleep(0.005)
            seconds = time.perf_counter() - start
        shutil.rmtree(run, ignore_errors=True)
        return Measured({"seconds": seconds})

    return one_round


@contextlib.contextmanager
def training(words: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run `restomod WORDS` in the context, and kill it at the end."""
    command = [sys.executable, "-m", "restomod", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def has_step(metrics: Path) -> bool:
    """Return whether a training step is logged."""
    with contextlib.suppress(OSError, ValueError):  # missing file or incomplete line
        return any(json.loads(line)["kind"] == "train" for line in metrics.read_text().splitlines())
    return False
