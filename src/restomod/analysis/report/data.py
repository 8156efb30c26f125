"""Content of a report for one run, as JSON values for the page, Markdown and PNG files. Does not import torch.

Texts are not escaped here. The code that shows them must escape them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shlex
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field
from typing_extensions import TypedDict

from restomod.analysis.health.history import number
from restomod.analysis.report.curves import run_curves, task_curves
from restomod.analysis.report.evals import HEADLINES, evaluation_tables, reference_lines
from restomod.analysis.report.usage import HourlyRates, Usage, flops_text, run_usage, usage_rows
from restomod.config.presets import PRESETS, is_preset, preset
from restomod.config.run import RunConfig
from restomod.config.serialize import to_dict
from restomod.data.manifest import Count
from restomod.runs.config_diff import differing, flatten, trains_on_fineweb_edu
from restomod.runs.reader import Finite, Record, Run, Text, newest_checkpoint, read_optional
from restomod.utils.json_files import as_tuple
from restomod.utils.redaction import redact_command
from restomod.utils.text import duration, short_count

SAMPLED_STEPS = 40  # maximum number of steps whose samples are shown
SAMPLE_CHARACTERS = 4000
EVENTS = 200  # maximum number of events, and of starts
SILENT = 120.0  # seconds without a record after which a run counts as stopped

ERRORS_FILE = "error_analysis.json"
ERRORS_FORMAT = "restomod-error-analysis-1"


def run_data(run: Run, name: str, rates: HourlyRates) -> dict[str, Any]:
    """Return the content of a report for one run as JSON values.

    Args:
        run: run to show.
        name: name of the run in the report.
        rates: price and power, for cost and energy.
    """
    used = run_usage(run)
    name_of_preset = preset_of(run)
    state, remark = run_state(run, used, time.time())
    tasks = task_curves(run, HEADLINES)
    return {
        "name": name,
        "folder": str(run.folder),
        "state": state,
        "remark": remark,
        "about": about(run),
        "figures": headline_numbers(run, used, rates, tasks),
        "batch_tokens": run.config.batch_tokens,
        "curves": run_curves(run),
        "tasks": tasks,
        "lines": reference_lines(run),
        "fineweb_edu": trains_on_fineweb_edu(run),
        "events": events(run),
        "evaluations": evaluation_tables(run),
        "error_analysis": error_analysis_or_reason(run),
        "samples": samples(run),
        "preset": name_of_preset,
        "changed": changed_settings(run.config, preset(name_of_preset)),
        "settings": list(shown_settings(run.config).items()),
        "environments": [environment_rows(e) for e in run.environments[:EVENTS]],
        "usage": usage_rows(used, rates),
    }


def about(run: Run) -> list[list[str]]:
    """Return the table "Model, data, machine": names and values."""
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


def _numbers(records: Sequence[Record], name: str) -> list[float]:
    """Return the finite values of a metric in the order of the records."""
    return [value for record in records if math.isfinite(value := number(record.get(name)))]


def headline_numbers(run: Run, used: Usage, rates: HourlyRates, tasks: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the most important numbers of a run: name, value, remark.

    Args:
        run: run to show.
        used: resource usage of the run.
        rates: price and power.
        tasks: accuracies from `restomod.analysis.report.curves.task_curves`.
    """
    rows = []
    val = [(loss, r["step"]) for r in run.val if math.isfinite(loss := number(r.get("loss")))]
    train = _numbers(run.train, "loss")[-20:]
    if val:
        (loss, step), (best, best_step) = val[-1], min(val)
        remark = f"best {best:.4f} at step {best_step:,}" if best < loss else f"step {step:,}, the best so far"
        rows.append(["Validation loss", f"{loss:.4f}", remark])
    elif train:
        rows.append(["Training loss", f"{np.mean(train):.4f}", f"mean of the last {len(train)} steps"])
    for task, points in tasks.items():
        # newest step first, then the largest number of examples
        columns = zip(points["x"], points["examples"], points["y"], strict=True)
        step, n, share = max(point for point in columns if point[2] is not None)
        of = f", {n:,} examples" if n else ""
        rows.append([f"{task}, {points['metric']}", f"{100 * share:.1f} %", f"step {step:,}{of}"])
    rows.append(["Tokens", short_count(used.tokens), f"step {used.steps:,} of {run.config.steps:,}"])
    if speeds := _numbers(run.train, "tokens_per_second"):
        utilisation = _numbers(run.train, "mfu")
        mfu = f", MFU {np.median(utilisation):.1%}" if utilisation else ""
        rows.append(["Tokens/s", f"{np.median(speeds):,.0f}", f"median of the steps{mfu}"])
    if used.wall is None or used.overhead is None:
        rows.append(["Time in steps", duration(used.in_steps), "the wall clock is unknown"])
    else:
        rows.append(["Wall clock", duration(used.wall), f"including {duration(used.overhead)} of overhead"])
    rows.append(["Compute", flops_text(used.flops), "FLOPs of the model"])
    if rates.per_hour is not None:
        rows.append(["Cost", f"${used.cost(rates.per_hour):,.2f}", used.priced(rates.per_hour)])
    return rows


