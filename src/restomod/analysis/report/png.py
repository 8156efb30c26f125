"""PNG files of a report's curves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from restomod.analysis.report.curves import sample_sizes
from restomod.utils.errors import shortened
from restomod.utils.figures import INK, make_folder, quiet, require_matplotlib, use_default_style, write_figure
from restomod.utils.files import short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SOFT, ACCENT = "#66666d", "#c2410c"
OTHERS = ("#5f6b7a", "#98a1ab", "#3d4650", "#b9bfc6")
STYLES = ("-", "--", ":", "-.")
CHARTS = {
    "loss": "Loss, nats per token",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "mfu": "Model FLOP utilisation",
}


def draw_curves(runs: list[dict[str, Any]], folder: Path) -> dict[Path, Figure]:
    """Draw the curves of runs without writing them.

    Args:
        runs: content of each run; see `restomod.analysis.report.data.run_data`.
        folder: folder of the future files.

    Returns:
        Figures by path.

    Raises:
        UserError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    use_default_style()
    tasks = list(dict.fromkeys(task for run in runs for task in run["tasks"]))
    drawn = {name for run in runs for name in run["curves"]} | {"loss" for run in runs if "val" in run["curves"]}
    wanted = [name for name in CHARTS if name in drawn]
    figures: dict[Path, Figure] = {}
    for name in [*wanted, *tasks]:
        figure = Figure(figsize=(9, 4.6) if name == "loss" else (7, 3.6), layout="constrained")
        axes = figure.subplots()
        (_task if name in tasks else _curve)(axes, runs, name)
        quiet(axes)
        axes.tick_params(colors=SOFT, labelsize=9)
        if axes.get_legend_handles_labels()[0]:
            for text in axes.legend(frameon=False, fontsize=9).get_texts():
                text.set_parse_math(False)
        path = folder / f"{short_name(''.join(c if c.isalnum() or c in '-_' else '_' for c in name))}.png"
        figures[path] = figure
    return figures


def write_picture(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file. Its folder is created if missing.

    Raises:
        UserError: the file cannot be written.
    """
    make_folder(path.parent)
    write_figure(figure, path, path.parent, dpi=150)


def _look(index: int) -> dict[str, Any]:
    """Return the line style of a run: accent colour for the first, shades of grey and dashes for the others."""
    if index == 0:
        return {"color": ACCENT, "linewidth": 1.5}
    return {"color": OTHERS[(index - 1) % 4], "linewidth": 1.3, "linestyle": STYLES[(index - 1) % 4]}


def _curve(axes: Axes, runs: list[dict[str, Any]], name: str) -> None:
    axes.set_title(CHARTS[name], loc="left", color=INK, fontsize=12)
    axes.set_xlabel("step", color=SOFT)
    if name == "grad_norm":
        axes.set_yscale("log")
    for i, run in enumerate(runs):
        curves, look = run["curves"], _look(i)
        raw, mean = curves.get(name), curves.get(f"{name}_mean")
        label = shortened(run["name"]) if len(runs) > 1 else ("training" if name == "loss" else None)
        if raw and mean and i == 0:
            axes.plot(raw["x"], _numbers(raw), color=look["color"], linewidth=0.7, alpha=0.3)
        if raw:
            shown = mean or raw
            axes.plot(shown["x"], _numbers(shown), label=label, **look)
        if name == "loss" and "val" in curves:
            val = curves["val"]
            own: dict[str, Any] = {"color": INK if i == 0 else look["color"], "markerfacecolor": "#ffffff"}
            own["label"] = "validation" if len(runs) == 1 else None
            axes.plot(val["x"], _numbers(val), "o", markersize=4, **own)
    if name == "loss":
        _lines(axes, runs[0]["lines"].get("loss", []), "{:.2f}".format)


def _task(axes: Axes, runs: list[dict[str, Any]], task: str) -> None:
    found = [(i, run, run["tasks"][task]) for i, run in enumerate(runs) if task in run["tasks"]]
    sizes = dict.fromkeys(filter(None, (sample_sizes(points) for _, _, points in found)))
    title = ", ".join([shortened(task), found[0][2]["metric"], "± one standard error", *sizes])
    axes.set_title(title, loc="left", color=INK, fontsize=12, parse_math=False)
    axes.set_xlabel("step", color=SOFT)
    for i, run, points in found:
        look = _look(i) | {"marker": "o", "markersize": 4, "label": shortened(run["name"])}
        axes.errorbar(points["x"], _numbers(points), yerr=points["error"], **look)
    _lines(axes, runs[0]["lines"].get(task, []), lambda share: f"{100 * share:.4g} %")


def _lines(axes: Axes, lines: list[dict[str, Any]], text_of: Callable[[float], str]) -> None:
    for line in lines:
        axes.axhline(line["value"], color=SOFT, linewidth=0.8, linestyle="--")
        where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        text = f"{line['name']} {text_of(line['value'])}"
        axes.annotate(text, (1, line["value"]), (0, 2), **where, ha="right", va="bottom", color=SOFT, fontsize=8)


def _numbers(curve: dict[str, Any]) -> list[float]:
    return [float("nan") if y is None else y for y in curve["y"]]
