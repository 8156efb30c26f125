"""Checkpoints are atomic, free of pickles, and restore the training exactly."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from restomod.config.run import ModelConfig
from restomod.engine.optimizer import Optimizers, optimizer_tensors
from restomod.runs import checkpoint as module
from restomod.runs.checkpoint import (
    load_checkpoint,
    progress,
    set_aside_unusable,
    verify_checkpoint,
    write_checkpoint,
)
from restomod.utils.errors import UserError
from restomod.utils.files import sha256_file
from restomod.utils.run_files import list_checkpoints
from restomod.utils.temporary import Temporary
from tests.filesystems import refuse, refuse_renaming_folders
from tests.models import random_tokens
from tests.trainee import Trainee, assert_identical, make_trainee, save_checkpoint

FILES = [
    "COMPLETE",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "tokenizer_config.json",
    "training_state/*.safetensors",
    "training_state/state.json",
    "vocab.json",
]


def save(trainee: Trainee, run: Path, step: int) -> Path:
    return save_checkpoint(run, step, trainee.model, trainee.optimizer)


def load(trainee: Trainee, folder: Path) -> int:
    return load_checkpoint(folder, trainee.model, trainee.optimizer)


def names(run: Path) -> list[str]:
    """Names of all files in the checkpoints folder."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainee, Path]:
    """A run after three steps, and its checkpoint, which tests must not change."""
    trainee = make_trainee()
    trainee.train(0, 3)
    return trainee, save(trainee, tmp_path_factory.mktemp("run"), 3)


@pytest.fixture
def folder(saved: tuple[Trainee, Path], tmp_path: Path) -> Path:
    """A copy of this checkpoint, which tests may damage."""
    return shutil.copytree(saved[1], tmp_path / "checkpoints" / "step_000003")


# --- there and back ------------------------------------------------------------------------------------------


def test_weights_and_optimizer_are_restored_bit_for_bit(saved: tuple[Trainee, Path]) -> None:
    old, new = saved[0], make_trainee(seed=2)
    assert load(new, saved[1]) == 3
    assert_identical(new.tensors(), old.tensors())


def test_loading_does_not_change_the_next_steps(tmp_path: Path) -> None:
    through, resumed = make_trainee(seed=1), make_trainee(seed=1)
    through.train(0, 3)
    load(resumed, save(through, tmp_path, 3))
    assert resumed.train(3, 6) == through.train(3, 6)
    assert_identical(resumed.tensors(), through.tensors())


