"""Checkpoints: atomic writing, verification, loading.

    checkpoints/step_000500/
        config.json  model.safetensors  vocab.json  merges.txt  …   model folder for `from_pretrained`
        training_state/                                             optimizer state and step
        COMPLETE                                                    size and SHA-256 of every file, written last

A checkpoint is written to a temporary folder, synced to disk, and renamed. All tensors are in safetensors format;
pickle is never used.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import TypedDict

from restomod.config.run import ModelConfig
from restomod.data.manifest import Count
from restomod.engine.distributed import SINGLE, Processes
from restomod.engine.gather import broadcast_weights, copy_from_main
from restomod.engine.loss_scale import LOSS_SCALE
from restomod.engine.optimizer import Optimizers, optimizer_tensors, put_numbers_back
from restomod.model.flops import parameter_count
from restomod.model.gpt import GPT
from restomod.model.hf_format import as_saved
from restomod.model.hf_io import (
    WEIGHTS,
    load_model,
    read_model_config,
    require_short_header,
    save_model,
    write_tensors,
)
from restomod.runs.config_diff import DATA_FINGERPRINT, identity_differences, run_identity
from restomod.utils.errors import UserError, one_line, reason
from restomod.utils.files import fsync_path, move_folder, require_inside, require_regular, sha256_file
from restomod.utils.json_files import read_json
from restomod.utils.run_files import CHECKPOINTS, STEP_FOLDER, list_checkpoints, require_checkpoint_inside, step_of
from restomod.utils.temporary import Temporary, remove_leftovers
from restomod.utils.verified import changed_file

COMPLETE = "COMPLETE"
STATE = "training_state"
OPTIMIZER = "optimizer.safetensors"
FORMAT = "restomod-checkpoint-1"
STATE_FORMAT = "restomod-state-2"  # of state.json
REPLACED = ".old.tmp"  # suffix of an older checkpoint of the same step until the new one is renamed
NEVER_NEGATIVE = (".exp_avg_sq", ".step")  # AdamW state; its roots and powers of negative values would be NaN


class Size(TypedDict):
    """Size and hash of a file."""

    bytes: Count
    sha256: str


class CheckpointFiles(TypedDict):
    """Contents of `COMPLETE`."""

    format: Literal["restomod-checkpoint-1"]
    files: dict[str, Size]


class State(TypedDict):
    """A checkpoint's `state.json`."""

    format: Literal["restomod-state-2"]
    step: Count
    data_offset: Count
    run: dict[str, Any]
    """Identity of the checkpoint's run, from `run_identity`."""


def set_aside_unusable(run: Path) -> tuple[Path | None, list[str]]:
    """Find the newest usable checkpoint, and set newer ones aside.

    Returns:
        Folder of the checkpoint (None without checkpoints), and the problems of the newer ones.

    Raises:
        UserError: all checkpoints are unusable.
    """
    folder, unusable = newest_usable(run)
    set_aside(unusable)
    return folder, list(unusable.values())


def newest_usable(run: Path) -> tuple[Path | None, dict[Path, str]]:
    """Find the newest checkpoint from which a run can resume.

    A usable checkpoint is complete, belongs to this run, matches the step in its name, and has finite tensors. The
    function also deletes incomplete files of killed processes. Do not call it while a checkpoint is being written.

    Returns:
        Folder of the checkpoint (None without checkpoints), and newer, unusable ones with their problems, for
        `set_aside`.

    Raises:
        UserError: all checkpoints are unusable.
    """
    with contextlib.suppress(OSError):  # the next save reports the problem
        _remove_leftovers(run)
    unusable: dict[Path, str] = {}
    for folder in list_checkpoints(run)[::-1]:
        try:
            verify_checkpoint(folder)
            _require_same(folder, run_identity(run))
            require_finite(folder)
        except UserError as e:
            unusable[folder] = str(e).partition("; ")[0]
            continue
        return folder, unusable
    if unusable:
        raise UserError(
            f"{run} cannot resume: all {len(unusable)} checkpoints are unusable: {next(iter(unusable.values()))}; "
            f"restore one, or delete {run / 'checkpoints'} to start from step 0"
        )
    return None, {}


