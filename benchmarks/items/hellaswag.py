"""Speed of HellaSwag, compared with scoring four full rows of one example at a time.

That way is the method of build-nanogpt's `hellaswag.py`, written anew: context and ending of all four choices as rows
of equal length, `transformers`' GPT-2, logits of all positions, cross-entropy, and the endings' part of it. It runs in
fp32, as that script does, and in bf16, as that project's training does for its evaluations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.contenders import Contender, Here, Measured, Round
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
    """Score the same examples with the same random weights, a part of them per round."""
    count, rounds = plan.pick(500, 6, 1000), plan.rounds or plan.pick(5, 2)
    file, what = hellaswag(plan, count)
    model = random_model(plan)
    if plan.device == "cpu":
        keep_freed_memory()
    metric = Metric("examples/s", "", "higher")
    contenders: list[Contender] = [
        Here("restomod eval, fp32", lambda: ours(model, file, count, rounds)),
        Here("four full rows, fp32", lambda: theirs(model, plan, file, count, rounds, torch.float32)),
    ]
    left_out = []
    if plan.device == "cuda" or choose_dtype("auto", torch.device("cpu")) == torch.bfloat16:
        contenders.append(
            Here("four full rows, bf16", lambda: theirs(model, plan, file, count, rounds, torch.bfloat16))
        )
    else:
        left_out.append("four full rows in bf16: this processor computes that slower than fp32")
    note = f"{what}; random weights; same output: of the choices by `acc` and `acc_token`"
    case = "one pass over the examples"
    comparison = compare(plan, case, contenders, [metric], rounds, agree=alike)
    return Item("HellaSwag", [comparison], notes=[note], left_out=left_out)


def alike(ours: Choices, theirs: Choices) -> float:
    """Part of the examples in which both accuracies choose the same."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def parts(count: int, rounds: int) -> Iterator[slice]:
    """Examples of each round: four to warm up, then all in equal parts."""
    yield slice(0, min(4, count))
    size = -(-count // rounds)
    for start in range(0, count, size):
        yield slice(start, start + size)


def timed(ask: Callable[[slice], Choices], count: int, rounds: int) -> Round:
    remaining = parts(count, rounds)

    def one_round() -> Measured:
        part = next(remaining)
        start = perf_counter()
        choices = ask(part)
        return Measured({"examples/s": len(choices) / (perf_counter() - start)}, choices)

    return one_round


def ours(model: GPT, file: Path, count: int, rounds: int) -> Round:
    """Score as `restomod eval` does."""
    loaded, scored = load_task(f"hellaswag={file}", Path(), count), ScoredGPT(model)

    def ask(part: slice) -> Choices:
        chosen = score_task(scored, LoadedTask(loaded.task, loaded.examples[part])).choices
        return list(zip(chosen["acc"], chosen["acc_token"], strict=True))

    return timed(ask, count, rounds)


def theirs(model: GPT, plan: BenchPlan, file: Path, count: int, rounds: int, dtype: torch.dtype) -> Round:
    """One example at a time, as four full rows."""
    device = torch.device(plan.device)
    other = exported(model, torch.float32).to(device)
    with open(file, encoding="utf-8") as f:
        records = [json.loads(line) for _, line in zip(range(count), f, strict=False)]
    return timed(lambda part: four_rows(other, records[part], dtype, device), count, rounds)


@torch.no_grad()
def four_rows(model: Any, records: list[dict[str, Any]], dtype: torch.dtype, device: torch.device) -> Choices:
    """The choice of each example by summed and by mean log-probability."""
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
