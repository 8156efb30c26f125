"""Complete runs of a tiny model."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from restomod.cli import main
from restomod.config.run import RunConfig
from restomod.config.serialize import from_file
from restomod.data.tokenizer import gpt2_tokenizer
from restomod.runs.checkpoint import verify_checkpoint
from restomod.runs.metrics import SampleRecord, read_jsonl
from restomod.train.loop import train
from restomod.utils.console import Display
from restomod.utils.errors import UserError
from restomod.utils.run_files import list_checkpoints

from .conftest import QUIET


def records(run: Path, kind: str) -> list[dict]:
    return [r for r in read_jsonl(run / "metrics.jsonl") if r["kind"] == kind]


def test_a_run_learns_and_writes_all_its_files(tiny: RunConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = dataclasses.replace(tiny, steps=60)
    assert train(config, run, display=QUIET) == 0
    names = {p.name for p in run.iterdir()}
    assert names == {"config.json", "environment.json", "data.json", "metrics.jsonl", "samples.jsonl", "checkpoints"}
    assert from_file(json.loads((run / "config.json").read_text()), "config.json").steps == 60
    train_losses = [r["loss"] for r in records(run, "train")]
    assert [r["step"] for r in records(run, "train")] == list(range(60))
    assert abs(train_losses[0] - math.log(50257)) < 0.3
    # the text is uniform over 20 words, so ln(20) = 3.0 is the lowest possible loss
    assert math.log(20) - 0.2 < records(run, "val")[-1]["loss"] < 6
    assert [r["step"] for r in records(run, "val")] == [*range(0, 60, 5), 60]
    assert [r["step"] for r in read_jsonl(run / "samples.jsonl", SampleRecord)] == [*range(5, 60, 5), 60]
    assert [p.name for p in list_checkpoints(run)] == ["step_000056", "step_000060"]
    verify_checkpoint(list_checkpoints(run)[-1])


def test_target_loss_stops_with_a_checkpoint_and_a_last_evaluation(tiny: RunConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(dataclasses.replace(tiny, steps=500, target_loss=9.0), run, display=QUIET) == 0
    trained = records(run, "train")
    assert trained[-1]["loss"] <= 9.0 < min(r["loss"] for r in trained[:-1])
    assert records(run, "val")[-1]["step"] == len(trained)
    assert list_checkpoints(run)[-1].name == f"step_{len(trained):06d}"


def test_without_a_validation_split_there_is_no_validation_loss(tiny: RunConfig, tmp_path: Path) -> None:
    data = dataclasses.replace(tiny.data, val_fraction=0.0)
    train(dataclasses.replace(tiny, data=data, steps=2), tmp_path / "run", display=QUIET)
    assert records(tmp_path / "run", "val") == []


def test_bad_text_leaves_no_run_folder(tiny: RunConfig, tmp_path: Path, text: Path) -> None:
    (text / "bad.txt").write_bytes(b"good so far \xff")
    with pytest.raises(UserError, match="offset 12"):
        train(tiny, tmp_path / "runs/bad", display=QUIET)
    assert not (tmp_path / "runs").exists()


def test_the_start_of_a_run_prints_its_settings(
    tiny: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny, tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    tokens = sum(len(gpt2_tokenizer().encode(p.read_text())) + 1 for p in Path(tiny.data.path or "").iterdir())
    assert any(f"({tokens:,} tokens, 8 documents)" in line for line in lines)
    assert any("128 tokens = gradient accumulation 2 × micro-batch 2 × sequence length 32" in line for line in lines)
    assert any("expected ln(50257) = 10.82" in line for line in lines)
    progress = [line.split()[1] for line in lines if line.startswith("step ") and "tok/s" in line]
    assert (progress[0], progress[-1]) == (f"1/{tiny.steps}", f"{tiny.steps}/{tiny.steps}")
    assert any("restomod sample" in line for line in lines)


@pytest.mark.parametrize("width", [80, 160])
def test_a_terminal_gets_a_progress_bar_that_fits(tiny: RunConfig, tmp_path: Path, width: int) -> None:
    display = Display(interactive=True)
    output = io.StringIO()
    display.console = Console(file=output, force_terminal=True, width=width, color_system=None)
    assert train(dataclasses.replace(tiny, steps=3), tmp_path / "run", display=display) == 0
    bar = [line for line in re.split(r"[\r\n]", output.getvalue()) if "step 3/3" in line][-1]
    assert "━" in bar
    assert re.search(r"eta 0 s +loss \d+\.\d{4}", bar)
    assert "tok/s" in bar
    assert "…" not in bar


def test_compiling_without_a_compiler_is_one_line(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    broken = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with torch._inductor.config.patch(broken), pytest.raises(UserError, match="use --compile off"):
        train(dataclasses.replace(tiny, compile="on"), tmp_path / "run", display=QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("vocab_size", [256, 50304])
def test_another_vocabulary_than_the_tokenizers_is_refused(tiny: RunConfig, tmp_path: Path, vocab_size: int) -> None:
    model = dataclasses.replace(tiny.model, vocab_size=vocab_size)
    with pytest.raises(UserError, match="tokenizer has 50257 tokens"):
        train(dataclasses.replace(tiny, model=model), tmp_path / "run", display=QUIET)


# --- the verdict -------------------------------------------------------------------------------------------------


def lines_of(config: RunConfig, folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert train(config, folder, display=Display(interactive=False)) == 0
    return capsys.readouterr().out.splitlines()


def test_a_healthy_run_ends_with_its_verdict(
    tiny: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = lines_of(tiny, tmp_path / "run", capsys)
    (last,) = [line for line in said if line.startswith("verdict")]
    assert re.match(r"verdict +healthy \((\d+ of )?\d+ symptoms checked; details: ", last)
    assert last.endswith(f"restomod verdict {tmp_path / 'run'})")
    warnings = [line for line in said if line.startswith("warning")]
    assert [w for w in warnings if not w.startswith("warning: kernel shapes")] == []
    assert {record["kind"] for record in read_jsonl(tmp_path / "run/metrics.jsonl")} == {"train", "val"}
    assert main(["verdict", str(tmp_path / "run")]) == 0


def test_a_symptom_is_a_warning_at_every_validation_and_in_the_verdict(
    tiny: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(tiny, optim=dataclasses.replace(tiny.optim, warmup_steps=0), sanity_checks=False)
    said = lines_of(config, tmp_path / "run", capsys)
    warnings = [line for line in said if line.startswith("warning: warm-up: the learning rate is 0.003 from")]
    assert len(warnings) == 2, "at steps 5 and 10, and at the end only the verdict"
    (last,) = [line for line in said if line.startswith("verdict")]
    assert last.split(maxsplit=1)[1] == f"not healthy: warm-up (details: restomod verdict {tmp_path / 'run'})"
    assert main(["verdict", str(tmp_path / "run")]) == 1