def set_aside(unusable: Iterable[Path]) -> None:
    """Rename checkpoints to ``….damaged``, so that `list_checkpoints` ignores them."""
    for folder in unusable:
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        move_folder(folder, aside, COMPLETE)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint: it is renamed first, or loses `COMPLETE` first, so that no part of it is ever used."""
    with Temporary(folder.parent, "folder") as doomed:
        try:
            folder.rename(doomed.path)  # an empty folder, which is replaced
        except OSError:  # some file systems cannot rename folders
            (folder / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(folder)


def _remove_leftovers(run: Path) -> None:
    """Delete temporary files of killed processes; restore a checkpoint that a killed save was replacing."""
    checkpoints = run / CHECKPOINTS
    for replaced in checkpoints.glob(f".step_*{REPLACED}"):
        folder = replaced.with_name(replaced.name.removesuffix(REPLACED)[1:])
        if replaced.is_symlink():
            replaced.unlink()
        elif folder.exists():
            shutil.rmtree(replaced)
        else:  # the save was killed between its two renames
            move_folder(replaced, folder, COMPLETE)
    remove_leftovers(checkpoints)


def write_checkpoint(
    run: Path, step: int, model: GPT, optimizer_state: dict[str, Tensor], data_offset: int = 0
) -> Path:
    """Write a checkpoint.

    Args:
        run: run folder.
        step: number of updates made so far.
        model: model with all its weights on this rank.
        optimizer_state: tensors by name, from `optimizer_tensors`; empty before the first step.
        data_offset: number of batches skipped by rollbacks.

    Returns:
        Folder of the checkpoint.

    Raises:
        UserError: the disk is full or not writable; older checkpoints are unchanged.
    """
    folder = run / CHECKPOINTS / f"step_{step:06d}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        require_inside(run, folder.parent)
        _remove_leftovers(run)
        with Temporary(folder.parent, "folder") as temporary:
            state = {"format": STATE_FORMAT, "step": step, "data_offset": data_offset, "run": run_identity(run)}
            _write_files(temporary.path, model, optimizer_state, state)
            replaced = folder.with_name(f".{folder.name}{REPLACED}")
            if folder.exists():  # from an earlier save of the same step
                move_folder(folder, replaced, COMPLETE)
            move_folder(temporary.path, folder, COMPLETE)
        fsync_path(folder.parent)
        if replaced.exists():
            shutil.rmtree(replaced)
    except (OSError, SafetensorError) as e:
        with contextlib.suppress(OSError):
            _remove_leftovers(run)
        raise UserError(
            f"cannot save {folder}: {reason(e)}; {describe_newest(run)}; "
            f"after fixing it, resume with `restomod train --resume {quote(str(run))}`"
        ) from None
    return folder


def _write_files(folder: Path, model: GPT, optimizer_state: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write the files of a checkpoint into an empty folder, and sync them to disk."""
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
    """Describe the newest checkpoint of a run in words, for messages."""
    newest = list_checkpoints(run)[-1:]
    return f"the newest checkpoint is {newest[0].name}" if newest else "there is no checkpoint yet"


def verify_checkpoint(folder: Path) -> None:
    """Check a checkpoint: the hashes of all files, its step, and the run it belongs to.

    Raises:
        UserError: a file is missing or altered (the message names it), or the step or run does not match.
    """
    _verify(folder, lambda name: True, remember=False)


def verify_model(folder: Path) -> None:
    """Check a checkpoint for reading its model: like `verify_checkpoint`, without hashing the optimizer state.

    A file that passed before is read again only if its inode, size or time of change differs (see
    `restomod.utils.verified`).

    Raises:
        UserError: a file is missing or altered (the message names it), or the step or run does not match.
    """
    _verify(folder, lambda name: name != f"{STATE}/{OPTIMIZER}", remember=True)


def _verify(folder: Path, is_needed: Callable[[str], bool], remember: bool) -> None:
    fix = f"delete {folder} to use the previous checkpoint"
    if not (folder / COMPLETE).exists():
        raise UserError(f"{folder / COMPLETE} is missing: the checkpoint may be incomplete; {fix}")
    require_checkpoint_inside(folder)
    try:
        record = read_json(folder / COMPLETE, "list of a checkpoint's files", CheckpointFiles)
    except UserError as e:
        raise UserError(f"{e}; {fix}") from None
    files = record["files"]
    require_checkpoint_inside(folder, *(folder / name for name in files))
    for needed in (WEIGHTS, "config.json", f"{STATE}/state.json"):
        if needed not in files:
            raise UserError(f"{folder / COMPLETE} is damaged: it does not list {needed}; {fix}")
    for name, entry in files.items():
        path, size = folder / name, entry["bytes"]
        if not path.is_file():
            raise UserError(f"{path} is missing from the checkpoint; {fix}")
        if path.stat().st_size != size:
            raise UserError(f"{path} is damaged: {path.stat().st_size:,} bytes, not {size:,}; {fix}")
    hashes = {name: entry["sha256"] for name, entry in files.items() if is_needed(name)}
    if (changed := changed_file(folder, hashes, remember)) is not None:
        raise UserError(f"{folder / changed} is damaged: its SHA-256 differs from the recorded one; {fix}")
    state = read_state(folder)
    if STEP_FOLDER.fullmatch(folder.name) and state["step"] != step_of(folder):
        raise UserError(f"{folder} contains step {state['step']}, not {step_of(folder)}; {fix}")
    if folder.absolute().parent.name == CHECKPOINTS:
        run = run_identity(folder.absolute().parent.parent)
        # changed data prevent further training, but not the use of the model
        _require_same(folder, {name: value for name, value in run.items() if name != DATA_FINGERPRINT})


def _require_same(folder: Path, run: dict[str, Any]) -> None:
    """Raise UserError if a checkpoint does not belong to the run with the identity ``run``."""
    other = identity_differences(read_state(folder)["run"], run)
    if other:
        raise UserError(
            f"{folder} belongs to another run: {', '.join(other)}; delete it to use the previous checkpoint"
        )


