"""Command `inspect`: statistics and plots of a model's weights, and comparison of two models."""

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
    """Flags of `restomod inspect`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run (newest checkpoint), model folder, name on the Hugging Face hub such as gpt2, or preset (initial weights)."""
    plots: Path | None = None
    """Folder for plots of the weights (PNG). None: no plots."""
    diff: str | None = None
    """Second model, to compare with MODEL tensor by tensor. None: no comparison."""
    seed: int = 1337
    """Random seed of the initial weights of a preset."""


def run(arguments: list[str]) -> int:
    """Print the statistics or the comparison, and return 0."""
    parsed = parse(InspectArguments, arguments, "restomod inspect")
    require_seed("--seed", parsed.seed)
    if parsed.seed != InspectArguments.seed and not any(is_preset(m) for m in (parsed.model, parsed.diff or "")):
        raise UserError("--seed has no effect without a preset; omit it")
    if parsed.plots is not None and parsed.diff is not None:
        raise UserError("--plots and --diff exclude each other; omit one of them")

    from restomod.analysis.weights.report import compare_weights, inspect_weights

    if parsed.diff is not None:
        lines = compare_weights(parsed.model, parsed.diff, parsed.seed)
    else:
        lines = inspect_weights(parsed.model, parsed.seed, parsed.plots)
    for line in lines:
        print(line)
    return 0
