"""Which run and step a checkpoint belongs to: the settings that never change, and the data's fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from restomod.errors import UserError
from restomod.json_files import read_json

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
_FIRST_STATE_FORMAT = "restomod-checkpoint-1"  # which had no `run`, and at first no `data_offset`


def run_identity(run: Path) -> dict[str, Any]:
    """The settings of a run that cannot change, and the fingerprint of its data, as JSON values.

    Two runs of equal identity make the same checkpoints, so nothing random is needed to tell runs apart, and a run's
    folder may be copied and moved. Empty where ``run`` has no readable `config.json`.
    """
    try:
        config = read_json(run / "config.json", "run's configuration")
        data = read_json(run / "data.json", "manifest of the run's data")
    except UserError:
        return {}
    if not isinstance(config, dict) or not isinstance(data, dict):
        return {}
    settings = {k: v for k, v in config.items() if k not in MAY_CHANGE_ON_RESUME | _NOT_SETTINGS}
    return settings | {DATA_FINGERPRINT: data.get("fingerprint")}


def differences(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> list[str]:
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
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name} is {a!r}, not {b!r}")
    return sorted(found)


def read_state(path: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint: ``step``, ``data_offset`` and ``run``, the identity of its run.

    Raises:
        UserError: a value is missing or of another type.
    """
    state = read_json(path, "training state")
    if not isinstance(state, dict) or state.get("format") not in (_FIRST_STATE_FORMAT, STATE_FORMAT):
        raise UserError(f"{path} is damaged: its format is neither {_FIRST_STATE_FORMAT!r} nor {STATE_FORMAT!r}")
    if state["format"] == _FIRST_STATE_FORMAT:
        state = {"data_offset": 0, "run": {}} | state
    for name, kind in (("step", int), ("data_offset", int), ("run", dict)):
        if type(state.get(name)) is not kind:
            raise UserError(f"{path} is damaged: {name} is missing or wrong")
    return state
