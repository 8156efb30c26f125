"""Names of the files in a run's folder, and the check that no link leads out of it."""

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
    """Return the checkpoint folders of a run, in order of steps.

    Raises:
        OSError: the folder exists but cannot be listed.
    """
    folder = run / CHECKPOINTS
    names = os.listdir(folder) if folder.exists() else []
    return sorted((folder / name for name in names if STEP_FOLDER.fullmatch(name)), key=step_of)


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint folder, from its name."""
    return int(folder.name.removeprefix("step_"))


def require_run_inside(run: Path) -> None:
    """Raise UserError if a link in a run's folder leads out of it. Every reader of a run calls this first.

    The folder itself may be a link. `require_checkpoint_inside` checks the files of a checkpoint.
    """
    require_inside(run, *(run / name for name in (*RUN_FILES, CHECKPOINTS, EVALUATIONS)))
    require_inside(run, *run.glob(f"{CHECKPOINTS}/*"), *run.glob(f"{EVALUATIONS}/*"))


def require_checkpoint_inside(folder: Path, *listed: Path) -> None:
    """Raise UserError if a link leads out of a checkpoint's run, or out of a checkpoint without a run.

    In the hub's cache, files are links from `snapshots` to the sibling folder `blobs`, which are allowed.

    Args:
        folder: folder of the checkpoint.
        listed: further files, named in the checkpoint's record.
    """
    here = folder.absolute()
    within = folder
    if here.parent.name == CHECKPOINTS:
        within = here.parent.parent
        require_run_inside(within)
    elif here.parent.name == "snapshots":
        within = here.parent.parent
    require_inside(within, *folder.rglob("*"), *listed)
