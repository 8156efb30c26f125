"""`restomod doctor`: is this machine fit to train?"""

from __future__ import annotations

from pathlib import Path

import tyro

from restomod.commands.check import show_results
from restomod.commands.flags import DoctorArguments
from restomod.commands.parsing import parse
from restomod.config.presets import preset


def run(arguments: list[str]) -> int:
    """Examine this machine. Returns 0, or 1 where a check has failed."""
    parsed = parse(DoctorArguments, tyro.MISSING_NONPROP, arguments, "restomod doctor")
    config = preset(parsed.preset)

    from restomod.checks.doctor import check_machine
    from restomod.utils.console import Display

    verdicts = check_machine(parsed.device, parsed.precision, config, parsed.preset, Path(parsed.out))
    return show_results(verdicts, "this machine", Display())