def run_state(run: Run, used: Usage, now: float) -> tuple[str, str]:
    """Return the state of a run ("finished", "running", "stopped" or "waiting") and a remark.

    Args:
        run: run to show.
        used: resource usage of the run.
        now: current time in seconds since the epoch.
    """
    config, train = run.config, run.train
    newest = max(_numbers(run.records, "time"), default=None)
    recent = _numbers(train[-50:], "ms")
    loss = number(train[-1].get("loss")) if train else math.nan
    if used.steps >= config.steps or (config.target_loss is not None and loss <= config.target_loss):
        return "finished", f"after {used.steps:,} steps"
    where = f"step {used.steps:,} of {config.steps:,}"
    if newest is None:
        return ("stopped", where) if train else ("waiting", "no records yet")
    silent = now - newest
    if silent > max(SILENT, 20 * max(recent, default=0.0) / 1000):
        return "stopped", f"{where}; no new record for {duration(silent)}"
    left = (config.steps - used.steps) * float(np.median(recent)) / 1000 if recent else None
    return "running", where if left is None else f"{where}; about {duration(left)} left"


def events(run: Run) -> list[list[Any]]:
    """Return skipped updates, rollbacks and restarts: step (None: unknown) and description."""
    found: list[list[Any]] = []
    for record in run.records:
        step = record["step"]
        if record["kind"] == "rollback":
            found.append([step, f"rollback from step {record.get('failed_step')}; the data in between is skipped"])
        elif record["kind"] == "train" and "skipped" in record:
            found.append([step, f"update skipped: {record['skipped']}"])
        elif record["kind"] == "train" and not math.isfinite(number(record.get("loss"))):
            found.append([step, "the loss is not finite"])
    found += [[None, f"resumed {environment.get('started', '')}"] for environment in run.environments[1:]]
    more = len(found) - EVENTS
    return [*found[:EVENTS], [None, f"and {more:,} more"]] if more > 0 else found


def samples(run: Run) -> list[Record]:
    """Return the samples of at most `SAMPLED_STEPS` steps, spread over the run, including the first and the last."""
    steps = sorted({record["step"] for record in run.samples})
    if len(steps) > SAMPLED_STEPS:
        steps = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, SAMPLED_STEPS).astype(int))]
    return [
        {"step": record["step"]} | {key: record[key][:SAMPLE_CHARACTERS] for key in ("prompt", "text")}
        for record in run.samples
        if record["step"] in set(steps)
    ]


# --- configuration ---------------------------------------------------------------------------------------------------


def shown_settings(config: RunConfig) -> dict[str, str]:
    """Return all settings as JSON text by dotted name."""
    return {name: json.dumps(value, ensure_ascii=False) for name, value in flatten(to_dict(config)).items()}


def changed_settings(config: RunConfig, other: RunConfig) -> list[tuple[str, str, str]]:
    """Return the settings that differ: name, value in ``config``, value in ``other``."""
    return [(name, *values) for name, values in differing([shown_settings(config), shown_settings(other)]).items()]


