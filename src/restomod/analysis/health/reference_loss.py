"""Where the losses of a preset should lie on its data, and whether a run's do.

The quickstart's validation losses are those of runs on two machines (an Intel Xeon in fp32: 5.2391, 4.9584 and 4.8383
at steps 300, 600 and 900; an AMD EPYC in bf16: 5.2379, 4.9784 and 4.8488), with one seed and Python 3.11's library. The
width is a judgement and not a measurement: it leaves room for other seeds and other Pythons. GPT-2 124M on 10 billion
tokens of FineWeb-Edu: published, see `restomod.evals.tasks.references`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from restomod.analysis.health.symptoms import Finding
from restomod.config.presets import preset
from restomod.evals.tasks.references import GPT2, LR_STUDY
from restomod.evals.tasks.registry import references
from restomod.runs.config_diff import differing, flatten_config, trains_on_fineweb_edu
from restomod.runs.reader import Run

NAME = "reference band"
NAMED_DIFFERENCES = 5


@dataclass(frozen=True)
class Band:
    """The validation loss that a preset has on its data, by tokens seen; between two of them along a line."""

    preset: str
    data: str
    is_on: Callable[[Run], bool]
    tokens: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    reach: float
    """How far beyond the first and last of ``tokens`` it holds, as a part of them."""
    source: str

    def at(self, tokens: int) -> tuple[float, float] | None:
        """The lowest and highest usual loss; None where nothing is known."""
        if not self.tokens[0] * (1 - self.reach) <= tokens <= self.tokens[-1] * (1 + self.reach):
            return None
        low, high = (float(np.interp(tokens, self.tokens, edge)) for edge in (self.low, self.high))
        return low, high


def _published(model: str) -> float:
    return next(r.value for r in references("validation") if r.model == model)


def bands() -> tuple[Band, ...]:
    """All that are known."""
    centres = (5.239, 4.968, 4.844)
    return (
        Band(
            "quickstart",
            "Python's library",
            lambda run: run.config.data.source == "python-stdlib",
            tuple(512 * step for step in (300, 600, 900)),
            tuple(c - 0.3 for c in centres),
            tuple(c + 0.3 for c in centres),
            0.0,
            "measured on two machines, one seed",
        ),
        Band(
            "gpt2-124m",
            "FineWeb-Edu",
            trains_on_fineweb_edu,
            (10**10,),
            (_published(LR_STUDY[0]) - 0.1,),
            (_published(GPT2),),
            0.03,
            f"a reproduction has {_published(LR_STUDY[0])}, OpenAI's GPT-2 {_published(GPT2)}",
        ),
    )


def reference(run: Run) -> Finding:
    """The newest validation loss that a band speaks of, against that band."""
    band = next((b for b in bands() if b.is_on(run) and run.config.model == preset(b.preset).model), None)
    if band is None:
        return Finding(NAME, "unknown", "there is none for this model on this data")
    compared = [
        (record, band.at(run.tokens_at(record["step"])))
        for record in run.val
        if math.isfinite(record.get("loss") or math.nan)
    ]
    known = [(record, edges) for record, edges in compared if edges is not None]
    if not known:
        return Finding(NAME, "unknown", f"needs a validation after {_tokens(band.tokens[0])} tokens: {band.source}")
    record, (low, high) = known[-1]
    off = differing(
        [flatten_config(preset(band.preset)), flatten_config(run.config)], without=("seed", *_data_settings(run))
    )
    shown = [f"{name} {values[1]} (not {values[0]})" for name, values in off.items()][:NAMED_DIFFERENCES]
    but = f"; this run differs from {band.preset} in {', '.join(shown)}" if off else ""
    where = f"validation loss {record['loss']:.4f} at step {record['step']}, {band.preset} on {band.data} has"
    usual = f"{low:.2f} to {high:.2f} ({band.source})"
    if low <= record["loss"] <= high:
        return Finding(NAME, "well", f"{where} {usual}{but}")
    which = "above" if record["loss"] > high else "below"
    return Finding(NAME, "note" if off else "sick", f"{where} {usual}: it is {which} that{but}")


def _data_settings(run: Run) -> list[str]:
    return [name for name in flatten_config(run.config) if name.startswith("data.")]


def _tokens(n: int) -> str:
    return f"{n / 1e9:g}B" if n >= 10**9 else f"{n:,}"
