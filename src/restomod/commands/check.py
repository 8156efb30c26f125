"""Command `check`: sanity checks of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from restomod.commands.flags import DeviceArguments
from restomod.commands.parsing import parse
from restomod.config.run import require_seed

if TYPE_CHECKING:  # torch is imported when it is needed
    from restomod.utils.console import CheckResult, Display

EXIT_CHECK_FAILED = 1
STATUS_WORDS = {"pass": "passed", "warn": "with a warning", "fail": "failed", "skip": "skipped"}


@dataclass(frozen=True, kw_only=True)
class CheckArguments(DeviceArguments):
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = "gpt2-124m"
    """A preset (its initial weights), a run, a model folder, or a name on the Hugging Face hub, such as gpt2."""
    seed: int = 1337
    """Random seed of a preset's initial weights."""


def run(arguments: list[str]) -> int:
    """Check a preset or a model. Returns 0, or 1 if a check has failed."""
    parsed = parse(CheckArguments, arguments, "restomod check")
    require_seed("--seed", parsed.seed)

    from restomod.checks.model_slow import check
    from restomod.utils.console import Display

    display = Display()
    return show_check_results(check(parsed.model, parsed.seed, parsed.device, parsed.precision), parsed.model, display)


def show_check_results(results: Iterable[CheckResult], subject: str, display: Display) -> int:
    """Print results as they come, and a summary. Returns the exit code."""
    statuses = []
    for result in results:
        display.check_result(result)
        statuses.append(result.status)
    counts = [f"{statuses.count(s)} {word}" for s, word in STATUS_WORDS.items() if s in statuses]
    display.line(f"{subject}: {', '.join(counts)}")
    display.require_printed()
    return EXIT_CHECK_FAILED if "fail" in statuses else 0
