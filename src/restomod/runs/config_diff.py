"""In what runs differ: configurations side by side, without what changes no result."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from restomod.config.run import RunConfig
from restomod.config.serialize import to_dict
from restomod.data.manifest import is_fineweb_edu
from restomod.runs.reader import Run

Settings = dict[str, Any]

CHANGES_NOTHING = (  # when to look and to save, and how to compute the same
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
    "sanity_checks",
    "micro_batch",
    "device",
    "precision",  # as asked for; what it came to is in the environment
    "parallel",
    "recompute",
    "deterministic",
    "compile",
    "data.cache",
)
WHERE_DATA_IS = re.compile(r"data\.(?!mix)\w+")  # said better by the fingerprint of its tokens


def flatten_config(config: RunConfig) -> Settings:
    """Every setting under its dotted name, such as ``optim.lr``, but for those that change no result."""
    return {
        name: value
        for name, value in _flattened(to_dict(config)).items()
        if not any(name == other or name.startswith(f"{other}.") for other in CHANGES_NOTHING)
    }


def settings(run: Run) -> Settings:
    """What decides a run's result, its seed included: the configuration, the data and the precision it came to."""
    found, data = flatten_config(run.config), run.manifest
    if "fingerprint" in data:
        found = {name: value for name, value in found.items() if not WHERE_DATA_IS.fullmatch(name)}
        found["data"] = f"{data.get('name', 'tokens')} ({str(data['fingerprint'])[:8]})"
    precision = run.environments[-1].get("precision") if run.environments else None
    return found | ({"precision": precision} if precision else {"precision": run.config.precision})


def differing(many: Sequence[Settings], without: Sequence[str] = ()) -> dict[str, list[Any]]:
    """The settings that are not the same in all of ``many``, with the value of each; None where one is absent."""
    names = dict.fromkeys(name for each in many for name in each)
    values = {name: [each.get(name) for each in many] for name in names if name not in without}
    return {name: found for name, found in values.items() if len({_key(value) for value in found}) > 1}


def trains_on_fineweb_edu(run: Run) -> bool:
    """Whether a run trains on FineWeb-Edu, so that losses published for it can stand beside its own."""
    return run.config.data.mix is None and is_fineweb_edu(run.manifest)


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Settings:
    found: Settings = {}
    for name, value in values.items():
        found |= _flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
