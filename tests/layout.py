"""Generator of docs/layout.md from the first lines of module docstrings.

python -m tests.layout     after a module was added, moved or described anew
"""

from __future__ import annotations

import ast
from pathlib import Path

from tests.test_imports import LAYERS, SOURCE

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "layout.md"
INTRODUCTION = """\
# Layout

Where everything is. `python -m tests.layout` writes this page from the first line of every module's docstring.

A folder is a layer: its modules import from their own folder and from folders further down this page, never from one
further up, and in no circle. `tests/test_imports.py` has the list and checks it. `tests/` has the same folders.
"""
OTHERS = ("benchmarks", "benchmarks/items", "benchmarks/gpu")


def layout() -> str:
    """Return the page for the current modules."""
    entry = [SOURCE / f"{name}.py" for name in ("__main__", "cli", "__init__")]
    lines = [INTRODUCTION, "## src/restomod", "", *_table(entry)]
    for layer in reversed(LAYERS[1:]):
        folder = SOURCE.joinpath(*layer.split(".")[1:])
        if folder.is_dir():
            lines += _section(folder, f"restomod/{folder.relative_to(SOURCE)}")
    lines += ["## Outside the package", ""]
    for name in OTHERS:
        lines += _section(ROOT / name, name)
    lines += _section(ROOT / "tests", "tests")
    return "\n".join(lines).rstrip("\n") + "\n"


def _section(folder: Path, title: str) -> list[str]:
    files = sorted(f for f in folder.glob("*.py") if not f.name.startswith(("__init__", "test_")))
    about = summary(folder / "__init__.py")
    return [f"### {title}", "", *([about, ""] if about else []), *_table(files)]


def _table(files: list[Path]) -> list[str]:
    rows = [f"| `{f.name}` | {summary(f)} |" for f in files]
    return ["| file | |", "|---|---|", *rows, ""] if rows else []


def summary(path: Path) -> str:
    """Return the first sentence of a module's docstring, without line breaks."""
    paragraph = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
    text = " ".join(paragraph.split())
    return text.partition(". ")[0].rstrip(".").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(layout(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
