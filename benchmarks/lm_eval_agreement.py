"""Agreement of restomod and lm-evaluation-harness on HellaSwag, example by example.

    pip install -c constraints.txt -e '.[lm-eval]'
    python -m benchmarks.lm_eval_agreement MODEL_FOLDER hellaswag_val.jsonl [--examples 500]

The harness runs unmodified on the model folder, offline, with a task that reads the same file.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

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


def evaluate_by_harness(folder: Path, file: Path, examples: int) -> dict[str, Any]:
    """Return the results of lm-evaluation-harness, including its samples."""
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


def main() -> None:
    """Score the examples with restomod and with the harness, and print the agreement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="model folder, such as a checkpoint of a run")
    parser.add_argument("file", type=Path, help="hellaswag_val.jsonl")
    parser.add_argument("--examples", type=int, default=500, help="number of examples (default: %(default)s)")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

    model = ScoredGPT(load_model(given.folder, torch.device("cpu")))
    loaded = load_task(f"hellaswag={given.file}", Path(), given.examples)
    ours = score_task(model, loaded)
    print({name: (e.value, e.stderr) for name, e in ours.metrics.items()}, f"{ours.seconds:.0f} s", flush=True)
    for batch in (1, 8, 32):
        same = score_task(model, loaded, batch).choices == ours.choices
        print(f"batch size {batch}: choices {'equal' if same else 'DIFFER'}", flush=True)

    began = time.perf_counter()
    report = evaluate_by_harness(given.folder, given.file, given.examples)
    samples = sorted(report["samples"]["local_hellaswag"], key=lambda sample: sample["doc_id"])
    print(f"lm-evaluation-harness: {report['results']['local_hellaswag']}, {time.perf_counter() - began:.0f} s")
    for name in ("acc", "acc_norm"):
        hits = [a == b for a, b in zip(ours.choices[name], ours.gold, strict=True)]
        equal = sum(bool(sample[name]) == hit for sample, hit in zip(samples, hits, strict=True))
        print(f"{name}: same result for {equal} of {len(samples)} examples")
    likeliest = [int(np.argmax([answer[0][0] for answer in sample["resps"]])) for sample in samples]
    equal = sum(a == b for a, b in zip(likeliest, ours.choices["acc"], strict=True))
    print(f"acc: same choice for {equal} of {len(samples)} examples")


if __name__ == "__main__":
    main()
