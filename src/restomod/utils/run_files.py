"""The files of a run's folder, and the check that none is a link out of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from restomod.utils.files import require_inside

RUN_FILES = (
    "config.json",
    "environment.json",
    "data.json",
    "metrics.jsonl",
    "samples.jsonl",
    "error_analysis.json",
    "track.json",
    ".lock",
)
CHECKPOINTS = "checkpoints"
EVALUATIONS = "evals"
STEP_FOLDER = re.compile(r"step_\d+")


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest step first. Raises OSError: they cannot be listed, but may exist."""
    folder = run / CHECKPOINTS
    names = os.listdir(folder) if folder.exists() else []
    return sorted((folder / name for name in names if STEP_FOLDER.fullmatch(name)), key=step_of)


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder, from its name."""
    return int(folder.name.removeprefix("step_"))


def require_run_inside(run: Path) -> None:
    """Refuse links out of a run's folder with UserError. Every reader of a run calls this first.

    The folder may be a link itself. The files of a checkpoint are checked by `require_checkpoint_inside`.
    """
    require_inside(run, *(run / name for name in (*RUN_FILES, CHECKPOINTS, EVALUATIONS)))
    require_inside(run, *run.glob(f"{CHECKPOINTS}/*"), *run.glob(f"{EVALUATIONS}/*"))


def require_checkpoint_inside(folder: Path, *listed: Path) -> None:
    """Refuse links out of the run of a checkpoint, or out of a checkpoint that is in no run, with UserError.

    ``listed`` are files that its record names. In the hub's cache, files are links to `blobs` beside `snapshots`.
    """
    here = folder.absolute()
    within = folder
    if here.parent.name == CHECKPOINTS:
        within = here.parent.parent
        require_run_inside(within)
    elif here.parent.name == "snapshots":
        within = here.parent.parent
    require_inside(within, *folder.rglob("*"), *listed)
