"""Plots of model weights: position embeddings, histograms, singular values.

The plots of position embeddings follow Karpathy, "Let's reproduce GPT-2 (124M)", 2024, where those of OpenAI's
checkpoint are noisy waves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from restomod.analysis.weights.statistics import POSITIONS, roughness
from restomod.utils.errors import UserError, shortened
from restomod.utils.figures import INK, make_folder, new_figure, quiet, require_matplotlib, write_figure
from restomod.utils.redaction import redact

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {  # matrices of a block
    "attn.c_attn": "attention: queries, keys and values",
    "attn.c_proj": "attention: output projection",
    "mlp.c_fc": "MLP: hidden layer",
    "mlp.c_proj": "MLP: output projection",
}
CHANNELS = (150, 200, 250)
BINS = 200


def draw_weights(tensors: Mapping[str, Tensor], title: str, folder: Path) -> list[Path]:
    """Draw the weights of a model as PNG files and return their paths.

    Args:
        tensors: weights by GPT-2's parameter names, on the CPU.
        title: name of the model, shown in the titles.
        folder: folder of the files, created if missing.

    Raises:
        UserError: matplotlib is missing, a weight is not finite, or the folder cannot be written.
    """
    require_matplotlib()
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{title} cannot be drawn: {name} has values that are not finite")
    pictures = {"weight_histograms.png": weight_histograms, "singular_values.png": singular_values}
    if POSITIONS in tensors:
        positions = {"position_embeddings.png": position_matrix, "position_channels.png": position_channels}
        pictures = positions | pictures
    make_folder(folder)
    for name, picture in pictures.items():
        figure = picture(tensors)
        subject = f"{shortened(redact(title))}: {figure.get_suptitle()}"
        figure.suptitle(subject, color=INK, fontsize=13, parse_math=False)
        write_figure(figure, folder / name, folder)
    return [folder / name for name in pictures]


def position_matrix(tensors: Mapping[str, Tensor]) -> Figure:
    """Draw the position embeddings, (n_positions, D), as an image with one row per position."""
    wpe = tensors[POSITIONS]  # (n_positions, D)
    figure = new_figure("position embeddings", 9, 6.5)
    axes = figure.subplots()
    limit = 3 * wpe.std(correction=0).item() or 1.0
    image = axes.imshow(wpe.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="weight", fraction=0.04)
    axes.set_xlabel("channel")
    axes.set_ylabel("position")
    return figure


def position_channels(tensors: Mapping[str, Tensor]) -> Figure:
    """Draw three channels of the position embeddings: noise at initialisation, smooth waves after long training."""
    wpe = tensors[POSITIONS]
    D = wpe.shape[1]
    channels = CHANNELS if max(CHANNELS) < D else (D // 4, D // 2, 3 * D // 4)
    rough = roughness(wpe)
    measure = "" if math.isnan(rough) else f", roughness {rough:.2f} (1: noise, 0: smooth)"
    figure = new_figure(f"position embeddings{measure}", 9, 5)
    axes = figure.subplots()
    for channel in dict.fromkeys(channels):
        axes.plot(wpe[:, channel], linewidth=0.9, label=f"channel {channel}")
    axes.set_xlabel("position")
    axes.set_ylabel("weight")
    axes.legend(frameon=False)
    quiet(axes)
    return figure


def weight_histograms(tensors: Mapping[str, Tensor]) -> Figure:
    """Draw the distribution of the weights of each kind of matrix, with one line per layer."""
    figure = new_figure("weights, by layer", 11, 8)
    for axes, weights in _panels(figure, tensors):
        widest = max(4 * w.double().std(correction=0).item() for w in weights) or 1.0
        for layer, weight in enumerate(weights):
            counts = torch.histc(weight.float(), bins=BINS, min=-widest, max=widest)
            width = 2 * widest / BINS
            centres = (torch.arange(BINS) + 0.5) * width - widest
            axes.plot(centres, counts / (width * weight.numel()), color=_colour(layer, len(weights)), linewidth=0.9)
        axes.set_xlabel("weight")
        axes.set_ylabel("density")
    return figure


def singular_values(tensors: Mapping[str, Tensor]) -> Figure:
    """Draw the singular values of each kind of matrix in decreasing order, with one line per layer."""
    figure = new_figure("singular values, by layer", 11, 8)
    for axes, weights in _panels(figure, tensors):
        for layer, weight in enumerate(weights):
            spectrum = torch.linalg.svdvals(weight.float())
            axes.plot(spectrum.clamp(min=1e-6), color=_colour(layer, len(weights)), linewidth=0.9)
        axes.set_yscale("log")
        axes.set_xlabel("rank")
        axes.set_ylabel("singular value")
    return figure


def _panels(figure: Figure, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Axes, list[Tensor]]]:
    """Yield the panel and the weights by layer of each kind of matrix; add the colour scale at the end."""
    layers = sum(name.endswith("ln_1.weight") for name in tensors)
    for axes, (kind, does) in zip(figure.subplots(2, 2).flat, KINDS.items(), strict=True):
        axes.set_title(f"{kind}: {does}", fontsize=10)
        quiet(axes)
        yield axes, [tensors[f"transformer.h.{layer}.{kind}.weight"] for layer in range(layers)]
    _layer_scale(figure, layers)


def _colour(layer: int, layers: int) -> tuple[float, ...]:
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * layer / max(1, layers - 1))  # viridis ends in a yellow too light for white


def _layer_scale(figure: Figure, layers: int) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colours = ListedColormap([_colour(layer, layers) for layer in range(layers)])
    scale = ScalarMappable(Normalize(-0.5, layers - 0.5), colours)
    figure.colorbar(scale, ax=figure.axes, label="layer", fraction=0.025, ticks=range(0, layers, max(1, layers // 12)))
