"""Command `report`: an HTML page, Markdown and PNG files of runs. Does not import torch."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from restomod.analysis.report.data import run_data
from restomod.analysis.report.html import as_page, footer
from restomod.analysis.report.markdown import report_markdown
from restomod.analysis.report.png import draw_curves, write_picture
from restomod.analysis.report.usage import HourlyRates
from restomod.runs.reader import Run, open_run
from restomod.utils.errors import UserError, did_you_mean
from restomod.utils.files import write_bytes_atomically, write_text_atomically
from restomod.utils.output_files import Output, require_output_folder, require_outputs, write_outputs
from restomod.utils.redaction import redact, redact_pieces


def report(
    runs: Sequence[Run],
    out: Path,
    markdown: Path | None = None,
    png: Path | None = None,
    rates: HourlyRates | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Write a report of runs.

    Args:
        runs: runs to show.
        out: HTML file.
        markdown: Markdown file; None: not written.
        png: folder for PNG files of the curves; None: not written.
        rates: price and power; None: unknown.
        say: function that prints a line.

    Raises:
        UserError: a file of a run is damaged, or an output file cannot be written.
    """
    require_writable(out, markdown, png)
    data = report_data(runs, rates or HourlyRates())
    page = as_page(data).encode()  # everything is built before the first file is written
    pictures = draw_curves(data["runs"], png) if png is not None else {}
    outputs = [Output(out, lambda path: write_bytes_atomically(path, page), f" ({len(page) / 1e6:.1f} MB)")]
    if markdown is not None:
        text = report_markdown(data, list(pictures), markdown.parent)
        outputs.append(Output(markdown, lambda path: write_text_atomically(path, text)))
    outputs += [Output(path, functools.partial(write_picture, figure)) for path, figure in pictures.items()]
    write_outputs(outputs, say)


def report_data(runs: Sequence[Run], rates: HourlyRates) -> dict[str, Any]:
    """Return the content of a report; see `restomod.analysis.report.html.as_page`.

    All text is redacted: secrets, home folders and control characters are removed.
    """
    names = run_names(runs)
    made = [run_data(run, name, rates) for run, name in zip(runs, names, strict=True)]
    for run in made:
        for passage in [*run["error_analysis"].get("best", []), *run["error_analysis"].get("worst", [])]:
            texts, losses = zip(*passage["tokens"], strict=True) if passage["tokens"] else ((), ())
            passage["before"], *shown = redact_pieces([passage["before"], *texts])
            passage["tokens"] = list(zip(shown, losses, strict=True))
    title = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    found: dict[str, Any] = redact({"title": title, "footer": footer(), "runs": made})
    return found


def run_names(runs: Sequence[Run]) -> list[str]:
    """Return the names of the runs' folders; folders with equal names are shown as paths."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else str(run.folder) for run in runs]


def open_runs(folders: Sequence[str]) -> list[Run]:
    """Open runs. A folder that is given twice is opened once.

    Raises:
        UserError: a run does not exist; the message suggests the most similar name.
    """
    unique = list({Path(folder).resolve(): folder for folder in folders}.values())
    runs = []
    for folder in unique:
        path = Path(os.path.expanduser(folder))
        if not path.exists() and path.parent.is_dir():
            near = [entry.name for entry in path.parent.iterdir() if (entry / "config.json").exists()]
            raise UserError(f"{folder}: no such run{did_you_mean(path.name, near) if near else ''}")
        runs.append(open_run(folder))
    return runs


def require_writable(out: Path, markdown: Path | None, png: Path | None) -> None:
    """Raise UserError unless all files of a report can be written."""
    require_outputs({"--out": out, "--markdown": markdown})
    if png is None:
        return
    require_output_folder("--png", png)
    for flag, path in (("--out", out), ("--markdown", markdown)):
        inside = path is not None and path.suffix == ".png" and os.path.realpath(path.parent) == os.path.realpath(png)
        if inside or (path is not None and os.path.realpath(path) == os.path.realpath(png)):
            raise UserError(f"{flag} {path} and --png {png} would overwrite each other; name another file")
