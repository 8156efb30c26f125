"""Tests of expected losses: the loss of a similar published run, or unknown without such a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from restomod.config.presets import preset
from restomod.config.run import DataConfig, RunConfig
from restomod.experiments.plan.expected_loss import expected_loss

GPT2, LLAMA, TINY = preset("gpt2-124m"), preset("llama-124m"), preset("tinyshakespeare")


def with_rate(config: RunConfig, lr: float) -> RunConfig:
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=lr))


@pytest.mark.parametrize(("lr", "published"), [(6e-4, 3.0718), (1.2e-3, 3.0438)])
def test_a_published_learning_rate_gives_the_published_loss(lr: float, published: float) -> None:
    expected = expected_loss(with_rate(GPT2, lr))
    assert expected.loss == pytest.approx(published, abs=1e-6)
    assert (expected.low, expected.high) == (3.0438, 3.3969)
    assert "if the text is FineWeb-Edu" in expected.basis


def test_the_loss_is_interpolated_between_learning_rates() -> None:
    loss = expected_loss(with_rate(GPT2, 6e-4 * 2**0.5)).loss
    assert loss == pytest.approx((3.0718 + 3.0438) / 2)


def test_llama_has_one_published_run_of_two_epochs() -> None:
    expected = expected_loss(LLAMA)
    assert (expected.loss, expected.low) == (2.99, None)
    assert "one public run" in expected.basis


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (dataclasses.replace(GPT2, steps=1000), "this run on 0.524 billion"),
        (dataclasses.replace(GPT2, steps=2 * GPT2.steps), "this run on 20 billion"),
        (dataclasses.replace(LLAMA, steps=GPT2.steps), "two epochs with learning rate 1.8e-3"),
        (with_rate(LLAMA, 6e-4), "two epochs with learning rate 1.8e-3"),
        (dataclasses.replace(LLAMA, data=DataConfig()), "trains on FineWeb-Edu"),
        (dataclasses.replace(GPT2, batch_tokens=2**18, steps=38_146), "524,288 tokens per step"),
        (with_rate(GPT2, 3e-3), "this run has 0.003"),
        (with_rate(GPT2, 1e-4), "this run has 0.0001"),
        (dataclasses.replace(GPT2, init="gpt2"), "trained ones"),
        (dataclasses.replace(GPT2, data=DataConfig()), "train on FineWeb-Edu or TinyShakespeare"),
        (preset("modern-124m"), "this is another model"),
        (preset("gpt2-355m"), "this is another model"),
        (dataclasses.replace(TINY, target_loss=None), "has 3,533 steps"),
        (with_rate(TINY, 1e-3), "a learning rate of 6e-4"),
        (dataclasses.replace(preset("quickstart"), steps=901), "this is another model"),
    ],
)
def test_without_a_similar_published_run_the_loss_is_unknown_with_a_reason(config: RunConfig, why: str) -> None:
    expected = expected_loss(config)
    assert (expected.loss, expected.low, expected.high) == (None, None, None)
    assert expected.basis.startswith("unknown: ")
    assert why in expected.basis


@pytest.mark.parametrize(
    ("steps", "target", "loss"),
    [(3533, None, 0.089), (1000, None, 2.464), (3600, 0.09, 0.09), (1950, None, (0.272 * 0.199) ** 0.5)],
)
def test_tinyshakespeare_is_memorised(steps: int, target: float | None, loss: float) -> None:
    expected = expected_loss(dataclasses.replace(TINY, steps=steps, target_loss=target))
    assert expected.loss == pytest.approx(loss)
    assert "training loss" in expected.basis


@pytest.mark.parametrize("changed", [{}, {"eval_every": 100}, {"device": "cpu"}])
def test_the_quickstart_reaches_its_previous_loss(changed: dict[str, Any]) -> None:
    expected = expected_loss(dataclasses.replace(preset("quickstart"), **changed))
    assert expected.loss == pytest.approx(4.84, abs=0.01)
    assert "Python 3.11.7" in expected.basis


@pytest.mark.parametrize(("name", "known"), [("fineweb-edu", True), ("mine", False)])
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_tokens_of_another_text_have_no_published_loss(
    config: RunConfig, name: str, known: bool, tmp_path: Path
) -> None:
    manifest = {"format": "restomod-tokens-1", "name": name, "fingerprint": "0", "documents": None, "tokens": 0}
    tokenizer = {"name": "gpt2", "vocab_size": 50257, "sha256": "0"}
    splits = {split: {"tokens": 0, "shards": []} for split in ("train", "val")}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": tokenizer, "splits": splits}))
    data = DataConfig(source="tokens", path=str(tmp_path))
    assert (expected_loss(dataclasses.replace(config, data=data)).loss is not None) is known