class Counting(torch.optim.Optimizer):
    """Custom optimizer with a Python number in its state."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
            p.add_(p.grad, alpha=-self.param_groups[0]["lr"] / state["step"])


def test_python_numbers_in_optimizer_state_are_restored(tmp_path: Path) -> None:
    through, resumed = make_trainee(seed=1), make_trainee(seed=2)
    for trainee in (through, resumed):
        trainee.optimizer = Optimizers([Counting(trainee.model.parameters())], trainee.optimizer.loss_scale)
    through.train(0, 3)
    load(resumed, save(through, tmp_path, 3))
    for trainee in (through, resumed):
        trainee.batches = make_trainee(seed=1).batches
        trainee.train(3, 6)
    for ours, theirs in zip(resumed.model.parameters(), through.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert resumed.optimizer.parts[0].state[ours] == {"step": 6}


def test_loading_replaces_a_later_optimizer_state(folder: Path) -> None:
    ahead, fresh = make_trainee(), make_trainee()
    ahead.train(0, 6)
    load(ahead, folder)
    load(fresh, folder)
    assert_identical(ahead.tensors(), fresh.tensors())


def test_a_checkpoint_of_step_0_starts_from_scratch(tmp_path: Path) -> None:
    old, new = make_trainee(seed=1), make_trainee(seed=2)
    assert load(new, save(old, tmp_path, 0)) == 0
    assert_identical(new.tensors(), old.tensors())


def test_transformers_loads_a_checkpoint_folder(saved: tuple[Trainee, Path]) -> None:
    model = saved[0].model
    theirs, report = AutoModelForCausalLM.from_pretrained(saved[1], output_loading_info=True)
    assert not any(report.values()), report
    tokens = random_tokens(model.config, 2, 16)
    with torch.no_grad():
        assert (theirs.eval()(tokens).logits - model(tokens)).abs().max() < 1e-4


def test_a_checkpoint_of_another_model_is_refused(folder: Path) -> None:
    other = make_trainee(model=ModelConfig(n_layer=3, n_head=2, n_embd=32, n_positions=16, vocab_size=97))
    with pytest.raises(UserError, match="has another model than"):
        load(other, folder)


# --- damage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("state.transformer.ln_f.bias.exp_avg"), r"ln_f\.bias\.exp_avg is missing"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "more does not match"),
        (lambda tensors: tensors.update({"state.transformer.ln_f.bias.exp_avg": torch.zeros(1)}), "does not match"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(folder: Path, change: Any, said: str) -> None:
    file = folder / module.STATE / module.OPTIMIZER
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    trainee = make_trainee()
    with pytest.raises(UserError, match=f"belongs to another optimizer or model: .*{said}"):
        module.load_optimizer(folder, trainee.model, trainee.optimizer)


def test_the_list_of_files_is_complete(saved: tuple[Trainee, Path]) -> None:
    found = {path for pattern in FILES for path in saved[1].glob(pattern)}
    assert found == {path for path in saved[1].rglob("*") if path.is_file()}


@pytest.fixture(params=FILES)
def file(request: pytest.FixtureRequest, folder: Path) -> Path:
    """Each file of a checkpoint."""
    (file,) = folder.glob(request.param)
    return file


def assert_refused(folder: Path, file: Path) -> None:
    trainee = make_trainee(seed=2)
    before = trainee.tensors()
    with pytest.raises(UserError, match=re.escape(str(file))) as caught:
        load(trainee, folder)
    assert "\n" not in str(caught.value)
    assert_identical(trainee.tensors(), before)


def test_a_missing_file_is_named(folder: Path, file: Path) -> None:
    file.unlink()
    assert_refused(folder, file)


@pytest.mark.parametrize("left", [0.0, 0.5])
def test_a_truncated_file_is_named(folder: Path, file: Path, left: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content))])
    assert_refused(folder, file)


@pytest.mark.parametrize("where", [0.0, 0.02, 0.999])
def test_a_file_with_one_flipped_bit_is_named(folder: Path, file: Path, where: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 1
    file.write_bytes(content)
    assert_refused(folder, file)


def test_a_file_with_one_byte_more_is_named(folder: Path) -> None:
    with open(folder / "vocab.json", "ab") as f:
        f.write(b"\n")
    assert_refused(folder, folder / "vocab.json")


def test_a_record_with_any_one_bit_flipped_is_refused(folder: Path) -> None:
    content = (folder / "COMPLETE").read_bytes()
    for i in range(0, len(content), 5):  # in keys, names, numbers and hashes
        (folder / "COMPLETE").write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        with pytest.raises(UserError, match=re.escape(str(folder))):
            verify_checkpoint(folder)


@pytest.mark.parametrize(
    "record",
    [
        [],
        {},
        {"format": "restomod-checkpoint-1"},
        {"format": "restomod-checkpoint-1", "files": []},
        {"format": "restomod-checkpoint-1", "files": {"config.json": {}}},
        {"format": "restomod-checkpoint-1", "files": {"config.json": None}},
        {"format": "restomod-checkpoint-2", "files": {}},
    ],
)
def test_a_record_of_another_shape_is_named(folder: Path, record: Any) -> None:
    (folder / "COMPLETE").write_text(json.dumps(record))
    with pytest.raises(UserError, match="COMPLETE"):
        verify_checkpoint(folder)


# --- no pickles ----------------------------------------------------------------------------------------------


def test_all_tensors_are_in_safetensors_and_the_rest_is_text(saved: tuple[Trainee, Path]) -> None:
    tensors = 0
    for path in saved[1].rglob("*"):
        if path.suffix == ".safetensors":
            tensors += sum(value.numel() for value in load_file(path).values())
        elif path.is_file():
            path.read_text(encoding="utf-8")
    weights = sum(p.numel() for p in saved[0].model.parameters())
    padding = (128 - 97) * 32
    assert tensors == 3 * weights - padding + len(list(saved[0].model.parameters()))  # + a step count for each


def test_pickle_is_never_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a pickle")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    trainee = make_trainee()
    trainee.train(0, 1)
    load(make_trainee(seed=2), save(trainee, tmp_path, 1))


# --- which checkpoints there are -----------------------------------------------------------------------------


def test_only_checkpoints_are_listed_sorted_by_step(tmp_path: Path) -> None:
    for name in ("step_1000000", "step_999999", "step_000010", ".step_000020.tmp", "step_x", "step_30.old", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [f.name for f in list_checkpoints(tmp_path)] == ["step_000010", "step_999999", "step_1000000"]


# --- saving that fails ---------------------------------------------------------------------------------------


def no_space(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("at", ["save_model", "fsync_path", "sha256_file", "write_tensors"])
def test_a_failed_save_leaves_only_the_older_checkpoint(
    at: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainee = make_trainee()
    trainee.train(0, 4)
    with monkeypatch.context() as patch:
        patch.setattr(module, at, no_space)
        with pytest.raises(UserError, match=r"cannot save .*step_000004: No space left on device"):
            save(trainee, tmp_path, 4)
    assert names(tmp_path) == ["step_000003"]
    assert load(make_trainee(), folder) == 3


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limits files to ``size`` bytes; larger writes fail, as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "limit", [500_000, 1_000_000, 1_500_000], ids=["model.safetensors", "vocab.json", "optimizer state"]
)
def test_an_incomplete_write_is_a_user_error(limit: int, tmp_path: Path) -> None:
    # 0.9 MB of weights, 1.0 MB of vocabulary, 1.7 MB of optimizer state
    trainee = make_trainee(model=ModelConfig(n_layer=1, n_head=2, n_embd=128, n_positions=16, vocab_size=97))
    trainee.train(0, 1)
    older = save(trainee, tmp_path, 1)
    with file_size_limit(limit), pytest.raises(UserError, match=r"cannot save .*step_000002") as caught:
        save(trainee, tmp_path, 2)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step_000001"]
    verify_checkpoint(older)


def test_files_of_a_killed_save_are_removed(folder: Path, tmp_path: Path) -> None:
    stale = folder.with_name(".restomod.0123456789abcdef.tmp")
    (stale / "training_state").mkdir(parents=True)
    (stale / "training_state" / "stale.safetensors").write_bytes(b"half a file")
    assert list_checkpoints(tmp_path) == [folder]
    trainee = make_trainee()
    trainee.train(0, 4)
    saved = save(trainee, tmp_path, 4)
    assert names(tmp_path) == ["step_000003", "step_000004"]
    assert not (saved / "training_state" / "stale.safetensors").exists()
    assert load(make_trainee(), saved) == 4


class Killed(BaseException):
    """Simulated SIGKILL, which no code catches."""


@pytest.mark.parametrize("moment", range(6))
def test_a_kill_during_a_replacement_leaves_the_old_or_the_new_checkpoint(
    moment: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make_trainee(), make_trainee(seed=2)
    old.train(0, 3)
    new.train(0, 3)
    calls: list[str] = []

    def deadly(call: Any) -> Any:
        def called(*arguments: Any, **named: Any) -> Any:
            calls.append(call.__name__)
            if len(calls) == moment // 2 + 1 and moment % 2 == 0:
                raise Killed
            result = call(*arguments, **named)
            if len(calls) == moment // 2 + 1:
                raise Killed
            return result

        return called

    monkeypatch.setattr(Path, "rename", deadly(Path.rename))
    monkeypatch.setattr(shutil, "rmtree", deadly(shutil.rmtree))
    monkeypatch.setattr(Temporary, "__exit__", lambda self, *_: self._close())  # a killed process only closes files
    with pytest.raises(Killed):
        save(new, tmp_path, 3)
    monkeypatch.undo()
    assert calls == ["rename", "rename", "rmtree"][: moment // 2 + 1]
    found, problems = set_aside_unusable(tmp_path)
    assert (found, problems) == (folder, [])
    assert names(tmp_path) == ["step_000003"]
    restored = make_trainee(seed=3)
    assert load(restored, folder) == 3
    assert_identical(restored.tensors(), (old if moment < 3 else new).tensors())


# --- file systems that cannot rename folders -----------------------------------------------------------------


def test_checkpoints_work_on_file_systems_that_cannot_rename_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_renaming_folders(monkeypatch)
    trainee = make_trainee()
    for step in (1, 2, 3, 3):
        trainee.train(step - 1, step)
        save(trainee, tmp_path, step)
    assert names(tmp_path) == ["step_000001", "step_000002", "step_000003"]
    other = make_trainee(seed=2)
    assert load(other, tmp_path / "checkpoints/step_000003") == 3
    assert_identical(other.tensors(), trainee.tensors())
    spoil(tmp_path, 3)
    assert set_aside_unusable(tmp_path)[0] == tmp_path / "checkpoints/step_000002"
    module.remove_checkpoint(tmp_path / "checkpoints/step_000001")
    assert names(tmp_path) == ["step_000002", "step_000003.damaged"]


def test_a_kill_while_files_are_moved_leaves_the_previous_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainee = make_trainee()
    trainee.train(0, 4)
    for fatal in range(1, 9):
        with monkeypatch.context() as patch:
            refuse_renaming_folders(patch)
            calls = iter(range(1, 100))
            replace = os.replace

            def deadly(source: Any, target: Any) -> None:
                if next(calls) == fatal:  # noqa: B023 - called in this iteration
                    raise Killed
                replace(source, target)  # noqa: B023

            patch.setattr(os, "replace", deadly)
            with pytest.raises(Killed):
                save(trainee, tmp_path, 4)
        assert set_aside_unusable(tmp_path)[0] == folder
    verify_checkpoint(folder)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_failed_rename_is_reported_and_leaves_no_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    trainee = make_trainee()
    trainee.train(0, 4)
    refuse_renaming_folders(monkeypatch)
    monkeypatch.setattr(os, "replace", refuse(code))
    with pytest.raises(UserError, match=f"cannot save .*step_000004: {os.strerror(code)}.*step_000003"):
        save(trainee, tmp_path, 4)
    assert names(tmp_path) == ["step_000003"]
    verify_checkpoint(folder)


# --- the newest that is whole --------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 1, 2 and 3."""
    trainee = make_trainee()
    for step in (1, 2, 3):
        trainee.train(step - 1, step)
        save(trainee, tmp_path, step)
    return tmp_path


