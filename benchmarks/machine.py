"""Environment of a measurement: machine, packages and revisions of other projects."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import BenchPlan
from restomod.checks.machine import available_bytes, usable_processors
from restomod.engine.device import choose_dtype, describe_device, dtype_name
from restomod.runs.folder import environment as of_run

PACKAGES = ("numpy", "tiktoken", "tokie", "transformers", "tokenizers", "litgpt", "safetensors")


def environment(plan: BenchPlan) -> dict[str, Any]:
    """Return the environment of a run plus processors, memory, load, packages and revisions of other projects."""
    device = torch.device(plan.device)
    about = of_run(describe_device(device), dtype_name(choose_dtype("auto", device)))
    return about | {
        "command": plan.command_line(),
        "smoke": plan.smoke,
        "processors": usable_processors(),
        "processor": describe_device(torch.device("cpu")),
        "available_memory_bytes": available_bytes(torch.device("cpu")),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "cuda": torch.version.cuda,
        "packages": {name: version(name) for name in PACKAGES},
        "peers": {name: revision(path) for name, path in plan.peers.items()},
    }


def version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def revision(checkout: Path) -> str | None:
    """Return the commit of a checkout, from its file REVISION or from git; None if unknown."""
    if (checkout / "REVISION").exists():
        return (checkout / "REVISION").read_text().strip()
    if not (checkout / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None if done.returncode == 0 else None
