"""Tokens that the modern recipe needs to reach the loss of GPT-2's: small models from scratch, several seeds.

A shortened run of `benchmarks.recipe`, which measures every part at length.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from benchmarks.contenders import Measured
from benchmarks.harness import BenchPlan, comparison_of
from benchmarks.recipe import BASELINE, RECIPES, base, changed, tokens_to, trial
from benchmarks.records import Item, Metric
from benchmarks.texts import training_text
from restomod.data.dataset import Dataset
from restomod.data.prepare.text_cache import prepare_text

Row = dict[str, Measured]

OURS = ("modern", "speedrun", BASELINE)
METRICS = [
    Metric("tokens to GPT-2's loss", "", "lower"),
    Metric("validation loss", "nats", "lower"),
    Metric("tokens/s", "", "higher"),
]


def measure(plan: BenchPlan) -> Item:
    """A round is a seed, with which every recipe is trained once on the same tokens."""
    data, what = training_text(plan)
    dataset = prepare_text(data)
    sizes = argparse.Namespace(
        layers=plan.pick(4, 1, 12),
        width=plan.pick(128, 64, 768),
        context=plan.pick(256, 32, 256),
        batch_tokens=plan.pick(2048, 64, 16_384),
        tokens=plan.pick(65_536, 512, 4_194_304),
        lr=plan.pick(2e-3, 2e-3, 6e-4),
        budget=1.0,
        compile=False,
    )
    rows: list[Row] = []
    for seed in range(plan.rounds or plan.pick(2, 1)):
        if plan.late() and rows:
            break
        rows.append(trained(sizes, seed, dataset, plan.pick(8, 2), plan.pick(8_192, 64)))
    case = f"{sizes.layers} layers × {sizes.width}, {sizes.tokens:,} tokens, GPT-2's rate {sizes.lr:g}"
    notes = [f"{what}; a round is a seed; AdamW's rate of GPT-2's recipe was tuned at 4 × 128 with a million tokens"]
    notes += [f"{name} did not reach GPT-2's loss with every seed" for name in OURS if not reaching(rows, name)]
    return Item("Tokens to a loss", [comparison_of(case, list(OURS), rows, METRICS, notes=notes)])


def trained(sizes: argparse.Namespace, seed: int, dataset: Dataset, looks: int, eval_tokens: int) -> Row:
    """One seed of all recipes."""
    results: dict[str, dict[str, Any]] = {}
    for name in OURS:
        run = dataclasses.replace(changed(base(sizes), RECIPES[name]), seed=seed)
        results[name] = trial(run, dataset, looks, eval_tokens)
    return measured(results)


def measured(results: dict[str, dict[str, Any]]) -> Row:
    """The values of trials of one seed, by recipe; GPT-2's is among them."""
    target = results[BASELINE]["loss"]
    row = {}
    for name, result in results.items():
        values = {"validation loss": result["loss"], "tokens/s": result["tokens_per_second"]}
        reached = tokens_to(result["curve"], target)
        row[name] = Measured(values | ({METRICS[0].name: reached} if reached is not None else {}))
    return row


def reaching(rows: list[Row], name: str) -> bool:
    return all(METRICS[0].name in row[name].values for row in rows)
