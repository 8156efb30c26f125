"""An out-of-memory error on a CPU is one line with the flags to change, in every command."""

from __future__ import annotations

import errno
import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from restomod import cli
from restomod.cli import main
from restomod.commands.catalog import COMMANDS

HUGE = 2**60  # bytes; more than any machine has


def fail_with(error: Exception) -> object:
    raise error


def caused() -> object:
    try:
        return torch.empty(HUGE, dtype=torch.uint8)
    except RuntimeError as e:
        raise RuntimeError("the step failed") from e


ALLOCATE: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.empty(HUGE, dtype=torch.uint8),
    "numpy": lambda: np.zeros(HUGE // 8),
    "python": lambda: bytearray(HUGE),
    "system": lambda: fail_with(OSError(errno.ENOMEM, "Cannot allocate memory")),
    "C++": lambda: fail_with(RuntimeError("std::bad_alloc")),
    "oneDNN": lambda: fail_with(RuntimeError("could not create a primitive")),
    "library": lambda: fail_with(ImportError("libtorch_cpu.so: failed to map segment from shared object")),
    "cause": caused,
}


@pytest.mark.parametrize("allocate", ALLOCATE.values(), ids=ALLOCATE)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_one_line(
    command: str, allocate: Callable[[], object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: list[str]) -> int:
        allocate()
        return 0

    module = importlib.import_module(f"restomod.commands.{command.replace('-', '_')}")
    monkeypatch.setattr(module, "run", run)
    assert main([command]) == 2
    error = capsys.readouterr().err
    assert error.startswith("restomod: error: out of memory (")
    assert error.count("\n") == 1
    assert error.endswith(f"); {getattr(module, 'MEMORY_HINT', cli.MEMORY_HINT)}\n")


def test_another_error_stays_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: list[str]) -> int:
        raise RuntimeError("a fault")

    monkeypatch.setattr("restomod.commands.train.run", run)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["train"])


def test_recommended_flags_exist(capsys: pytest.CaptureFixture[str]) -> None:
    hints = 0
    for command in COMMANDS:
        module = importlib.import_module(f"restomod.commands.{command.replace('-', '_')}")
        flags = re.findall(r"--[\w-]+", getattr(module, "MEMORY_HINT", ""))
        hints += len(flags)
        preset = {"bench": ["step", "quickstart"], "train": ["quickstart"], "plan": ["quickstart"]}.get(command, [])
        assert not flags or main([command, *preset, "--help"]) == 0
        shown = capsys.readouterr().out
        assert [flag for flag in flags if flag not in shown] == []
    assert hints > 10


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux only")
@pytest.mark.slow
@pytest.mark.parametrize("room", [2**28, 400 * 2**20])
@pytest.mark.parametrize("arguments", ["train quickstart --steps 1 --device cpu", "check quickstart --device cpu"])
def test_a_process_whose_memory_is_limited(arguments: str, room: int, tmp_path: Path) -> None:
    program = (
        "import resource, sys, torch._dynamo, restomod.cli, restomod.train.loop, restomod.checks.model_slow\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(sys.argv.pop(1)),) * 2)\n"
        "sys.exit(restomod.cli.main(sys.argv[1:]))"
    )
    (tmp_path / "text.txt").write_text("A text that is long enough to be trained on.\n" * 4000)
    text = ["--data.source", "text", "--data.path", "text.txt", "--out", "r"] if arguments.startswith("train") else []
    done = subprocess.run(
        [sys.executable, "-c", program, str(room), *arguments.split(), *text],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 2, done.stderr[-1000:]
    *warnings_of_torch, _ = done.stderr.splitlines()  # torch may warn about kernels
    assert not any("Traceback" in line or "restomod: error" in line for line in warnings_of_torch)
    assert "memory" in done.stderr
    assert not (tmp_path / "r").exists()
