"""Start-up times: `--help`, imports, the first step of the quickstart."""

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

from benchmarks.contenders import Absent, Command, Contender, Here, Measured, Round
from benchmarks.harness import BenchPlan, compare
from benchmarks.records import Item, Metric

SECONDS, MEMORY = Metric("seconds", "", "lower"), Metric("peak memory", "GB", "lower")
PATIENCE = 300.0
SHAPE = ["--model.n-layer", "2", "--model.n-head", "2", "--model.n-embd", "32"]
TINY = [*SHAPE, "--batch-tokens", "512", "--precision", "fp32"]


def measure(plan: BenchPlan) -> Item:
    """Every round is a new process; the warm-up has read its files once."""

    def python(name: str, *words: str) -> Command:
        return Command(name, [sys.executable, *words], patience=PATIENCE)

    rounds = plan.pick(3, 1)
    helped: list[Contender] = [
        python("restomod --help", "-m", "restomod", "--help"),
        python("litgpt --help", "-m", "litgpt", "--help"),
        python("python, doing nothing", "-c", "pass"),
    ]
    imported: list[Contender] = [
        python("import restomod", "-c", "import restomod"),
        python("import torch", "-c", "import torch"),
        python("transformers, ready to load a GPT-2", "-c", "from transformers import GPT2LMHeadModel"),
    ]
    cache = plan.scratch / "data"
    begun: list[Contender] = [
        Here("tokens in the cache", lambda: first_step(plan, cache, lambda: None)),
        Here("nothing prepared", lambda: first_step(plan, cache, functools.partial(shutil.rmtree, cache, True))),
    ]
    return Item(
        "Start-up",
        [
            compare(plan, "the command's first word", helped, [SECONDS, MEMORY], rounds),
            compare(plan, "an import", imported, [SECONDS, MEMORY], rounds),
            compare(plan, "`restomod train quickstart` to its first step", begun, [SECONDS], plan.pick(3, 1)),
        ],
    )


def first_step(plan: BenchPlan, cache: Path, before: Callable[[], None]) -> Round:
    """Start a run, wait until its first step is on record, and end it."""
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
                if time.perf_counter() - start > PATIENCE:
                    raise Absent(f"no step after {PATIENCE:g} s")
                time.sleep(0.005)
            seconds = time.perf_counter() - start
        shutil.rmtree(run, ignore_errors=True)
        return Measured({"seconds": seconds})

    return one_round


@contextlib.contextmanager
def training(words: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """`restomod WORDS`, which is killed on the way out."""
    command = [sys.executable, "-m", "restomod", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def has_step(metrics: Path) -> bool:
    """Whether a training step is on record."""
    with contextlib.suppress(OSError, ValueError):  # not there yet, or half a line
        return any(json.loads(line)["kind"] == "train" for line in metrics.read_text().splitlines())
    return False
