"""Run folders without training: a configuration and records that are made up, or those of the quickstart."""

from __future__ import annotations

import dataclasses
import json
import lzma
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from restomod.config.presets import preset
from restomod.config.run import RunConfig
from restomod.config.serialize import to_dict

QUICKSTART = preset("quickstart")
SMALL = dataclasses.replace(QUICKSTART, steps=100, eval_every=50)


def make_run(
    folder: Path,
    config: RunConfig = SMALL,
    records: Iterable[dict[str, Any]] = (),
    data: dict[str, Any] | None = None,
    environments: list[dict[str, Any]] | None = None,
) -> Path:
    """A run's folder as training leaves it, without checkpoints."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if data is not None:
        (folder / "data.json").write_text(json.dumps(data))
    if environments is not None:
        (folder / "environment.json").write_text(json.dumps(environments))
    return folder


def train(step: int, loss: float | None, ms: float = 200.0, **values: Any) -> dict[str, Any]:
    """One train record."""
    return {"kind": "train", "step": step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "ms": ms} | values


def val(step: int, loss: float, tokens: int = 32_768) -> dict[str, Any]:
    """One val record."""
    return {"kind": "val", "step": step, "loss": loss, "tokens": tokens}


def simple(losses: dict[int, float], steps: int = 100, ms: float = 200.0) -> list[dict[str, Any]]:
    """Records of a run with these validation losses by step, and steps of equal length."""
    return [train(s, 5.0, ms) for s in range(steps)] + [val(s, loss) for s, loss in losses.items()]


def healthy(seed: int, steps: int = 900, sigma: float | None = None) -> list[dict[str, Any]]:
    """Records with the noise of real runs: of losses normal, heavy-tailed or drifting, of times and of gradients.

    The loss falls by a power law from ln(50257) to a floor; batches of 512 tokens scatter by 0.6 nats (measured on the
    quickstart), those of half a million by some 0.02.
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
    """Of a real run of the quickstart (2 threads of an Intel Xeon, fp32), rounded to six digits."""
    packed = (Path(__file__).parent / "quickstart.jsonl.xz").read_bytes()
    return [json.loads(line) for line in lzma.decompress(packed).splitlines()]
