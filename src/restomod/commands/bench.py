"""Command `bench`: measure the speed of a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from restomod.commands.catalog import heading
from restomod.commands.flags import ConfigArguments
from restomod.commands.parsing import flags_in, ignored_by_run, parse_run, preset_first, refuse_ignored
from restomod.config.model import require_size
from restomod.config.presets import preset
from restomod.utils.errors import UserError, did_you_mean, reported_once

MEMORY_HINT = "lower --micro-batch, --batch-tokens or --sequence-length"
USAGE = f"""\
usage: restomod bench step [PRESET] [FLAGS]    measure a training step (default preset: quickstart)
       restomod bench step PRESET --help       list all flags; the flags of `restomod train` are accepted too

{heading("bench")}"""


@dataclass(frozen=True)
class BenchArguments(ConfigArguments):
    """Flags of `restomod bench step`."""

    tokens: Literal["synthetic", "real"] = "synthetic"
    """Training tokens. synthetic: random tokens, without data preparation; real: tokens of the run's data."""
    warmup: int = 3
    """Number of untimed steps before the measurement."""
    timed: int = 10
    """Number of timed steps; the same number of steps is timed phase by phase, in alternation."""
    json: str | None = None
    """JSON file for results, configuration and environment. None: no file."""
    trace: str | None = None
    """File for a Chrome trace of one additional step; open it in ui.perfetto.dev. None: no trace."""


def run(arguments: list[str]) -> int:
    """Measure a training step, and return the exit code."""
    with reported_once():
        name, given = _parse(arguments)

    from restomod.bench.step import bench_step

    return bench_step(given.config, name, given.tokens, given.warmup, given.timed, given.json, given.trace)


def _parse(arguments: list[str]) -> tuple[str, BenchArguments]:
    """Return the name of the preset and the parsed flags."""
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
