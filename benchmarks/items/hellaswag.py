"""Speed of HellaSwag, compared with scoring one example at a time as four rows.

The second method is a reimplementation of build-nanogpt's `hellaswag.py`: context and ending of the four choices as
rows of equal length, the GPT-2 of `transformers`, logits of all positions, and the cross-entropy of the endings. It
runs in fp32, as that script, and in bf16, as the evaluation during that project's training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.contenders import Contender, InProcess, Measured, Round
from benchmarks.harness import BenchPlan, compare
from benchmarks.items.generation import exported, random_model
from benchmarks.records import Item, Metric
from benchmarks.texts import hellaswag
from restomod.data.tokenizer import gpt2_tokenizer
from restomod.engine.device import autocast, choose_dtype, keep_freed_memory, synchronize
from restomod.evals.models import ScoredGPT
from restomod.evals.scoring import score_task
from restomod.evals.tasks.registry import LoadedTask, load_task
from restomod.model.gpt import GPT

Choices = list[tuple[int, int]]


def measure(plan: BenchPlan) -> Item:
    """Score the same examples with the same random weights, one part of them per round."""
    count, rounds = plan.pick(500, 6, 1000), plan.rounds or plan.pick(5, 2)
    file, what = hellaswag(plan, count)
    model = random_model(plan)
    if plan.device == "cpu":
        keep_freed_memory()
    metric = Metric("examples/s", "", "higher")
    contenders: list[Contender] = [
        InProcess("restomod eval, fp32", lambda: ours(model, file, count, rounds)),
        InProcess("four rows per example, fp32", lambda: theirs(model, plan, file, count, rounds, torch.float32)),
    ]
    left_out = []
    if plan.device == "cuda" or choose_dtype("auto", torch.device("cpu")) == torch.bfloat16:
        contenders.append(
            InProcess("four rows per example, bf16", lambda: theirs(model, plan, file, count, rounds, torch.bfloat16))
        )
    else:
        left_out.append("four rows per example, bf16: slower than fp32 on this processor")
    note = f"{what}; random weights; same output: share of examples with the same choice by `acc` and by `acc_token`"
    case = "one pass over the examples"
    comparison = compare(plan, case, contenders, [metric], rounds, agree=alike)
    return Item("HellaSwag", [comparison], notes=[note], left_out=left_out)


def alike(ours: Choices, theirs: Choices) -> float:
    """Return the share of examples with the same choices, 0 to 1."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def parts(count: int, rounds: int) -> Iterator[slice]:
    """Yield the examples of each round: four for the warm-up, then all in equal parts."""
    yield slice(0, min(4, count))
    size = -(-count // rounds)
    for start in range(0, count, size):
        yield slice(start, start + size)


def timed(ask: Callable[[slice], Choices], count: int, rounds: int) -> Round:
    """Return a round that scores the next part of the examples with ``ask``."""
    remaining = parts(count, rounds)

    def one_round() -> Measured:
        part = next(remaining)
        start = perf_counter()
        choices = ask(part)
        return Measured({"examples/s": len(choices) / (perf_counter() - start)}, choices)

    return one_round


def ours(model: GPT, file: Path, count: int, rounds: int) -> Round:
    """Return a round that scores as `restomod eval` does."""
    loaded, scored = load_task(f"hellaswag={file}", Path(), count), ScoredGPT(model)

    def ask(part: slice) -> Choices:
        chosen = score_task(scored, LoadedTask(loaded.task, loaded.examples[part])).choices
        return list(zip(chosen["acc"], chosen["acc_token"], strict=True))

    return timed(ask, count, rounds)


def theirs(model: GPT, plan: BenchPlan, file: Path, count: int, rounds: int, dtype: torch.dtype) -> Round:
    """Return a round that scores one example at a time as four rows."""
    device = torch.device(plan.device)
    other = exported(model, torch.float32).to(device)
    with open(file, encoding="utf-8") as f:
        records = [json.loads(line) for _, line in zip(range(count), f, strict=False)]
    return timed(lambda part: four_rows(other, records[part], dtype, device), count, rounds)


@torch.no_grad()
def four_rows(model: Any, records: list[dict[str, Any]], dtype: torch.dtype, device: torch.device) -> Choices:
    """Return the choice of each example by summed and by mean log-probability."""
    encode = gpt2_tokenizer().encode
    choices = []
    for record in records:
        context = encode(record["ctx"]).tolist()
        endings = [encode(" " + ending).tolist() for ending in record["endings"]]
        T = len(context) + max(map(len, endings))
        tokens, mask = torch.zeros(4, T, dtype=torch.long), torch.zeros(4, T)
        for i, ending in enumerate(endings):
            tokens[i, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[i, len(context) : len(context) + len(ending)] = 1
        tokens, mask = tokens.to(device), mask.to(device)
        with autocast(device, dtype):
            logits = model(tokens).logits[:, :-1].contiguous()  # (4, T - 1, V)
        losses = F.cross_entropy(logits.view(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1), reduction="none")
        summed = (losses.view(4, -1) * mask[:, 1:]).sum(1)
        choices.append((int(summed.argmin()), int((summed / mask[:, 1:].sum(1)).argmin())))
    synchronize(device)
    return choices
