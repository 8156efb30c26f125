"""Agreement of restomod, lm-evaluation-harness and a plain loop on HellaSwag, example by example.

    pip install -c constraints.txt -e '.[lm-eval]'
    python -m benchmarks.lm_eval_agreement MODEL_FOLDER hellaswag_val.jsonl [--examples 500]

The harness runs unmodified on the exported folder, with a task that reads the same file, and no network.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2LMHeadModel

from restomod.data.tokenizer import gpt2_tokenizer
from restomod.evals.models import ScoredGPT
from restomod.evals.scoring import score_task
from restomod.evals.tasks.registry import load_task
from restomod.model.hf_io import load_model

TASK = """\
task: local_hellaswag
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{ctx}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def by_harness(folder: Path, file: Path, examples: int) -> dict[str, Any]:
    """Results of lm-evaluation-harness, with its samples."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as tasks:
        (Path(tasks) / "local_hellaswag.yaml").write_text(TASK.format(file=file.absolute()))
        report = simple_evaluate(
            model="hf",
            model_args=f"pretrained={folder},dtype=float32",
            tasks=["local_hellaswag"],
            task_manager=TaskManager(include_path=tasks, include_defaults=False),
            limit=examples,
            batch_size=8,
            device="cpu",
        )
    assert report is not None
    return report


@torch.no_grad()
def score_one_row_at_a_time(folder: Path, records: list[dict[str, Any]]) -> list[list[tuple[float, int]]]:
    """Log-probability and number of tokens of each ending: one row at a time, all logits, no batches."""
    model, encode = GPT2LMHeadModel.from_pretrained(folder).eval(), gpt2_tokenizer().encode
    scores = []
    for record in records:
        context, part = encode(record["ctx"]).tolist(), []
        for ending in record["endings"]:
            tokens = encode(" " + ending).tolist()
            logits = model(torch.tensor([context + tokens])).logits[0].double().log_softmax(-1)
            at = range(len(context) - 1, len(context) + len(tokens) - 1)
            part.append((sum(logits[i, t].item() for i, t in zip(at, tokens, strict=True)), len(tokens)))
        scores.append(part)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description="HellaSwag by three ways")
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--examples", type=int, default=500)
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

    model = ScoredGPT(load_model(given.folder, torch.device("cpu")))
    loaded = load_task(f"hellaswag={given.file}", Path(), given.examples)
    ours = score_task(model, loaded)
    print({name: (e.value, e.stderr) for name, e in ours.metrics.items()}, f"{ours.seconds:.0f} s", flush=True)
    for batch in (1, 8, 32):
        same = score_task(model, loaded, batch).choices == ours.choices
        print(f"batch {batch}: all choices are {'the same' if same else 'NOT the same'}", flush=True)

    with open(given.file, encoding="utf-8") as f:
        records = [json.loads(line) for _, line in zip(range(given.examples), f, strict=False)]
    scores = score_one_row_at_a_time(given.folder, records)
    sums = [np.array([p for p, _ in part]) for part in scores]
    lengths = {
        "acc": [np.ones(len(r["endings"])) for r in records],
        "acc_norm": [np.array([len(e) for e in r["endings"]]) for r in records],
        "acc_bytes": [np.array([len(e.encode()) for e in r["endings"]]) for r in records],
        "acc_token": [np.array([n for _, n in part]) for part in scores],
    }
    for name, divisors in lengths.items():
        plain = [int(np.argmax(s / d)) for s, d in zip(sums, divisors, strict=True)]
        equal = sum(a == b for a, b in zip(plain, ours.choices[name], strict=True))
        print(f"one row at a time, {name}: {equal} of {len(plain)} choices are ours", flush=True)

    began = time.perf_counter()
    report = by_harness(given.folder, given.file, given.examples)
    samples = sorted(report["samples"]["local_hellaswag"], key=lambda sample: sample["doc_id"])
    print(f"lm-evaluation-harness: {report['results']['local_hellaswag']}, {time.perf_counter() - began:.0f} s")
    furthest = max(
        abs(float(answer[0][0]) - p)
        for sample, part in zip(samples, sums, strict=True)
        for answer, p in zip(sample["resps"], part, strict=True)
    )
    for name in ("acc", "acc_norm"):
        hits = [a == b for a, b in zip(ours.choices[name], ours.gold, strict=True)]
        alike = sum(bool(sample[name]) == hit for sample, hit in zip(samples, hits, strict=True))
        answers = [np.array([float(answer[0][0]) for answer in sample["resps"]]) for sample in samples]
        theirs = [int(np.argmax(a / d)) for a, d in zip(answers, lengths[name], strict=True)]
        equal = sum(a == b for a, b in zip(theirs, ours.choices[name], strict=True))
        print(f"lm-evaluation-harness, {name}: {alike} of {len(samples)} judged alike, {equal} choices are ours")
    print(f"largest difference of a log-likelihood: harness and plain loop {furthest:.1e}")


if __name__ == "__main__":
    main()
