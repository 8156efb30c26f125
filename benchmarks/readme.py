"""Generator of the benchmark tables in README.md and docs/ from `benchmarks/results/*.json`.

    python -m benchmarks.readme            # write the tables
    python -m benchmarks.readme --check    # print differences and exit with 1 if a page is outdated

The text between `<!-- bench:NAME -->` and `<!-- /bench -->` is replaced. NAME is one of:

    cpu               a few rows of results/cpu.json with the best peer of each
    cpu/peers         all comparisons with peers, one row each
    cpu/step          all results of one item
    cpu/all           all results of all items
    gpu, gpu/...      the same for results/gpu.json
    scale/data, scale/steps, scale/predictions    tables of results/scale.json
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
ALL, PEERS = "all", "peers"
HOW = {"cpu": "make bench OUT=benchmarks/results", "gpu": "OUT=measure benchmarks/gpu/measure.sh"}


def pages(root: Path) -> list[Path]:
    """Return the pages that can have tables."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def rendered(text: str, results: Path, where: str) -> str:
    """Return a page with its tables generated.

    Args:
        text: text of the page.
        results: folder of the results.
        where: name of the page for messages.

    Raises:
        UserError: a marker has no end or an unknown name, or a file of results is damaged.
    """
    lines, out = iter(enumerate(text.split("\n"), 1)), []
    for number, line in lines:
        if line == END:
            raise UserError(f"{where}, line {number}: {END} without a begin marker")
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
    """Return the Markdown for the marker ``name``."""
    machine, _, item = name.partition("/")
    if machine == "scale":
        return scale_table(item, results / "scale.json", where)
    if machine not in HOW:
        raise UserError(f"{where}: unknown results {machine!r}{did_you_mean(machine, HOW)}")
    known = (*ITEMS, *(gpu.ITEMS if machine == "gpu" else ()), ALL, PEERS)
    if item and item not in known:
        raise UserError(f"{where}: unknown item {item!r}{did_you_mean(item, known)}")
    items = records.read(results / f"{machine}.json")
    if items and not item:
        return table.summary(items)
    if items and item == PEERS:
        return table.peer_table(items)
    if items and item == ALL:
        return table.page(items, "###").rstrip()
    return table.body(items[item]) if item in items else f"*Not measured yet: `{HOW[machine]}`.*"


def scale_table(part: str, file: Path, where: str) -> str:
    """Return a table of the simulation of scale."""
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
    """Write or check the tables and return the exit code: 0, 1 if --check finds a difference, 2 for a user error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is outdated")
    check = parser.parse_args(arguments).check
    outdated = False
    try:
        for page in pages(root):
            before = page.read_text(encoding="utf-8")
            name = str(page.relative_to(root))
            after = rendered(before, root / "benchmarks" / "results", name)
            if after == before:
                continue
            outdated = True
            if check:
                diff = difflib.unified_diff(before.splitlines(), after.splitlines(), name, "as measured", "", "", 1, "")
                print("\n".join(diff))
            else:
                write_text_atomically(page, after)
                print(f"{name} written")
    except (UserError, OSError) as e:
        print(f"benchmarks: error: {e}", file=sys.stderr)
        return EXIT_USER_ERROR
    if check and outdated:
        print("outdated tables: run `python -m benchmarks.readme`", file=sys.stderr)
    return int(check and outdated)


if __name__ == "__main__":
    sys.exit(main())