def spoil(run: Path, step: int) -> None:
    path = run / "checkpoints" / f"step_{step:06d}" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def reseal(folder: Path, name: str) -> None:
    """Update a checkpoint's record of a file to its current content."""
    record, path = json.loads((folder / "COMPLETE").read_text()), folder / name
    record["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    (folder / "COMPLETE").write_text(json.dumps(record))


@pytest.mark.parametrize("what", ["exp_avg_sq", "step"])
def test_a_checkpoint_with_invalid_optimizer_state_is_skipped(three: Path, what: str) -> None:
    newest, name = three / "checkpoints/step_000003", "training_state/optimizer.safetensors"
    tensors = load_file(newest / name)
    next(value for key, value in tensors.items() if key.endswith(f".{what}")).fill_(-1.0)
    save_file(tensors, newest / name)
    reseal(newest, name)
    found, problems = set_aside_unusable(three)
    assert found == three / "checkpoints/step_000002"
    assert f"{what} has values below 0" in problems[0]


def test_the_newest_complete_checkpoint_is_used(three: Path) -> None:
    spoil(three, 1)
    assert set_aside_unusable(three) == (three / "checkpoints/step_000003", [])
    assert names(three) == ["step_000001", "step_000002", "step_000003"]


def test_damaged_checkpoints_are_set_aside_and_reported(three: Path) -> None:
    spoil(three, 3)
    (three / "checkpoints/step_000002/COMPLETE").unlink()
    folder, problems = set_aside_unusable(three)
    assert folder == three / "checkpoints/step_000001"
    first, second = problems
    assert "step_000003/model.safetensors is damaged: its SHA-256" in first
    assert "step_000002/COMPLETE is missing" in second
    assert names(three) == ["step_000001", "step_000002.damaged", "step_000003.damaged"]
    assert set_aside_unusable(three) == (folder, [])


def test_no_file_changes_if_all_checkpoints_are_damaged(three: Path) -> None:
    for step in (1, 2, 3):
        spoil(three, step)
    with pytest.raises(UserError, match=r"all 3 checkpoints are unusable: .*step_000003.*delete"):
        set_aside_unusable(three)
    assert names(three) == ["step_000001", "step_000002", "step_000003"]


def test_a_run_without_checkpoints_has_no_newest_one(tmp_path: Path) -> None:
    assert set_aside_unusable(tmp_path) == (None, [])


def test_the_data_offset_is_saved(tmp_path: Path) -> None:
    trainee = make_trainee()
    trainee.train(0, 1)
    tensors = optimizer_tensors(trainee.model, trainee.optimizer)
    assert progress(write_checkpoint(tmp_path, 1, trainee.model, tensors, data_offset=7)) == (1, 7)
