"""Checkpoints that are whole or absent.

    checkpoints/step_000500/
        config.json  model.safetensors  vocab.json  merges.txt  …   a model folder for `from_pretrained`
        training_state/                                             the optimizer's tensors and the step
        COMPLETE                                                    every file's size and SHA-256, written last

A checkpoint is written to a temporary folder, synced to disk, and renamed. Tensors are safetensors throughout: no
pickle is ever written or loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from restomod.engine.distributed import SINGLE, Processes
from restomod.engine.gather import copy_from_main, fill
from restomod.engine.loss_scale import LOSS_SCALE
from restomod.engine.optimizer import Optimizers, optimizer_tensors, put_numbers_back
from restomod.model.gpt import GPT
from restomod.model.hf_io import WEIGHTS, load_weights, save_model, write_tensors
from restomod.runs.identity import (
    DATA_FINGERPRINT,
    STATE_FORMAT,
    CheckpointFiles,
    identity_differences,
    read_state,
    run_identity,
)
from restomod.runs.saved_tensors import STATE, opened, require_finite
from restomod.utils.errors import UserError, reason
from restomod.utils.files import fsync_path, move_folder, require_inside, sha256_file
from restomod.utils.json_files import read_json
from restomod.utils.run_files import require_checkpoint_inside
from restomod.utils.temporary import Temporary, remove_leftovers

COMPLETE = "COMPLETE"
OPTIMIZER = "optimizer.safetensors"
FORMAT = "restomod-checkpoint-1"
REPLACED = ".old.tmp"  # what an earlier checkpoint of the same step is called until the new one has its name
STEP_FOLDER = re.compile(r"step_\d+")


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest step first.

    Raises:
        OSError: ``checkpoints`` cannot be read, which does not mean that there are none.
    """
    folder = run / "checkpoints"
    names = os.listdir(folder) if folder.exists() else []
    return sorted((folder / name for name in names if STEP_FOLDER.fullmatch(name)), key=step_of)


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder, by its name."""
    return int(folder.name.removeprefix("step_"))


@dataclass(frozen=True)
class Unusable:
    """A checkpoint that a run cannot go on from."""

    folder: Path
    problem: str


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """`newest_usable`, and what is wrong with the checkpoints after it, which are set aside."""
    folder, unusable = newest_usable(run)
    set_aside(unusable)
    return folder, [each.problem for each in unusable]


def newest_usable(run: Path) -> tuple[Path | None, list[Unusable]]:
    """The newest checkpoint from which a run can go on, and those after it, which are for `set_aside`.

    It is whole, of this run and of the step in its name, and its tensors are finite. Not to be called while a
    checkpoint is being written: what a killed process has half written or deleted is removed.

    Raises:
        UserError: there are checkpoints, and the run can go on from none.
    """
    with contextlib.suppress(OSError):  # the next save will say what is the matter
        _remove_leftovers(run)
    unusable: list[Unusable] = []
    for folder in list_checkpoints(run)[::-1]:
        try:
            verify_checkpoint(folder)
            _require_same(folder, run_identity(run))
            require_finite(folder)
        except UserError as e:
            unusable.append(Unusable(folder, str(e).partition("; ")[0]))
            continue
        return folder, unusable
    if unusable:
        raise UserError(
            f"{run} can go on from none of its {len(unusable)} checkpoints: {unusable[0].problem}; "
            f"put that right, or delete {run / 'checkpoints'} to start the run from step 0"
        )
    return None, []


def set_aside(unusable: list[Unusable]) -> None:
    """Rename checkpoints to ``….damaged``, so that they are no longer found."""
    for folder in (each.folder for each in unusable):
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        move_folder(folder, aside, COMPLETE)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint so that it is never seen half deleted."""
    with Temporary(folder.parent, "folder") as doomed:
        try:
            folder.rename(doomed.path)  # which is empty
        except OSError:  # a file system that cannot rename folders
            (folder / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(folder)


def _remove_leftovers(run: Path) -> None:
    """Remove what a save, or the deletion of a checkpoint, has left when it was killed; bring back what it replaced."""
    checkpoints = run / "checkpoints"
    for replaced in checkpoints.glob(f".step_*{REPLACED}"):
        folder = replaced.with_name(replaced.name.removesuffix(REPLACED)[1:])
        if not folder.exists() and not replaced.is_symlink():  # killed between the two renames
            move_folder(replaced, folder, COMPLETE)
    for leftover in checkpoints.glob(".step_*.tmp"):  # as earlier versions have named all that is temporary
        leftover.unlink() if leftover.is_symlink() else shutil.rmtree(leftover)
    remove_leftovers(checkpoints)


def write_checkpoint(
    run: Path, step: int, model: GPT, optimizer_state: dict[str, Tensor], data_offset: int = 0
) -> Path:
    """Write the checkpoint of ``step`` updates.

    Args:
        run: its folder.
        step: how many updates the weights have had.
        model: with all its weights in this process.
        optimizer_state: from `optimizer_tensors`; empty before the first step.
        data_offset: how many batches have been passed over.

    Raises:
        UserError: the disk is full or refuses; older checkpoints are untouched.
    """
    folder = run / "checkpoints" / f"step_{step:06d}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        require_inside(run, folder.parent)
        _remove_leftovers(run)
        with Temporary(folder.parent, "folder") as temporary:
            state = {"format": STATE_FORMAT, "step": step, "data_offset": data_offset, "run": run_identity(run)}
            _write_files(temporary.path, model, optimizer_state, state)
            replaced = folder.with_name(f".{folder.name}{REPLACED}")
            if folder.exists():  # left by an earlier attempt at this step
                move_folder(folder, replaced, COMPLETE)
            move_folder(temporary.path, folder, COMPLETE)
        fsync_path(folder.parent)
        if replaced.exists():
            shutil.rmtree(replaced)
    except (OSError, SafetensorError) as e:
        with contextlib.suppress(OSError):
            _remove_leftovers(run)
        raise UserError(
            f"cannot save {folder}: {reason(e)}; {describe_newest(run)}: "
            f"mend it, then go on with `restomod train --resume {quote(str(run))}`"
        ) from None
    return folder


def _write_files(folder: Path, model: GPT, optimizer_state: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Fill an empty folder with a checkpoint's files, and put them on the disk."""
    (folder / STATE).mkdir()
    save_model(model, folder)
    if optimizer_state:
        write_tensors({k: v.contiguous() for k, v in optimizer_state.items()}, folder / STATE / OPTIMIZER)
    (folder / STATE / "state.json").write_text(json.dumps(state) + "\n")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    record = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in files
    }
    (folder / COMPLETE).write_text(json.dumps({"format": FORMAT, "files": record}, indent=2) + "\n")
    for path in [*files, folder / COMPLETE, folder / STATE, folder]:
        fsync_path(path)


def describe_newest(run: Path) -> str:
    """Which checkpoint a run would go on from, as its folder has it now."""
    newest = list_checkpoints(run)[-1:]
    return f"the newest checkpoint is {newest[0].name}" if newest else "there is no checkpoint yet"


def verify_checkpoint(folder: Path) -> None:
    """Check every file of a checkpoint against `COMPLETE`, its step against its name, its settings against its run's.

    Raises:
        UserError: a file is missing or altered; the message names it. Or the checkpoint is of another step or run.
    """
    mend = f"delete {folder} to fall back on the checkpoint before it"
    if not (folder / COMPLETE).exists():
        raise UserError(f"{folder / COMPLETE} is missing: the checkpoint may be incomplete; {mend}")
    require_checkpoint_inside(folder)
    try:
        record = read_json(folder / COMPLETE, "record of a finished checkpoint", CheckpointFiles)
    except UserError as e:
        raise UserError(f"{e}; {mend}") from None
    expected_files = [(folder / name, entry["bytes"], entry["sha256"]) for name, entry in record["files"].items()]
    listed = {path for path, _, _ in expected_files}
    require_checkpoint_inside(folder, *listed)
    for needed in (WEIGHTS, "config.json", f"{STATE}/state.json"):
        if folder / needed not in listed:
            raise UserError(f"{folder / COMPLETE} is damaged: it does not list {needed}; {mend}")
    for path, size, sha256 in expected_files:
        if not path.is_file():
            raise UserError(f"{path} is missing from the checkpoint; {mend}")
        if path.stat().st_size != size:
            raise UserError(f"{path} is damaged: {path.stat().st_size:,} bytes, not {size:,}; {mend}")
        if sha256_file(path) != sha256:
            raise UserError(f"{path} is damaged: its SHA-256 is not the one recorded; {mend}")
    state = read_state(folder / STATE / "state.json")
    if STEP_FOLDER.fullmatch(folder.name) and state["step"] != step_of(folder):
        raise UserError(f"{folder} holds step {state['step']}, not {step_of(folder)}; {mend}")
    if folder.absolute().parent.name == "checkpoints":
        run = run_identity(folder.absolute().parent.parent)
        # a model can be used whose data have changed; only training cannot go on
        _require_same(folder, {name: value for name, value in run.items() if name != DATA_FINGERPRINT})


def _require_same(folder: Path, run: dict[str, Any]) -> None:
    """Raise UserError if a checkpoint's run is not the one with the identity ``run``."""
    other = identity_differences(read_state(folder / STATE / "state.json")["run"], run)
    if other:
        raise UserError(
            f"{folder} belongs to another run: {', '.join(other)}; delete it to fall back on the checkpoint before it"
        )


def progress(folder: Path) -> tuple[int, int]:
    """Of a checkpoint: how many updates its weights have had, and how many batches were passed over.

    Raises:
        UserError: its training state is damaged.
    """
    state = read_state(folder / STATE / "state.json")
    return state["step"], state["data_offset"]


def load_optimizer(folder: Path, model: GPT, optimizer: Optimizers, processes: Processes = SINGLE) -> None:
    """Put the optimizer's state of a verified checkpoint back, one tensor after the other. All processes call this.

    The state of step 0 is that of an optimizer that has not stepped. The loss scale of fp16 is left out in other
    precisions, and begins anew where the checkpoint has none.

    Args:
        folder: of the checkpoint; the main process alone reads it.
        model: the one that is optimized.
        optimizer: gets the state.
        processes: that train the model.

    Raises:
        UserError: it is that of another optimizer or model.
    """
    if processes.from_main(lambda: progress(folder)[0]) == 0:
        optimizer.reset()
        return
    optimizer.loss_scale.reset()
    tensors = optimizer_tensors(model, optimizer)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    files = processes.from_main(lambda: _optimizer_files(folder, shapes))
    for name in files:

        def read(name: str = name) -> Tensor:
            with opened(files[name]) as saved:
                value: Tensor = saved.get_tensor(name)
            return value

        copy_from_main(read, tensors[name], processes)
    put_numbers_back(model, optimizer, tensors)


def _optimizer_files(folder: Path, shapes: dict[str, torch.Size]) -> dict[str, Path]:
    """In which file of a checkpoint each tensor of the optimizer is, which have to be those of ``shapes``.

    The loss scale may be missing on either side: only fp16 has one.
    """
    files = {}
    for path in sorted((folder / STATE).glob("*.safetensors")):  # the one file that used to have another name, too
        with opened(path) as saved:
            for name in saved.keys():  # noqa: SIM118  # it is no mapping
                if name in LOSS_SCALE and name not in shapes:
                    continue
                if name not in shapes or shapes[name] != torch.Size(saved.get_slice(name).get_shape()):
                    raise UserError(f"{path} is of another optimizer or model: {name} does not fit")
                files[name] = path
    missing = shapes.keys() - files.keys() - set(LOSS_SCALE)
    if missing:
        raise UserError(f"{folder / STATE} is of another optimizer or model: {min(missing)} is missing")
    return files


def load_saved_weights(folder: Path, model: GPT, processes: Processes = SINGLE) -> None:
    """Put the weights of a verified checkpoint back. All processes call this; the main process alone reads.

    Raises:
        UserError: it is of another model.
    """
    fill(model, processes.run_on_all_ranks(lambda: _read_weights(folder, model) if processes.main else None), processes)


@torch.no_grad()
def _read_weights(folder: Path, like: GPT) -> GPT:
    """The weights of a checkpoint on the CPU, in a model of the configuration of ``like``."""
    with torch.device("meta"):
        model = GPT(like.config)
    model.to_empty(device="cpu")
    for matrix in model.vocabulary_matrices():
        matrix.zero_()  # its padding is not in the files
    load_weights(model, folder)
    return model


def load_checkpoint(folder: Path, model: GPT, optimizer: Optimizers, processes: Processes = SINGLE) -> int:
    """Verify a checkpoint and put its weights and optimizer state back; return its step. All processes call this.

    Raises:
        UserError: it is damaged, or is of another model.
    """
    processes.from_main(lambda: verify_checkpoint(folder))
    load_saved_weights(folder, model, processes)
    load_optimizer(folder, model, optimizer, processes)
    return processes.from_main(lambda: progress(folder)[0])
