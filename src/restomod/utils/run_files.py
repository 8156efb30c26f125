"""The files of a run's folder, and the check that none is a link out of it."""

from __future__ import annotations

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


def require_run_inside(run: Path) -> None:
    """Refuse links out of a run's folder, which may be a link itself. Whatever reads a run calls this first.

    The files within a checkpoint are checked by `require_checkpoint_inside`.

    Raises:
        UserError: a file or folder of the run leads elsewhere.
    """
    require_inside(run, *(run / name for name in (*RUN_FILES, CHECKPOINTS, EVALUATIONS)))
    require_inside(run, *run.glob(f"{CHECKPOINTS}/*"), *run.glob(f"{EVALUATIONS}/*"))


def require_checkpoint_inside(folder: Path, *listed: Path) -> None:
    """Refuse links out of the run of a checkpoint, or out of a checkpoint that is in no run.

    In the cache of the Hugging Face hub, files are links to `blobs` beside `snapshots`.

    Args:
        folder: the checkpoint.
        listed: files that its record names.

    Raises:
        UserError: a file of the checkpoint, or of its run, leads elsewhere.
    """
    here = folder.absolute()
    within = folder
    if here.parent.name == CHECKPOINTS:
        within = here.parent.parent
        require_run_inside(within)
    elif here.parent.name == "snapshots":
        within = here.parent.parent
    require_inside(within, *folder.rglob("*"), *listed)
