"""Unmodified lm-evaluation-harness on an exported checkpoint: the same choice for every example."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from restomod.checks.device_parity import random_model
from restomod.evals.models import open_language_model
from restomod.evals.scoring import TaskResult, score_task
from restomod.evals.tasks.registry import load_task
from restomod.model.hf_io import save_model
from tests.evals.plainly import SMALL
from tests.models import CPU

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None,
        reason="lm-evaluation-harness is not installed: pip install -c constraints.txt -e '.[lm-eval]'",
    ),
]

CHOICE = """\
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_bytes, aggregation: mean, higher_is_better: true}}
"""
LAST_WORD = """\
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: loglikelihood
validation_split: validation
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
"""
WORDS = [
    "The",
    "cat's",
    "naïve",
    "中文",
    "résumé,",
    "it",
    "said:",
    "'go'",
    "and\nthen",
    "3.14",
    "walked",
    "over",
    "an",
    "unbelievable",
    "hill",
    "<|endoftext|>",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(random_model(SMALL), path)
    return path


def harness(folder: Path, task: str, file: Path) -> tuple[dict, list[dict]]:
    """Return the results and the samples in file order."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    (file.parent / "local.yaml").write_text(task.format(file=file))
    report = simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},dtype=float32",
        tasks=["local"],
        task_manager=TaskManager(include_path=str(file.parent), include_defaults=False),
        batch_size=4,
        device="cpu",
    )
    assert report is not None
    return report["results"]["local"], sorted(report["samples"]["local"], key=lambda sample: sample["doc_id"])


def ours(folder: Path, task: str) -> TaskResult:
    return score_task(open_language_model(str(folder), CPU, torch.float32), load_task(task, Path()))


def test_multiple_choice_gives_the_same_choices(folder: Path, tmp_path: Path) -> None:
    chance = np.random.default_rng(0)

    def words(least: int, most: int) -> str:
        return " ".join(chance.choice(WORDS, chance.integers(least, most + 1)))

    records = [
        {"query": words(1, 40), "choices": [words(1, 6) for _ in range(4)], "gold": int(chance.integers(4))}
        for _ in range(60)
    ]
    records[3]["query"] += "  "  # spaces at the end of the context belong to the choice
    records[4]["choices"][2] = records[4]["choices"][1]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    result = ours(folder, str(file))
    report, samples = harness(folder, CHOICE, file)
    assert 0 < result.truncated < 60
    for name in ("acc", "acc_norm", "acc_bytes"):
        hits = [a == b for a, b in zip(result.choices[name], result.gold, strict=True)]
        assert [bool(sample[name]) for sample in samples] == hits
        assert result.metrics[name].value == report[f"{name},none"]
        assert result.metrics[name].stderr == pytest.approx(report[f"{name}_stderr,none"])
    likeliest = [int(np.argmax([answer[0][0] for answer in sample["resps"]])) for sample in samples]
    assert result.choices["acc"] == likeliest


def test_last_words_have_the_same_perplexity(folder: Path, tmp_path: Path) -> None:
    chance = np.random.default_rng(1)
    texts = [" ".join(chance.choice(WORDS, chance.integers(3, 20))) for _ in range(30)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    result = ours(folder, f"lambada={file}")
    report, samples = harness(folder, LAST_WORD, file)
    assert result.choices["acc"] == [int(sample["acc"]) for sample in samples]
    assert math.log(result.metrics["perplexity"].value) == pytest.approx(math.log(report["perplexity,none"]), rel=1e-6)
