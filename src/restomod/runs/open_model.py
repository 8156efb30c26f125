"""Opening a model: a run (its newest checkpoint), a checkpoint, a Hugging Face model folder, or a name on the hub."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

import torch

from restomod.config.presets import PRESETS, is_preset, preset
from restomod.model.gpt import GPT, build_model
from restomod.model.hf_format import UnsupportedModel
from restomod.model.hf_io import OPENAI, download_model, hub_name, load_model
from restomod.runs.checkpoint import COMPLETE, STATE, verify_model
from restomod.utils.errors import UserError, did_you_mean, is_out_of_memory, one_line
from restomod.utils.json_files import read_json
from restomod.utils.run_files import CHECKPOINTS, list_checkpoints


def find_model(name: str) -> Path:
    """Find the model folder of ``name``, verified if a checkpoint, downloaded if a hub name.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(name)
    if not path.is_dir():
        return _from_hub(name)
    if (path / COMPLETE).exists() or (path / STATE).exists():
        verify_model(path)
        return path
    checkpoints = list_checkpoints(path)
    if checkpoints:
        verify_model(checkpoints[-1])
        return checkpoints[-1]
    if is_run(path):
        raise UserError(
            f"{path} holds no checkpoint yet; continue training with `restomod train --resume {quote(name)}`"
        )
    if (path / "adapter_config.json").exists():  # weights beside it, without the adapter, are another model
        raise UserError(
            f"{path} holds an adapter (LoRA): merge it into the weights of its model (PEFT: merge_and_unload), "
            f"and give the folder of that"
        )
    if path.absolute().name == CHECKPOINTS and is_run(path.absolute().parent):
        raise UserError(f"{path} holds the checkpoints of a run: name the run, or one of them")
    if (path / "manifest.json").exists():
        raise UserError(f"{path} holds tokens and no model; `restomod data {quote(name)}` shows them")
    if not (path / "config.json").exists():
        raise UserError(f"{path} is neither a run nor a model folder: it has no config.json")
    return path


def open_model(name: str, device: torch.device) -> GPT:
    """The model that ``name`` stands for (see `find_model`), on ``device``, in evaluation mode."""
    return load_model(find_model(name), device)


def open_or_build(name: str, device: torch.device, seed: int, finite: bool = True) -> tuple[GPT, bool]:
    """A preset's model with the initial weights of ``seed``, or an existing model; and whether it is a preset's.

    Raises:
        UserError: ``name`` is neither a preset nor a model, or with ``finite`` its weights are not finite.
    """
    if is_preset(name) and not Path(name).is_dir():
        try:
            return build_model(preset(name).model, seed, device).eval(), True
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
            raise UserError(f"{name} does not fit into memory here ({one_line(e)})") from e
    if Path(name).name == name and not Path(name).exists() and name not in OPENAI:
        raise UserError(f"{name}: no such preset, run or model{did_you_mean(name, [*PRESETS, *OPENAI])}")
    try:
        return (open_model(name, device) if finite else load_model(find_model(name), device, finite=False)), False
    except UnsupportedModel as e:
        raise UserError(f"{name} can be evaluated and sampled, but not inspected or checked: {e}") from None


def is_run(folder: Path) -> bool:
    """Whether a folder's `config.json` is of a run, and not of a model."""
    path = folder / "config.json"
    values = read_json(path, "configuration") if path.exists() else None
    return isinstance(values, dict) and "model_type" not in values and "steps" in values


def _from_hub(name: str) -> Path:
    path = Path(name)
    if path.exists():
        raise UserError(f"{path} is a file; give the folder of a run or a model")
    repository = hub_name(name)
    meant_here = path.parent != Path() and path.parent.exists()  # a slip in a path is not sent to the hub
    if repository is None or meant_here:
        if is_preset(name):
            raise UserError(f"{name} is a preset: `restomod train {name}` makes a run of it, runs/{name}")
        there = path.parent.iterdir() if path.parent.is_dir() else []
        near = [entry.name for entry in there if any((entry / made).exists() for made in (CHECKPOINTS, "config.json"))]
        known = near if meant_here else [*OPENAI, *near]
        raise UserError(f"{name}: no such run or model folder{did_you_mean(path.name, known) if known else ''}")
    return download_model(repository)