def preset_of(run: Run) -> str:
    """Return the preset in the first command of a run, or else the most similar preset."""
    command = run.environments[0].get("command") if run.environments else None
    words = [str(word) for word in command] if isinstance(command, list) else []
    named = [after for word, after in itertools.pairwise(words) if word == "train" and is_preset(after)]
    return named[0] if named else min(PRESETS, key=lambda name: len(changed_settings(run.config, preset(name))))


def describe_model(config: RunConfig) -> str:
    """Return the sizes of a model and its differences from GPT-2's architecture, in one line."""
    model = config.model
    default = type(model)()
    sizes = f"{model.n_layer} layers, {model.n_head} heads, width {model.n_embd}, {model.n_positions:,} positions"
    parts = [
        f"{field.name} {value}"
        for field in dataclasses.fields(model)
        if field.name not in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
        and (value := getattr(model, field.name)) != getattr(default, field.name)
    ]
    return f"{sizes}; {', '.join(parts)}" if parts else f"{sizes}; GPT-2 architecture"


def environment_rows(environment: Record) -> list[tuple[str, str]]:
    """Return names and values of a `restomod.runs.reader.Environment`; ``--then`` and secrets are removed."""
    rows = []
    for name, value in environment.items():
        if isinstance(value, list):  # the command
            value = " ".join(["restomod", *map(shlex.quote, redact_command(value[1:]))])
        rows.append((name.replace("_", " "), "unknown" if value is None else str(value)))
    return rows


# --- error analysis --------------------------------------------------------------------------------------------------

Share = Annotated[float, Field(ge=0, le=1)]


class TokenKind(TypedDict):
    """Loss of one kind of token."""

    name: Text
    meaning: Text
    loss: Finite
    share: Share
    """Share of the tokens."""
    of_loss: Finite
    """Share of the total loss."""


class Positions(TypedDict):
    """Mean losses ``y`` by position ``x`` in the window."""

    x: list[Annotated[float, Field(gt=0, le=1e12)]]
    y: list[Finite]


class SourceLoss(TypedDict):
    """Loss of one source of a mix."""

    name: Text
    loss: Finite
    tokens: Count


class Passage(TypedDict):
    """Passage of the validation text with the loss of every token."""

    loss: Finite
    """Mean loss of the tokens."""
    before: Text
    """Text before the passage."""
    tokens: list[Annotated[tuple[Text, Finite], BeforeValidator(as_tuple)]]
    """Text and loss of each token."""


class ErrorAnalysis(TypedDict):
    """Content of `error_analysis.json`; losses are in nats per token."""

    format: Literal["restomod-error-analysis-1"]
    checkpoint: Text
    """Folder name of the checkpoint."""
    step: Count
    asked: Count
    """Requested number of validation tokens."""
    tokens: Count
    """Number of evaluated tokens."""
    loss: Finite
    kinds: Annotated[list[TokenKind], Field(min_length=1)]
    positions: Positions
    sources: list[SourceLoss]
    best: list[Passage]
    worst: list[Passage]


def read_error_analysis(run: Run) -> Record | None:
    """Read the error analysis in a run's folder; None if it is missing or, with a warning, damaged."""
    values = read_optional(run.folder / ERRORS_FILE, "error analysis", ErrorAnalysis, run.warn)
    if values is not None and len(values["positions"]["x"]) != len(values["positions"]["y"]):
        run.warn(f"warning: {run.folder / ERRORS_FILE} is skipped: its positions and losses differ in number")
        return None
    return None if values is None else dict(values)


def error_analysis_or_reason(run: Run) -> dict[str, Any]:
    """Return the error analysis with a ``remark`` on its age, or the ``reason`` why it is not available."""
    values, newest = read_error_analysis(run), newest_checkpoint(run.folder)
    if values is None:
        how = f"create it with `restomod report {run.folder} --error-analysis`"
        return {"reason": how if newest else "the run has no checkpoint yet"}
    old = newest is not None and values["checkpoint"] != newest
    return values | {"remark": f"There is a newer checkpoint, {newest}: repeat --error-analysis." if old else ""}
