"""Command `train`: start a run from a preset, or resume a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from restomod.commands.catalog import heading
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
from restomod.config.run import RARELY_USED_FIELDS, RunConfig
from restomod.utils.errors import UserError, reported_once

MEMORY_HINT = "lower --micro-batch, --batch-tokens or --sequence-length, or train a smaller model"
RARE = ("then",)


@dataclass(frozen=True, kw_only=True)
class ResumeArguments(ConfigArguments):
    """Flags of `restomod train --resume RUN`."""

    then: str | None = None
    """Shell command to run after training, also after an error, such as --then "sudo shutdown now". None: no
    command."""


@dataclass(frozen=True, kw_only=True)
class TrainArguments(ResumeArguments):
    """Flags of `restomod train PRESET`."""

    out: str
    """Folder of the run. It must not exist yet."""


def run(arguments: list[str]) -> int:
    """Train a model, and return the exit code."""
    with reported_once():
        config, folder, resume = parse_arguments(arguments)

    from restomod.train.loop import train

    return train(config, folder, resume)


def parse_arguments(arguments: list[str]) -> tuple[RunConfig, Path, bool]:
    """Return the configuration, the run's folder, and whether the run is resumed.

    Raises:
        UserError: an argument is invalid.
        SystemExit: the help was printed.
    """
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--resume=") else [a])]
    if "--resume" in arguments:
        return _parse_resume(arguments)
    name, rest = preset_first("train", arguments, _usage())
    parsed = parse_run(TrainArguments(preset(name), out=f"runs/{name}"), rest, f"restomod train {name}", RARE)
    folder = Path(parsed.out)
    in_sweep = (folder.parent.parent / "plan.json").exists()  # its trials share their flags, and not all use each flag
    refuse_ignored(rest, {} if in_sweep else ignored_by_run(parsed.config))
    return parsed.config, folder, False


def _parse_resume(arguments: list[str]) -> tuple[RunConfig, Path, bool]:
    at = arguments.index("--resume")
    if arguments[at + 1 : at + 2] in ([], [""]) or is_flag(arguments[at + 1]):
        raise UserError("--resume needs the folder of a run, for example --resume runs/quickstart")
    folder, rest = Path(arguments[at + 1]), long_names(arguments[:at] + arguments[at + 2 :])
    if rest and not rest[0].startswith("-"):
        raise UserError(f"--resume uses the configuration of the run; omit {rest[0]!r}")

    from restomod.config.serialize import read_config

    saved = ResumeArguments(read_config(folder))
    rare = (*RARELY_USED_FIELDS, *RARE)
    config = parse(ResumeArguments, rest, f"restomod train --resume {folder}", saved, rare).config
    refuse_ignored(rest, ignored_by_run(config))
    return config, folder, True


def _usage() -> str:
    width = max(map(len, PRESETS))
    return "\n".join(
        [
            "usage: restomod train PRESET [FLAGS]          start a run in runs/PRESET (or --out FOLDER)",
            "       restomod train --resume RUN [FLAGS]    resume a run from its newest checkpoint",
            "       restomod train PRESET --help           list all flags, with the preset's values as defaults",
            f"\n{heading('train')}",
            "\npresets:",
            *(f"  {name:<{width}}  {preset_summary(name)}" for name in PRESETS),
            f"  {'|'.join(SIZES)}-dN  presets of this family with N layers and an embedding width of 64 N",
        ]
    )
