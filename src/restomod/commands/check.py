"""`restomod check`: is a model sound, and can it learn?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import tyro

from restomod.commands.flags import CheckArguments
from restomod.commands.parsing import parse
from restomod.config.run import require_seed

if TYPE_CHECKING:  # torch is imported when it is needed
    from restomod.utils.console import CheckResult, Display

EXIT_CHECK_FAILED = 1
STATUS_WORDS = {"pass": "passed", "warn": "to look at", "fail": "failed", "skip": "skipped"}


def run(arguments: list[str]) -> int:
    """Check a preset or a model. Returns 0, or 1 where a check has failed."""
    parsed = parse(CheckArguments, tyro.MISSING_NONPROP, arguments, "restomod check")
    require_seed("--seed", parsed.seed)

    from restomod.checks.model_slow import check
    from restomod.utils.console import Display

    display = Display()
    return show_results(check(parsed.model, parsed.seed, parsed.device, parsed.precision), parsed.model, display)


def show_results(verdicts: Iterable[CheckResult], of: str, display: Display) -> int:
    """Print verdicts as they come, and their sum. Returns the exit code."""
    statuses = []
    for verdict in verdicts:
        display.check_result(verdict)
        statuses.append(verdict.status)
    counts = [f"{statuses.count(s)} {word}" for s, word in STATUS_WORDS.items() if s in statuses]
    display.line(f"{of}: {', '.join(counts)}")
    display.require_printed()
    return EXIT_CHECK_FAILED if "fail" in statuses else 0
