"""Differences between configurations: which settings may change on resume, which change no result, which differ."""

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
"""Settings of a run that cannot change on resume; all others may."""
DATA_FINGERPRINT = "data fingerprint"
CHANGES_NOTHING = (  # when to evaluate and save, and how to compute the same result
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
    "precision",  # as requested; the one that was used is in the environment
    "parallel",
    "gradient_checkpointing",
    "deterministic",
    "compile",
    "data.cache",
)
WHERE_DATA_IS = re.compile(r"data\.(?!mix)\w+")  # the fingerprint of the tokens says more


def flatten_config(config: RunConfig) -> Settings:
    """Settings by dotted name, such as ``optim.lr``, without those that change no result."""
    return {
        name: value
        for name, value in flatten(to_dict(config)).items()
        if not any(name == other or name.startswith(f"{other}.") for other in CHANGES_NOTHING)
    }


def settings(run: Run) -> Settings:
    """What determines a run's result, its seed included: configuration, data and actual precision."""
    found, data = flatten_config(run.config), run.manifest
    if "fingerprint" in data:
        found = {name: value for name, value in found.items() if not WHERE_DATA_IS.fullmatch(name)}
        found["data"] = f"{data.get('name', 'tokens')} ({str(data['fingerprint'])[:8]})"
    precision = run.environments[-1].get("precision") if run.environments else None
    return found | ({"precision": precision} if precision else {"precision": run.config.precision})


def differing(many: Sequence[Settings], without: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Settings that differ among ``many``, with the value in each; None where one is absent."""
    names = dict.fromkeys(name for each in many for name in each)
    values = {name: [each.get(name) for each in many] for name in names if name not in without}
    return {
        name: found for name, found in values.items() if len({json.dumps(value, sort_keys=True) for value in found}) > 1
    }


def trains_on_fineweb_edu(run: Run) -> bool:
    """Whether a run trains on FineWeb-Edu, so that losses published for it can stand beside its own."""
    return run.config.data.mix is None and is_fineweb_edu(run.manifest)


def run_identity(run: Path) -> dict[str, Any]:
    """Settings of a run that cannot change, and the fingerprint of its data, as JSON values.

    Runs of equal identity make the same checkpoints, so a run's folder may be copied and moved.
    Empty, so that nothing is compared, where `config.json` or `data.json` cannot be read.
    """
    try:
        config = read_json(run / "config.json", "run's configuration", dict[str, Any])
        data = read_json(run / "data.json", "manifest of the run's data", dict[str, Any], MAX_BYTES)
    except UserError:
        return {}
    return {k: config[k] for k in FIXED if k in config} | {DATA_FINGERPRINT: data.get("fingerprint")}


def identity_differences(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> list[str]:
    """Differences among the JSON settings that both sides have, each as ``PREFIX.NAME is A, not B``."""
    found = []
    for name in theirs.keys() & ours.keys():
        a, b = theirs[name], ours[name]
        if isinstance(a, dict) and isinstance(b, dict):
            found += identity_differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name} is {a!r}, not {b!r}")
    return sorted(found)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Settings:
    """Nested settings by dotted name."""
    found: Settings = {}
    for name, value in values.items():
        found |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
