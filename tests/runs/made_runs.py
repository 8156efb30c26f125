"""Folders of runs that were never trained, with known numbers: one second a step, a loss of 3 + 8 exp(-s / 10)."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

from restomod.config.presets import preset
from restomod.config.run import RunConfig, SamplingConfig
from restomod.config.serialize import to_dict
from restomod.model.flops import flops_per_token, parameter_count

START = 1_763_700_000  # seconds since 1970, as `stamp` writes them
HOSTILE = (
    "</script><script>window.hurt = 1</script><img src=x onerror='window.hurt = 2'> <b>bold</b> & \u2028 "
    "{{x}} %s @DATA@ `|` \x1b[2J \u202ertl"
)


def stamp(seconds: float) -> str:
    """As environment.json has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def loss_at(step: int) -> float:
    """The training loss of a made run."""
    return 3 + 8 * math.exp(-step / 10)


def make_run(
    folder: Path,
    steps: int = 40,
    config: RunConfig | None = None,
    timed: bool = True,
    text: str = "a text",
    data: str = "python-stdlib",
    spikes: dict[int, float] | None = None,
) -> Path:
    """A finished run: `start`, 5 seconds later its first step, each of one second; validations every 10 steps.

    Args:
        folder: to make.
        steps: how many.
        config: of the run; by default quickstart's with so many steps.
        timed: whether records say when they were made.
        text: what its samples, prompts, device and data say.
        data: name of its data.
        spikes: training losses that are others.
    """
    config = dataclasses.replace(config or preset("quickstart"), steps=steps)
    if text != "a text":
        config = dataclasses.replace(config, sampling=SamplingConfig(prompts=(text,)))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "data.json").write_text(json.dumps({"name": data, "fingerprint": "0", "tokens": 1000, "splits": {}}))
    environment = {"restomod": "0.1.0", "git_revision": "abc", "device": text, "precision": "fp32"}
    work = flops_per_token(config.model, config.sequence_length)
    environment |= {"parameters": parameter_count(config.model), "flops_per_token": work}
    environment |= {"command": ["restomod", "train", "quickstart", text], "started": stamp(START)}
    (folder / "environment.json").write_text(json.dumps([environment]))
    records: list[dict[str, Any]] = []
    for step in range(steps + 1):
        at = {"time": START + 5.0 + step} if timed else {}
        if step % 10 == 0 or step == steps:
            records.append({"kind": "val", "step": step, "loss": loss_at(step) + 0.1, "tokens": 100} | at)
        if step < steps:
            loss = (spikes or {}).get(step, loss_at(step))
            numbers = {"loss": loss, "lr": 1e-3, "grad_norm": 1.0, "ms": 1000.0}
            numbers |= {"tokens_per_second": float(config.batch_tokens), "mfu": None}
            at = {"time": START + 6.0 + step} if timed else {}
            records.append({"kind": "train", "step": step} | numbers | at)
    write(folder / "metrics.jsonl", records)
    samples = [{"step": s, "prompt": text, "text": f"{text} {s}"} for s in (10, 20)]
    write(folder / "samples.jsonl", samples)
    return folder


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """Records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def add_task(folder: Path, name: str = "hellaswag", step: int = 40, **more: Any) -> None:
    """An evaluation, as `restomod eval` writes it."""
    metrics = {"acc": {"value": 0.28, "stderr": 0.01}, "acc_token": {"value": 0.31, "stderr": 0.02}}
    (folder / "evals").mkdir(exist_ok=True)
    values = {"task": name, "step": step, "examples": 1000, "metrics": metrics, "convention": "as it is"} | more
    (folder / "evals" / f"step_{step:06d}-{name}.json").write_text(json.dumps(values))


def add_error_analysis(folder: Path, text: str = "a passage") -> None:
    """An error analysis, as `restomod report --error-analysis` writes it."""
    passage = {"loss": 2.0, "before": text, "tokens": [[text, 1.0], [" end", 3.0]]}
    kinds = [{"name": text, "meaning": text, "loss": 2.0, "share": 1.0, "of_loss": 1.0}]
    values = {"format": "restomod-error-analysis-1", "checkpoint": "step_000040", "step": 40, "asked": 10, "tokens": 10}
    values |= {"loss": 2.0, "kinds": kinds, "positions": {"x": [1, 2], "y": [3.0, 1.0]}}
    values |= {"sources": [{"name": text, "loss": 2.0, "tokens": 5}, {"name": "b", "loss": 3.0, "tokens": 5}]}
    values |= {"best": [passage], "worst": [passage]}
    (folder / "error_analysis.json").write_text(json.dumps(values))
