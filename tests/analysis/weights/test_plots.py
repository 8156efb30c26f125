"""Plots of weights compared with numpy, and the PNG files that are written."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import rcParams
from PIL import Image
from torch import Tensor

from restomod.analysis.weights.plots import (
    BINS,
    KINDS,
    draw_weights,
    position_channels,
    position_matrix,
    singular_values,
    weight_histograms,
)
from restomod.checks.device_parity import random_model
from restomod.config.run import ModelConfig
from restomod.model.hf_io import hf_tensors
from restomod.utils.errors import UserError

CONFIG = ModelConfig(n_layer=3, n_head=2, n_embd=16, n_positions=24, vocab_size=97)
SIZES = {  # inches of the figures * 120 dots
    "position_embeddings.png": (1080, 780),
    "position_channels.png": (1080, 600),
    "weight_histograms.png": (1320, 960),
    "singular_values.png": (1320, 960),
}
FIGURES = [position_matrix, position_channels, weight_histograms, singular_values]


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return hf_tensors(random_model(CONFIG))


def lines(axes: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in axes.get_lines()]


def panels(figure: Any) -> list[Any]:
    """Return the four panels of matrices without the colour scale."""
    return figure.axes[:4]


# --- data ------------------------------------------------------------------------------------------------------


def test_the_position_matrix_is_the_embedding_centred_on_zero(tensors: dict[str, Tensor]) -> None:
    wpe = tensors["transformer.wpe.weight"].numpy()
    figure = position_matrix(tensors)
    (image,) = figure.axes[0].get_images()
    assert np.array_equal(image.get_array(), wpe)
    low, high = image.get_clim()
    assert low == -high
    assert high == pytest.approx(3 * wpe.std(), rel=1e-5)


def test_the_position_channels_are_columns_of_the_embedding(tensors: dict[str, Tensor]) -> None:
    wpe = tensors["transformer.wpe.weight"].numpy()
    figure = position_channels(tensors)
    drawn = figure.axes[0].get_lines()
    assert [line.get_label() for line in drawn] == ["channel 4", "channel 8", "channel 12"]
    for line, channel in zip(drawn, (4, 8, 12), strict=True):
        assert np.array_equal(np.asarray(line.get_ydata()), wpe[:, channel])
    y = wpe.astype(np.float64)
    rough = np.mean((np.diff(y, axis=0) ** 2).sum(0) / (2 * ((y - y.mean(0)) ** 2).sum(0)))
    assert f"roughness {rough:.2f} " in figure.get_suptitle()


@pytest.mark.parametrize(("width", "channels"), [(250, (62, 125, 187)), (251, (150, 200, 250)), (768, (150, 200, 250))])
def test_a_wide_embedding_shows_the_channels_that_the_source_shows(width: int, channels: tuple[int, ...]) -> None:
    figure = position_channels({"transformer.wpe.weight": torch.randn(4, width)})
    assert [line.get_label() for line in figure.axes[0].get_lines()] == [f"channel {c}" for c in channels]


def test_the_histograms_are_numpys(tensors: dict[str, Tensor]) -> None:
    for axes, kind in zip(panels(weight_histograms(tensors)), KINDS, strict=True):
        weights = [tensors[f"transformer.h.{layer}.{kind}.weight"].numpy() for layer in range(CONFIG.n_layer)]
        widest = max(4 * w.astype(np.float64).std() for w in weights)
        assert kind in axes.get_title()
        for (x, y), w in zip(lines(axes), weights, strict=True):
            counts, edges = np.histogram(w, bins=BINS, range=(-widest, widest))
            assert x == pytest.approx((edges[:-1] + edges[1:]) / 2, abs=1e-5 * widest)
            assert y == pytest.approx(counts / (np.diff(edges) * w.size), rel=1e-4)
            inside = np.abs(w) <= widest
            assert np.sum(y) * (edges[1] - edges[0]) == pytest.approx(inside.mean(), rel=1e-4)  # an area of 1


def test_the_singular_values_are_numpys(tensors: dict[str, Tensor]) -> None:
    for axes, kind in zip(panels(singular_values(tensors)), KINDS, strict=True):
        assert kind in axes.get_title()
        assert axes.get_yscale() == "log"
        for layer, (x, y) in enumerate(lines(axes)):
            w = tensors[f"transformer.h.{layer}.{kind}.weight"].numpy()
            assert np.array_equal(x, np.arange(16))
            assert y == pytest.approx(np.linalg.svd(w, compute_uv=False), rel=1e-3)


@pytest.mark.parametrize("figure", [weight_histograms, singular_values])
def test_layers_differ_in_colour_and_the_scale_counts_them(
    tensors: dict[str, Tensor], figure: Callable[[dict[str, Tensor]], Any]
) -> None:
    drawn = figure(tensors)
    assert len(drawn.axes) == 5
    for axes in panels(drawn):
        assert len({tuple(line.get_color()) for line in axes.get_lines()}) == CONFIG.n_layer
    assert list(drawn.axes[4].get_yticks()) == [0, 1, 2]
    assert drawn.axes[4].get_ylim() == (-0.5, 2.5)
    assert drawn.axes[4].get_ylabel() == "layer"


# --- files -----------------------------------------------------------------------------------------------------


def is_drawn(path: Path) -> bool:
    """Return whether an image can be decoded and is not empty."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))  # decodes the complete image
        assert image.format == "PNG"
    return bool(len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20 and (pixels[0, 0] == 255).all())


