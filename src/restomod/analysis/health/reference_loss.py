"""Symptom "reference loss": known validation losses of presets on their data, and the comparison of a run with them.

The quickstart's losses were measured on two machines with one seed and Python 3.11's library, at steps 300, 600 and
900: 5.2391, 4.9584 and 4.8383 on an Intel Xeon in fp32; 5.2379, 4.9784 and 4.8488 on an AMD EPYC in bf16. The width of
the range (± 0.3) is an estimate for other seeds and Python versions, not a measurement. The losses of GPT-2 124M on 10
billion tokens of FineWeb-Edu are published; see `restomod.evals.tasks.task`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from restomod.analysis.health.history import number
from restomod.analysis.health.symptoms import Finding, Status
from restomod.config.presets import preset
from restomod.evals.tasks.registry import references
from restomod.evals.tasks.task import GPT2, LR_STUDY
from restomod.runs.config_diff import differing, flatten_config, trains_on_fineweb_edu
from restomod.runs.reader import Run
from restomod.utils.text import short_count

NAME = "reference loss"
NAMED_DIFFERENCES = 5


@dataclass(frozen=True)
class ReferenceLoss:
    """Range of the validation loss of a preset on its data, as a function of the training tokens."""

    preset: str
    data: str
    """Name of the data, for messages."""
    is_on: Callable[[Run], bool]
    """Function that returns whether a run trains on this data."""
    tokens: tuple[int, ...]
    """Training tokens at which the range is known; interpolated linearly between them."""
    low: tuple[float, ...]
    """Lowest usual loss at each of ``tokens``, in nats."""
    high: tuple[float, ...]
    """Highest usual loss at each of ``tokens``, in nats."""
    reach: float
    """Validity before the first and after the last of ``tokens``, as a fraction of them."""
    source: str
    """Source of the losses, for messages."""

    def at(self, tokens: int) -> tuple[float, float] | None:
        """Return the lowest and the highest usual loss after ``tokens``, in nats; None if it is unknown."""
        if not self.tokens[0] * (1 - self.reach) <= tokens <= self.tokens[-1] * (1 + self.reach):
            return None
        low, high = (float(np.interp(tokens, self.tokens, edge)) for edge in (self.low, self.high))
        return low, high


def _published(model: str) -> float:
    return next(r.value for r in references("validation") if r.model == model)


def reference_losses() -> tuple[ReferenceLoss, ...]:
    """Return all known reference losses."""
    centres = (5.239, 4.968, 4.844)
    return (
        ReferenceLoss(
            "quickstart",
            "Python's library",
            lambda run: run.config.data.source == "python-stdlib",
            tuple(512 * step for step in (300, 600, 900)),
            tuple(c - 0.3 for c in centres),
            tuple(c + 0.3 for c in centres),
            0.0,
            "measured on two machines, one seed",
        ),
        ReferenceLoss(
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


def check_reference_loss(run: Run) -> Finding:
    """Compare a run with its reference loss, at the newest validation with a known reference."""
    model = run.config.model
    reference = next((r for r in reference_losses() if r.is_on(run) and model == preset(r.preset).model), None)
    if reference is None:
        return Finding(NAME, "unknown", "no reference loss is known for this model on this data")
    compared = [
        (record["step"], loss, edges)
        for record in run.val
        if math.isfinite(loss := number(record.get("loss")))
        and (edges := reference.at(run.tokens_at(record["step"]))) is not None
    ]
    if not compared:
        return Finding(
            NAME, "unknown", f"needs a validation after {short_count(reference.tokens[0])} tokens: {reference.source}"
        )
    step, loss, (low, high) = compared[-1]
    data_settings = [name for name in flatten_config(run.config) if name.startswith("data.")]
    off = differing([flatten_config(preset(reference.preset)), flatten_config(run.config)], ("seed", *data_settings))
    shown = [f"{name} {values[1]} (not {values[0]})" for name, values in off.items()][:NAMED_DIFFERENCES]
    difference = f"; this run differs from {reference.preset} in {', '.join(shown)}" if off else ""
    status: Status = "ok" if low <= loss <= high else "warning" if off else "fail"
    where = "within" if low <= loss <= high else "above" if loss > high else "below"
    reference_range = f"range of {reference.preset} on {reference.data}, {low:.2f} to {high:.2f} ({reference.source})"
    return Finding(
        NAME, status, f"validation loss {loss:.4f} at step {step} is {where} the {reference_range}{difference}"
    )