def read_state(folder: Path) -> State:
    """Read the `state.json` of a checkpoint; raise UserError if a value is missing or has the wrong type."""
    state: State = read_json(folder / STATE / "state.json", "training state", State)
    return state


def progress(folder: Path) -> tuple[int, int]:
    """Return the step and data offset of a checkpoint; raise UserError if its training state is damaged."""
    state = read_state(folder)
    return state["step"], state["data_offset"]


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file; raise UserError if it is damaged or torch lacks a tensor's dtype."""
    require_regular(path)
    try:
        require_short_header(path)
        with safe_open(path, "pt") as saved:
            yield saved
    except (SafetensorError, OSError, TypeError, ValueError, KeyError, NotImplementedError) as e:
        raise UserError(f"{path} is damaged: {one_line(e)}") from None


def require_shape(folder: Path, config: ModelConfig) -> None:
    """Raise UserError if a checkpoint's model is not that of ``config``; reads no tensors."""
    if read_model_config(folder) != as_saved(config):
        raise UserError(f"{folder} has another model than config.json of the run; restore the original files")
    with open_safetensors(folder / WEIGHTS) as saved:
        sizes = [math.prod(saved.get_slice(name).get_shape()) for name in saved.keys()]  # noqa: SIM118
    if sum(sizes) != parameter_count(config):
        raise UserError(
            f"{folder / WEIGHTS} has {sum(sizes):,} parameters, but the model in the run's config.json has "
            f"{parameter_count(config):,}; restore the original config.json"
        )


def require_finite(folder: Path) -> None:
    """Raise UserError if a tensor of a verified checkpoint is not finite, or a second moment or step is negative."""
    for path in [folder / WEIGHTS, *(folder / STATE).glob("*.safetensors")]:
        with open_safetensors(path) as saved:
            for name in saved.keys():  # noqa: SIM118  # not a mapping
                values = saved.get_tensor(name)
                if not values.isfinite().all():
                    raise UserError(f"{path}: {name} has values that are not finite")
                if name.endswith(NEVER_NEGATIVE) and (values < 0).any():
                    raise UserError(f"{path}: {name} has values below 0")


def load_optimizer(folder: Path, model: GPT, optimizer: Optimizers, processes: Processes = SINGLE) -> None:
    """Load the optimizer state of a verified checkpoint, tensor by tensor. All ranks call this; the main one reads.

    A checkpoint of step 0 resets the optimizer. The loss scale is loaded in fp16 only; it is reset if the checkpoint
    has none.

    Raises:
        UserError: the state belongs to another optimizer or model.
    """
    if processes.from_main(lambda: progress(folder)[0]) == 0:
        optimizer.reset()
        return
    optimizer.loss_scale.reset()
    tensors = optimizer_tensors(model, optimizer)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    path = folder / STATE / OPTIMIZER
    for name in processes.from_main(lambda: _optimizer_tensor_names(path, shapes)):

        def read(name: str = name) -> Tensor:
            with open_safetensors(path) as saved:
                value: Tensor = saved.get_tensor(name)
            return value

        copy_from_main(read, tensors[name], processes)
    put_numbers_back(model, optimizer, tensors)


def _optimizer_tensor_names(path: Path, shapes: dict[str, torch.Size]) -> list[str]:
    """Return the names of the saved optimizer tensors that are to be loaded; raise UserError if shapes differ.

    The loss scale may be missing, in ``shapes`` or in the file, because only fp16 has one.
    """
    with open_safetensors(path) as saved:
        found = {name: torch.Size(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
    names = [name for name in found if name in shapes or name not in LOSS_SCALE]
    for name in names:
        if shapes.get(name) != found[name]:
            raise UserError(f"{path} belongs to another optimizer or model: {name} does not match")
    missing = shapes.keys() - found.keys() - set(LOSS_SCALE)
    if missing:
        raise UserError(f"{path} belongs to another optimizer or model: {min(missing)} is missing")
    return names


def load_saved_weights(folder: Path, model: GPT, processes: Processes = SINGLE) -> None:
    """Load the weights of a checkpoint from `newest_usable`. All ranks call this.

    Raises:
        UserError: the checkpoint has another model.
    """

    def read() -> GPT | None:
        if not processes.main:
            return None
        require_shape(folder, model.config)
        return load_model(folder, torch.device("cpu"), finite=False)

    broadcast_weights(model, processes.run_on_all_ranks(read), processes)


def load_checkpoint(folder: Path, model: GPT, optimizer: Optimizers, processes: Processes = SINGLE) -> int:
    """Verify and load a checkpoint; return its step. All ranks call this.

    Raises:
        UserError: the checkpoint is damaged, or belongs to another run, model or optimizer.
    """
    processes.from_main(lambda: verify_checkpoint(folder))
    load_saved_weights(folder, model, processes)
    load_optimizer(folder, model, optimizer, processes)
    return processes.from_main(lambda: progress(folder)[0])
