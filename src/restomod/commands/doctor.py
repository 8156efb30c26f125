"""Command `doctor`: test that this machine can train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from restomod.commands.check import show_check_results
from restomod.commands.flags import DeviceArguments
from restomod.commands.parsing import parse
from restomod.config.presets import preset


@dataclass(frozen=True, kw_only=True)
class DoctorArguments(DeviceArguments):
    """Flags of `restomod doctor`."""

    preset: str = "gpt2-124m"
    """Preset that determines the required disk space and memory."""
    out: str = "runs"
    """Folder of future runs, for the check of disk space."""


def run(arguments: list[str]) -> int:
    """Check this machine; return 1 if a check failed, else 0."""
    parsed = parse(DoctorArguments, arguments, "restomod doctor")
    config = preset(parsed.preset)

    from restomod.checks.doctor import check_machine
    from restomod.utils.console import Display

    results = check_machine(parsed.device, parsed.precision, config, parsed.preset, Path(parsed.out))
    return show_check_results(results, "this machine", Display())
