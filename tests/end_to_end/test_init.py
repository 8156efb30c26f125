"""`--init`: a run starts from exactly the given weights."""

from __future__ import annotations

import dataclasses
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from restomod.checks.device_parity import random_model
from restomod.cli import main
from restomod.config.run import DataConfig, ModelConfig, OptimConfig, RunConfig, SamplingConfig
from restomod.config.serialize import read_config
from restomod.data.prepare.text_cache import prepare_text
from restomod.model.hf_io import save_model
from restomod.runs.metrics import read_jsonl
from restomod.train import loop as loop_module
from restomod.train.loop import train
from restomod.utils.errors import UserError
from restomod.utils.run_files import list_checkpoints
from tests.models import to_transformers

from .conftest import QUIET, WORDS, flags, losses


def validation(run: Path) -> list[float]:
    return [record["loss"] for record in read_jsonl(run / "metrics.jsonl") if record["kind"] == "val"]


def with_flags(config: RunConfig) -> list[str]:
    sampled = dataclasses.replace(config, micro_batch=1, sampling=SamplingConfig(("the",), max_tokens=1))
    return [*flags(sampled), "--data.glob", config.data.glob, "--no-sanity-checks"]


def started_from(tiny: RunConfig, init: str | Path, run: Path, steps: int = 1) -> float:
    """Train one step from ``init`` and return the validation loss before it."""
    assert train(dataclasses.replace(tiny, init=str(init), steps=steps), run, display=QUIET) == 0
    return validation(run)[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A configuration and its read-only run of four steps, with checkpoints after two and four steps."""
    folder = tmp_path_factory.mktemp("world")
    chance = random.Random(0)
    for i in range(4):
        (folder / f"{i}.txt").write_text(" ".join(chance.choices(WORDS.split(), k=300)))
    config = RunConfig(
        steps=4,
        batch_tokens=64,
        sequence_length=32,
        model=ModelConfig(n_layer=2, n_head=2, n_embd=8, n_positions=32),
        data=DataConfig(source="text", path=str(folder), glob="*.txt", val_fraction=0.25, cache=str(folder / "data")),
        optim=OptimConfig(lr=3e-3, warmup_steps=1),
        sampling=SamplingConfig(prompts=()),
        eval_every=2,
        save_every=2,
        sanity_checks=False,
        device="cpu",
        precision="fp32",
    )
    train(config, folder / "source", display=QUIET)
    return config, folder / "source"


@pytest.fixture
def tiny(world: tuple[RunConfig, Path]) -> RunConfig:
    return world[0]


@pytest.fixture
def source(world: tuple[RunConfig, Path], tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(world[1], tmp_path / "source"))


@pytest.fixture
def theirs(tiny: RunConfig, tmp_path: Path) -> tuple[Path, GPT2LMHeadModel]:
    """A model saved by transformers, without a run."""
    model = to_transformers(random_model(tiny.model))
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", model


# --- where it starts -------------------------------------------------------------------------------------------


def test_a_run_starts_from_any_checkpoint_of_another(tiny: RunConfig, source: Path, tmp_path: Path) -> None:
    _, middle, end = validation(source)
    assert middle != end
    assert started_from(tiny, source, tmp_path / "from the run") == end
    old = source / "checkpoints/step_000002"
    assert started_from(tiny, old, tmp_path / "from a checkpoint") == middle


def test_a_run_from_a_model_folder_has_transformers_loss(
    tiny: RunConfig, theirs: tuple[Path, GPT2LMHeadModel], tmp_path: Path
) -> None:
    folder, model = theirs
    ours = started_from(tiny, folder, tmp_path / "run")
    dataset, T = prepare_text(tiny.data), tiny.sequence_length
    stream = torch.from_numpy(np.asarray(dataset.val.read(0, len(dataset.val))).astype(np.int64))
    losses = []
    with torch.no_grad():
        for start in range(0, len(stream) - 1, T):  # the last window may be shorter
            logits = model(stream[None, start : start + T][:, : len(stream) - 1 - start]).logits[0].double()
            losses.append(F.cross_entropy(logits, stream[start + 1 : start + T + 1], reduction="none"))
    assert ours == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)


def test_the_seed_determines_everything_except_the_weights(tiny: RunConfig, source: Path, tmp_path: Path) -> None:
    first = started_from(dataclasses.replace(tiny, seed=1), source, tmp_path / "1", steps=2)
    second = started_from(dataclasses.replace(tiny, seed=2), source, tmp_path / "2", steps=2)
    assert first == second
    assert losses(tmp_path / "1")[1:] != losses(tmp_path / "2")[1:], "the order of the data"


def test_the_summary_names_the_initial_weights(
    tiny: RunConfig, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "quickstart", "--out", str(tmp_path / "run"), *with_flags(tiny), "--steps", "1"]
    assert main([*arguments, "--init", str(source)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"initialised from {source}" in shown
    assert "random initialisation" not in shown


# --- shapes ----------------------------------------------------------------------------------------------------


PARTS = {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "bias": False, "tied": False}


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({}, ("--model.n-layer 1 --model.n-head 4 --model.n-embd 16 --model.n-positions 40",)),
        (PARTS, ("--model.no-bias", "--model.no-tied")),
    ],
)
def test_another_shape_names_the_flags_to_add_and_adding_them_works(
    tiny: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], parts: dict[str, Any], named: tuple[str, ...]
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_model(random_model(ModelConfig(n_layer=1, n_head=4, n_embd=16, n_positions=40, **parts)), theirs)
    arguments = ["train", "quickstart", *with_flags(tiny), "--steps", "1", "--out", str(tmp_path / "run")]
    arguments += ["--init", str(theirs)]
    assert main(arguments) == 2
    said, _, added = capsys.readouterr().err.partition("; add ")
    assert said == f"restomod: error: {theirs} has another shape than the run's model"
    assert all(flags in added for flags in named)
    assert not (tmp_path / "run").exists()
    assert main([*arguments, *added.split()]) == 0


def test_only_the_flags_that_differ_are_named(tiny: RunConfig, source: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, n_layer=3), init=str(source))
    with pytest.raises(UserError, match=r"; add --model\.n-layer 2$"):
        train(config, tmp_path / "run", display=QUIET)


# --- what is written down, and going on from it ----------------------------------------------------------------


def test_a_relative_path_is_made_absolute_and_a_run_pinned_to_its_checkpoint(
    tiny: RunConfig, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    started_from(tiny, "source", Path("run"))
    assert read_config(Path("run")).init == str(source / "checkpoints/step_000004")


def test_a_name_on_the_hub_is_kept(
    tiny: RunConfig, theirs: tuple[Path, GPT2LMHeadModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("restomod.runs.open_model.download_model", lambda repository: theirs[0])
    started_from(tiny, "someone/tiny", tmp_path / "run")
    assert read_config(tmp_path / "run").init == "someone/tiny"


def killed_before_a_checkpoint(config: RunConfig, run: Path) -> None:
    """Start a run that is killed in its first evaluation."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "evaluate", die)
        with pytest.raises(KeyboardInterrupt):
            train(config, run, display=QUIET)
    assert list_checkpoints(run) == []


def test_a_run_killed_before_its_first_checkpoint_starts_again_from_the_same_weights(
    tiny: RunConfig, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source run has continued meanwhile, and the working directory is another."""
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(tiny, init="source", steps=3)
    train(config, Path("reference"), display=QUIET)
    killed_before_a_checkpoint(config, Path("killed"))
    train(dataclasses.replace(tiny, steps=6, keep_checkpoints=0), source, True, QUIET)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    killed = tmp_path / "killed"
    assert train(read_config(killed), killed, resume=True, display=QUIET) == 0
    assert losses(killed) == losses(tmp_path / "reference")
    ends = [
        load_file(tmp_path / name / "checkpoints/step_000003/model.safetensors") for name in ("killed", "reference")
    ]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_run_killed_before_its_first_checkpoint_needs_its_initial_weights(
    tiny: RunConfig, source: Path, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    killed_before_a_checkpoint(dataclasses.replace(tiny, init=str(source)), run)
    shutil.rmtree(source)
    with pytest.raises(UserError, match=r"step_000004: no such run or model folder"):
        train(read_config(run), run, resume=True, display=QUIET)


@pytest.mark.parametrize(
    "spoil",
    [
        shutil.rmtree,
        lambda source: (source / "checkpoints/step_000004/model.safetensors").write_bytes(b"spoiled"),
    ],
    ids=["gone", "damaged"],
)
def test_a_run_with_a_checkpoint_no_longer_needs_its_initial_weights(
    tiny: RunConfig, source: Path, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    started_from(tiny, source, tmp_path / "run")
    spoil(source)
    resumed = dataclasses.replace(read_config(tmp_path / "run"), steps=2)
    assert train(resumed, tmp_path / "run", resume=True, display=QUIET) == 0


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_resumed_run_refuses_other_initial_weights(
    tiny: RunConfig, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoint: bool
) -> None:
    run = tmp_path / "run"
    if checkpoint:
        train(dataclasses.replace(tiny, steps=1), run, display=QUIET)
    else:
        killed_before_a_checkpoint(tiny, run)
    before = (run / "config.json").read_text()
    for init in (str(source), "someone/unreachable"):
        assert main(["train", "--resume", str(run), "--steps", "2", "--init", init]) == 2
        said = capsys.readouterr().err
        assert re.match(r"restomod: error: cannot change on resume: init is .*, not None$", said), said
    assert (run / "config.json").read_text() == before


def test_trained_weights_need_not_have_the_loss_of_random_ones(
    tiny: RunConfig, theirs: tuple[Path, GPT2LMHeadModel], tmp_path: Path
) -> None:
    """The sanity check of the initial loss, ln V, is for fresh weights."""
    checked = dataclasses.replace(tiny, sanity_checks=True)
    assert abs(started_from(checked, theirs[0], tmp_path / "run") - np.log(50257)) > 0.3


def test_weights_that_do_not_fit_in_memory_are_one_line(
    tiny: RunConfig, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object) -> None:
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("restomod.train.setup.load_model", too_large)
    with pytest.raises(UserError, match=r"parameters does not fit into memory \(CUDA out of memory\.\)$"):
        train(dataclasses.replace(tiny, init=str(source)), tmp_path / "run", display=QUIET)
