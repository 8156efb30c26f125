"""Lines at the head and at the end of a run."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from restomod.runs.metrics import read_jsonl
from restomod.utils.check_result import CheckResult
from restomod.utils.text import duration


def closing_lines(folder: Path, checkpoints: list[Path], seconds: float, finished: bool) -> list[str]:
    """What stands at the end of a run: its losses, where it is, and what to do next, by the files that it has left.

    Args:
        folder: of the run.
        checkpoints: the newest that is there, or none.
        seconds: that it has taken.
        finished: whether it has made all of its steps.
    """
    run = quote(str(folder))
    records = read_jsonl(folder / "metrics.jsonl")
    made = max((r["step"] + 1 for r in records if r["kind"] == "train"), default=0)
    saved = int(checkpoints[-1].name.removeprefix("step_")) if checkpoints else 0
    if not finished:
        go_on = f"go on with: restomod train --resume {run}"
        if not checkpoints:
            return [f"stopped after {made} steps without a checkpoint, so they will be repeated; {go_on}"]
        if saved < made:
            again = f"the newest checkpoint is that of step {saved}, and the steps after it will be repeated"
            return [f"stopped after {made} steps; {again}; {go_on}"]
        return [f"stopped with the checkpoint of step {saved}; {go_on}"]
    lines = [f"finished in {duration(seconds)}"]
    for kind, name in (("train", "training loss"), ("val", "validation loss")):
        losses = [r["loss"] for r in records if r.get("kind") == kind and r.get("loss") is not None]
        if losses:
            lines.append(f"  {name:<15}  {losses[0]:.4f} at the start, {losses[-1]:.4f} at the end")
    if not checkpoints or saved < made:
        newest = f"the newest is that of step {saved}" if checkpoints else "there is none"
        lines.append(f"warning: the checkpoint of step {made} could not be saved; {newest}")
    return [
        *lines,
        f"everything is in {folder}; next:",
        f'  restomod sample {run} --prompt "..."     # let it write',
        f"  restomod train --resume {run} --steps N   # go on to step N",
        *(f"  AutoModelForCausalLM.from_pretrained({str(path)!r})   # use it elsewhere" for path in checkpoints),
    ]


def sanity_lines(verdicts: list[CheckResult]) -> list[str]:
    """The sanity checks in a few lines, for the head of a run: the first in full, the others by name, and warnings."""
    if not verdicts:
        return []
    first, *others = verdicts
    passed = [verdict.check for verdict in others if verdict.status == "pass"]
    warnings = [f"warning: {v.check}: {v.reason}" for v in verdicts if v.status == "warn"]
    head = [f"{first.check} {first.reason}"] if first.status == "pass" else []
    too = [f"checked too: {', '.join(passed)}"] if passed else []
    return [*head, *too, *warnings]
