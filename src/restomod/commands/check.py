"""Command `check`: test that a model is correct and can learn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from restomod.commands.flags import DeviceArguments
from restomod.commands.parsing import parse
from restomod.config.run import require_seed

if TYPE_CHECKING:  # this module imports torch
    from restomod.utils.console import CheckResult, Display

EXIT_CHECK_FAILED = 1
STATUS_WORDS = {"pass": "passed", "warn": "with a warning", "fail": "failed", "skip": "skipped"}


@dataclass(frozen=True, kw_only=True)
class CheckArguments(DeviceArguments):
    """Flags of `restomod check`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = "gpt2-124m"
    """Preset (initial weights), run, model folder, or name on the Hugging Face hub such as gpt2."""
    seed: int = 1337
    """Random seed of the initial weights of a preset."""


def run(arguments: list[str]) -> int:
    """Check a preset or a model; return 1 if a check failed, else 0."""
    parsed = parse(CheckArguments, arguments, "restomod check")
    require_seed("--seed", parsed.seed)

    from restomod.checks.model_slow import check
    from restomod.utils.console import Display

    display = Display()
    return show_check_results(check(parsed.model, parsed.seed, parsed.device, parsed.precision), parsed.model, display)


def show_check_results(results: Iterable[CheckResult], subject: str, display: Display) -> int:
    """Print every result when it is available, then a summary, and return the exit code.

    Args:
        results: results of checks; a generator that runs them one by one.
        subject: name of the model or machine, for the summary.
        display: output for the lines.
    """
    statuses = []
    for result in results:
        display.check_result(result)
        statuses.append(result.status)
    counts = [f"{statuses.count(s)} {word}" for s, word in STATUS_WORDS.items() if s in statuses]
    display.line(f"{subject}: {', '.join(counts)}")
    display.require_printed()
    return EXIT_CHECK_FAILED if "fail" in statuses else 0
