"""Names of models, and the folders that they resolve to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from restomod.checks.device_parity import random_model
from restomod.config.presets import PRESETS, preset
from restomod.config.run import ModelConfig
from restomod.model.gpt import GPT, build_model
from restomod.runs import open_model as module
from restomod.runs.checkpoint import verify_checkpoint
from restomod.runs.open_model import find_model, open_model, open_or_build
from restomod.utils import verified
from restomod.utils.errors import UserError
from restomod.utils.files import sha256_file
from tests.models import CPU, to_transformers
from tests.trainee import Trainee, make_trainee, save_checkpoint

CONFIG = ModelConfig(n_layer=1, n_head=1, n_embd=8, n_positions=4, vocab_size=97)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and a hub that must not be contacted."""

    def asked(repository: str) -> NoReturn:
        raise AssertionError(f"the hub was asked for {repository}")

    monkeypatch.setattr(module, "download_model", asked)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names requested from the hub."""
    names: list[str] = []

    def download(repository: str) -> Path:
        names.append(repository)
        return Path("downloaded")

    monkeypatch.setattr(module, "download_model", download)
    return names


@pytest.fixture
def trainee() -> Trainee:
    trainee = make_trainee()
    trainee.train(0, 1)
    return trainee


def save(trainee: Trainee, run: str, step: int) -> Path:
    return save_checkpoint(Path(run), step, trainee.model, trainee.optimizer)


def refusal(name: str) -> str:
    with pytest.raises(UserError) as caught:
        find_model(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same_weights(model: GPT, other: GPT) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


# --- runs and checkpoints --------------------------------------------------------------------------------------


def test_a_run_resolves_to_its_newest_checkpoint(trainee: Trainee) -> None:
    for step in (5, 999_999, 1_000_000):  # alphabetical and numerical order differ
        folder = save(trainee, "runs/mine", step)
    assert find_model("runs/mine") == folder == Path("runs/mine/checkpoints/step_1000000")
    assert find_model("runs/mine/") == folder


def test_a_checkpoint_resolves_to_itself(trainee: Trainee) -> None:
    old = save(trainee, "mine", 5)
    save(trainee, "mine", 6)
    assert find_model(str(old)) == old
    assert same_weights(open_model(str(old), CPU), trainee.model)


def test_an_incomplete_checkpoint_is_skipped(trainee: Trainee) -> None:
    folder = save(trainee, "mine", 5)
    save(trainee, "mine", 6).rename("mine/checkpoints/.step_000006.tmp")
    assert find_model("mine") == folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.json"])
@pytest.mark.parametrize("as_run", [True, False])
def test_an_altered_checkpoint_is_refused_by_the_files_name(trainee: Trainee, name: str, as_run: bool) -> None:
    save(trainee, "mine", 5)
    folder = save(trainee, "mine", 6)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    said = refusal("mine" if as_run else str(folder))
    assert said.startswith(f"{folder / name} is damaged: its SHA-256 differs from the recorded one")


def test_a_checkpoint_is_verified_again_only_if_a_file_has_changed(
    trainee: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(verified, "SETTLED_SECONDS", -1.0)
    monkeypatch.setattr(verified, "sha256_file", lambda path: read.append(path.name) or sha256_file(path))
    save(trainee, "mine", 5)
    folder = save(trainee, "mine", 6)
    find_model("mine")
    assert {"model.safetensors", "config.json"} < set(read)
    assert "optimizer.safetensors" not in read
    read.clear()
    find_model("mine")
    assert read == []
    weights = folder / "model.safetensors"
    time = weights.stat().st_mtime_ns
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(time, time))
    assert refusal("mine").startswith(f"{weights} is damaged")
    assert read == ["model.safetensors"]


def test_a_damaged_optimizer_state_prevents_resuming_but_not_sampling(trainee: Trainee) -> None:
    folder = save(trainee, "mine", 6)
    state = folder / "training_state/optimizer.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    assert find_model("mine") == folder
    with pytest.raises(UserError, match=f"{state} is damaged"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("gone", ["COMPLETE", "model.safetensors", "training_state/state.json"])
def test_an_incomplete_checkpoint_is_not_used_as_a_model_folder(trainee: Trainee, gone: str) -> None:
    folder = save(trainee, "mine", 5)
    (folder / gone).unlink()
    assert str(folder / gone) in refusal(str(folder))


def test_a_run_without_a_checkpoint_is_refused_with_a_fix() -> None:
    Path("my run").mkdir()
    Path("my run/config.json").write_text(json.dumps({"steps": 9, "model": {}}))
    assert refusal("my run") == (
        "my run has no checkpoint yet; wait for the first one, or, if training has stopped, run "
        "`restomod train --resume 'my run'`"
    )


# --- model folders ---------------------------------------------------------------------------------------------


def test_a_model_folder_resolves_to_itself() -> None:
    model = random_model(CONFIG)
    to_transformers(model).save_pretrained("theirs")
    assert find_model("theirs") == Path("theirs")
    opened = open_model("theirs", CPU)
    assert not opened.training
    assert same_weights(opened, model)


def test_a_model_config_with_steps_is_not_a_run() -> None:
    to_transformers(random_model(CONFIG)).save_pretrained("theirs")
    path = Path("theirs/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "steps": 9}))
    assert find_model("theirs") == Path("theirs")


def test_other_folders_are_refused() -> None:
    Path("empty").mkdir()
    assert refusal("empty") == "empty is neither a run nor a model folder: it has no config.json"


def test_a_folder_with_a_damaged_config_is_refused_by_its_name() -> None:
    Path("odd").mkdir()
    Path("odd/config.json").write_text("{")
    assert refusal("odd").startswith("odd/config.json is damaged")


@pytest.mark.parametrize("name", ["notes.txt", "gpt2", "runs/a"])
def test_a_file_is_refused_whatever_its_name(name: str) -> None:
    Path("runs").mkdir()
    Path(name).write_text("text")
    assert refusal(name) == f"{name} is a file; pass the folder of a run or a model"


# --- what is on the hub, and what only looks like it -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "repository"), [("gpt2", "openai-community/gpt2"), ("gpt2-xl", "openai-community/gpt2-xl"), ("a/b", "a/b")]
)
def test_a_name_without_a_folder_is_looked_up_on_the_hub(asked: list[str], name: str, repository: str) -> None:
    assert find_model(name) == Path("downloaded")
    assert asked == [repository]


def test_a_folder_is_preferred_to_the_hub() -> None:
    for name in ("gpt2", "a/b"):
        to_transformers(random_model(CONFIG)).save_pretrained(name)
        assert find_model(name) == Path(name)


def test_a_mistyped_path_is_not_sent_to_the_hub() -> None:
    Path("runs/quickstart/checkpoints").mkdir(parents=True)
    Path("runs/no run").mkdir()
    Path("runs/notes.txt").write_text("no folder")
    assert refusal("runs/quikstart") == "runs/quikstart: no such run or model folder; did you mean 'quickstart'?"
    assert refusal("runs/zzz") == "runs/zzz: no such run or model folder; known: quickstart"


def test_a_mistyped_path_in_an_empty_folder_has_no_suggestion() -> None:
    Path("runs").mkdir()
    assert refusal("runs/quikstart") == "runs/quikstart: no such run or model folder"


@pytest.mark.parametrize("name", ["./mine", "../mine", "~/mine", "a/b/c", "/nowhere/mine", "mine/"])
def test_paths_are_not_sent_to_the_hub(name: str) -> None:
    assert refusal(name).startswith(f"{name}: no such run or model folder")


def test_a_mistyped_name_suggests_openais_models_and_folders() -> None:
    Path("mine-2").mkdir()
    Path("mine-2/config.json").write_text("{}")
    assert refusal("gpt2-midium").endswith("; did you mean 'gpt2-medium'?")
    assert refusal("mine2").endswith("; did you mean 'mine-2'?")


def test_a_preset_is_not_a_model() -> None:
    assert refusal("quickstart").startswith("quickstart is a preset: `restomod train quickstart` creates the run")


# --- presets ---------------------------------------------------------------------------------------------------


def test_a_preset_is_built_from_its_seed() -> None:
    model, fresh = open_or_build("quickstart", CPU, seed=3)
    assert fresh
    assert not model.training
    assert model.config == preset("quickstart").model
    assert same_weights(model, build_model(model.config, 3, CPU))
    assert not same_weights(model, build_model(model.config, 4, CPU))


def test_a_folder_of_a_presets_name_is_preferred_to_the_preset() -> None:
    expected = random_model(CONFIG)
    to_transformers(expected).save_pretrained("quickstart")
    model, fresh = open_or_build("quickstart", CPU, seed=3)
    assert not fresh
    assert same_weights(model, expected)


def test_a_file_of_a_presets_name_does_not_hide_the_preset() -> None:
    Path("quickstart").write_text("notes")
    assert open_or_build("quickstart", CPU, seed=3)[1]


def test_a_run_can_replace_a_preset(trainee: Trainee) -> None:
    save(trainee, "mine", 5)
    model, fresh = open_or_build("mine", CPU, seed=3)
    assert not fresh
    assert same_weights(model, trainee.model)


def test_an_unknown_name_suggests_presets_too() -> None:
    with pytest.raises(UserError, match=r"^quikstart: no such preset, run or model; did you mean 'quickstart'\?$"):
        open_or_build("quikstart", CPU, seed=0)
    with pytest.raises(UserError) as caught:
        open_or_build("zzz", CPU, seed=0)
    assert all(name in str(caught.value) for name in (*PRESETS, "gpt2-xl"))


def test_a_short_hub_name_is_not_a_preset(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_model", lambda folder, device: random_model(CONFIG))
    for name in ("gpt2", "a/b"):
        assert not open_or_build(name, CPU, seed=0)[1]
    assert asked == ["openai-community/gpt2", "a/b"]


def test_a_preset_that_is_too_large_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*arguments: object) -> NoReturn:
        raise RuntimeError("can't allocate memory\nand more")

    monkeypatch.setattr("restomod.runs.open_model.build_model", too_large)
    with pytest.raises(UserError, match=r"^quickstart does not fit into memory \(can't allocate memory\)$"):
        open_or_build("quickstart", CPU, seed=3)


def test_a_model_that_transformers_runs_is_not_inspected(tmp_path: Path) -> None:
    (tmp_path / "neox").mkdir()
    (tmp_path / "neox" / "config.json").write_text('{"model_type": "gpt_neox"}')
    with pytest.raises(UserError, match=r"neox can be evaluated and sampled, but not inspected or checked: .*gpt_neox"):
        open_or_build(str(tmp_path / "neox"), CPU, seed=0)


def test_unreadable_checkpoints_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "checkpoints").write_text("no folder")
    with pytest.raises(OSError, match="checkpoints"):
        find_model("run")
