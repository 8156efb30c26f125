"""Which run and step a checkpoint belongs to: the settings that never change, and the data's fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from restomod.data.manifest import MAX_BYTES, Count
from restomod.utils.errors import UserError
from restomod.utils.json_files import read_json

MAY_CHANGE_ON_RESUME = {
    "steps",
    "target_loss",
    "micro_batch",
    "eval_every",
    "eval_tokens",
    "eval_tasks",
    "eval_limit",
    "sample_every",
    "sampling",
    "save_every",
    "save_every_minutes",
    "keep_checkpoints",
    "keep_best",
    "keep_every",
    "keep_gb",
    "track",
    "on_save_error",
    "on_spike",
    "spike_sigmas",
    "device",
    "precision",
    "parallel",
    "recompute",
    "deterministic",
    "compile",
    "residual_dtype",
    "sanity_checks",
    "data",
}
_NOT_SETTINGS = {"version"}
DATA_FINGERPRINT = "data fingerprint"
STATE_FORMAT = "restomod-state-2"  # of a checkpoint's state.json


class Size(TypedDict):
    """Of a file."""

    bytes: Count
    sha256: str


class CheckpointFiles(TypedDict):
    """What `COMPLETE` says."""

    format: Literal["restomod-checkpoint-1"]
    files: dict[str, Size]


class State(TypedDict):
    """A checkpoint's `state.json`. Of the first format it had no `run`, and at first no `data_offset`."""

    format: Literal["restomod-checkpoint-1", "restomod-state-2"]
    step: Count
    data_offset: NotRequired[Count]
    run: NotRequired[dict[str, Any]]


def run_identity(run: Path) -> dict[str, Any]:
    """The settings of a run that cannot change, and the fingerprint of its data, as JSON values.

    Two runs of equal identity make the same checkpoints, so nothing random is needed to tell runs apart, and a run's
    folder may be copied and moved. Empty where ``run`` has no readable `config.json`.
    """
    try:
        config = read_json(run / "config.json", "run's configuration", dict[str, Any])
        data = read_json(run / "data.json", "manifest of the run's data", dict[str, Any], MAX_BYTES)
    except UserError:
        return {}
    settings = {k: v for k, v in config.items() if k not in MAY_CHANGE_ON_RESUME | _NOT_SETTINGS}
    return settings | {DATA_FINGERPRINT: data.get("fingerprint")}


def identity_differences(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs among the settings that both sides have, each as ``NAME is A, not B``.

    Args:
        theirs: settings as JSON values, nested or not.
        ours: those that they should equal. Settings that only one side has were added later and are passed over.
        prefix: dotted path of both, for the names.
    """
    found = []
    for name in theirs.keys() & ours.keys():
        a, b = theirs[name], ours[name]
        if isinstance(a, dict) and isinstance(b, dict):
            found += identity_differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name} is {a!r}, not {b!r}")
    return sorted(found)


def read_state(path: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint: ``step``, ``data_offset`` and ``run``, the identity of its run.

    Raises:
        UserError: a value is missing or of another type.
    """
    state: dict[str, Any] = read_json(path, "training state", State)
    if state["format"] == STATE_FORMAT and not {"data_offset", "run"} <= state.keys():
        raise UserError(f"{path} is damaged: the training state lacks data_offset or run")
    return {"data_offset": 0, "run": {}} | state
