"""A run as the JSON object that the page, the Markdown and the pictures are made of. Needs no torch.

All text in it is shown as text and nothing else, by whoever shows it.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from restomod.analysis.report.config import (
    changed_settings,
    describe_model,
    environment_rows,
    newest_checkpoint,
    preset_of,
    shown_settings,
)
from restomod.analysis.report.curves import number, page_curves, task_curves
from restomod.analysis.report.evals import HEADLINES, evaluation_tables, lines_of
from restomod.analysis.report.examined import examined
from restomod.analysis.report.usage import Prices, Usage, flops_text, quantity, usage, usage_rows
from restomod.config.presets import preset
from restomod.config.serialize import to_dict
from restomod.runs.config_diff import trains_on_fineweb_edu
from restomod.runs.reader import Record, Run
from restomod.utils.text import duration

SAMPLED_STEPS = 40  # of which samples are kept
SAMPLE_CHARACTERS = 4000
EVENTS = 200  # and starts, that are shown
SILENT = 120.0  # seconds without a record after which a run is no longer called going on


def page_run(run: Run, name: str, prices: Prices, now: float | None = None) -> dict[str, Any]:
    """Everything that a report says of a run, as values of JSON.

    Args:
        run: the run.
        name: what to call it.
        prices: what the machine costs, if that is known.
        now: seconds since 1970; None: the time it is.
    """
    used = usage(run)
    name_of_preset = preset_of(run)
    state, remark = status(run, used, time.time() if now is None else now)
    return {
        "name": name,
        "folder": str(run.folder),
        "state": state,
        "remark": remark,
        "about": about(run),
        "figures": figures(run, used, prices),
        "batch_tokens": run.config.batch_tokens,
        "curves": page_curves(run),
        "tasks": task_curves(run, HEADLINES),
        "lines": lines_of(run),
        "fineweb_edu": trains_on_fineweb_edu(run),
        "events": events(run),
        "evaluations": evaluation_tables(run),
        "examined": examined(run, newest_checkpoint(run.folder)),
        "samples": samples(run),
        "preset": name_of_preset,
        "changed": [list(row) for row in changed_settings(run.config, preset(name_of_preset))],
        "settings": [list(row) for row in shown_settings(to_dict(run.config)).items()],
        "environments": [[list(row) for row in environment_rows(e)] for e in run.environments[:EVENTS]],
        "usage": [list(row) for row in usage_rows(used, prices)],
    }


def about(run: Run) -> list[list[str]]:
    """What was trained on what, as names and values."""
    manifest = run.manifest
    tokens = manifest.get("tokens")
    data = str(manifest.get("name") or run.config.data.source)
    first = run.environments[0] if run.environments else {}
    return [
        ["Model", describe_model(run.config)],
        ["Parameters", f"{run.parameters:,}"],
        ["Data", f"{data}, {tokens:,} tokens" if tokens is not None else data],
        ["Device", ", ".join(first[key] for key in ("device", "precision") if first.get(key))],
        ["Started", str(first.get("started", "unknown"))],
        ["Revision", str(first.get("git_revision") or "unknown")[:12]],
    ]


def losses(run: Run) -> list[tuple[int, float]]:
    """Steps and validation losses, those that are numbers."""
    return [(r["step"], number(r.get("loss"))) for r in run.val if math.isfinite(number(r.get("loss")))]


def figures(run: Run, used: Usage, prices: Prices) -> list[list[str]]:
    """The few numbers that matter most: name, value, remark."""
    rows = []
    val = losses(run)
    train = [number(r.get("loss")) for r in run.train if math.isfinite(number(r.get("loss")))]
    if val:
        step, loss = val[-1]
        best_step, best = min(val, key=lambda at: at[1])
        better = f"best {best:.4f} at step {best_step:,}" if best < loss else f"step {step:,}, the lowest"
        rows.append(["Validation loss", f"{loss:.4f}", better])
    elif train:
        rows.append(["Training loss", f"{np.mean(train[-20:]):.4f}", f"mean of the last {len(train[-20:])} steps"])
    for task, points in task_curves(run, HEADLINES).items():
        # the newest; at one step that of the most examples
        step, n, share = max(
            (x, n, y) for x, n, y in zip(points["x"], points["examples"], points["y"], strict=True) if y is not None
        )
        of = f", {n:,} examples" if n else ""
        rows.append([f"{task}, {points['metric']}", f"{100 * share:.1f} %", f"step {step:,}{of}"])
    rows.append(["Tokens", quantity(used.tokens), f"step {used.steps:,} of {run.config.steps:,}"])
    speeds = [number(r.get("tokens_per_second")) for r in run.train]
    speeds = [speed for speed in speeds if math.isfinite(speed)]
    if speeds:
        utilisation = [number(r.get("mfu")) for r in run.train if math.isfinite(number(r.get("mfu")))]
        mfu = f", MFU {np.median(utilisation):.1%}" if utilisation else ""
        rows.append(["Tokens/s", f"{np.median(speeds):,.0f}", f"median of the steps{mfu}"])
    if used.wall is None or used.idle is None:
        rows.append(["Time in steps", duration(used.in_steps), "the wall clock is not known"])
    else:
        rows.append(["Wall clock", duration(used.wall), f"{duration(used.idle)} of it not in steps"])
    rows.append(["Compute", flops_text(used.flops), "FLOPs of the model"])
    if prices.per_hour is not None:
        rows.append(["Cost", f"${used.cost(prices.per_hour):,.2f}", used.priced(prices.per_hour)])
    return rows


def status(run: Run, used: Usage, now: float) -> tuple[str, str]:
    """Whether a run is finished, running, stopped or has not begun, and a remark."""
    config, train = run.config, run.train
    newest = max((at for r in run.records if math.isfinite(at := number(r.get("time")))), default=None)
    slowest = max((number(r.get("ms")) / 1000 for r in train[-50:] if math.isfinite(number(r.get("ms")))), default=0.0)
    loss = number(train[-1].get("loss")) if train else math.nan
    if used.steps >= config.steps or (config.target_loss is not None and loss <= config.target_loss):
        return "finished", f"after {used.steps:,} steps"
    where = f"step {used.steps:,} of {config.steps:,}"
    if newest is None:
        return ("stopped", where) if train else ("waiting", "nothing is logged yet")
    quiet = now - newest
    if quiet > max(SILENT, 20 * slowest):
        return "stopped", f"{where}; nothing logged for {duration(quiet)}"
    steps_left = config.steps - used.steps
    recent = [number(r.get("ms")) for r in train[-50:] if math.isfinite(number(r.get("ms")))]
    left = f"; about {duration(steps_left * float(np.median(recent)) / 1000)} left" if recent else ""
    return "running", where + left


def events(run: Run) -> list[list[Any]]:
    """What went wrong along the way, as steps and words: updates refused, returns to a checkpoint, new starts."""
    found: list[list[Any]] = []
    for record in run.records:
        step = record["step"]
        if record["kind"] == "rollback":
            found.append([step, f"went back here from step {record.get('failed_step')}, past the data in between"])
        elif record["kind"] == "train" and "skipped" in record:
            found.append([step, f"no update: {record['skipped']}"])
        elif record["kind"] == "train" and not math.isfinite(number(record.get("loss"))):
            found.append([step, "the loss is not a finite number"])
    if len(run.environments) > 1:
        for environment in run.environments[1:]:
            found.append([None, f"resumed {environment.get('started', '')}"])
    more = len(found) - EVENTS
    return [*found[:EVENTS], [None, f"and {more:,} more"]] if more > 0 else found


def samples(run: Run) -> list[Record]:
    """What the model wrote, of at most `SAMPLED_STEPS` steps spread over the run, the first and last among them."""
    steps = sorted({record["step"] for record in run.samples})
    if len(steps) > SAMPLED_STEPS:
        steps = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, SAMPLED_STEPS).astype(int))]
    return [
        {
            "step": record["step"],
            "prompt": record["prompt"][:SAMPLE_CHARACTERS],
            "text": record["text"][:SAMPLE_CHARACTERS],
        }
        for record in run.samples
        if record["step"] in set(steps)
    ]
