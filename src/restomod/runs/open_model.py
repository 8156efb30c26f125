"""Opening of models: run (newest checkpoint), checkpoint, Hugging Face model folder, or hub name."""

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
    """Find the folder of a model; verify a checkpoint; download a model of the hub.

    Args:
        name: path of a run, a checkpoint or a model folder, or a name on the hub.

    Returns:
        Model folder; of a run, its newest checkpoint.

    Raises:
        UserError: the model does not exist, or is damaged.
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
            f"{path} has no checkpoint yet; wait for the first one, or, if training has stopped, run "
            f"`restomod train --resume {quote(name)}`"
        )
    if (path / "adapter_config.json").exists():  # without it, the folder's weights are another model
        raise UserError(
            f"{path} contains an adapter (LoRA): merge it into its base model (PEFT: merge_and_unload), "
            f"and pass the folder of the merged model"
        )
    if path.absolute().name == CHECKPOINTS and is_run(path.absolute().parent):
        raise UserError(f"{path} contains all checkpoints of a run: pass the run, or one checkpoint")
    if (path / "manifest.json").exists():
        raise UserError(f"{path} contains tokens, not a model; show them with `restomod data {quote(name)}`")
    if not (path / "config.json").exists():
        raise UserError(f"{path} is neither a run nor a model folder: it has no config.json")
    return path


def open_model(name: str, device: torch.device) -> GPT:
    """Load a model on ``device`` in evaluation mode; see `find_model` for ``name``."""
    return load_model(find_model(name), device)


def open_or_build(name: str, device: torch.device, seed: int, finite: bool = True) -> tuple[GPT, bool]:
    """Build the model of a preset, or load an existing model.

    Args:
        name: name of a preset, or a model (see `find_model`).
        device: device of the model.
        seed: seed of a preset's initial weights.
        finite: require finite weights.

    Returns:
        Model in evaluation mode, and True if it has the initial weights of a preset.

    Raises:
        UserError: the name is neither a preset nor a model, the weights are not finite, or memory is too small.
    """
    if is_preset(name) and not Path(name).is_dir():
        try:
            return build_model(preset(name).model, seed, device).eval(), True
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
            raise UserError(f"{name} does not fit into memory ({one_line(e)})") from e
    if Path(name).name == name and not Path(name).exists() and name not in OPENAI:
        raise UserError(f"{name}: no such preset, run or model{did_you_mean(name, [*PRESETS, *OPENAI])}")
    try:
        return (open_model(name, device) if finite else load_model(find_model(name), device, finite=False)), False
    except UnsupportedModel as e:
        raise UserError(f"{name} can be evaluated and sampled, but not inspected or checked: {e}") from None


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run folder; the `config.json` of a model has other keys."""
    path = folder / "config.json"
    values = read_json(path, "configuration") if path.exists() else None
    return isinstance(values, dict) and "model_type" not in values and "steps" in values


def _from_hub(name: str) -> Path:
    path = Path(name)
    if path.exists():
        raise UserError(f"{path} is a file; pass the folder of a run or a model")
    repository = hub_name(name)
    meant_here = path.parent != Path() and path.parent.exists()  # a mistyped path is not sent to the hub
    if repository is None or meant_here:
        if is_preset(name):
            raise UserError(f"{name} is a preset: `restomod train {name}` creates the run runs/{name}")
        there = path.parent.iterdir() if path.parent.is_dir() else []
        near = [entry.name for entry in there if any((entry / made).exists() for made in (CHECKPOINTS, "config.json"))]
        known = near if meant_here else [*OPENAI, *near]
        raise UserError(f"{name}: no such run or model folder{did_you_mean(path.name, known) if known else ''}")
    return download_model(repository)
