"""Results of a sweep: a table, best first, and `sweep.json`."""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from restomod.config.serialize import to_dict
from restomod.experiments.sweep.gpu_time import TrialTimes
from restomod.experiments.sweep.space import Value, label
from restomod.experiments.sweep.study import Store, SweepPlan
from restomod.utils.files import write_json_atomically
from restomod.utils.terminal import Terminal
from restomod.utils.text import duration, visible

State = Literal["finished", "pruned", "failed", "running", "stopped"]
ORDER: list[State] = ["finished", "pruned", "running", "stopped", "failed"]
STATES: dict[str, State] = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}


@dataclass(frozen=True)
class SweepResult:
    """State and result of a trial."""

    number: int
    name: str
    """Name of its folder in `trials/`."""
    state: State
    """stopped: started, but no process works on it."""
    loss: float | None
    """Validation loss in nats per token, at the end or where the trial was pruned."""
    step: int | None
    """Step at which the loss was measured."""
    parameters: dict[str, Value]
    seed: int
    seconds: float
    """Sum over all attempts, startup and validation included."""
    gpu_seconds: float
    """Seconds times GPUs (processes); trials that share a GPU share its seconds."""
    reason: str | None
    """Why there is no result."""


def collect_results(store: Store, times: TrialTimes) -> list[SweepResult]:
    """All trials started so far, best first. Requires the sweep's lock.

    Args:
        store: the sweep.
        times: from `Store.times`.
    """
    found = []
    for trial in store.trials():
        notes = trial.user_attrs
        name = notes["name"]
        found.append(
            SweepResult(
                trial.number,
                name,
                STATES.get(trial.state.name) or ("running" if store.at_work(name) else "stopped"),
                trial.value,
                notes.get("step"),
                dict(trial.params),
                notes["seed"],
                round(times.seconds.get(trial.number, 0.0), 3),
                round(times.gpu_seconds.get(trial.number, 0.0), 3),
                notes.get("reason"),
            )
        )
    return sorted(found, key=lambda r: (ORDER.index(r.state), math.inf if r.loss is None else r.loss, r.number))


def configurations(found: list[SweepResult]) -> list[dict[str, Any]]:
    """Finished trials grouped by parameters, best first: mean and standard deviation (n - 1) over the seeds."""
    by_label: dict[str, list[SweepResult]] = {}
    for result in found:
        if result.state == "finished":
            by_label.setdefault(repr(sorted(result.parameters.items())), []).append(result)
    rows = []
    for same in by_label.values():
        losses = [result.loss for result in same if result.loss is not None]
        sd = statistics.stdev(losses) if len(losses) > 1 else None
        rows.append({"parameters": same[0].parameters, "n": len(losses), "mean": statistics.fmean(losses), "sd": sd})
    return sorted(rows, key=lambda row: row["mean"])


def write_results(found: list[SweepResult], store: Store, price: float | None) -> None:
    """Write `sweep.json`."""
    gpu_hours = sum(result.gpu_seconds for result in found) / 3600
    content = {
        "plan": to_dict(store.plan),
        "trials": [dataclasses.asdict(result) for result in found],
        "configurations": configurations(found),
        "hours": sum(result.seconds for result in found) / 3600,
        "gpu_hours": gpu_hours,
        "dollars": None if price is None else gpu_hours * price,
    }
    write_json_atomically(store.folder / "sweep.json", content, store.folder)


def show_results(found: list[SweepResult], folder: Path, plan: SweepPlan) -> None:
    """Print the trials, best first, and the folder."""
    console = Terminal(highlight=False)
    if not console.is_terminal:
        console.width = 200
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("", "validation loss", "parameters", *(["seed"] if plan.seeds > 1 else []), "step", "time", ""):
        table.add_column(heading, justify="right" if heading in ("validation loss", "step", "time") else "left")
    for rank, r in enumerate(found, 1):
        cells = [
            str(rank) if r.state == "finished" else "",
            "" if r.loss is None else f"{r.loss:.4f}",
            label(r.parameters),
            *([str(r.seed)] if plan.seeds > 1 else []),
            "" if r.step is None else str(r.step),
            duration(r.seconds),
            "" if r.state == "finished" else f"{r.state}: {r.reason}" if r.state == "failed" else r.state,
        ]
        table.add_row(*(Text(visible(cell)) for cell in cells), style="" if r.state == "finished" else "dim")
    console.print(table)
    if plan.seeds > 1:
        for row in configurations(found):
            spread = f" ± {row['sd']:.4f} (standard deviation)" if row["sd"] is not None else ""
            console.print(Text(f"{label(row['parameters'])}: {row['mean']:.4f}{spread}, {row['n']} seeds"))
    console.print(Text(f"results: {folder}/sweep.json; runs: {folder}/trials/"), soft_wrap=True)
