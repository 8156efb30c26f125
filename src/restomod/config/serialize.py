"""Configurations to JSON and back, strictly: what a file says and a dataclass does not know is refused by name."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from restomod.config.model import require
from restomod.config.run import RunConfig
from restomod.utils.errors import UserError, did_you_mean, shortened
from restomod.utils.json_files import read_json
from restomod.utils.run_files import require_run_inside

# Of a run's `config.json`. A file of this version has every field; older ones have no version. A field that is added to
# `RunConfig`, or within it, needs a new version, and `from_file` has to know that files of older ones may lack it.
CONFIG_VERSION = 1

# Fields that files without a version may lack, in the order in which they were added: one that has a field has all that
# were there before it. What a file lacks had the default's effect then, but for `save_every_minutes`.
_FIRST = (
    "steps batch_tokens sequence_length model data optim sampling micro_batch target_loss eval_every eval_tokens "
    "sample_every save_every keep_checkpoints seed device precision compile model.n_layer model.n_head model.n_embd "
    "model.n_positions model.vocab_size data.source data.path data.glob data.val_fraction data.split_seed data.cache "
    "optim.lr optim.min_lr_ratio optim.warmup_steps optim.betas optim.eps optim.weight_decay optim.grad_clip "
    "sampling.prompts sampling.max_tokens sampling.temperature sampling.top_k"
)
_ADDED = (
    "init sanity_checks",
    "data.text_column",
    "data.mix",
    "parallel",
    "save_every_minutes keep_best keep_every keep_gb on_save_error on_spike spike_sigmas",
    "recompute deterministic",
    "sampling.top_p",
    "eval_tasks eval_limit",
    "optim.optimizer optim.muon_lr optim.decay optim.cooldown optim.muon_momentum optim.muon_weight_decay "
    "document_mask model.norm model.positions model.rope_theta model.mlp model.n_inner model.head_dim model.qk_norm "
    "model.bias model.tied model.zero_init_projections",
    "model.softcap model.embedding_norm model.embedding_skip model.value_embedding",
    "track",
    "residual_dtype",
)


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


def to_file(config: RunConfig) -> dict[str, Any]:
    """What a run's `config.json` holds."""
    return {"version": CONFIG_VERSION, **to_dict(config)}


def from_file(values: Any, where: str) -> RunConfig:
    """The configuration that `to_file` made, now or in an earlier version.

    Raises:
        UserError: as `from_dict`; the version is not known; a field is missing that its version had.
    """
    require(isinstance(values, dict), f"{where}: the file should be an object, not {shortened(repr(values))}")
    version = values.get("version", 0)
    require(
        type(version) is int and 0 <= version <= CONFIG_VERSION,
        f"{where}: version is {version!r}, but this restomod reads those up to {CONFIG_VERSION}; install a newer one",
    )
    there, needed = _paths(values), _field_paths(RunConfig)
    if version == 0:
        eras = [_FIRST.split(), *(line.split() for line in _ADDED)]
        newest = max(i for i, era in enumerate(eras) if i == 0 or there & {*era})
        needed &= {path for era in eras[: newest + 1] for path in era}
        values = _translated(values)
    lacking = {path for path in needed - there if path.rpartition(".")[0] in there | {""}}
    config = from_dict(values, RunConfig, where, lacking=lacking)
    assert isinstance(config, RunConfig)
    return config


def _translated(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a file without a version as they are written today."""
    compile_ = values.get("compile")
    return (
        {"save_every_minutes": None} | values | ({"compile": ("off", "on")[compile_]} if type(compile_) is bool else {})
    )


def _paths(values: dict[str, Any], prefix: str = "") -> set[str]:
    """The dotted names of all fields, those of nested objects too."""
    found = {f"{prefix}{key}" for key in values}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _paths(value, f"{prefix}{key}.")
    return found


def _field_paths(cls: Any, prefix: str = "") -> set[str]:
    """The dotted names of all fields of a dataclass, nested ones too."""
    found = set()
    for name, hint in typing.get_type_hints(cls).items():
        found |= {f"{prefix}{name}"} | (
            _field_paths(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else set()
        )
    return found


def from_dict(
    values: Any,
    cls: type[Any] = RunConfig,
    where: str = "config.json",
    prefix: str = "",
    lacking: Collection[str] = (),
) -> Any:
    """Build ``cls`` from what `to_dict` made, refusing what it does not know.

    Args:
        values: JSON object with the fields of ``cls``; absent fields take their defaults.
        cls: the dataclass to build.
        where: the file's name, for messages.
        prefix: dotted path of ``values`` inside the file, for messages.
        lacking: dotted paths of absent fields that may not take their defaults.

    Raises:
        UserError: an unknown or missing key, a value of the wrong type, or one that the dataclass refuses.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: {prefix or 'the file'} should be an object, not {shortened(repr(values))}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    if cls is RunConfig:
        values = {key: value for key, value in values.items() if key != "version"}
    for key in values:
        if key not in names:  # looking for what is meant takes longer than all else here
            raise UserError(f"{where}: unknown key {prefix}{key}{did_you_mean(str(key), names)}")
    known = {
        name: _typed(values[name], hints[name], where, f"{prefix}{name}", lacking) for name in names if name in values
    }
    required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory}
    missing = {prefix + name for name in required - known.keys()}
    if not missing and any(prefix + name in lacking for name in names):
        missing = {*lacking}
    require(not missing, f"{where}: missing {', '.join(sorted(missing))}")
    try:
        return cls(**known)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def _typed(value: Any, hint: Any, where: str, key: str, lacking: Collection[str] = ()) -> Any:
    """Return ``value`` as type ``hint`` (an int is a fine float; a list a fine tuple), or raise UserError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(value, typing.cast(type, hint), where, f"{key}.", lacking)
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
        require(right_length, f"{where}: {key} should hold {len(arguments)} values, not {len(value)}")
        return tuple(_typed(v, element, where, key) for v in value)
    if hint is float and type(value) is int:
        return float(value)
    require(type(value) is hint, f"{where}: {key} should be {hint.__name__}, not {shortened(repr(value))}")
    return value


def read_config(folder: Path) -> RunConfig:
    """The configuration of an existing run, of which no file is a link to elsewhere.

    Raises:
        UserError: ``folder`` is no run, or its configuration is damaged.
    """
    require_run_inside(folder)
    refuse_model(folder)
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} is not a run: it has no config.json; start one with `restomod train PRESET`")
    return from_file(read_json(path, "run's configuration"), str(path))


def refuse_model(folder: Path) -> None:
    """Raise UserError where ``folder`` is a file, a checkpoint, the checkpoints of a run, or a model."""
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
