"""Command `bench`: measure the speed of a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from restomod.commands.flags import ConfigArguments
from restomod.commands.parsing import flags_in, ignored_by_run, parse_run, refuse_ignored, usage_unless_given
from restomod.config.presets import preset
from restomod.utils.errors import UserError, did_you_mean, reported_once

MEMORY_HINT = "lower --micro-batch, --batch-tokens or --sequence-length"
USAGE = """\
usage: restomod bench step [PRESET] [FLAGS]    measure a training step (default preset: quickstart)
       restomod bench step PRESET --help       list all flags; those of `restomod train` may be given too"""


@dataclass(frozen=True)
class BenchArguments(ConfigArguments):
    tokens: Literal["synthetic", "real"] = "synthetic"
    """Training tokens. synthetic: random, nothing to prepare; real: from the run's data."""
    warmup: int = 3
    """Steps to discard before the measurement."""
    timed: int = 10
    """Steps to time as a whole, and the same number to time phase by phase, alternately."""
    json: str | None = None
    """Write all results, the configuration and the environment to this file."""
    trace: str | None = None
    """Write a Chrome trace of one more step to this file (open it in ui.perfetto.dev)."""


def run(arguments: list[str]) -> int:
    """Measure. Returns the exit code."""
    with reported_once():
        name, given = _parse(arguments)

    from restomod.bench.step import bench_step

    return bench_step(given.config, name, given.tokens, given.warmup, given.timed, given.json, given.trace)


def _parse(arguments: list[str]) -> tuple[str, BenchArguments]:
    """Return the preset's name and all flags."""
    usage_unless_given(arguments, lambda: USAGE)
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
