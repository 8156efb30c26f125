"""Command `verdict`: find symptoms of an unhealthy run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from restomod.commands.parsing import parse

EXIT_NOT_HEALTHY = 1


@dataclass(frozen=True)
class VerdictArguments:
    """Flags of `restomod verdict`."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a finished, stopped or active run."""
    weights: bool = True
    """Check the newest checkpoint for dead layers. This imports torch; the other checks do not."""
    json: Path | None = None
    """JSON file for the findings. None: no file."""


def run(arguments: list[str]) -> int:
    """Print the symptoms of a run; return 0 if it is healthy, else 1."""
    parsed = parse(VerdictArguments, arguments, "restomod verdict")

    from restomod.analysis.health.verdict import verdict
    from restomod.runs.reader import open_run
    from restomod.utils.files import write_json_atomically
    from restomod.utils.output_files import Output, require_outputs, write_outputs
    from restomod.utils.terminal import Table, print_table

    require_outputs({"--json": parsed.json})
    found = verdict(open_run(parsed.run), parsed.weights)
    print_table(
        Table("", ["status", "symptom", "observation"], [[f.status, f.symptom, f.reason] for f in found.findings])
    )
    print(found.summary())
    if parsed.json is not None:
        write_outputs([Output(parsed.json, lambda path: write_json_atomically(path, found.to_dict()))])
    return 0 if found.healthy else EXIT_NOT_HEALTHY
