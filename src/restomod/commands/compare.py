"""Command `compare`: compare runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from restomod.commands.parsing import parse, require_number
from restomod.utils.errors import UserError


@dataclass(frozen=True)
class CompareArguments:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Folders of runs, finished or not. Runs that differ only in their seed form a group."""
    baseline: str | None = None
    """A run of the baseline group. Default: the first."""
    target_loss: float | None = None
    """Target of the tokens-to-target count. Default: the final loss of the baseline."""
    price: float | None = None
    """US dollars for one GPU and one hour (on a CPU: for one process and one hour)."""
    x: Literal["all", "steps", "tokens", "flops", "time", "dollars"] = "all"
    """x-axis of the curves. all: tokens in the table, every axis in the picture."""
    json: Path | None = None
    """Write everything, curves included, to this JSON file."""
    markdown: Path | None = None
    """Write the tables to this Markdown file."""
    plot: Path | None = None
    """Draw the curves as a PNG file."""


def run(arguments: list[str]) -> int:
    """Compare runs: print tables, and write the files asked for. Returns 0."""
    parsed = parse(CompareArguments, arguments, "restomod compare")
    if not parsed.runs:
        raise UserError("name the runs: restomod compare RUN RUN ... (restomod compare --help)")
    require_number("--price", parsed.price, above_0=True)
    require_number("--target-loss", parsed.target_loss, above_0=True)
    if parsed.x == "dollars" and parsed.price is None:
        raise UserError("--x dollars needs --price, in US dollars for one GPU and one hour")

    from restomod.analysis.compare.axes import AXES, Axis
    from restomod.analysis.compare.groups import compare_runs
    from restomod.analysis.compare.plot import draw_comparison
    from restomod.analysis.compare.tables import comparison_markdown, comparison_tables
    from restomod.runs.reader import open_run
    from restomod.utils.figures import require_matplotlib
    from restomod.utils.files import resolve_destination, write_json_atomically, write_text_atomically
    from restomod.utils.output_files import Output, require_outputs, write_outputs
    from restomod.utils.terminal import print_table

    json, report, plot = parsed.json, parsed.markdown, parsed.plot
    require_outputs({"--json": json, "--markdown": report, "--plot": plot})
    if plot is not None:
        if plot.suffix.lower() != ".png" and resolve_destination(plot).is_regular:
            raise UserError(f"{plot}: the picture is a PNG file; name it .png")
        require_matplotlib()
    runs = [open_run(folder) for folder in parsed.runs]
    baseline = None
    if parsed.baseline is not None:
        named = Path(parsed.baseline).expanduser().resolve()
        baseline = next((run for run in runs if run.folder.resolve() == named), None)
        if baseline is None:
            baseline = open_run(parsed.baseline)
            runs.insert(0, baseline)
    found = compare_runs(runs, baseline, parsed.target_loss, parsed.price)
    axis: Axis = "tokens" if parsed.x == "all" else parsed.x
    for table in comparison_tables(found, axis):
        print_table(table)
        print()
    outputs = []
    if plot is not None:
        every = [a for a in AXES if a != "dollars" or found.price is not None]
        axes = every if parsed.x == "all" else [axis]
        outputs.append(Output(plot, lambda path: draw_comparison(found, axes, path)))
    if json is not None:
        outputs.append(Output(json, lambda path: write_json_atomically(path, found.to_dict())))
    if report is not None:
        outputs.append(Output(report, lambda path: write_text_atomically(path, comparison_markdown(found, axis, plot))))
    write_outputs(outputs)
    return 0
