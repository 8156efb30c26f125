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
import re
import shutil
from pathlib import Path
from shlex import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from restomod.errors import UserError
from restomod.files import fsync_path, read_json, sha256_file
from restomod.model.gpt import GPT
from restomod.model.pretrained import load_weights, save_model
from restomod.model.storage import WEIGHTS
from restomod.train.distributed import SINGLE, Processes
from restomod.train.gather import copy_from_main, fill
from restomod.train.optimizer import Optimizers, optimizer_tensors

COMPLETE = "COMPLETE"
STATE = "training_state"
OPTIMIZER = "optimizer.safetensors"
FORMAT = "restomod-checkpoint-1"
STEP_FOLDER = re.compile(r"step_\d+")


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest step first."""
    folders = (run / "checkpoints").glob("step_*")
    return sorted((f for f in folders if STEP_FOLDER.fullmatch(f.name)), key=step_of)


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder, by its name."""
    return int(folder.name.removeprefix("step_"))


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that is whole, and what is wrong with those after it, which are set aside.

    Not to be called while a checkpoint is being written: what a killed process has half written or deleted is removed.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    with contextlib.suppress(OSError):  # the next save will say what is the matter
        _remove_leftovers(run)
    problems: list[str] = []
    folders = list_checkpoints(run)[::-1]
    for folder in folders:
        try:
            verify_checkpoint(folder)
        except UserError as e:
            problems.append(str(e).partition("; ")[0])
            continue
        for damaged in folders[: len(problems)]:
            aside = damaged.with_name(f"{damaged.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            damaged.rename(aside)
        return folder, problems
    if problems:
        raise UserError(
            f"none of the {len(folders)} checkpoints of {run} is whole: {problems[0]}; "
            f"delete {run / 'checkpoints'} to begin the run anew"
        )
    return None, []


def _remove_leftovers(run: Path) -> None:
    """Remove what a save, or the deletion of an old checkpoint, has left when it was killed."""
    for leftover in (run / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(leftover)


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
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        _remove_leftovers(run)
        (temporary / STATE).mkdir(parents=True)
        save_model(model, temporary)
        if optimizer_state:
            save_file({k: v.contiguous() for k, v in optimizer_state.items()}, temporary / STATE / OPTIMIZER)
        state = {"format": FORMAT, "step": step, "data_offset": data_offset}
        (temporary / STATE / "state.json").write_text(json.dumps(state) + "\n")
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        record = {
            str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in files
        }
        (temporary / COMPLETE).write_text(json.dumps({"format": FORMAT, "files": record}, indent=2) + "\n")
        for path in [*files, temporary / COMPLETE, temporary / STATE, temporary]:
            fsync_path(path)
        if folder.exists():  # left by an earlier attempt at this step
            shutil.rmtree(folder)
        temporary.rename(folder)
        fsync_path(folder.parent)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot save {folder}: {_reason(e)}; older checkpoints are whole: "
            f"mend it, then go on with `restomod train --resume {quote(str(run))}`"
        ) from None
    return folder


def _reason(e: OSError | SafetensorError) -> str:
    """Why a save failed, in one line."""
    return getattr(e, "strerror", None) or str(e).partition("\n")[0]


def verify_checkpoint(folder: Path) -> None:
    """Check every file of a checkpoint against `COMPLETE`.

    Raises:
        UserError: a file is missing or altered; the message names it.
    """
    mend = f"delete {folder} to fall back on the checkpoint before it"
    if not (folder / COMPLETE).exists():
        raise UserError(f"{folder / COMPLETE} is missing: the checkpoint may be incomplete; {mend}")
    record = read_json(folder / COMPLETE, "record of a finished checkpoint")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{folder / COMPLETE} is damaged: its format is not {FORMAT!r}; {mend}")
    try:
        expected_files = [(folder / name, int(e["bytes"]), str(e["sha256"])) for name, e in record["files"].items()]
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{folder / COMPLETE} is damaged: {e!r}; {mend}") from None
    listed = {path for path, _, _ in expected_files}
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


def progress(folder: Path) -> tuple[int, int]:
    """Of a checkpoint: how many updates its weights have had, and how many batches were passed over."""
    state = read_json(folder / STATE / "state.json", "training state")
    return int(state["step"]), int(state.get("data_offset", 0))


def load_optimizer(folder: Path, model: GPT, optimizer: Optimizers, processes: Processes = SINGLE) -> None:
    """Put the optimizer's state of a verified checkpoint back, one tensor after the other. All processes call this.

    Args:
        folder: of the checkpoint; the main process alone reads it.
        model: the one that is optimized.
        optimizer: gets the state.
        processes: that train the model.

    Raises:
        UserError: it is that of another optimizer or model.
    """
    if processes.from_main(lambda: progress(folder)[0]) == 0:
        return
    tensors = optimizer_tensors(model, optimizer)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    files = processes.from_main(lambda: _optimizer_files(folder, shapes))
    for name in files:

        def read(name: str = name) -> Tensor:
            with safe_open(files[name], "pt") as saved:
                value: Tensor = saved.get_tensor(name)
            return value

        copy_from_main(read, tensors[name], processes)


def _optimizer_files(folder: Path, shapes: dict[str, torch.Size]) -> dict[str, Path]:
    """In which file of a checkpoint each tensor of the optimizer is, which have to be those of ``shapes``."""
    files = {}
    for path in sorted((folder / STATE).glob("*.safetensors")):  # the one file that used to have another name, too
        with safe_open(path, "pt") as saved:
            for name in saved.keys():  # noqa: SIM118  # it is no mapping
                if name not in shapes or shapes[name] != torch.Size(saved.get_slice(name).get_shape()):
                    raise UserError(f"{path} is of another optimizer or model: {name} does not fit")
                files[name] = path
    if files.keys() != shapes.keys():
        raise UserError(f"{folder / STATE} is of another optimizer or model: {min(shapes.keys() - files)} is missing")
    return files


def load_saved_weights(folder: Path, model: GPT, processes: Processes = SINGLE) -> None:
    """Put the weights of a verified checkpoint back. All processes call this; the main process alone reads.

    Raises:
        UserError: it is of another model.
    """
    fill(model, processes.together(lambda: _read_weights(folder, model) if processes.main else None), processes)


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
