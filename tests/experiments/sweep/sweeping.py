"""Sweeps as processes for tests, with real training or with `stand_in`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.experiments.sweep import stand_in

STAND_IN = (
    "import sys; from restomod.experiments.sweep import worker; "
    f"worker.TRAIN = (sys.executable, {stand_in.__file__!r}); "
    "from restomod.cli import main; sys.exit(main(sys.argv[1:]))"
)


def start(folder: Path, *arguments: str, real: bool = False, pause: float = 0.0) -> subprocess.Popen[str]:
    """Start `restomod sweep quickstart ARGUMENTS --out FOLDER` in the parent of ``folder``."""
    program = ("-m", "restomod") if real else ("-c", STAND_IN)
    return subprocess.Popen(
        [sys.executable, *program, "sweep", "quickstart", *arguments, "--out", str(folder)],
        cwd=folder.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1", "STAND_IN_PAUSE": str(pause)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(folder: Path, *arguments: str, real: bool = False, pause: float = 0.0) -> tuple[int, str]:
    """Run a sweep and return its exit code and output."""
    process = start(folder, *arguments, real=real, pause=pause)
    said, _ = process.communicate(timeout=900)
    return process.returncode, said


def trials(folder: Path) -> list[dict[str, Any]]:
    """Return the trials of `sweep.json`, by number."""
    return sorted(json.loads((folder / "sweep.json").read_text())["trials"], key=lambda t: t["number"])


def outcomes(folder: Path) -> list[tuple[Any, ...]]:
    """Return the values that interruptions must not change: names, states, parameters, losses."""
    return [(t["name"], t["state"], t["loss"], t["step"], t["parameters"], t["seed"]) for t in trials(folder)]


def losses(folder: Path) -> dict[str, list[tuple[str, int, float]]]:
    """Return all losses of all trials, from the runs."""
    found = {}
    for path in sorted(folder.glob("trials/*/metrics.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.parent.name] = [(r["kind"], r["step"], r["loss"]) for r in records if "loss" in r]
    return found


def starts(folder: Path) -> dict[str, int]:
    """Return the number of starts of each trial."""
    return {path.parent.name: len(path.read_text().split()) for path in folder.glob("trials/*/starts.txt")}
