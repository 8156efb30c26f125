"""Command `train`: start a run from a preset, or resume a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from restomod.commands.flags import ConfigArguments
from restomod.commands.parsing import (
    ignored_by_run,
    is_flag,
    long_names,
    parse,
    parse_run,
    preset_first,
    refuse_ignored,
)
from restomod.config.presets import PRESETS, SIZES, preset, preset_summary
from restomod.config.run import RunConfig
from restomod.utils.errors import UserError, reported_once

MEMORY_HINT = "lower --micro-batch, --batch-tokens or --sequence-length, or train a smaller model"


@dataclass(frozen=True, kw_only=True)
class ResumeArguments(ConfigArguments):
    then: str | None = None
    """Shell command to run when the process ends, however it ends (--then "sudo shutdown now")."""


@dataclass(frozen=True, kw_only=True)
class TrainArguments(ResumeArguments):
    out: str
    """Folder of the run. It must not exist yet."""


def run(arguments: list[str]) -> int:
    """Train. Returns the exit code."""
    with reported_once():
        config, folder, resume = parse_arguments(arguments)

    from restomod.train.loop import train

    return train(config, folder, resume)


def parse_arguments(arguments: list[str]) -> tuple[RunConfig, Path, bool]:
    """Return the configuration, the run's folder, and whether the run is resumed.

    Raises:
        UserError: an argument is wrong.
        SystemExit: help has been printed.
    """
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--resume=") else [a])]
    if "--resume" in arguments:
        return _parse_resume(arguments)
    name, rest = preset_first("train", arguments, _usage())
    parsed = parse_run(TrainArguments(preset(name), out=f"runs/{name}"), rest, f"restomod train {name}")
    folder = Path(parsed.out)
    in_sweep = (folder.parent.parent / "plan.json").exists()  # all trials share the flags, and one may need them
    refuse_ignored(rest, {} if in_sweep else ignored_by_run(parsed.config))
    return parsed.config, folder, False


def _parse_resume(arguments: list[str]) -> tuple[RunConfig, Path, bool]:
    at = arguments.index("--resume")
    if arguments[at + 1 : at + 2] in ([], [""]) or is_flag(arguments[at + 1]):
        raise UserError("--resume needs the folder of a run, for example --resume runs/quickstart")
    folder, rest = Path(arguments[at + 1]), long_names(arguments[:at] + arguments[at + 2 :])
    if rest and not rest[0].startswith("-"):
        raise UserError(f"--resume takes the preset from the run; leave {rest[0]!r} out")

    from restomod.config.serialize import read_config

    saved = ResumeArguments(read_config(folder))
    config = parse(ResumeArguments, rest, f"restomod train --resume {folder}", saved).config
    refuse_ignored(rest, ignored_by_run(config))
    return config, folder, True


def _usage() -> str:
    width = max(map(len, PRESETS))
    return "\n".join(
        [
            "usage: restomod train PRESET [FLAGS]          start a run in runs/PRESET (or --out FOLDER)",
            "       restomod train --resume RUN [FLAGS]    resume a run from its newest checkpoint",
            "       restomod train PRESET --help           list all flags, with the preset's values as defaults",
            "\npresets:",
            *(f"  {name:<{width}}  {preset_summary(name)}" for name in PRESETS),
            f"  {'|'.join(SIZES)}-dN  the same with N layers, an embedding width of 64 N, and scaled learning rates",
        ]
    )
