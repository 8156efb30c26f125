"""Tokens that the modern recipe needs to reach the loss of GPT-2's recipe, with small models and several seeds.

A short version of `benchmarks.recipe`, which measures every part.
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
    """Train every recipe once per round on the same tokens; each round has another seed."""
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
    case = f"{sizes.layers} layers, width {sizes.width}, {sizes.tokens:,} tokens, learning rate {sizes.lr:g} for gpt2"
    notes = [f"{what}; one seed per round; gpt2's learning rate was tuned at 4 layers, width 128, one million tokens"]
    notes += [f"{name} did not reach GPT-2's loss with every seed" for name in OURS if not reaching(rows, name)]
    return Item("Tokens to GPT-2's loss", [comparison_of(case, list(OURS), rows, METRICS, notes=notes)])


def trained(sizes: argparse.Namespace, seed: int, dataset: Dataset, looks: int, eval_tokens: int) -> Row:
    """Train all recipes with one seed and return their metrics."""
    results: dict[str, dict[str, Any]] = {}
    for name in OURS:
        run = dataclasses.replace(changed(base(sizes), RECIPES[name]), seed=seed)
        results[name] = trial(run, dataset, looks, eval_tokens)
    return measured(results)


def measured(results: dict[str, dict[str, Any]]) -> Row:
    """Return the metrics of trials with one seed, by recipe; the baseline must be included."""
    target = results[BASELINE]["loss"]
    row = {}
    for name, result in results.items():
        values = {"validation loss": result["loss"], "tokens/s": result["tokens_per_second"]}
        reached = tokens_to(result["curve"], target)
        row[name] = Measured(values | ({METRICS[0].name: reached} if reached is not None else {}))
    return row


def reaching(rows: list[Row], name: str) -> bool:
    """Return whether a recipe reached GPT-2's loss in every round."""
    return all(METRICS[0].name in row[name].values for row in rows)
