"""A run's configuration for people: what differs from its preset comes first."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

from restomod.config.presets import PRESETS, is_preset, preset
from restomod.config.run import RunConfig
from restomod.config.serialize import to_dict
from restomod.runs.reader import Record, Run
from restomod.utils.redaction import redact_command


def shown_settings(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names and JSON values."""
    made: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            made |= shown_settings(value, f"{prefix}{key}.")
        else:
            made[prefix + key] = json.dumps(value, ensure_ascii=False)
    return made


def changed_settings(config: RunConfig, other: RunConfig) -> list[tuple[str, str, str]]:
    """Name, value and the other's value of every setting that is not the same."""
    mine, theirs = shown_settings(to_dict(config)), shown_settings(to_dict(other))
    return [(name, value, theirs[name]) for name, value in mine.items() if value != theirs[name]]


def preset_of(run: Run) -> str:
    """The preset that a run was started from: as its first command says, or else the one that differs least."""
    command = run.environments[0].get("command") if run.environments else None
    words = [str(word) for word in command] if isinstance(command, list) else []
    named = [after for word, after in itertools.pairwise(words) if word == "train" and is_preset(after)]
    return named[0] if named else min(PRESETS, key=lambda name: len(changed_settings(run.config, preset(name))))


def describe_model(config: RunConfig) -> str:
    """A model's shape and parts in a line."""
    model = config.model
    default = type(model)()
    sizes = f"{model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, {model.n_positions:,} positions"
    parts = [
        f"{field.name} {value}"
        for field in dataclasses.fields(model)
        if field.name not in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
        and (value := getattr(model, field.name)) != getattr(default, field.name)
    ]
    return f"{sizes}; {', '.join(parts)}" if parts else f"{sizes}; GPT-2's parts"


def environment_rows(environment: Record) -> list[tuple[str, str]]:
    """Names and values of an `restomod.runs.reader.Environment`.

    The command is one line, without ``--then`` and secrets.
    """
    rows = []
    for name, value in environment.items():
        if isinstance(value, list):  # the command
            value = " ".join(["restomod", *map(shlex.quote, redact_command(value[1:]))])
        rows.append((name.replace("_", " "), "unknown" if value is None else str(value)))
    return rows


def newest_checkpoint(folder: Path) -> str | None:
    """The name of a run's newest checkpoint folder."""
    names = [path.name for path in folder.glob("checkpoints/step_*") if re.fullmatch(r"step_\d+", path.name)]
    return max(names, key=lambda name: int(name.removeprefix("step_")), default=None)
