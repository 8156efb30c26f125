"""HellaSwag's examples per second, beside a loop that feeds the four full rows of one example at a time.

    python benchmarks/hellaswag.py hellaswag_val.jsonl [--examples 500] [--rounds 5] [--model FOLDER] [--threads N]

The loop is the method of build-nanogpt's `hellaswag.py`, written anew: context and ending of all four choices as rows
of equal length, `transformers`' GPT-2, logits of all positions, cross-entropy, and the endings' part of it. Both run
alternately over the same examples, in fp32, with the same weights: random ones unless --model names a folder. Their
choices are compared, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

from restomod.data.tokenizer import gpt2_tokenizer
from restomod.device import describe_device, keep_freed_memory
from restomod.evals.models import ScoredGPT
from restomod.evals.scoring import ACCURACIES, evaluate
from restomod.evals.tasks import TASKS
from restomod.model.gpt import GPT, build_model
from restomod.model.pretrained import load_model, save_model
from restomod.presets import preset

FULL = 10_042
CPU = torch.device("cpu")


@torch.no_grad()
def four_rows(model: GPT2LMHeadModel, records: list[dict[str, object]]) -> list[tuple[int, int]]:
    """The choice of each example by summed and by mean log-probability, one example at a time."""
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
        logits = model(tokens).logits[:, :-1].contiguous()  # (4, T - 1, V)
        losses = F.cross_entropy(logits.view(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1), reduction="none")
        summed = (losses.view(4, -1) * mask[:, 1:]).sum(1)
        choices.append((int(summed.argmin()), int((summed / mask[:, 1:].sum(1)).argmin())))
    return choices


def main() -> None:
    parser = argparse.ArgumentParser(description="HellaSwag's examples per second")
    parser.add_argument("file", type=Path)
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    ours: GPT = load_model(given.model, CPU) if given.model else build_model(preset("gpt2-124m").model, 1, CPU).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, Path(folder))
        theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    with open(given.file, encoding="utf-8") as f:
        records = [json.loads(line) for _, line in zip(range(given.examples), f, strict=False)]
    examples = TASKS["hellaswag"].read(given.file)[: given.examples]
    scored = ScoredGPT(ours)

    part = -(-given.examples // given.rounds)
    times: list[tuple[float, float]] = []
    agreed = 0
    for start in range(0, given.examples, part):
        began = time.perf_counter()
        result = evaluate(scored, examples[start : start + part])
        middle = time.perf_counter()
        expected = four_rows(theirs, records[start : start + part])
        times.append((middle - began, time.perf_counter() - middle))
        agreed += sum(a == b for a, b in zip(zip(result.choices["acc"], result.choices["acc_token"]), expected))
        n = len(expected)
        print(f"{n} examples: {n / times[-1][0]:.2f} and {n / times[-1][1]:.2f} examples/s", flush=True)
    a, b = (sum(column) for column in zip(*times, strict=True))
    ratio = statistics.median(theirs / ours for ours, theirs in times)
    print(f"{describe_device(CPU)}, torch {torch.__version__}, fp32, {given.examples} examples in {len(times)} rounds")
    print(
        f"restomod           {given.examples / a:6.2f} examples/s; {FULL:,} would take {FULL * a / given.examples / 60:.1f} min"
    )
    print(
        f"four rows, in turn {given.examples / b:6.2f} examples/s; {FULL:,} would take {FULL * b / given.examples / 60:.1f} min"
    )
    print(
        f"{ratio:.2f} times as fast (median of the rounds); {agreed} of {given.examples} choose alike, by {len(ACCURACIES)} accuracies"
    )


if __name__ == "__main__":
    main()