def test_four_pictures_are_written_into_a_new_folder(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "new" / "pictures"
    before = dict(rcParams)
    paths = draw_weights(tensors, "runs/a $x_{$ model", folder)  # an invalid formula for matplotlib
    assert paths == [folder / name for name in SIZES]
    assert sorted(path.name for path in folder.iterdir()) == sorted(SIZES)
    for path in paths:
        with Image.open(path) as image:
            assert image.size == SIZES[path.name]
        assert is_drawn(path)
    assert dict(rcParams) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(n_layer=1, n_head=1, n_embd=1, n_positions=1, vocab_size=1),
        ModelConfig(n_layer=1, n_head=2, n_embd=16, n_positions=1, vocab_size=97),
        ModelConfig(n_layer=1, n_head=2, n_embd=16, n_positions=2, vocab_size=97),
        ModelConfig(n_layer=30, n_head=2, n_embd=4, n_positions=3, vocab_size=97),
    ],
    ids=["one number", "one position", "two positions", "many layers"],
)
def test_a_model_of_any_size_can_be_written(config: ModelConfig, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(is_drawn(path) for path in draw_weights(hf_tensors(random_model(config)), "tiny", tmp_path))


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (2, 16)])
def test_a_model_of_any_size_can_be_drawn(shape: tuple[int, int], figure: Callable[[dict[str, Tensor]], Any]) -> None:
    positions, width = shape
    config = ModelConfig(n_layer=1, n_head=1, n_embd=width, n_positions=positions, vocab_size=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = figure(hf_tensors(random_model(config)))
    assert drawn.get_suptitle()
    assert "nan" not in drawn.get_suptitle()
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in panels(drawn) if axes.get_label() != "<colorbar>")


@pytest.mark.parametrize("figure", FIGURES)
def test_weights_that_are_all_zero_can_be_drawn(
    tensors: dict[str, Tensor], figure: Callable[[dict[str, Tensor]], Any]
) -> None:
    drawn = figure({name: torch.zeros_like(value) for name, value in tensors.items()})
    assert "nan" not in drawn.get_suptitle()
    assert all(np.isfinite(y).all() for axes in panels(drawn) for _, y in lines(axes))
    if figure is singular_values:  # on a logarithmic axis
        assert all((y > 0).all() for axes in panels(drawn) for _, y in lines(axes))
    if figure is position_matrix:
        assert drawn.axes[0].get_images()[0].get_clim() == (-1, 1)


def test_numbers_that_are_not_finite_are_refused_by_name(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    bad = tensors[name].clone()
    bad[0, 0] = float("nan")
    with pytest.raises(UserError, match=rf"^mine cannot be drawn: {name} has values that are not finite$"):
        draw_weights({**tensors, name: bad}, "mine", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("taken", "folder", "said"),
    [
        ("taken", "taken", "taken is a file; name a folder for the pictures"),
        ("taken", "taken/deeper", "taken/deeper: cannot write pictures there ("),
        ("position_embeddings.png/", "", "position_embeddings.png is a folder"),
    ],
)
def test_a_folder_that_cannot_be_written_is_an_error_in_one_line(
    taken: str, folder: str, said: str, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    (tmp_path / taken).mkdir() if taken.endswith("/") else (tmp_path / taken).write_text("a file")
    with pytest.raises(UserError) as caught:
        draw_weights(tensors, "mine", tmp_path / folder)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_matplotlib_the_message_says_how_to_install_it(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"^pictures need matplotlib \(.*\): pip install matplotlib$"):
        draw_weights(tensors, "mine", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_drawing_leaves_pyplot_and_its_windows_alone() -> None:
    """Check that pyplot is not used, because it selects a backend for the process and keeps every figure."""
    program = """
import sys
import torch
from restomod.analysis.weights.plots import position_channels
assert 'matplotlib' not in sys.modules
position_channels({'transformer.wpe.weight': torch.randn(4, 8)})
assert 'matplotlib.figure' in sys.modules
assert 'matplotlib.pyplot' not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
