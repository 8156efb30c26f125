"""Runs on the user's text: counts of read files at the start, separators, folders with any name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from restomod.cli import main
from restomod.config.run import DataConfig, RunConfig
from restomod.config.serialize import read_config
from restomod.data.dataset import write_shard
from restomod.runs.metrics import read_jsonl
from restomod.train.console_lines import run_summary, run_warnings
from restomod.train.loop import train
from restomod.train.setup import set_up

from .conftest import QUIET, flags

END = "<|endoftext|>"


def test_train_lists_read_files_and_warnings_also_with_cached_tokens(
    tiny: RunConfig, text: Path, tmp_path: Path
) -> None:
    stories = (text / "0.txt").read_text()
    (text / "0.txt").write_text(stories.replace(" cat ", f"\n{END}\n"))
    size = sum(file.stat().st_size for file in text.iterdir())
    (text / "link.txt").symlink_to("1.txt")
    n = stories.count(" cat ")
    for _ in range(2):
        training = set_up(dataclasses.replace(tiny, sanity_checks=False), tmp_path / "run", resume=False)
        rows = run_summary(training)
        assert ("read", f"8 files as plain text (.txt, {size:,} bytes)") in rows
        assert ("skipped", "1 file or folder: duplicate path 1") in rows
        (warning,) = run_warnings(training)
        assert f"a literal <|endoftext|> {n} times" in warning
        for path in sorted((tmp_path / "run").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (tmp_path / "run").rmdir()


def test_separator_is_a_flag_of_train_and_is_kept_on_resuming(tiny: RunConfig, text: Path, tmp_path: Path) -> None:
    (text / "0.txt").write_text(f"\n{END}\n".join(["the cat sleeps and never runs"] * 5 + ["a dog"]))
    run = tmp_path / "run"
    short = dataclasses.replace(tiny, steps=4)
    assert main(["train", "quickstart", *flags(short), "--separator", END, "--out", str(run)]) == 0
    config = read_config(run)
    assert config.data.separator == END
    training = set_up(dataclasses.replace(config, steps=6), run, resume=True)
    assert training.start.step == 4
    assert training.data.dataset.manifest["documents"] == 7 + 6
    assert run_warnings(training) == []


def test_a_mix_of_folders_with_commas_and_colons_resumes(tiny: RunConfig, tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    names = ["web, v2", "books:1,old"]
    for name in names:
        (tmp_path / name).mkdir()
        for split in ("train", "val"):
            write_shard(tmp_path / name / f"x_{split}_0.bin", chance.integers(0, 100, 900).astype(np.uint16))
    mix = f"{tmp_path / names[0]}:3,{tmp_path / names[1]}:1"
    data = DataConfig(source="tokens", mix=mix, cache=tiny.data.cache)
    whole = dataclasses.replace(tiny, data=data, sanity_checks=False, steps=8, eval_every=8, sample_every=99)
    assert train(whole, tmp_path / "whole", display=QUIET) == 0
    assert train(dataclasses.replace(whole, steps=4), tmp_path / "parts", display=QUIET) == 0
    assert train(dataclasses.replace(read_config(tmp_path / "parts"), steps=8), tmp_path / "parts", True, QUIET) == 0
    last = [read_jsonl(tmp_path / run / "metrics.jsonl")[-1] for run in ("whole", "parts")]
    assert sorted(last[0]["sources"]) == sorted(names)
    assert last[0]["loss"] == last[1]["loss"]


def test_a_run_that_takes_months_causes_a_warning(tiny: RunConfig, tmp_path: Path) -> None:
    training = set_up(dataclasses.replace(tiny, sanity_checks=False, steps=100), tmp_path / "run", resume=False)
    slow = dataclasses.replace(training, micro_batch_seconds=40 * 86_400 / 100)
    assert any("takes about" in warning and "days" in warning for warning in run_warnings(slow))
    assert not any("days" in warning for warning in run_warnings(training))
