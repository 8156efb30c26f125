"""Run folders without training, with given or generated records."""

from __future__ import annotations

import dataclasses
import json
import lzma
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from restomod.config.presets import preset
from restomod.config.run import RunConfig, SamplingConfig
from restomod.config.serialize import to_dict
from restomod.model.flops import flops_per_token, parameter_count

QUICKSTART = preset("quickstart")
SMALL = dataclasses.replace(QUICKSTART, steps=100, eval_every=50)
START = 1_763_700_000  # seconds since 1970, as `stamp` writes them
HOSTILE = (
    "</script><script>window.hurt = 1</script><img src=x onerror='window.hurt = 2'> <b>bold</b> & \u2028 "
    "{{x}} %s @DATA@ `|` \x1b[2J \u202ertl"
)


def stamp(seconds: float) -> str:
    """Time in the format of environment.json."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def loss_at(step: int) -> float:
    """Training loss of a generated run."""
    return 3 + 8 * math.exp(-step / 10)


def write_run(
    folder: Path,
    config: RunConfig = SMALL,
    records: Iterable[dict[str, Any]] = (),
    data: dict[str, Any] | None = None,
    environments: list[dict[str, Any]] | None = None,
) -> Path:
    """Creates a run folder without checkpoints."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    write(folder / "metrics.jsonl", records)
    if data is not None:
        (folder / "data.json").write_text(json.dumps(data))
    if environments is not None:
        (folder / "environment.json").write_text(json.dumps(environments))
    return folder


def make_run(
    folder: Path,
    steps: int = 40,
    config: RunConfig | None = None,
    timed: bool = True,
    text: str = "a text",
    data: str = "python-stdlib",
    spikes: dict[int, float] | None = None,
) -> Path:
    """Creates a finished run of quickstart or ``config``, with the loss 3 + 8 exp(-step / 10) and ``spikes``.

    The first step begins 5 seconds after `START`; each step takes a second. Validation is every 10 steps. With
    ``timed``, records have times. ``text`` is used in samples, prompts and device; ``data`` is the name of the data.
    """
    config = dataclasses.replace(config or QUICKSTART, steps=steps)
    if text != "a text":
        config = dataclasses.replace(config, sampling=SamplingConfig(prompts=(text,)))
    environment = {"restomod": "0.1.0", "git_revision": "abc", "device": text, "precision": "fp32"}
    work = flops_per_token(config.model, config.sequence_length)
    environment |= {"parameters": parameter_count(config.model), "flops_per_token": work}
    environment |= {"command": ["restomod", "train", "quickstart", text], "started": stamp(START)}
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
    manifest = {"name": data, "fingerprint": "0", "tokens": 1000, "splits": {}}
    write_run(folder, config, records, manifest, [environment])
    samples = [{"step": s, "prompt": text, "text": f"{text} {s}"} for s in (10, 20)]
    write(folder / "samples.jsonl", samples)
    return folder


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def add_task(folder: Path, name: str = "hellaswag", step: int = 40, **more: Any) -> None:
    """Writes an evaluation in the format of `restomod eval`."""
    metrics = {"acc": {"value": 0.28, "stderr": 0.01}, "acc_token": {"value": 0.31, "stderr": 0.02}}
    (folder / "evals").mkdir(exist_ok=True)
    values = {"task": name, "step": step, "examples": 1000, "metrics": metrics, "convention": "as it is"} | more
    (folder / "evals" / f"step_{step:06d}-{name}.json").write_text(json.dumps(values))


def add_error_analysis(folder: Path, text: str = "a passage") -> None:
    """Writes an error analysis in the format of `restomod report --error-analysis`."""
    passage = {"loss": 2.0, "before": text, "tokens": [[text, 1.0], [" end", 3.0]]}
    kinds = [{"name": text, "meaning": text, "loss": 2.0, "share": 1.0, "of_loss": 1.0}]
    values = {"format": "restomod-error-analysis-1", "checkpoint": "step_000040", "step": 40, "asked": 10, "tokens": 10}
    values |= {"loss": 2.0, "kinds": kinds, "positions": {"x": [1, 2], "y": [3.0, 1.0]}}
    values |= {"sources": [{"name": text, "loss": 2.0, "tokens": 5}, {"name": "b", "loss": 3.0, "tokens": 5}]}
    values |= {"best": [passage], "worst": [passage]}
    (folder / "error_analysis.json").write_text(json.dumps(values))


def train(step: int, loss: float | None, ms: float = 200.0, **values: Any) -> dict[str, Any]:
    """One train record."""
    return {"kind": "train", "step": step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "ms": ms} | values


def val(step: int, loss: float, tokens: int = 32_768) -> dict[str, Any]:
    """One val record."""
    return {"kind": "val", "step": step, "loss": loss, "tokens": tokens}


def simple(losses: dict[int, float], steps: int = 100, ms: float = 200.0) -> list[dict[str, Any]]:
    """Records of a run with the given validation losses by step, and steps of equal duration."""
    return [train(s, 5.0, ms) for s in range(steps)] + [val(s, loss) for s, loss in losses.items()]


def healthy(seed: int, steps: int = 900, sigma: float | None = None) -> list[dict[str, Any]]:
    """Records with realistic noise of losses (normal, heavy-tailed or drifting), times and gradients.

    The loss falls by a power law from ln(50257) to a floor; its standard deviation is 0.6 nats for batches of 512
    tokens (measured on quickstart), about 0.02 for half a million tokens.
    """
    rng = np.random.default_rng(seed)
    t = np.arange(steps)
    floor, knee, exponent = rng.uniform(2.5, 4.5), rng.uniform(15, 60), rng.uniform(0.4, 0.7)
    level = floor + (10.82 - floor) * (1 + np.arange(steps + 1) / knee) ** -exponent
    white = rng.standard_normal(steps + 7)
    noise = {
        0: white[:steps],
        1: rng.laplace(0, np.sqrt(0.5), steps),
        2: 0.5 * np.convolve(white, np.full(8, 8**-0.5), "valid") + 0.85 * rng.standard_normal(steps),
    }[seed % 3]
    loss = level[:-1] + (sigma or (0.02, 0.1, 0.6)[seed // 3 % 3]) * noise
    norm = 0.4 * (1 + 8 * np.exp(-t / 30)) * (1 + 0.5 * t / steps) * np.exp(rng.normal(0, 0.25, steps))
    ms = 200 * np.exp(rng.normal(0, 0.08, steps)) * (1 + (rng.random(steps) < 0.01) * rng.exponential(5, steps))
    rate = 2e-3 * np.minimum(1, (t + 1) / 45)
    records = [
        train(int(s), float(loss[s]), float(ms[s]), lr=float(rate[s]), grad_norm=float(norm[s])) for s in range(steps)
    ]
    gap = rng.normal(0, 0.08)
    every = max(1, steps // 6)
    return records + [val(s, float(level[s] + gap + rng.normal(0, 0.01))) for s in range(0, steps + 1, every)]


def quickstart_records() -> list[dict[str, Any]]:
    """Records of a real run of quickstart (2 threads of an Intel Xeon, fp32), rounded to six digits."""
    packed = (Path(__file__).parent / "quickstart.jsonl.xz").read_bytes()
    return [json.loads(line) for line in lzma.decompress(packed).splitlines()]
