"""Command `bench`: measure the speed of a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from restomod.commands.flags import ConfigArguments
from restomod.commands.parsing import flags_in, ignored_by_run, parse_run, preset_first, refuse_ignored
from restomod.config.model import require_size
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
    benchmark, rest = preset_first("bench step", arguments, USAGE)
    if benchmark != "step":
        raise UserError(f"unknown benchmark {benchmark!r}{did_you_mean(benchmark, ['step'])}")
    name = "quickstart"
    if rest and not rest[0].startswith("-"):
        name, rest = rest[0], rest[1:]
    given = parse_run(BenchArguments(preset(name)), rest, f"restomod bench step {name}")
    require_size("--warmup", given.warmup, least=0)
    require_size("--timed", given.timed)
    synthetic = {flag: "with --tokens synthetic" for flag in flags_in(rest) if flag.startswith("--data.")}
    refuse_ignored(rest, (synthetic if given.tokens == "synthetic" else {}) | ignored_by_run(given.config))
    return name, given
