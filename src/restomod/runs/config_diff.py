"""Differences between configurations: settings fixed on resume, settings without effect on results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from restomod.config.run import RunConfig
from restomod.config.serialize import to_dict
from restomod.data.manifest import MAX_BYTES, is_fineweb_edu
from restomod.runs.reader import Run
from restomod.utils.errors import UserError
from restomod.utils.json_files import read_json

Settings = dict[str, Any]

FIXED = ("seed", "init", "batch_tokens", "sequence_length", "model", "optim", "document_mask")
"""Settings that cannot change on resume; all others can."""
DATA_FINGERPRINT = "data fingerprint"
NO_EFFECT_ON_RESULT = (  # settings without effect on the result, up to rounding
    "eval_every",
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
    "on_save_error",
    "track",
    "sanity_checks",
    "micro_batch",
    "device",
    "precision",  # the requested one; `settings` adds the one in use
    "parallel",
    "gradient_checkpointing",
    "deterministic",
    "compile",
    "data.cache",
)
DATA_LOCATION = re.compile(r"data\.(?!mix)\w+")  # replaced by the fingerprint of the tokens


def flatten_config(config: RunConfig) -> Settings:
    """Return settings by dotted name, such as ``optim.lr``, without those that have no effect on the result."""
    return {
        name: value
        for name, value in flatten(to_dict(config)).items()
        if not any(name == other or name.startswith(f"{other}.") for other in NO_EFFECT_ON_RESULT)
    }


def settings(run: Run) -> Settings:
    """Return the settings that determine a run's result: configuration, seed, data and the precision in use."""
    found, data = flatten_config(run.config), run.manifest
    if "fingerprint" in data:
        found = {name: value for name, value in found.items() if not DATA_LOCATION.fullmatch(name)}
        found["data"] = f"{data.get('name', 'tokens')} ({str(data['fingerprint'])[:8]})"
    precision = run.environments[-1].get("precision") if run.environments else None
    return found | ({"precision": precision} if precision else {"precision": run.config.precision})


def differing(many: Sequence[Settings], without: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Return the settings that differ between runs.

    Args:
        many: settings of each run.
        without: names to ignore.

    Returns:
        Values by name, one per run; None for a run without the setting.
    """
    names = dict.fromkeys(name for each in many for name in each)
    values = {name: [each.get(name) for each in many] for name in names if name not in without}
    return {
        name: found for name, found in values.items() if len({json.dumps(value, sort_keys=True) for value in found}) > 1
    }


def trains_on_fineweb_edu(run: Run) -> bool:
    """Return whether a run trains on FineWeb-Edu, so that published losses are comparable."""
    return run.config.data.mix is None and is_fineweb_edu(run.manifest)


def run_identity(run: Path) -> dict[str, Any]:
    """Return the settings that cannot change on resume, and the fingerprint of the data, as JSON values.

    Runs with equal identities can exchange checkpoints, so a run folder may be copied and moved.

    Returns:
        Values by name; empty if `config.json` or `data.json` cannot be read, so that no difference is found.
    """
    try:
        config = read_json(run / "config.json", "run's configuration", dict[str, Any])
        data = read_json(run / "data.json", "manifest of the run's data", dict[str, Any], MAX_BYTES)
    except UserError:
        return {}
    return {k: config[k] for k in FIXED if k in config} | {DATA_FINGERPRINT: data.get("fingerprint")}


def identity_differences(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> list[str]:
    """List the differences between settings that both sides have, each as ``PREFIX.NAME is A, not B``."""
    found = []
    for name in theirs.keys() & ours.keys():
        a, b = theirs[name], ours[name]
        if isinstance(a, dict) and isinstance(b, dict):
            found += identity_differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name} is {a!r}, not {b!r}")
    return sorted(found)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Settings:
    """Flatten nested settings to dotted names."""
    found: Settings = {}
    for name, value in values.items():
        found |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
