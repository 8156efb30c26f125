"""Fixtures: text, model and run configuration small enough to train in a second."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from restomod.config.run import DataConfig, ModelConfig, OptimConfig, RunConfig, SamplingConfig
from restomod.runs.metrics import read_jsonl
from restomod.utils.console import Display

QUIET = Display(interactive=False)
WORDS = "the a cat dog house tree runs sleeps eats sees green old quickly never and or but with under over"


def losses(run: Path) -> list[tuple[str, int, float]]:
    """Return kind, step and loss of all records of a run with a loss."""
    return [(r["kind"], r["step"], r["loss"]) for r in read_jsonl(run / "metrics.jsonl") if "loss" in r]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of eight documents of about 900 tokens each."""
    folder = tmp_path / "text"
    folder.mkdir()
    chance = random.Random(0)
    for i in range(8):
        (folder / f"{i}.txt").write_text(" ".join(chance.choices(WORDS.split(), k=800)))
    return folder


@pytest.fixture
def tiny(text: Path, tmp_path: Path) -> RunConfig:
    """Twelve steps of a two-layer GPT-2 in fp32."""
    return RunConfig(
        steps=12,
        batch_tokens=128,
        sequence_length=32,
        micro_batch=2,
        model=ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=32),
        data=DataConfig(source="text", path=str(text), val_fraction=0.2, cache=str(tmp_path / "data")),
        optim=OptimConfig(lr=3e-3, warmup_steps=3),
        sampling=SamplingConfig(prompts=("the cat",), max_tokens=8),
        eval_every=5,
        sample_every=5,
        save_every=4,
        device="cpu",
        precision="fp32",
    )


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Five questions with contexts of different lengths; the last is too long for `tiny`."""
    path = tmp_path / "questions.jsonl"
    records = [
        {"query": " ".join(WORDS.split()[: 3 * i + 1]), "choices": ["cat sleeps", "dog"], "gold": i % 2}
        for i in range(4)
    ]
    records.append({"query": "the cat " * 20, "choices": ["sees", "eats a house"], "gold": 1})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def shared(tiny: RunConfig) -> RunConfig:
    """A run with eight sequences per step, which up to four ranks can share."""
    return dataclasses.replace(
        tiny, batch_tokens=128, sequence_length=16, micro_batch=1, eval_tokens=256, keep_checkpoints=0
    )


def flags(config: RunConfig) -> list[str]:
    """Return the flags that turn the quickstart preset into ``config``."""
    m, d, o = config.model, config.data, config.optim
    values = {
        "steps": config.steps,
        "batch-tokens": config.batch_tokens,
        "sequence-length": config.sequence_length,
        "micro-batch": config.micro_batch,
        "model.n-layer": m.n_layer,
        "model.n-head": m.n_head,
        "model.n-embd": m.n_embd,
        "model.n-positions": m.n_positions,
        "data.source": d.source,
        "data.path": d.path,
        "data.val-fraction": d.val_fraction,
        "data.cache": d.cache,
        "optim.lr": o.lr,
        "optim.warmup-steps": o.warmup_steps,
        "sampling.prompts": config.sampling.prompts[0],
        "sampling.max-tokens": config.sampling.max_tokens,
        "eval-every": config.eval_every,
        "eval-tokens": config.eval_tokens,
        "keep-checkpoints": config.keep_checkpoints,
        "sample-every": config.sample_every,
        "save-every": config.save_every,
        "device": config.device,
        "precision": config.precision,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@pytest.fixture
def restomod(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Function that starts the command line in a separate process in ``tmp_path``, on one thread by default."""

    def start(
        *arguments: str, program: tuple[str, ...] = ("-m", "restomod"), threads: int = 1
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
