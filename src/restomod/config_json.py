"""Configurations to JSON and back, strictly: what a file says and a dataclass does not know is refused by name."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from pathlib import Path
from typing import Any, Literal

from restomod.config import RunConfig
from restomod.errors import UserError, did_you_mean
from restomod.files import read_json


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values: nested dataclasses become objects, tuples become lists."""
    return {
        f.name: to_dict(value)
        if dataclasses.is_dataclass(value)
        else list(value)
        if isinstance(value, tuple)
        else value
        for f in dataclasses.fields(config)
        for value in [getattr(config, f.name)]
    }


def from_dict(values: Any, cls: type[Any] = RunConfig, where: str = "config.json", prefix: str = "") -> Any:
    """Build ``cls`` from what `to_dict` made, refusing what it does not know.

    Args:
        values: JSON object with the fields of ``cls``; absent fields take their defaults.
        cls: the dataclass to build.
        where: the file's name, for messages.
        prefix: dotted path of ``values`` inside the file, for messages.

    Raises:
        UserError: an unknown or missing key, a value of the wrong type, or one that the dataclass refuses.
    """
    _require(isinstance(values, dict), f"{where}: {prefix or 'the file'} should be an object, not {values!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        _require(key in names, f"{where}: unknown key {prefix}{key}{did_you_mean(str(key), names)}")
    known = {name: _typed(values[name], hints[name], where, f"{prefix}{name}") for name in names if name in values}
    try:
        return cls(**known)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    except TypeError:  # a field without a default is absent
        required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory}
        missing = ", ".join(sorted(prefix + name for name in required - known.keys()))
        raise UserError(f"{where}: missing {missing}") from None


def _typed(value: Any, hint: Any, where: str, key: str) -> Any:
    """Return ``value`` as type ``hint`` (an int is a fine float; a list a fine tuple), or raise UserError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(value, typing.cast(type, hint), where, f"{key}.")
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (a for a in arguments if a is not type(None))
        return _typed(value, hint, where, key)
    if origin is Literal:
        if value in arguments:
            return value
        raise UserError(f"{where}: {key} is {value!r}{did_you_mean(str(value), arguments)}")
    if origin is tuple:
        _require(isinstance(value, list), f"{where}: {key} should be a list, not {value!r}")
        element = arguments[0]
        right_length = arguments[-1] is Ellipsis or len(value) == len(arguments)
        _require(right_length, f"{where}: {key} should hold {len(arguments)} values, not {len(value)}")
        return tuple(_typed(v, element, where, key) for v in value)
    if hint is float and type(value) is int:
        return float(value)
    _require(type(value) is hint, f"{where}: {key} should be {hint.__name__}, not {value!r}")
    return value


def read_config(folder: Path) -> RunConfig:
    """The configuration of an existing run.

    Raises:
        UserError: ``folder`` is no run, or its configuration is damaged.
    """
    refuse_model(folder)
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} is not a run: it has no config.json; start one with `restomod train PRESET`")
    config = from_dict(read_json(path, "run's configuration"), RunConfig, str(path))
    assert isinstance(config, RunConfig)
    return config


def refuse_model(folder: Path) -> None:
    """Raise UserError where a folder holds no run but a checkpoint, the checkpoints of a run, or a model."""
    here = folder.absolute()
    above = next((up for up in (here.parent, here.parent.parent) if (up / "checkpoints") in (here, here.parent)), None)
    if above is not None and (above / "config.json").exists():
        raise UserError(f"{folder} is of a run, and not the run: name {os.path.relpath(above)}")
    path = folder / "config.json"
    values = read_json(path, "run's configuration") if path.exists() else None
    if isinstance(values, dict) and "model_type" in values:
        raise UserError(f"{folder} holds a model, and no run; eval, sample, inspect and check take models")
