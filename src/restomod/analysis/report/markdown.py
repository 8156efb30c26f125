"""Report as GitHub Markdown, with PNG files of the curves if they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from restomod.utils.text import markdown_cell


def report_markdown(data: dict[str, Any], pictures: Sequence[Path] = (), folder: Path = Path()) -> str:
    """Build a Markdown report.

    Args:
        data: content of the report; see `restomod.analysis.report.html.as_page`.
        pictures: PNG files to show.
        folder: folder of the Markdown file; links to the pictures are relative to it.
    """
    runs = data["runs"]
    lines = [f"# {markdown_cell(data['title'])}", ""]
    if len(runs) > 1:
        names = list(dict.fromkeys(name for run in runs for name, _, _ in run["figures"]))
        values = [{name: value for name, value, _ in run["figures"]} for run in runs]
        rows = [
            [run["name"], *(value.get(name, "–") for name in names)] for run, value in zip(runs, values, strict=True)
        ]
        lines += [*_table(["run", *names], rows), ""]
    for picture in pictures:
        where = Path(os.path.relpath(picture, folder)).as_posix().replace(" ", "%20")
        lines += [f"![{markdown_cell(picture.stem.replace('_', ' '))}](<{where}>)", ""]
    for run in runs:
        lines += _run(run, "##" if len(runs) > 1 else "")
    return "\n".join([*lines, markdown_cell(data["footer"]), ""])


def _run(run: dict[str, Any], heading: str) -> Iterator[str]:
    """Yield the lines of a run; ``heading`` is "##" in a report of several runs, otherwise empty."""
    below = f"#{heading}" if heading else "##"
    if heading:
        yield from (f"{heading} {markdown_cell(run['name'])}", "")
    yield from (markdown_cell(f"{run['state']}, {run['remark']}" if run["remark"] else run["state"]), "")
    yield from (*_table(["", "", ""], run["figures"]), "")
    val = run["curves"].get("val")
    if val:
        rows = [
            [f"{step:,}", "–" if loss is None else f"{loss:.4f}"] for step, loss in zip(val["x"], val["y"], strict=True)
        ]
        yield from (f"{below} Validation loss", "", *_table(["step", "loss"], _spread(rows, 20)), "")
    for table in run["evaluations"]:
        yield from (f"{below} {markdown_cell(table['task'])}", "")
        yield from (*_table(["model", *table["columns"], ""], table["rows"]), "")
    yield from _error_analysis(run["error_analysis"], below)
    steps = sorted({sample["step"] for sample in run["samples"]})
    if steps:
        yield from (f"{below} Samples at step {steps[-1]:,}", "")
        last = [[s["prompt"], s["text"]] for s in run["samples"] if s["step"] == steps[-1]]
        yield from (*_table(["prompt", "continuation"], last), "")
    if run["events"]:
        events = [["–" if step is None else f"{step:,}", text] for step, text in run["events"]]
        yield from (f"{below} Events", "", *_table(["step", "event"], events), "")
    yield from (f"{below} Configuration", "")
    if run["changed"]:
        yield from (*_table(["setting", "this run", f"preset {run['preset']}"], run["changed"]), "")
    else:
        yield from (f"No difference from the preset {run['preset']}.", "")
    yield from (f"{below} Compute and cost", "", *_table(["", "", ""], run["usage"]), "")
    yield from (f"{below} Model, data, machine", "", *_table(["", ""], run["about"]), "")


def _error_analysis(found: dict[str, Any], below: str) -> Iterator[str]:
    yield from (f"{below} Error analysis", "")
    if "reason" in found:
        yield from (markdown_cell(f"Not available: {found['reason']}"), "")
        return
    rows = [
        [kind["name"], f"{kind['loss']:.3f}", f"{kind['share']:.1%}", f"{kind['of_loss']:.1%}"]
        for kind in found["kinds"]
    ]
    yield from (*_table(["kind of token", "loss", "share of tokens", "share of loss"], rows), "")
    if len(found["sources"]) > 1:
        sources = [[s["name"], f"{s['loss']:.4f}", f"{s['tokens']:,}"] for s in found["sources"]]
        yield from (*_table(["source", "loss", "tokens"], sources), "")
    for key in ("best", "worst"):
        passages = [[f"{p['loss']:.2f}", "".join(text for text, _ in p["tokens"])] for p in found[key]]
        yield from (*_table(["loss", f"{key} predicted passages"], passages), "")


def _spread(rows: list[list[str]], most: int) -> list[list[str]]:
    """Return at most ``most`` rows, evenly spread, including the first and the last."""
    if len(rows) <= most:
        return rows
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [list(head), *map(list, rows)]
    made = [f"| {' | '.join(markdown_cell(str(cell)) for cell in line)} |" for line in lines]
    return [made[0], "|" + "---|" * len(head), *made[1:]]
