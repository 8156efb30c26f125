"""Where a model is strong and weak: what `restomod report --examine` has left in the run's folder, read and checked."""

from __future__ import annotations

from typing import Any

from restomod.errors import UserError
from restomod.experiments.runs import Record, Run
from restomod.json_files import read_json

FILE = "examined.json"
FORMAT = "restomod-examined-1"


def read_examined(run: Run) -> Record | None:
    """What was examined last; None where there is nothing, or nothing of this format."""
    path = run.folder / FILE
    try:
        values = read_json(path, "examination of the run's model") if path.exists() else None
    except UserError:
        return None  # it is only a cache
    return values if isinstance(values, dict) and values.get("format") == FORMAT else None


def examined(run: Run, newest: str | None) -> dict[str, Any]:
    """What a report says of it: the examination, or ``reason`` why there is none.

    Args:
        run: the run.
        newest: the name of its newest checkpoint.
    """
    values = read_examined(run)
    if values is None:
        how = f"`restomod report {run.folder} --examine` finds it out"
        return {"reason": how if newest else "the run has no checkpoint yet"}
    old = newest is not None and values.get("checkpoint") != newest
    return values | {"remark": f"there is a newer checkpoint, {newest}: --examine again" if old else ""}
