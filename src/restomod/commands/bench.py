"""`restomod bench`: measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from restomod.commands.flags import ResumeArguments
from restomod.commands.parsing import flags_in, ignored_by_run, parse_run, refuse_ignored
from restomod.config.presets import preset
from restomod.utils.errors import EXIT_USER_ERROR, UserError, did_you_mean, reported_once


@dataclass(frozen=True)
class BenchArguments(ResumeArguments):
    tokens: Literal["synthetic", "real"] = "synthetic"
    """synthetic: random tokens, nothing to prepare; real: those of the run's data."""
    warmup: int = 3
    """Steps before the first one that counts."""
    timed: int = 10
    """Steps to time as a whole, and as many again by phase, in turns."""
    json: str | None = None
    """Write all results, the configuration and the environment to this file."""
    trace: str | None = None
    """Write a Chrome trace of one more step to this file (open it in ui.perfetto.dev)."""


def run(arguments: list[str]) -> int:
    """Measure the speed of a training step."""
    with reported_once():
        parsed = _parsed(arguments)
    if isinstance(parsed, int):
        return parsed
    name, given = parsed

    from restomod.bench.step import bench_step

    return bench_step(given.config, name, given.tokens, given.warmup, given.timed, given.json, given.trace)


def _parsed(arguments: list[str]) -> tuple[str, BenchArguments] | int:
    """The preset's name and all flags; an exit code where only help was asked for."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: restomod bench step [PRESET] [FLAGS]    measure a training step (default: quickstart)")
        print("       restomod bench step PRESET --help       every flag; those of `restomod train` count too")
        return 0 if arguments else EXIT_USER_ERROR
    if arguments[0] != "step":
        raise UserError(f"unknown benchmark {arguments[0]!r}{did_you_mean(arguments[0], ['step'])}")
    name, rest = "quickstart", arguments[1:]
    if rest and not rest[0].startswith("-"):
        name, rest = rest[0], rest[1:]
    given = parse_run(BenchArguments(preset(name)), rest, f"restomod bench step {name}")
    for flag, value, least in (("--warmup", given.warmup, 0), ("--timed", given.timed, 1)):
        if value < least:
            raise UserError(f"{flag} is {value}; it must be {least} or more")
    synthetic = {flag: "with --tokens synthetic" for flag in flags_in(rest) if flag.startswith(("--data.", "--mix"))}
    refuse_ignored(rest, (synthetic if given.tokens == "synthetic" else {}) | ignored_by_run(given.config))
    return name, given
