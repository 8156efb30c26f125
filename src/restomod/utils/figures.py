"""Matplotlib figures without a window: colours, an empty figure, atomic writing. Matplotlib is imported lazily."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from restomod.utils.errors import UserError, reason
from restomod.utils.files import write_bytes_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PAPER, GRID = "#222222", "#ffffff", "#dddddd"


def require_matplotlib() -> None:
    """Raise UserError if Matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise UserError(f"pictures need matplotlib ({e}): pip install matplotlib") from None


def use_default_style() -> None:
    """Reset Matplotlib to its defaults; a matplotlibrc in the working directory may belong to another user."""
    import matplotlib

    matplotlib.rcdefaults()


def new_figure(subject: str, width: float, height: float) -> Figure:
    """Return an empty figure with a title; width and height in inches."""
    from matplotlib.figure import Figure

    use_default_style()
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(subject, color=INK, fontsize=13, parse_math=False)
    return figure


def quiet(axes: Axes) -> None:
    """Draw a light grid and remove the frame."""
    axes.grid(color=GRID, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def write_figure(figure: Figure, path: Path, inside: Path | None = None, dpi: int = 120) -> None:
    """Write a figure as a PNG file.

    Args:
        figure: figure to draw.
        path: PNG file, written by `write_bytes_atomically`.
        inside: folder that links must not leave; None: no check.
        dpi: pixels per inch.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, facecolor=PAPER, format="png")
    try:
        write_bytes_atomically(path, drawn.getvalue(), inside)
    except BrokenPipeError:  # standard output was closed
        raise
    except OSError as e:
        raise UserError(f"{path}: cannot write the picture ({reason(e)})") from None


def make_folder(folder: Path) -> None:
    """Create a folder for pictures if it is missing; raise UserError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{folder} is a file; name a folder for the pictures") from None
    except OSError as e:
        raise UserError(f"{folder}: cannot write pictures there ({reason(e)})") from None
