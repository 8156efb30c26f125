"""HellaSwag's examples per second, beside a loop that feeds the four full rows of one example at a time.

    python benchmarks/hellaswag.py hellaswag_val.jsonl [--examples 500] [--rounds 5] [--model FOLDER] [--threads N]

The loop is the method of build-nanogpt's `hellaswag.py`, written anew: context and ending of all four choices as rows
of equal length, `transformers`' GPT-2, logits of all positions, cross-entropy, and the endings' part of it. It runs in
fp32, as that script does, and in bf16, as that project's training does for its evaluations. All run alternately over
the same examples with the same weights: random ones unless --model names a folder. Choices are compared, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

from restomod.data.tokenizer import gpt2_tokenizer
from restomod.device import autocast, describe_device, keep_freed_memory
from restomod.evals.models import ScoredGPT
from restomod.evals.scoring import evaluate
from restomod.evals.tasks import LoadedTask, load_task
from restomod.model.gpt import GPT, build_model
from restomod.model.pretrained import load_model, save_model
from restomod.presets import preset

FULL = 10_042
CPU = torch.device("cpu")


@torch.no_grad()
def four_rows(model: GPT2LMHeadModel, records: list[dict[str, Any]], dtype: torch.dtype) -> list[tuple[int, int]]:
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
        with autocast(CPU, dtype):
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
    loaded = load_task(f"hellaswag={given.file}", Path(), given.examples)
    scored = ScoredGPT(ours)
    loops = {"four rows, fp32": torch.float32, "four rows, bf16": torch.bfloat16}

    part = -(-given.examples // given.rounds)
    times: dict[str, list[float]] = {name: [] for name in ("restomod, fp32", *loops)}
    agreed = 0
    for start in range(0, given.examples, part):
        chunk = slice(start, start + part)
        n = len(records[chunk])
        began = time.perf_counter()
        result = evaluate(scored, LoadedTask(loaded.task, loaded.examples[chunk]))
        times["restomod, fp32"].append((time.perf_counter() - began) / n)
        ours_chose = list(zip(result.choices["acc"], result.choices["acc_token"], strict=True))
        for name, dtype in loops.items():
            began = time.perf_counter()
            theirs_chose = four_rows(theirs, records[chunk], dtype)
            times[name].append((time.perf_counter() - began) / n)
            if dtype == torch.float32:
                agreed += sum(a == b for a, b in zip(ours_chose, theirs_chose, strict=True))
        print(f"{n} examples:", ", ".join(f"{name} {1 / t[-1]:.2f}/s" for name, t in times.items()), flush=True)
    print(f"{describe_device(CPU)}, torch {torch.__version__}, {given.examples} examples in {len(times[name])} rounds")
    for name, seconds in times.items():
        mean = statistics.mean(seconds)
        ratio = statistics.median(s / o for s, o in zip(seconds, times["restomod, fp32"], strict=True))
        print(
            f"{name:<16} {1 / mean:6.2f} examples/s, {FULL:,} like these would take {FULL * mean / 60:.0f} min; "
            f"{ratio:.2f} times our time (median of the rounds)"
        )
    print(f"choices by acc and acc_token that are those of four rows in fp32: {agreed} of {given.examples}")


if __name__ == "__main__":
    main()
