"""Command `doctor`: check that this machine is fit for training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from restomod.commands.check import show_check_results
from restomod.commands.flags import DeviceArguments
from restomod.commands.parsing import parse
from restomod.config.presets import preset


@dataclass(frozen=True, kw_only=True)
class DoctorArguments(DeviceArguments):
    preset: str = "gpt2-124m"
    """Preset for which disk space and memory must suffice."""
    out: str = "runs"
    """Folder where runs will be written."""


def run(arguments: list[str]) -> int:
    """Check this machine. Returns 0, or 1 if a check has failed."""
    parsed = parse(DoctorArguments, arguments, "restomod doctor")
    config = preset(parsed.preset)

    from restomod.checks.doctor import check_machine
    from restomod.utils.console import Display

    results = check_machine(parsed.device, parsed.precision, config, parsed.preset, Path(parsed.out))
    return show_check_results(results, "this machine", Display())
