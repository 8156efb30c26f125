"""Checkpoints: written whole or not at all, verified, loaded.

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
REPLACED = ".old.tmp"  # suffix of an older checkpoint of the same step until the new one has its name
NEVER_NEGATIVE = (".exp_avg_sq", ".step")  # of AdamW: their roots, or powers, would make the weights NaN


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
    """Identity of its run, see `run_identity`."""


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """`newest_usable`, and the problems of newer checkpoints, which are set aside."""
    folder, unusable = newest_usable(run)
    set_aside(unusable)
    return folder, list(unusable.values())


def newest_usable(run: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint from which a run can resume, and the problems of newer ones, which are for `set_aside`.

    It is complete, of this run and of the step in its name, and its tensors are finite. Not to be called while a
    checkpoint is being written: what a killed process has half written or deleted is removed.

    Raises:
        UserError: there are checkpoints, and none is usable.
    """
    with contextlib.suppress(OSError):  # the next save will say what is the matter
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
            f"{run} can resume from none of its {len(unusable)} checkpoints: {next(iter(unusable.values()))}; "
            f"mend it, or delete {run / 'checkpoints'} to start the run from step 0"
        )
    return None, {}


def set_aside(unusable: Iterable[Path]) -> None:
    """Rename checkpoints to ``….damaged``, so that they are no longer found."""
    for folder in unusable:
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        move_folder(folder, aside, COMPLETE)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; it is never visible half deleted."""
    with Temporary(folder.parent, "folder") as doomed:
        try:
            folder.rename(doomed.path)  # which is empty
        except OSError:  # a file system that cannot rename folders
            (folder / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(folder)


def _remove_leftovers(run: Path) -> None:
    """Remove what a killed save or deletion has left; restore the checkpoint that a killed save was replacing."""
    checkpoints = run / CHECKPOINTS
    for replaced in checkpoints.glob(f".step_*{REPLACED}"):
        folder = replaced.with_name(replaced.name.removesuffix(REPLACED)[1:])
        if replaced.is_symlink():
            replaced.unlink()
        elif folder.exists():
            shutil.rmtree(replaced)
        else:  # killed between the two renames
            move_folder(replaced, folder, COMPLETE)
    remove_leftovers(checkpoints)


def write_checkpoint(
    run: Path, step: int, model: GPT, optimizer_state: dict[str, Tensor], data_offset: int = 0
) -> Path:
    """Write the checkpoint of ``step`` updates and ``data_offset`` skipped batches.

    The model holds all its weights in this process; the state is from `optimizer_tensors`, empty before the first step.

    Raises:
        UserError: the disk is full or refuses; older checkpoints are untouched.
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
            f"mend it, then resume with `restomod train --resume {quote(str(run))}`"
        ) from None
    return folder


