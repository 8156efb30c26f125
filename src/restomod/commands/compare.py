"""Command `compare`: compare the loss curves of runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from restomod.commands.parsing import parse, require_number
from restomod.utils.errors import UserError


@dataclass(frozen=True)
class CompareArguments:
    """Flags of `restomod compare`."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Folders of finished or unfinished runs. Runs that differ only in their seed form a group."""
    baseline: str | None = None
    """Run of the baseline group. None: the first run."""
    target_loss: float | None = None
    """Loss in nats for the comparison of tokens to a target loss. None: the final loss of the baseline."""
    price: float | None = None
    """Price in US dollars of one GPU for one hour (on a CPU: of one process for one hour). None: no cost."""
    x: Literal["all", "steps", "tokens", "flops", "time", "dollars"] = "all"
    """x-axis of the curves. all: tokens in the table, and one plot per axis."""
    json: Path | None = None
    """JSON file for all results, including the curves. None: no file."""
    markdown: Path | None = None
    """Markdown file for the tables. None: no file."""
    plot: Path | None = None
    """PNG file for a plot of the curves. None: no plot."""


def run(arguments: list[str]) -> int:
    """Print a comparison of runs, write the requested files, and return 0."""
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
            raise UserError(f"{plot}: the plot is a PNG file; its name must end in .png")
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
