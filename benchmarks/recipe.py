"""Ablations of the modern recipe, one part at a time with the same model size and text, over several seeds.

    python -m benchmarks.recipe TOKENS --out results.json [--seeds 3] [--only gpt2,modern] [--budget 0.5]
    python -m benchmarks.recipe TOKENS --out results.json --only ablations
    python -m benchmarks.recipe TOKENS --out results.json --speed 5
    python -m benchmarks.recipe --out results.json --table table.md

TOKENS is a folder written by `restomod prepare`. A trial trains a small model from scratch and records its validation
loss. Finished trials are in the JSON file and are not repeated, so the same command resumes after an interruption or
with more seeds, and several processes can share the file. The table has the tokens that a recipe needs to reach the
final loss of the baseline, GPT-2's recipe with a tuned learning rate. With `--speed` it also has the time per token
relative to the baseline.

Recipes: `gpt2`, `llama`, `modern` and `speedrun`; `gpt2+PART` with one part of modern, `modern-PART` without one part,
`modern+PART` with one part of speedrun (`ablations` means all of these). `--set NAME=BASE,key=value,...` defines more.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import itertools
import json
import statistics
import sys
import time
from collections import ChainMap
from pathlib import Path
from typing import Any

import torch

from restomod.config.run import DataConfig, ModelConfig, OptimConfig, RunConfig
from restomod.data.batches import Batches
from restomod.data.dataset import Dataset
from restomod.data.prepare.text_cache import prepare_text
from restomod.engine.device import (
    choose_device,
    choose_dtype,
    compile_module,
    describe_device,
    dtype_name,
    keep_freed_memory,
)
from restomod.engine.distributed import SINGLE
from restomod.engine.optimizer import build_optimizer
from restomod.engine.step import BatchLoss, ComputeConfig, train_step
from restomod.evals.validation import dataset_loss
from restomod.model.gpt import build_model
from restomod.runs.folder import environment
from restomod.utils.files import write_text_atomically

Overrides = dict[str, Any]
Row = dict[str, Any]

BASELINE = "gpt2"
PARTS: dict[str, Overrides] = {  # parts of modern, as differences from gpt2
    "rmsnorm": {"model.norm": "rmsnorm"},
    "rope": {"model.positions": "rope"},
    "swiglu": {"model.mlp": "swiglu"},
    "no-bias": {"model.bias": False},
    "qk-norm": {"model.qk_norm": True},
    "zero-init": {"model.zero_init_projections": True},
    "muon": {"optim.optimizer": "muon", "optim.muon_lr": 0.02, "optim.lr": 16e-3, "optim.weight_decay": 0.0},
    "wsd": {"optim.decay": "wsd", "optim.cooldown": 0.5, "optim.min_lr_ratio": 0.0, "optim.warmup_steps": 10},
}
LLAMA: Overrides = PARTS["rmsnorm"] | PARTS["rope"] | PARTS["swiglu"] | PARTS["no-bias"]
MODERN: Overrides = dict(ChainMap(*PARTS.values()))
EXTRAS: dict[str, Overrides] = {  # parts of speedrun, as differences from modern
    "relu2": {"model.mlp": "relu2"},
    "untied": {"model.tied": False},
    "softcap": {"model.softcap": 15.0},
    "embedding-norm": {"model.embedding_norm": True},
    "embedding-skip": {"model.embedding_skip": True},
    "value-embedding": {"model.value_embedding": True},
}
SPEEDRUN: Overrides = MODERN | dict(ChainMap(*EXTRAS.values()))
ABLATIONS: dict[str, Overrides] = (
    {f"gpt2+{part}": overrides for part, overrides in PARTS.items()}
    | {f"modern-{part}": {k: v for k, v in MODERN.items() if k not in PARTS[part]} for part in PARTS}
    | {f"modern+{part}": MODERN | overrides for part, overrides in EXTRAS.items()}
)
RECIPES: dict[str, Overrides] = {BASELINE: {}, "llama": LLAMA, "modern": MODERN, "speedrun": SPEEDRUN} | ABLATIONS


def base(given: argparse.Namespace) -> RunConfig:
    """Return the baseline configuration, GPT-2's recipe with the sizes of the command line."""
    steps = round(given.budget * given.tokens) // given.batch_tokens
    return RunConfig(
        model=ModelConfig(given.layers, max(1, given.width // 64), given.width, n_positions=given.context),
        optim=OptimConfig(lr=given.lr, warmup_steps=max(1, steps // 20)),
        steps=steps,
        batch_tokens=given.batch_tokens,
        sequence_length=given.context,
        compile="on" if given.compile else "off",
    )


def changed(config: RunConfig, overrides: Overrides) -> RunConfig:
    """Return a copy of ``config`` with fields such as ``model.norm`` or ``steps`` replaced."""
    parts: dict[str, dict[str, Any]] = {"model": {}, "optim": {}, "": {}}
    for path, value in overrides.items():
        section, _, name = path.rpartition(".")
        parts[section][name] = value
    model = dataclasses.replace(config.model, **parts["model"])
    return dataclasses.replace(
        config, model=model, optim=dataclasses.replace(config.optim, **parts["optim"]), **parts[""]
    )


class Training:
    """Model, optimizer and data of a trial."""

    def __init__(self, config: RunConfig, dataset: Dataset) -> None:
        self.config, self.dataset, self.device = config, dataset, choose_device("auto")
        if self.device.type == "cpu":
            keep_freed_memory()
        dtype = choose_dtype(config.precision, self.device)
        self.compute = ComputeConfig(
            self.device, dtype, config.micro_batch or config.batch_sequences, config.compile == "on"
        )
        self.model = build_model(config.model, config.seed, self.device)
        if self.compute.compiled:
            compile_module(self.model.transformer, self.device)
        self.batches = Batches(dataset.train, config.sequence_length, config.batch_sequences, config.seed)
        self.loss_of = BatchLoss(self.model, self.compute)
        self.optimizer = build_optimizer(self.model, config.optim, dtype)

    def step(self, step: int) -> float:
        """Make a training step and return its seconds."""
        began = time.perf_counter()
        micro = self.batches.micro_batches(step, self.compute.micro_batch)
        train_step(self.loss_of, self.optimizer, micro, self.config, step, SINGLE).wait()
        return time.perf_counter() - began

    def validation_loss(self, tokens: int) -> float:
        """Compute the validation loss, in nats per token, on ``tokens`` tokens."""
        length = self.config.sequence_length
        validation = dataset_loss(self.model, self.dataset, length, self.device, self.compute.dtype, tokens)
        assert validation is not None
        return validation.loss


def trial(config: RunConfig, dataset: Dataset, looks: int, eval_tokens: int) -> Row:
    """Train once and return the curve of (tokens, validation loss), the total seconds and the median speed.

    Args:
        config: run configuration.
        dataset: training and validation tokens.
        looks: number of validations.
        eval_tokens: tokens per validation.
    """
    training, curve = Training(config, dataset), []
    seconds: list[float] = []
    for step in range(config.steps + 1):
        if step == config.steps or step % max(1, config.steps // looks) == 0:
            curve.append((step * config.batch_tokens, training.validation_loss(eval_tokens)))
        if step < config.steps:
            seconds.append(training.step(step))
    speed = config.batch_tokens / statistics.median(seconds)  # the first step may include torch.compile
    final = {"loss": curve[-1][1], "tokens": curve[-1][0]}
    return {"curve": curve} | final | {"seconds": sum(seconds), "tokens_per_second": speed}


def speeds(runs: dict[str, RunConfig], dataset: Dataset, rounds: int) -> list[Row]:
    """Measure tokens/s of each recipe in alternating rounds of three steps, because of other load on the machine."""
    trainings = {name: Training(run, dataset) for name, run in runs.items()}
    measured: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, training in trainings.items():
            seconds = [training.step(3 * turn + i) for i in range(3)]
            if turn:  # the first round compiles
                measured[name].append(training.config.batch_tokens / statistics.median(seconds))
    return [{"recipe": name, "speeds": speeds} for name, speeds in measured.items()]


def add_row(out: Path, row: Row) -> None:
    """Append a finished trial to the file, which several processes can share."""
    with open(out.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_text_atomically(out, json.dumps([*rows_of(out), row]) + "\n")


def rows_of(out: Path) -> list[Row]:
    """Return the finished trials of a file; an empty list if it does not exist."""
    return json.loads(out.read_text()) if out.exists() else []


def tokens_to(curve: list[list[float]], loss: float) -> float | None:
    """Return the tokens at which a curve first reaches a loss, linearly interpolated; None if it never does."""
    for (t0, a), (t1, b) in itertools.pairwise(curve):
        if b <= loss:
            return t0 + (t1 - t0) * (a - loss) / (a - b)
    return None


def table(rows: list[Row]) -> str:
    """Return a Markdown table with a row per recipe and number of tokens, the longest baseline first."""
    groups: dict[tuple[str, int], list[Row]] = {}
    speed = {row["recipe"]: row["speeds"] for row in rows if "speeds" in row}
    for row in rows:
        if "loss" in row:
            groups.setdefault((row["recipe"], row["tokens"]), []).append(row)
    baseline = max((key for key in groups if key[0] == BASELINE), default=None)
    target = statistics.mean(row["loss"] for row in groups[baseline]) if baseline else None
    lines = [
        "| recipe | tokens | validation loss, mean ± sd | n | tokens to the baseline's loss | relative time |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for (name, tokens), group in sorted(groups.items(), key=lambda item: (item[0] != baseline, item[0])):
        losses = [row["loss"] for row in group]
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        reached = [tokens_to(row["curve"], target) for row in group] if target else []
        needed = [tokens for tokens in reached if tokens is not None]
        when = f"{statistics.mean(needed):,.0f}" if needed and len(needed) == len(group) else "not reached"
        when = f"{tokens:,}" if (name, tokens) == baseline else when  # the target is their mean
        cost = "" if name not in speed else f"{slower(speed[BASELINE], speed[name]):.2f}"
        cells = (name, f"{tokens:,}", f"{statistics.mean(losses):.4f}{spread}", len(group), when, cost)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def slower(baseline: list[float], speeds: list[float]) -> float:
    """Return the time per token relative to the baseline, median over rounds."""
    return statistics.median(b / s for b, s in zip(baseline, speeds, strict=True))


def main() -> None:
    """Run the trials and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", help="folder of token shards")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of finished trials")
    parser.add_argument("--layers", type=int, default=4, help="number of layers")
    parser.add_argument("--width", type=int, default=128, help="embedding width")
    parser.add_argument("--context", type=int, default=256, help="sequence length and context length")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens per step")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="training tokens of the baseline")
    parser.add_argument("--budget", type=float, default=1.0, help="fraction of --tokens to train on")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of AdamW in GPT-2's recipe")
    parser.add_argument("--looks", type=int, default=8, help="number of validations per trial")
    parser.add_argument("--eval-tokens", type=int, default=32_768, help="tokens per validation")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds per recipe")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=BASE,key=value,...", help="define another recipe"
    )
    parser.add_argument("--only", default="gpt2,llama,modern,speedrun", help="recipes, separated by commas")
    parser.add_argument(
        "--speed", type=int, metavar="ROUNDS", help="measure the speed of the recipes instead of training them"
    )
    parser.add_argument("--table", type=Path, help="file for the Markdown table of all finished trials")
    given = parser.parse_args()
    recipes = dict(RECIPES)
    for extra in given.set:
        name, _, changes = extra.partition("=")
        start, *pairs = changes.split(",")
        recipes[name] = recipes[start] | {k: json.loads(v) for k, v in (pair.split("=") for pair in pairs)}
    if given.data is not None:
        names = [n for name in given.only.split(",") for n in (ABLATIONS if name == "ablations" else [name])]
        dataset = prepare_text(DataConfig(source="tokens", path=str(given.data)))
        if given.speed:
            for row in speeds({name: changed(base(given), recipes[name]) for name in names}, dataset, given.speed):
                add_row(given.out, row)
            names = []
        device = choose_device("auto")
        for seed, name in itertools.product(range(given.seeds), names):
            run = dataclasses.replace(changed(base(given), recipes[name]), seed=seed)
            about = json.loads(json.dumps(dataclasses.asdict(run)))
            if any(row.get("config") == about for row in rows_of(given.out)):
                continue
            machine = environment(describe_device(device), dtype_name(choose_dtype(run.precision, device)))
            row = {"recipe": name, "seed": seed} | trial(run, dataset, given.looks, given.eval_tokens)
            add_row(given.out, row | {"config": about, "environment": machine})
            torch.compiler.reset()  # compiled code keeps its model in memory
            print(f"{name} seed {seed}: {row['loss']:.4f}", file=sys.stderr, flush=True)
    text = table(rows_of(given.out))
    print(text)
    if given.table:
        write_text_atomically(given.table, text)


if __name__ == "__main__":
    main()