def _write_files(folder: Path, model: GPT, optimizer_state: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint's files into an empty folder, and sync them to disk."""
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
    """Name the newest checkpoint in a run's folder, for messages."""
    newest = list_checkpoints(run)[-1:]
    return f"the newest checkpoint is {newest[0].name}" if newest else "there is no checkpoint yet"


def verify_checkpoint(folder: Path) -> None:
    """Check every byte of a checkpoint against `COMPLETE`, its step against its name, its settings against its run's.

    Raises:
        UserError: a file is missing or altered; the message names it. Or the checkpoint is of another step or run.
    """
    _verify(folder, lambda name: True, remember=False)


def verify_model(folder: Path) -> None:
    """Check the files of a checkpoint that a model is read from, as `verify_checkpoint` does.

    Of the optimizer's state only the size is checked. A file that was right before is read again only if its inode,
    size or time of change differs (see `restomod.utils.verified`).
    """
    _verify(folder, lambda name: name != f"{STATE}/{OPTIMIZER}", remember=True)


def _verify(folder: Path, is_needed: Callable[[str], bool], remember: bool) -> None:
    mend = f"delete {folder} to fall back on the checkpoint before it"
    if not (folder / COMPLETE).exists():
        raise UserError(f"{folder / COMPLETE} is missing: the checkpoint may be incomplete; {mend}")
    require_checkpoint_inside(folder)
    try:
        record = read_json(folder / COMPLETE, "record of a finished checkpoint", CheckpointFiles)
    except UserError as e:
        raise UserError(f"{e}; {mend}") from None
    files = record["files"]
    require_checkpoint_inside(folder, *(folder / name for name in files))
    for needed in (WEIGHTS, "config.json", f"{STATE}/state.json"):
        if needed not in files:
            raise UserError(f"{folder / COMPLETE} is damaged: it does not list {needed}; {mend}")
    for name, entry in files.items():
        path, size = folder / name, entry["bytes"]
        if not path.is_file():
            raise UserError(f"{path} is missing from the checkpoint; {mend}")
        if path.stat().st_size != size:
            raise UserError(f"{path} is damaged: {path.stat().st_size:,} bytes, not {size:,}; {mend}")
    hashes = {name: entry["sha256"] for name, entry in files.items() if is_needed(name)}
    if (changed := changed_file(folder, hashes, remember)) is not None:
        raise UserError(f"{folder / changed} is damaged: its SHA-256 is not the one recorded; {mend}")
    state = read_state(folder)
    if STEP_FOLDER.fullmatch(folder.name) and state["step"] != step_of(folder):
        raise UserError(f"{folder} holds step {state['step']}, not {step_of(folder)}; {mend}")
    if folder.absolute().parent.name == CHECKPOINTS:
        run = run_identity(folder.absolute().parent.parent)
        # a model can be used whose data have changed; only training cannot continue
        _require_same(folder, {name: value for name, value in run.items() if name != DATA_FINGERPRINT})


def _require_same(folder: Path, run: dict[str, Any]) -> None:
    """Raise UserError if a checkpoint's run is not the one with the identity ``run``."""
    other = identity_differences(read_state(folder)["run"], run)
    if other:
        raise UserError(
            f"{folder} belongs to another run: {', '.join(other)}; delete it to fall back on the checkpoint before it"
        )


def read_state(folder: Path) -> State:
    """The `state.json` of a checkpoint; raises UserError if a value is missing or of another type."""
    state: State = read_json(folder / STATE / "state.json", "training state", State)
    return state


def progress(folder: Path) -> tuple[int, int]:
    """Step and data offset of a checkpoint; raises UserError if its training state is damaged."""
    state = read_state(folder)
    return state["step"], state["data_offset"]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; raises UserError if it is damaged, or torch lacks a tensor's dtype."""
    require_regular(path)
    try:
        require_short_header(path)
        with safe_open(path, "pt") as saved:
            yield saved
    except (SafetensorError, OSError, TypeError, ValueError, KeyError, NotImplementedError) as e:
        raise UserError(f"{path} is damaged: {one_line(e)}") from None


def require_shape(folder: Path, config: ModelConfig) -> None:
    """Raise UserError if a checkpoint is not of the model ``config`` describes; called before memory is allocated."""
    if read_model_config(folder) != as_saved(config):
        raise UserError(f"{folder} is of another model than config.json of the run; restore the original files")
    with opened(folder / WEIGHTS) as saved:
        sizes = [math.prod(saved.get_slice(name).get_shape()) for name in saved.keys()]  # noqa: SIM118
    if sum(sizes) != parameter_count(config):
        raise UserError(
            f"{folder / WEIGHTS} holds {sum(sizes):,} parameters, but the run's config.json describes a model of "
            f"{parameter_count(config):,}; restore the original config.json"
        )


def require_finite(folder: Path) -> None:
    """Raise UserError if a tensor of a verified checkpoint holds NaN or infinity, or a mean of squares below 0."""
    for path in [folder / WEIGHTS, *(folder / STATE).glob("*.safetensors")]:
        with opened(path) as saved:
            for name in saved.keys():  # noqa: SIM118  # it is no mapping
                values = saved.get_tensor(name)
                if not values.isfinite().all():
                    raise UserError(f"{path}: {name} holds values that are not finite")
                if name.endswith(NEVER_NEGATIVE) and (values < 0).any():
                    raise UserError(f"{path}: {name} holds values below 0")


def load_optimizer(folder: Path, model: GPT, optimizer: Optimizers, processes: Processes = SINGLE) -> None:
    """Load the optimizer state of a verified checkpoint, tensor by tensor. All processes call this, one reads.

    Step 0 resets the optimizer. The loss scale of fp16 is ignored in other precisions, and starts anew if the
    checkpoint has none.

    Raises:
        UserError: the state is of another optimizer or model.
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
            with opened(path) as saved:
                value: Tensor = saved.get_tensor(name)
            return value

        copy_from_main(read, tensors[name], processes)
    put_numbers_back(model, optimizer, tensors)


def _optimizer_tensor_names(path: Path, shapes: dict[str, torch.Size]) -> list[str]:
    """Names of the saved optimizer tensors, which have to match ``shapes``.

    The loss scale may be missing on either side: only fp16 has one.
    """
    with opened(path) as saved:
        found = {name: torch.Size(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
    names = [name for name in found if name in shapes or name not in LOSS_SCALE]
    for name in names:
        if shapes.get(name) != found[name]:
            raise UserError(f"{path} is of another optimizer or model: {name} does not fit")
    missing = shapes.keys() - found.keys() - set(LOSS_SCALE)
    if missing:
        raise UserError(f"{path} is of another optimizer or model: {min(missing)} is missing")
    return names


def load_saved_weights(folder: Path, model: GPT, processes: Processes = SINGLE) -> None:
    """Load the weights of a checkpoint that `newest_usable` has found. All processes call this.

    Raises:
        UserError: the model differs.
    """

    def read() -> GPT | None:
        if not processes.main:
            return None
        require_shape(folder, model.config)
        return load_model(folder, torch.device("cpu"), finite=False)

    broadcast_weights(model, processes.run_on_all_ranks(read), processes)


def load_checkpoint(folder: Path, model: GPT, optimizer: Optimizers, processes: Processes = SINGLE) -> int:
    """Verify and load a checkpoint; return its step. All processes call this. Raises UserError: not usable."""
    processes.from_main(lambda: verify_checkpoint(folder))
    load_saved_weights(folder, model, processes)
    load_optimizer(folder, model, optimizer, processes)
    return processes.from_main(lambda: progress(folder)[0])
