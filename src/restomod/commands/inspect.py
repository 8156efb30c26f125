"""Command `inspect`: statistics and pictures of a model's weights, and comparison of two models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from restomod.commands.parsing import parse
from restomod.config.presets import is_preset
from restomod.config.run import require_seed
from restomod.utils.errors import UserError


@dataclass(frozen=True)
class InspectArguments:
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run, a model folder, a name on the Hugging Face hub, such as gpt2, or a preset (its initial weights)."""
    plots: Path | None = None
    """Draw the weights as PNG files into this folder."""
    diff: str | None = None
    """Compare MODEL with this model, tensor by tensor; named like MODEL."""
    seed: int = 1337
    """Random seed of a preset's initial weights."""


def run(arguments: list[str]) -> int:
    """Print the statistics or the comparison. Returns 0."""
    parsed = parse(InspectArguments, arguments, "restomod inspect")
    require_seed("--seed", parsed.seed)
    if parsed.seed != InspectArguments.seed and not any(is_preset(m) for m in (parsed.model, parsed.diff or "")):
        raise UserError("--seed sets the initial weights of a preset, and no preset is named; leave it out")
    if parsed.plots is not None and parsed.diff is not None:
        raise UserError("--plots draws one model and --diff compares two: give one of them")

    from restomod.analysis.weights.report import compare_weights, inspect_weights

    if parsed.diff is not None:
        lines = compare_weights(parsed.model, parsed.diff, parsed.seed)
    else:
        lines = inspect_weights(parsed.model, parsed.seed, parsed.plots)
    for line in lines:
        print(line)
    return 0
