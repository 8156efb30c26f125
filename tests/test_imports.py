"""Imports point one way: from what is specific to what is general, and never in a circle."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import restomod

SOURCE = Path(restomod.__file__).parent
MAX_LINES = 350

# Earliest first. A module belongs to the entry with the longest prefix of its name, and may import from its own layer
# or an earlier one. The package's own __init__ is the exception: "restomod" stands for it alone.
LAYERS = (
    ("restomod",),
    (
        "restomod.errors",
        "restomod.temporary",
        "restomod.destination",
        "restomod.files",
        "restomod.output_files",
        "restomod.json_files",
        "restomod.locks",
        "restomod.output",
        "restomod.figures",
        "restomod.memory",
        "restomod.text",
        "restomod.afterwards",
    ),
    (
        "restomod.hub",
        "restomod.config_model",
        "restomod.config",
        "restomod.config_json",
        "restomod.config_prepare",
        "restomod.presets",
        "restomod.device",
    ),
    ("restomod.data",),
    ("restomod.model",),
    ("restomod.train",),  # loss, schedule, optimizer, checkpoint, metrics, console, run, sanity, step
    ("restomod.evals",),
    ("restomod.draw", "restomod.generate", "restomod.samples", "restomod.compare_samples", "restomod.inspection"),
    (
        "restomod.train.setup",
        "restomod.train.summary",
        "restomod.train.journal",
        "restomod.train.observe",
        "restomod.train.recover",
        "restomod.train.loop",
    ),
    ("restomod.bench", "restomod.doctor"),
    ("restomod.experiments", "restomod.course"),
    ("restomod.parsing", "restomod.arguments", "restomod.commands", "restomod.cli", "restomod.__main__"),
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}


def layer_of(module: str) -> int:
    """The layer of a module. Raises KeyError where none of `LAYERS` speaks of it."""
    if module == "restomod":
        return LAYER_OF[module]
    parts = module.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 1, -1))
    return LAYER_OF[next((prefix for prefix in prefixes if prefix in LAYER_OF), module)]


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package in folder ``root``, by its dotted name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path, known: set[str]) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that ``module`` takes from its own package, wherever in the file it does so."""
    package = module.split(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names_of_package = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == package:
                    yield node.lineno, alias.name
                    names_of_package.add(alias.asname or package)
        elif isinstance(node, ast.ImportFrom):
            here = module if path.name == "__init__.py" else module.rpartition(".")[0]
            above = here.split(".")[: len(here.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            if origin.split(".")[0] == package:
                for alias in node.names:
                    submodule = f"{origin}.{alias.name}"
                    yield node.lineno, submodule if submodule in known or origin == package else origin
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names_of_package:
            yield node.lineno, f"{package}.{node.attr}"


def complaints(root: Path) -> list[str]:
    """What is wrong with the imports of the package in folder ``root``, one line each."""
    files = modules(root)
    wrong, graph = [], {}
    for module, path in files.items():
        graph[module] = set()
        for line, name in imports(module, path, set(files)):
            at = f"{path.relative_to(root)}:{line}: {module} takes {name}"
            if name == f"{root.name}.__version__":
                name = root.name
            if name not in files:
                wrong.append(f"{at}: import it from the module that defines it")
                continue
            graph[module].add(name)
            try:
                if layer_of(name) > layer_of(module):
                    wrong.append(f"{at}, which is in a later layer")
            except KeyError as e:
                wrong.append(f"{at}: {e.args[0]} is in no layer yet; add it to LAYERS")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as e:
        wrong.append(f"a circle of imports: {' -> '.join(reversed(e.args[1]))}")
    return wrong


def test_no_import_points_forward_or_in_a_circle() -> None:
    assert complaints(SOURCE) == []


def test_every_module_has_a_layer() -> None:
    for module in modules(SOURCE):
        layer_of(module)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("errors.py", "from restomod.config import RunConfig"),
        ("errors.py", "import restomod.config"),
        ("errors.py", "from restomod import config"),
        ("errors.py", "from . import config"),
        ("errors.py", "from .config import RunConfig"),
        ("errors.py", "import restomod\nrestomod.config"),
        ("errors.py", "import restomod as r\nr.config"),
        ("errors.py", "from restomod import RunConfig"),
        ("errors.py", "def f():\n    from restomod.config import RunConfig"),
        ("__init__.py", "from restomod.errors import UserError"),
        ("__init__.py", "from .errors import UserError"),
        ("train/step.py", "from restomod.train.loop import train"),
        ("train/step.py", "from .loop import train"),
        ("train/step.py", "from ..cli import main"),
        ("train/__init__.py", "from .loop import train"),
    ],
)
def test_a_planted_wrong_arrow_is_found(tmp_path: Path, file: str, line: str) -> None:
    root = fake_package(tmp_path)
    assert complaints(root) == []
    (root / file).write_text(line + "\n")
    assert complaints(root)[0].startswith(f"{file}:")


def test_a_planted_circle_within_a_layer_is_found(tmp_path: Path) -> None:
    root = fake_package(tmp_path)
    (root / "errors.py").write_text("from restomod.files import read_json\n")
    (root / "files.py").write_text("from restomod.errors import UserError\n")
    assert [c.partition(":")[0] for c in complaints(root)] == ["a circle of imports"]


def test_a_module_without_a_layer_is_found(tmp_path: Path) -> None:
    root = fake_package(tmp_path)
    (root / "news.py").write_text("from restomod.errors import UserError\n")
    assert "restomod.news is in no layer yet" in complaints(root)[0]


def test_the_package_itself_may_be_asked_for_its_version(tmp_path: Path) -> None:
    root = fake_package(tmp_path)
    (root / "errors.py").write_text("from restomod import __version__\nimport restomod\nrestomod.__version__\n")
    assert complaints(root) == []


def fake_package(folder: Path) -> Path:
    root = folder / "restomod"
    (root / "train").mkdir(parents=True)
    for file in ("__init__", "errors", "files", "train/__init__", "train/step"):
        (root / f"{file}.py").write_text("")
    (root / "config.py").write_text("import json\nfrom restomod.errors import UserError\n")
    (root / "train/loop.py").write_text("from .step import train_step\nfrom restomod.config import RunConfig\n")
    (root / "cli.py").write_text("def main():\n    from restomod.train import loop\n")
    return root


@pytest.mark.parametrize(
    "statement",
    [
        "import restomod",
        "import restomod.cli",
        "from restomod.cli import main; main(['--help']); main(['train', '--help']); main(['train', 'quikstart'])",
        "from restomod import RunConfig, UserError, preset",
    ],
)
def test_torch_is_not_imported_before_it_is_needed(statement: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys\nassert 'torch' not in sys.modules, 'torch was imported'"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_no_source_file_is_long() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCE.rglob("*.py")}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


@pytest.mark.parametrize("name", restomod.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(restomod, name) is not None
    assert name in dir(restomod)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'restomod' has no attribute 'GTP'"):
        _ = restomod.GTP
