"""Runs on existing token shards: batches equal slices of the files read by numpy."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from restomod.config.prepare import PrepareConfig
from restomod.config.run import DataConfig, RunConfig
from restomod.data.batches import Batches, permute
from restomod.data.dataset import open_tokens
from restomod.data.prepare.run import prepare_folder
from restomod.train.loop import train
from restomod.utils.errors import UserError

from .conftest import QUIET, losses

KINDS = ["prepared", "llm.c", "build-nanogpt"]


@pytest.fixture
def prepared(text: Path, tmp_path: Path) -> Path:
    """The text as token shards of 1,000 tokens."""
    out = tmp_path / "prepared"
    prepare_folder((str(text),), PrepareConfig(val_fraction=0.2, shard_tokens=1000), out, workers=1)
    return out


def as_published(prepared: Path, kind: str) -> tuple[Path, dict[str, np.ndarray]]:
    """The same tokens in formats of other projects, and the tokens that numpy reads from the files."""
    folder = prepared.parent / kind
    folder.mkdir(exist_ok=True)
    tokens: dict[str, np.ndarray] = {}
    for split in ("train", "val"):
        parts = []
        for i, path in enumerate(sorted(prepared.glob(f"{split}_*.bin"))):
            parts.append(np.fromfile(path, dtype="<u2", offset=1024))
            if kind == "llm.c":
                shutil.copyfile(path, folder / f"fineweb_{split}_{i:06d}.bin")
            elif kind == "build-nanogpt":
                np.save(folder / f"edufineweb_{split}_{i:06d}", parts[-1])
        tokens[split] = np.concatenate(parts)
        assert len(parts) > 1
    return folder, tokens


def on_tokens(config: RunConfig, folder: Path) -> RunConfig:
    return dataclasses.replace(config, data=DataConfig(source="tokens", path=str(folder)))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_slices_of_the_files_and_targets_are_one_ahead(prepared: Path, kind: str) -> None:
    folder, tokens = as_published(prepared, kind)
    dataset = open_tokens(folder)
    for split, stream in (("train", dataset.train), ("val", dataset.val)):
        T, n = 32, (len(tokens[split]) - 1) // 32
        batches = Batches(stream, sequence_length=T, batch_sequences=4, seed=5)
        for step in (0, 1, n // 4 - 1):
            windows = permute(np.arange(4 * step, 4 * step + 4), n, 5, 0)
            ((x, y),) = batches.micro_batches(step, micro_batch=4)
            expected = np.stack([tokens[split][w * T : w * T + T + 1] for w in windows]).astype(np.int64)
            assert torch.equal(x, torch.from_numpy(expected[:, :-1]))  # build-nanogpt: buf[:-1]
            assert torch.equal(y, torch.from_numpy(expected[:, 1:]))  # build-nanogpt: buf[1:]


def test_losses_do_not_depend_on_the_format_of_the_shards(tiny: RunConfig, tmp_path: Path, prepared: Path) -> None:
    runs = {}
    for kind in KINDS:
        folder, _ = as_published(prepared, kind)
        before = sorted(os.listdir(folder))
        assert (
            train(
                on_tokens(dataclasses.replace(tiny, steps=2, sanity_checks=False), folder),
                tmp_path / "runs" / kind,
                display=QUIET,
            )
            == 0
        )
        runs[kind] = losses(tmp_path / "runs" / kind)
        assert sorted(os.listdir(folder)) == before
    assert len(runs["prepared"]) > 2
    assert runs["prepared"] == runs["llm.c"] == runs["build-nanogpt"]


def test_a_run_on_tokens_resumes_and_refuses_other_tokens(tiny: RunConfig, tmp_path: Path, prepared: Path) -> None:
    folder, tokens = as_published(prepared, "build-nanogpt")
    config, run = on_tokens(dataclasses.replace(tiny, steps=2), folder), tmp_path / "run"
    assert train(config, run, display=QUIET) == 0
    assert train(dataclasses.replace(config, steps=3), run, resume=True, display=QUIET) == 0
    np.save(folder / "edufineweb_train_000000", tokens["train"][:1000][::-1].copy())
    with pytest.raises(UserError, match="other tokens than"):
        train(dataclasses.replace(config, steps=4), run, resume=True, display=QUIET)


@pytest.mark.parametrize("kind", ["llm.c", "prepared"])
def test_a_run_resumes_with_the_same_tokens_in_other_shards(
    tiny: RunConfig, tmp_path: Path, prepared: Path, kind: str
) -> None:
    folder, _ = as_published(prepared, "build-nanogpt")
    other, _ = as_published(prepared, kind)
    config, run = on_tokens(dataclasses.replace(tiny, steps=2), folder), tmp_path / "run"
    assert train(config, run, display=QUIET) == 0
    assert train(on_tokens(dataclasses.replace(config, steps=4), other), run, resume=True, display=QUIET) == 0
    assert train(dataclasses.replace(config, steps=4), tmp_path / "whole", display=QUIET) == 0
    assert losses(run)[-2:] == losses(tmp_path / "whole")[-2:]


def test_a_run_on_altered_tokens_is_refused(tiny: RunConfig, tmp_path: Path, prepared: Path) -> None:
    shard = json.loads((prepared / "manifest.json").read_text())["splits"]["val"]["shards"][0]["file"]
    content = bytearray((prepared / shard).read_bytes())
    content[-1] ^= 1
    (prepared / shard).write_bytes(content)
    with pytest.raises(UserError, match=f"{shard} is damaged"):
        train(on_tokens(tiny, prepared), tmp_path / "run", display=QUIET)
