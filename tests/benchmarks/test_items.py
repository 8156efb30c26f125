"""Tests of the contenders: steps, checkouts, texts, loaders."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import peers, texts
from benchmarks.contenders import Absent
from benchmarks.harness import BenchPlan
from benchmarks.items import growth, loader
from benchmarks.items.hellaswag import parts
from benchmarks.peers import Shape, StepInputs
from benchmarks.scale_data import write_sparse_shard
from restomod.data.dataset import HEADER_BYTES
from restomod.evals.tasks.registry import load_task


def task(path: Path | None = None) -> StepInputs:
    tokens = torch.randint(50257, (2, 17), generator=torch.Generator().manual_seed(0))
    return StepInputs(Shape(1, 2, 16, 32), tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), path)


@pytest.mark.parametrize("make", [lambda t: peers.restomod(t, False), peers.transformers])
def test_steps_start_at_the_loss_of_a_uniform_prediction_and_learn(make: object) -> None:
    pytest.importorskip("transformers")
    step = make(task())  # type: ignore[operator]
    losses = [step() for _ in range(10)]
    assert losses[0] == pytest.approx(math.log(50257), abs=0.3)
    assert losses[-1] < losses[0] - 0.05


SCRIPT = """
import torch
from dataclasses import dataclass

open("side effect", "w")  # statements of a script are not run

@dataclass
class GPTConfig:
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 1
    block_size: int = 1
    vocab_size: int = 1
    dropout: float = 0.5
    bias: bool = False

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.SGD(self.parameters(), lr=1000.0)

    def forward(self, x, y):
        logits = self.embedding(x) @ self.embedding.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""


def test_a_checkout_is_imported_without_running_its_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(SCRIPT)
    step = peers.nanogpt(task(tmp_path))
    first = step()
    assert step() != first, "it trains"
    assert not (tmp_path / "side effect").exists()


@pytest.mark.parametrize("name", peers.CHECKOUTS)
def test_a_checkout_of_another_project_is_absent(name: str, tmp_path: Path) -> None:
    with pytest.raises(Absent, match="the checkout has no file"):
        peers.CHECKOUTS[name](task(tmp_path))
    with pytest.raises(Absent, match="no checkout given"):
        peers.CHECKOUTS[name](task())


def test_random_questions_have_the_lengths_of_hellaswag(tmp_path: Path) -> None:
    """HellaSwag's validation set has 38.0 words per context and 24.7 per ending on average."""
    file, what = texts.hellaswag(BenchPlan(tmp_path), 1000)
    assert "random words" in what
    examples = load_task(f"hellaswag={file}", tmp_path).examples
    assert len(examples) == 1000
    assert np.mean([len(e.contexts[0].split()) for e in examples]) == pytest.approx(38.0, abs=1.5)
    assert np.mean([len(c.split()) for e in examples for c in e.choices]) == pytest.approx(24.7, abs=1.5)


def test_official_questions_are_used_if_they_exist(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / texts.HELLASWAG).write_text("{}")
    file, _ = texts.hellaswag(BenchPlan(tmp_path, data=tmp_path), 5)
    assert file == tmp_path / texts.HELLASWAG


def test_text_is_from_the_corpus_or_from_python(tmp_path: Path) -> None:
    found, what = texts.texts(BenchPlan(tmp_path), 0.2)
    assert sum(len(text.encode()) for text in found) >= 0.2e6
    assert "Python's standard library" in what
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train-0.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "corpus" / "val.jsonl").write_text('{"text": "held out"}\n')
    assert texts.texts(BenchPlan(tmp_path, data=tmp_path), 1.0)[0] == ["one", "two"]


def test_a_curve_is_reduced_to_medians() -> None:
    points = [(float(i), float(i % 3)) for i in range(7)]
    assert growth.medians(points, 3) == [(0.0, 1.0), (3.0, 1.0), (6.0, 0.0)]
    assert growth.medians(points, 1) == points


@pytest.mark.parametrize(("count", "rounds"), [(500, 5), (6, 2), (7, 3), (3, 1)])
def test_all_examples_are_scored_once(count: int, rounds: int) -> None:
    _, *timed = list(parts(count, rounds))
    assert len(timed) == rounds
    assert [i for part in timed for i in range(count)[part]] == list(range(count))


def test_both_loaders_read_every_window_once_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "T", 8)
    monkeypatch.setattr(loader, "SEQUENCES", 4)
    write_sparse_shard(path := tmp_path / "train.bin", 8 * 4 * 6 + 1)
    shard = np.memmap(path, dtype=np.uint16, mode="r+", offset=HEADER_BYTES)
    shard[:] = np.arange(len(shard))
    shard.flush()
    for fetch in (loader.ours([path], iter(range(6))), loader.data_loader([path], 0)):
        seen = torch.cat([fetch() for _ in range(6)])[:, 0] // 8
        assert sorted(seen.tolist()) == list(range(24))
    whole, rest = loader.data_loader([path], 0), loader.data_loader([path], 2)
    batches = [whole() for _ in range(3)]
    assert torch.equal(rest(), batches[2]), "a resumed DataLoader continues with the next batch"
