"""Public interface of the package and its behaviour in an untrusted working directory."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path
from typing import Any

import pytest

import restomod
from restomod.config import presets
from restomod.config.run import DataConfig, ModelConfig, RunConfig, SamplingConfig
from tests.runs import made_runs


def test_the_example_in_the_docstring_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the example with a model that trains in a second."""
    assert restomod.__doc__ is not None
    example = textwrap.dedent("\n".join(line for line in restomod.__doc__.splitlines() if line.startswith("    ")))
    (tmp_path / "text.txt").write_text("the quick brown fox " * 200)
    tiny = RunConfig(
        steps=2,
        batch_tokens=32,
        sequence_length=16,
        model=ModelConfig(n_layer=1, n_head=2, n_embd=32, n_positions=32),
        data=DataConfig(source="text", path=str(tmp_path / "text.txt"), cache=str(tmp_path / "data")),
        sampling=SamplingConfig(max_tokens=2),
        device="cpu",
        precision="fp32",
    )
    quickstart = presets.PRESETS["quickstart"]
    monkeypatch.setitem(presets.PRESETS, "quickstart", lambda: dataclasses.replace(tiny, optim=quickstart().optim))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["config"].steps == 2
    assert (tmp_path / "runs/mine/checkpoints/step_000002/COMPLETE").exists()
    assert len(names["texts"]) == 3


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a fake file for every module of Python and of installed packages; an import prints its name."""
    folder = tmp_path_factory.mktemp("poisoned")
    installed = set(importlib.metadata.packages_distributions())
    for name in (set(sys.stdlib_module_names) | installed) - {"restomod"}:
        if name.isidentifier():
            (folder / f"{name}.py").write_text(f"open({str(folder / 'imported')!r}, 'a').write('{name}\\n')\n")
    (folder / "some.txt").write_text("the quick brown fox " * 400)
    (folder / "matplotlibrc").write_text("text.usetex: True\n")
    made_runs.make_run(folder / "run", 20)
    return folder


def in_poisoned(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed command `restomod` with the folder as working directory."""
    program = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(program, cwd=folder, capture_output=True, text=True)


SCRIPT = Path(sysconfig.get_path("scripts")) / "restomod"
SHAPE = "--model.n-layer 1 --model.n-head 1 --model.n-embd 8 --sequence-length 16 --batch-tokens 32"
TINY = f"{SHAPE} --device cpu --data.source text"


@pytest.mark.parametrize(
    "line",
    [
        "report run --png pictures",
        f"sweep quickstart --grid optim.lr=1e-3 --steps 1 --out sweep --data.path some.txt {TINY}",
        pytest.param(
            "prepare some.txt --engine ray --workers 1 --out prepared",
            marks=[pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")],
        ),
        pytest.param(
            f"train quickstart --steps 1 --compile on {TINY} --data.path some.txt --out compiled",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_nothing_in_the_working_directory_is_imported(poisoned: Path, line: str) -> None:
    done = in_poisoned(poisoned, *line.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (poisoned / "imported").exists(), (poisoned / "imported").read_text()


def test_no_module_of_the_working_directory_is_imported_under_python_m(tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text("open('imported', 'w')\n")
    done = subprocess.run([sys.executable, "-m", "restomod", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "imported").exists()


def test_the_command_of_then_has_the_users_environment(tmp_path: Path) -> None:
    command = f"{sys.executable} -c 'import sys; print(\"safe:\", sys.flags.safe_path)'"
    done = in_poisoned(tmp_path, "train", "no-such-preset", "--then", command)
    assert "safe: False" in done.stdout, done.stderr
