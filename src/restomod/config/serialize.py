"""Conversion between configurations and JSON. Unknown keys and wrong types raise `UserError`."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from pathlib import Path
from typing import Any, Literal

from restomod.config.model import require
from restomod.config.run import RunConfig
from restomod.utils.errors import UserError, did_you_mean, shortened
from restomod.utils.json_files import read_json
from restomod.utils.run_files import require_run_inside

CONFIG_VERSION = 2  # format of a run's `config.json`, which has every field of `RunConfig`


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a dataclass to JSON values: nested dataclasses become objects, tuples become lists."""
    values: dict[str, Any] = dataclasses.asdict(
        config, dict_factory=lambda items: {key: list(v) if isinstance(v, tuple) else v for key, v in items}
    )
    return values


def to_file(config: RunConfig) -> dict[str, Any]:
    """Return the content of a run's `config.json`."""
    return {"version": CONFIG_VERSION, **to_dict(config)}


def from_file(values: Any, where: str) -> RunConfig:
    """Build a configuration from the content of a run's `config.json`, the inverse of `to_file`.

    Args:
        values: parsed JSON.
        where: file name for messages.

    Raises:
        UserError: unknown version, unknown or missing key, or invalid value.
    """
    require(isinstance(values, dict), f"{where}: the file should be an object, not {shortened(repr(values))}")
    version = values.get("version", CONFIG_VERSION)
    require(
        type(version) is int and version == CONFIG_VERSION,
        f"{where}: version is {shortened(repr(version))}, but this restomod reads version {CONFIG_VERSION} only",
    )
    fields = {key: value for key, value in values.items() if key != "version"}
    config = from_dict(fields, RunConfig, where, complete=True)
    assert isinstance(config, RunConfig)
    return config


def from_dict(
    values: Any,
    cls: type[Any] = RunConfig,
    where: str = "config.json",
    prefix: str = "",
    complete: bool = False,
) -> Any:
    """Build a dataclass from JSON values, the inverse of `to_dict`.

    Args:
        values: parsed JSON.
        cls: dataclass to build.
        where: file name at the beginning of messages.
        prefix: dotted path of ``values`` in the file, such as "optim.", for messages.
        complete: whether every field must be present; otherwise absent fields have their defaults.

    Raises:
        UserError: unknown or missing key, value of the wrong type, or value that the dataclass rejects.
    """
    if not isinstance(values, dict):
        raise UserError(
            f"{where}: {prefix.removesuffix('.') or 'the file'} should be an object, not {shortened(repr(values))}"
        )
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:  # the search for the nearest name is slow, so it runs only for unknown keys
            raise UserError(f"{where}: unknown key {prefix}{key}{did_you_mean(str(key), names)}")
    known = {
        name: _typed(values[name], hints[name], where, f"{prefix}{name}", complete) for name in names if name in values
    }
    required = {f.name for f in dataclasses.fields(cls) if complete or f.default is f.default_factory}
    missing = sorted(prefix + name for name in required - known.keys())
    require(not missing, f"{where}: missing {', '.join(missing)}")
    try:
        return cls(**known)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def _typed(value: Any, hint: Any, where: str, key: str, complete: bool = False) -> Any:
    """Convert ``value`` to type ``hint``, or raise UserError; int is accepted as float, and list as tuple."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(value, typing.cast(type, hint), where, f"{key}.", complete)
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
        require(isinstance(value, list), f"{where}: {key} should be a list, not {shortened(repr(value))}")
        element = arguments[0]
        right_length = arguments[-1] is Ellipsis or len(value) == len(arguments)
        require(right_length, f"{where}: {key} should have {len(arguments)} values, not {len(value)}")
        return tuple(_typed(v, element, where, key) for v in value)
    if hint is float and type(value) is int:
        return float(value)
    require(type(value) is hint, f"{where}: {key} should be {hint.__name__}, not {shortened(repr(value))}")
    return value


def read_config(folder: Path) -> RunConfig:
    """Read the configuration of an existing run.

    Raises:
        UserError: ``folder`` is not a run, a file in it is a link out of the run, or its `config.json` is damaged.
    """
    require_run_inside(folder)
    refuse_model(folder)
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} is not a run: it has no config.json; start one with `restomod train PRESET`")
    return from_file(read_json(path, "run's configuration"), str(path))


def refuse_model(folder: Path) -> None:
    """Raise UserError if ``folder`` is a file, a model folder, a checkpoint or the folder `checkpoints` of a run."""
    if folder.is_file():
        raise UserError(f"{folder} is a file; name the folder of a run")
    here = folder.absolute()
    above = next((up for up in (here.parent, here.parent.parent) if (up / "checkpoints") in (here, here.parent)), None)
    if above is not None and (above / "config.json").exists():
        run = above if folder.is_absolute() else Path(os.path.relpath(above))
        raise UserError(f"{folder} is a folder inside a run; name the run instead: {run}")
    path = folder / "config.json"
    values = read_json(path, "run's configuration") if path.exists() else None
    if isinstance(values, dict) and not {"model_type", "architectures"}.isdisjoint(values):
        raise UserError(f"{folder} is a model folder, not a run; eval, sample, inspect and check take models")
