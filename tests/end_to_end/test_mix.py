"""Runs on a mix of token folders: shares in every step, validation, resuming."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from restomod.config.prepare import PrepareConfig
from restomod.config.run import DataConfig, RunConfig
from restomod.data.dataset import mix, open_tokens, write_shard
from restomod.data.prepare.run import prepare_folder
from restomod.data.read_counts import summary_rows
from restomod.evals.validation import validation_loss
from restomod.runs.metrics import read_jsonl
from restomod.train.console_lines import run_summary
from restomod.train.loop import train
from restomod.train.setup import set_up
from restomod.utils.errors import UserError

from .conftest import QUIET


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two folders of tokens: a long one with low ids and a short one with high ids."""
    chance = np.random.default_rng(0)
    for name, low, high, n in (("web", 0, 100, 6_000), ("books", 200, 300, 700)):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "x_train_000000.bin", chance.integers(low, high, n).astype(np.uint16))
        write_shard(tmp_path / name / "x_val_000000.bin", chance.integers(low, high, 200).astype(np.uint16))
    return [tmp_path / "web", tmp_path / "books"]


@pytest.fixture
def mixed(tiny: RunConfig, folders: list[Path]) -> RunConfig:
    data = DataConfig(source="tokens", mix=f"{folders[0]}:3,{folders[1]}:1", cache=tiny.data.cache)
    return dataclasses.replace(tiny, data=data, steps=8, save_every=4, eval_every=4, sanity_checks=False)


def test_every_step_has_its_share_of_each_folder(mixed: RunConfig, tmp_path: Path) -> None:
    training = set_up(mixed, tmp_path / "run", resume=False)
    for step in range(30):  # 4 sequences per step, one from the short folder, for more than one epoch
        ((x, _),) = training.data.batches.micro_batches(step, 4)
        assert ((x >= 200).all(dim=1).sum().item(), (x < 100).all(dim=1).sum().item()) == (1, 3)
    table = dict(run_summary(training))
    assert table["data"] == "0.75 web + 0.25 books (7,100 tokens)"
    assert table["split"] == "6,700 training tokens, 400 validation tokens"
    assert table["steps"] == "8 (1,024 tokens, 0.13 epochs of web, 0.38 epochs of books)"


def test_the_validation_loss_is_the_mean_weighted_by_share(
    mixed: RunConfig, folders: list[Path], tmp_path: Path
) -> None:
    assert train(mixed, tmp_path / "run", display=QUIET) == 0
    last = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "val"][-1]
    training = set_up(dataclasses.replace(mixed), tmp_path / "run", resume=True)
    for folder in folders:
        held = validation_loss(
            training.model, open_tokens(folder).val, 32, training.compute.device, training.compute.dtype
        )
        assert last["sources"][folder.name] == pytest.approx(held.loss, rel=1e-6)
    assert last["loss"] == pytest.approx(0.75 * last["sources"]["web"] + 0.25 * last["sources"]["books"], rel=1e-9)
    assert last["tokens"] == 2 * 199


def test_a_resumed_run_refuses_another_mix(mixed: RunConfig, folders: list[Path], tmp_path: Path) -> None:
    assert train(mixed, tmp_path / "run", display=QUIET) == 0
    other = dataclasses.replace(mixed.data, mix=f"{folders[0]}:1,{folders[1]}:1")
    with pytest.raises(UserError, match="this mix has other tokens than"):
        train(dataclasses.replace(mixed, data=other, steps=9), tmp_path / "run", resume=True, display=QUIET)


def test_mix_is_a_flag_of_train(restomod: Callable, folders: list[Path], tmp_path: Path) -> None:
    shape = "--model.n-layer 1 --model.n-head 1 --model.n-embd 16 --sequence-length 32 --batch-tokens 128 --steps 2"
    process = restomod("train", "quickstart", "--mix", "web:0.5,books:0.5", "--out", "run", *shape.split())
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "0.5 web + 0.5 books" in out
    assert "validation loss" in out
    assert "(web " in out
    process = restomod("train", "quickstart", "--mix=web:0.5,book:0.5", "--out", "run2", *shape.split())
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.startswith(f"restomod: error: {tmp_path}/book: no such folder of token shards")
    assert err.count("\n") == 1


def test_counts_of_read_files_are_summed(tmp_path: Path) -> None:
    for name, content in (("a", "one <|endoftext|> two"), ("b", "three"), ("c", "four <|endoftext|>")):
        (tmp_path / f"{name}.txt").write_text(content * 9)
        prepare_folder((str(tmp_path / f"{name}.txt"),), PrepareConfig(), tmp_path / name, 1)
    parts = [(open_tokens(tmp_path / name, "sizes"), Fraction(1, 3)) for name in "abc"]
    said = dict(summary_rows(mix(parts).manifest))
    assert said["read"].startswith("3 files as plain text (.txt, ")
    assert said["warning"].startswith("the text contains a literal <|endoftext|> 18 times")
