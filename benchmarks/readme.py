"""The tables of measured numbers in README.md and docs/, generated from `benchmarks/results/*.json`.

    python -m benchmarks.readme            # write them
    python -m benchmarks.readme --check    # exit code 1, and what differs, where a page and the measurements disagree

A page holds `<!-- bench:NAME -->` and `<!-- /bench -->`; what is between is replaced. NAME is `cpu` for the headlines
of results/cpu.json, `cpu/step` for all that was measured of one item, or `cpu/all` for all of all; `gpu`, `gpu/step`
and `gpu/all` likewise of results/gpu.json; `scale/data`, `scale/steps` and `scale/predictions` for the tables of
results/scale.json.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import records, scale, scale_gpus, table
from benchmarks.gpu import collect as gpu
from benchmarks.run import ITEMS
from restomod.utils.errors import EXIT_USER_ERROR, UserError, did_you_mean
from restomod.utils.files import write_text_atomically
from restomod.utils.json_files import read_json

ROOT = Path(__file__).parents[1]
BEGIN, END = re.compile(r"^<!-- bench:(?P<name>\S+) -->$"), "<!-- /bench -->"
ALL = "all"
HOW = {"cpu": "make bench OUT=benchmarks/results", "gpu": "OUT=measure benchmarks/gpu/measure.sh"}


def pages(root: Path) -> list[Path]:
    """Where tables may stand."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def rendered(text: str, results: Path, where: str) -> str:
    """Return a page with its tables generated from ``results``; ``where`` names the page in messages.

    Raises:
        UserError: a marker has no end or an unknown name, or a file of results is damaged.
    """
    lines, out = iter(enumerate(text.split("\n"), 1)), []
    for number, line in lines:
        if line == END:
            raise UserError(f"{where}, line {number}: {END} without a beginning")
        out.append(line)
        begin = BEGIN.match(line)
        if begin is None:
            continue
        for _, inner in lines:
            if BEGIN.match(inner):
                raise UserError(f"{where}, line {number}: {line} has no {END}")
            if inner == END:
                break
        else:
            raise UserError(f"{where}, line {number}: {line} has no {END}")
        out += ["", *content(begin["name"], results, f"{where}, line {number}").split("\n"), "", END]
    return "\n".join(out)


def content(name: str, results: Path, where: str) -> str:
    """Markdown to put between the markers of ``name``."""
    machine, _, item = name.partition("/")
    if machine == "scale":
        return of_scale(item, results / "scale.json", where)
    if machine not in HOW:
        raise UserError(f"{where}: unknown results {machine!r}{did_you_mean(machine, HOW)}")
    known = (*ITEMS, *(gpu.ITEMS if machine == "gpu" else ()), ALL)
    if item and item not in known:
        raise UserError(f"{where}: unknown item {item!r}{did_you_mean(item, known)}")
    items = records.read(results / f"{machine}.json")
    if items and not item:
        return table.headlines(items)
    if items and item == ALL:
        return table.page(items, "###").rstrip()
    return table.body(items[item]) if item in items else f"*Not measured yet: `{HOW[machine]}`.*"


def of_scale(part: str, file: Path, where: str) -> str:
    """A table of the simulation of scale."""
    parts: dict[str, Callable[[dict[str, Any]], list[str]]] = {
        "data": lambda found: scale.data_lines(found["data"]),
        "steps": lambda found: scale.step_lines(found["steps"]),
        "predictions": lambda found: scale_gpus.table(found["steps"]["predictions"]),
    }
    if part not in parts:
        raise UserError(f"{where}: unknown part {part!r}{did_you_mean(part, parts)}")
    if not file.exists():
        return f"*Not measured yet: `python -m benchmarks.scale --json {file.name}`.*"
    return "\n".join(parts[part](read_json(file, "simulation of scale")))


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Returns 0; 1 with --check where a page has drifted; 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page differs")
    check = parser.parse_args(arguments).check
    drifted = False
    try:
        for page in pages(root):
            before = page.read_text(encoding="utf-8")
            name = str(page.relative_to(root))
            after = rendered(before, root / "benchmarks" / "results", name)
            if after == before:
                continue
            drifted = True
            if check:
                diff = difflib.unified_diff(before.splitlines(), after.splitlines(), name, "as measured", "", "", 1, "")
                print("\n".join(diff))
            else:
                write_text_atomically(page, after)
                print(f"{name} written")
    except (UserError, OSError) as e:
        print(f"benchmarks: error: {e}", file=sys.stderr)
        return EXIT_USER_ERROR
    if check and drifted:
        print("these pages are not what was measured: run `python -m benchmarks.readme`", file=sys.stderr)
    return int(check and drifted)


if __name__ == "__main__":
    sys.exit(main())
