"""Plot of the validation loss by position in the window."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from restomod.evals.validation import ValidationLoss
from restomod.utils.errors import shortened
from restomod.utils.figures import INK, new_figure, quiet, require_matplotlib, write_figure
from restomod.utils.redaction import redact

POINTS = 60  # means over ranges of positions, each longer than the one before


def position_means(by_position: list[float]) -> tuple[list[float], list[float]]:
    """Centres of ranges of positions, whose lengths grow geometrically, and the mean loss in each."""
    T = len(by_position)
    edges = np.unique(np.geomspace(1, T + 1, POINTS).round().astype(int))
    ranges = [(a, b) for a, b in itertools.pairwise(edges)]
    return [(a + b - 1) / 2 for a, b in ranges], [float(np.mean(by_position[a - 1 : b - 1])) for a, b in ranges]


def draw_positions(validation: ValidationLoss, title: str, path: Path, inside: Path | None = None) -> None:
    """Draw the loss by position (number of tokens seen) as a PNG file; ``inside``: see `write_bytes_atomically`.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    require_matplotlib()
    figure = new_figure("validation loss by position", 9, 5)
    subject = f"{shortened(redact(title))}: validation loss by position in the window"
    figure.suptitle(subject, color=INK, fontsize=13, parse_math=False)
    axes = figure.subplots()
    positions = np.arange(1, len(validation.by_position) + 1)
    axes.plot(positions, validation.by_position, ".", color="#bbbbbb", markersize=2, label="each position")
    axes.plot(*position_means(validation.by_position), color="#2a6fbb", label="mean over neighbours")
    axes.axhline(validation.loss, color=INK, linewidth=0.7, linestyle="--", label=f"mean {validation.loss:.4f}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False)
    quiet(axes)
    write_figure(figure, path, inside)
