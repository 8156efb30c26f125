"""What all pictures share: colours, and an empty figure without a window. Matplotlib is imported to draw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from restomod.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PAPER, GRID = "#222222", "#ffffff", "#dddddd"


def require_matplotlib() -> None:
    """Raise UserError where pictures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise UserError(f"pictures need matplotlib ({e}): pip install matplotlib") from None


def use_default_style() -> None:
    """Undo the settings of a matplotlibrc in the working folder, which may be someone else's: pictures are the same
    everywhere."""
    import matplotlib

    matplotlib.rcdefaults()


def new_figure(subject: str, width: float, height: float) -> Figure:
    """An empty figure, its size in inches."""
    from matplotlib.figure import Figure

    use_default_style()
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(subject, color=INK, fontsize=13, parse_math=False)
    return figure


def quiet(axes: Axes) -> None:
    """A light grid, and no frame."""
    axes.grid(color=GRID, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def write_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, dpi=120, facecolor=PAPER, format="png")
        temporary.replace(path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write the picture ({e.strerror or e})") from None
