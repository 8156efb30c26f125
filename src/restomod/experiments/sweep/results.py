"""Results of a sweep, as a printed table and as `sweep.json`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from restomod.analysis.compare.groups import Summary, summarize
from restomod.config.serialize import to_dict
from restomod.experiments.sweep.gpu_time import TrialTimes
from restomod.experiments.sweep.space import Value, label
from restomod.experiments.sweep.study import Store, SweepPlan
from restomod.utils.files import write_json_atomically
from restomod.utils.terminal import Table, print_table
from restomod.utils.text import duration

State = Literal["finished", "pruned", "failed", "running", "stopped"]
ORDER: list[State] = ["finished", "pruned", "running", "stopped", "failed"]
STATES: dict[str, State] = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}


@dataclass(frozen=True)
class SweepResult:
    """State and result of a trial."""

    number: int
    """Number of the trial, from 0."""
    name: str
    """Name of the trial's folder in `trials/`."""
    state: State
    """State; "stopped" is a trial that has started and that no process trains."""
    loss: float | None
    """Validation loss in nats per token, at the last step or where the trial was pruned; None if there is none."""
    step: int | None
    """Step at which the loss was measured."""
    parameters: dict[str, Value]
    """Swept fields and their values."""
    seed: int
    """Seed of the run."""
    seconds: float
    """Seconds of all attempts, including start-up and validation."""
    gpu_seconds: float
    """Seconds times GPUs of all attempts; trials that share a GPU share its seconds."""
    reason: str | None
    """Reason of a failure or pruning; None otherwise."""


def collect_results(store: Store, times: TrialTimes) -> list[SweepResult]:
    """Return all trials started so far, best first. The caller must hold the sweep's lock."""
    found = []
    for trial in store.trials():
        notes = trial.user_attrs
        name = notes["name"]
        found.append(
            SweepResult(
                trial.number,
                name,
                STATES.get(trial.state.name) or ("running" if store.is_running(name) else "stopped"),
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


def configurations(found: list[SweepResult]) -> list[tuple[dict[str, Value], Summary]]:
    """Summarize the losses of finished trials by parameters, lowest mean first."""
    by_label: dict[str, list[SweepResult]] = {}
    for result in found:
        if result.state == "finished":
            by_label.setdefault(repr(sorted(result.parameters.items())), []).append(result)
    rows = []
    for same in by_label.values():
        rows.append((same[0].parameters, summarize([result.loss for result in same if result.loss is not None])))
    return sorted(rows, key=lambda row: row[1].mean)


def write_results(found: list[SweepResult], store: Store, price: float | None) -> None:
    """Write the results, the plan, time and cost to `sweep.json`.

    Args:
        found: results of all trials.
        store: trials of the sweep.
        price: US dollars per GPU and hour; None if unknown.
    """
    gpu_hours = sum(result.gpu_seconds for result in found) / 3600
    content = {
        "plan": to_dict(store.plan),
        "trials": [dataclasses.asdict(result) for result in found],
        "configurations": [{"parameters": p, **dataclasses.asdict(loss)} for p, loss in configurations(found)],
        "hours": sum(result.seconds for result in found) / 3600,
        "gpu_hours": gpu_hours,
        "dollars": None if price is None else gpu_hours * price,
    }
    write_json_atomically(store.folder / "sweep.json", content, store.folder)


def show_sweep_results(found: list[SweepResult], folder: Path, plan: SweepPlan) -> None:
    """Print the table of trials, a summary over seeds, and where the results are."""
    seeds = ["seed"] if plan.seeds > 1 else []
    rows, notes = [], []
    for rank, r in enumerate(found, 1):
        row = [str(rank) if r.state == "finished" else "", "" if r.loss is None else f"{r.loss:.4f}"]
        row += [label(r.parameters), *(str(r.seed) for _ in seeds), "" if r.step is None else str(r.step)]
        outcome = "" if r.state == "finished" else f"{r.state}: {r.reason}" if r.state == "failed" else r.state
        rows.append([*row, duration(r.seconds), outcome])
    for parameters, loss in configurations(found) if seeds else []:
        spread = " (standard deviation)" if loss.sd is not None else ""
        notes.append(f"{label(parameters)}: {loss.shown()}{spread}, {loss.n} seeds")
    notes.append(f"results: {folder}/sweep.json; runs: {folder}/trials/")
    print_table(Table("", ["", "validation loss", "parameters", *seeds, "step", "time", ""], rows, notes))
