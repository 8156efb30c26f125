"""Plot of the validation loss by position in the window."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from restomod.evals.validation import ValidationLoss
from restomod.utils.errors import shortened
from restomod.utils.figures import INK, new_figure, quiet, require_matplotlib, write_figure
from restomod.utils.redaction import redact

POINTS = 60  # edges of the ranges of positions


def position_means(by_position: list[float]) -> tuple[list[float], list[float]]:
    """Average the loss over ranges of positions whose lengths grow geometrically.

    Args:
        by_position: mean loss at each position of a window, (T,), in nats.

    Returns:
        Centres of the ranges (positions from 1) and the mean loss in each.
    """
    T = len(by_position)
    edges = np.unique(np.geomspace(1, T + 1, POINTS).round().astype(int))
    ranges = [(a, b) for a, b in itertools.pairwise(edges)]
    return [(a + b - 1) / 2 for a, b in ranges], [float(np.mean(by_position[a - 1 : b - 1])) for a, b in ranges]


def draw_positions(validation: ValidationLoss, title: str, path: Path, inside: Path | None = None) -> None:
    """Draw the validation loss by position in the window as a PNG file.

    Args:
        validation: measured loss.
        title: name of the model, shown in the title.
        path: PNG file to write.
        inside: folder that symbolic links in ``path`` must not leave; None: links are followed anywhere.

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
    axes.plot(*position_means(validation.by_position), color="#2a6fbb", label="mean over a range of positions")
    axes.axhline(validation.loss, color=INK, linewidth=0.7, linestyle="--", label=f"mean {validation.loss:.4f}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False)
    quiet(axes)
    write_figure(figure, path, inside)
