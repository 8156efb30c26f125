"""What each modern part is worth: the same model size and text, one part at a time, several seeds.

    python benchmarks/recipe.py TOKENS --out results.json [--seeds 3] [--only gpt2,modern] [--table]

TOKENS is a folder that `restomod prepare` made. A trial trains a small model from scratch and writes down its held-out
loss as it goes; finished trials are in the JSON file and are not repeated, so the same command goes on after an
interruption and with more seeds. The table says how many tokens a recipe needs to reach the final loss of the
baseline, GPT-2's own recipe with its learning rate tuned.
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
from pathlib import Path
from typing import Any

import torch

from restomod.config import DataConfig, ModelConfig, OptimConfig, RunConfig
from restomod.data.batches import Batches
from restomod.data.prepare import prepare
from restomod.data.shards import Dataset
from restomod.data.tokenizer import gpt2_tokenizer
from restomod.device import choose_device, choose_dtype, describe_device, keep_freed_memory
from restomod.evals.heldout import dataset_loss
from restomod.files import write_text_atomically
from restomod.model.gpt import build_model
from restomod.train.distributed import SINGLE
from restomod.train.optimizer import build_optimizer
from restomod.train.step import BatchLoss, Compute, train_step

Overrides = dict[str, Any]

BASELINE = "gpt2"
LLAMA: Overrides = {
    "model.norm": "rmsnorm",
    "model.positions": "rope",
    "model.mlp": "swiglu",
    "model.bias": False,
}
MODERN: Overrides = LLAMA | {
    "model.qk_norm": True,
    "model.zero_init_projections": True,
    "optim.optimizer": "muon",
    "optim.muon_lr": 0.02,
    "optim.lr": 4e-3,
    "optim.decay": "wsd",
    "optim.min_lr_ratio": 0.0,
    "optim.cooldown": 0.5,
    "optim.warmup_steps": 10,
}


def base(layers: int, width: int, context: int, batch_tokens: int, tokens: int, compile: bool) -> RunConfig:
    """GPT-2's recipe at another scale."""
    steps = tokens // batch_tokens
    return RunConfig(
        model=ModelConfig(n_layer=layers, n_head=max(1, width // 64), n_embd=width, n_positions=context),
        optim=OptimConfig(lr=2e-3, warmup_steps=max(1, steps // 20)),
        steps=steps,
        batch_tokens=batch_tokens,
        sequence_length=context,
        compile=compile,
    )


def changed(config: RunConfig, overrides: Overrides) -> RunConfig:
    """The run with some fields, ``model.norm`` or ``steps``, set to other values."""
    parts: dict[str, dict[str, Any]] = {"model": {}, "optim": {}, "": {}}
    for path, value in overrides.items():
        section, _, name = path.rpartition(".")
        parts[section][name] = value
    model = dataclasses.replace(config.model, **parts["model"])
    return dataclasses.replace(
        config, model=model, optim=dataclasses.replace(config.optim, **parts["optim"]), **parts[""]
    )


def trial(config: RunConfig, dataset: Dataset, looks: int, eval_tokens: int) -> dict[str, Any]:
    """Train once; held-out losses by tokens, and the time of the steps alone."""
    device = choose_device("auto")
    if device.type == "cpu":
        keep_freed_memory()
    compute = Compute(
        device, choose_dtype(config.precision, device), config.micro_batch or config.batch_sequences, config.compile
    )
    model = build_model(config.model, config.seed, device)
    if config.compile:
        model.transformer.compile(dynamic=False)
    batches = Batches(dataset.train, config.sequence_length, config.batch_sequences, config.seed)
    loss_of, optimizer = BatchLoss(model, compute), build_optimizer(model, config.optim, compute.dtype)
    curve, seconds = [], []
    for step in range(config.steps + 1):
        if step == config.steps or step % max(1, config.steps // looks) == 0:
            held = dataset_loss(model, dataset, config.sequence_length, device, compute.dtype, eval_tokens)
            assert held is not None
            curve.append((step * config.batch_tokens, held.loss))
        if step < config.steps:
            began = time.perf_counter()
            micro = batches.micro_batches(step, compute.micro_batch)
            train_step(loss_of, optimizer, micro, config, step, SINGLE).wait()
            seconds.append(time.perf_counter() - began)
    # the median: the first steps compile, and machines are shared
    speed = config.batch_tokens / statistics.median(seconds)
    return {"curve": curve, "loss": curve[-1][1], "tokens": curve[-1][0], "tokens_per_second": speed}


def add_row(out: Path, row: dict[str, Any]) -> None:
    """Write down a finished trial; several processes may share the file."""
    with open(out.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_text_atomically(out, json.dumps([*rows_of(out), row]) + "\n")


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The finished trials."""
    return json.loads(out.read_text()) if out.exists() else []


def tokens_to(curve: list[list[float]], loss: float) -> float | None:
    """Where a curve first reaches a loss, between its points in proportion."""
    for (t0, a), (t1, b) in itertools.pairwise(curve):
        if b <= loss:
            return t0 + (t1 - t0) * (a - loss) / (a - b)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description="what modern parts are worth")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--looks", type=int, default=12)
    parser.add_argument("--eval-tokens", type=int, default=32_768)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=BASE,key=value,...")
    parser.add_argument("--only", default="")
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    recipes: dict[str, Overrides] = {BASELINE: {}, "llama": LLAMA, "modern": MODERN}
    for extra in given.set:
        name, _, changes = extra.partition("=")
        start, *pairs = changes.split(",")
        recipes[name] = recipes[start] | {k: json.loads(v) for k, v in (pair.split("=") for pair in pairs)}
    config = base(given.layers, given.width, given.context, given.batch_tokens, given.tokens, given.compile)
    dataset = prepare(DataConfig(source="tokens", path=str(given.data)), gpt2_tokenizer())
    wanted = given.only.split(",") if given.only else list(recipes)
    for seed in range(given.seeds):
        for name in wanted:
            run = dataclasses.replace(changed(config, recipes[name]), seed=seed)
            about = json.loads(json.dumps(dataclasses.asdict(run)))
            if any(row["config"] == about for row in rows_of(given.out)):
                continue
            row = {"recipe": name, "seed": seed} | trial(run, dataset, given.looks, given.eval_tokens)
            row |= {"config": about, "device": describe_device(torch.device("cpu")), "threads": torch.get_num_threads()}
            add_row(given.out, row)
            said = f"{name} seed {seed}: {row['loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s"
            print(said, file=sys.stderr, flush=True)
    table(rows_of(given.out))


def table(results: list[dict[str, Any]]) -> None:
    """Print a row per recipe."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        by_name.setdefault(row["recipe"], []).append(row)
    target = statistics.mean(row["loss"] for row in by_name[BASELINE]) if BASELINE in by_name else None
    for name, rows in by_name.items():
        losses = [row["loss"] for row in rows]
        sd = statistics.stdev(losses) if len(losses) > 1 else float("nan")
        reached = [tokens_to(row["curve"], target) for row in rows] if target else []
        speed = statistics.median(row["tokens_per_second"] for row in rows)
        when = [r for r in reached if r is not None]
        there = f"{statistics.mean(when):,.0f}" if when and len(when) == len(reached) else "never"
        print(
            f"{name:<24} n {len(rows)}  loss {statistics.mean(losses):.4f} ± {sd:.4f}  {there:>12}  {speed:,.0f} tok/s"
        )


if __name__ == "__main__":
    main()
