"""Command `inspect`: statistics, plots and differences of model weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from restomod.analysis.weights.statistics import (
    POSITIONS,
    Difference,
    roughness,
    tensor_statistics,
    totals,
    weight_differences,
)
from restomod.config.run import ModelConfig
from restomod.model.hf_format import family_of, named_views
from restomod.model.hf_io import hf_tensors
from restomod.runs.open_model import open_or_build
from restomod.utils.output_files import require_output_folder


def inspect_weights(name: str, seed: int, plots: Path | None = None) -> Iterator[str]:
    """Yield the lines of a model's statistics: a table of its tensors, then totals.

    Args:
        name: preset (initial weights), run, model folder, or name on the Hugging Face hub.
        seed: seed of the initial weights of a preset.
        plots: folder for plots; None: nothing is drawn.

    Raises:
        UserError: the model cannot be loaded, or the plots cannot be drawn or written.
    """
    if plots is not None:
        require_output_folder("--plots", plots)
    config, tensors = _open(name, seed)
    rows = tensor_statistics(tensors)
    width = max(len(row.name) for row in rows)
    yield f"{'tensor':<{width}}  {'shape':>13}  {'count':>11}  {'mean':>9}  {'std':>8}"
    for row in rows:
        shape = " × ".join(map(str, row.shape))
        bad = f"  {row.not_finite:,} not finite" if row.not_finite else ""
        yield f"{row.name:<{width}}  {shape:>13}  {row.count:>11,}  {row.mean:>9.5f}  {row.std:>8.5f}{bad}"
    yield ""
    for label, value in totals(config):
        yield f"{label:<19} {value}"
    rough = roughness(tensors[POSITIONS]) if POSITIONS in tensors else math.nan
    if not math.isnan(rough):
        yield f"{'positions':<19} roughness {rough:.2f} (1: noise, as at initialisation; 0: smooth)"
    if plots is not None:
        from restomod.analysis.weights.plots import draw_weights

        for path in draw_weights(tensors, name, plots):
            yield f"{'drawn':<19} {path}"


def compare_weights(first: str, second: str, seed: int) -> Iterator[str]:
    """Yield the lines of a comparison of two models, tensor by tensor.

    Args:
        first: preset, run, model folder, or name on the Hugging Face hub.
        second: model to compare with ``first``, named in the same way.
        seed: seed of the initial weights of a preset.

    Raises:
        UserError: a model cannot be loaded.
    """
    (config, a), (other, b) = _open(first, seed), _open(second, seed)
    rows = weight_differences(a, b)
    width = max(len(row.name) for row in rows)
    yield f"{'tensor':<{width}}  {'largest':>9}  {'relative':>9}  {'cosine':>8}"
    for row in rows:
        yield f"{row.name:<{width}}  {_cells(row)}"
    same = sum(row.identical for row in rows)
    yield ""
    yield f"{same} of {len(rows)} tensors are identical" if same < len(rows) else f"all {same} tensors are identical"
    if config != other:
        yield f"the configurations differ: {_shape(config)}; {_shape(other)}"
    compared = [row for row in rows if not row.remark]
    if same < len(rows) and compared:
        most = max(compared, key=lambda row: row.relative)
        yield f"largest relative change: {most.relative:.2e} in {most.name}"


def _shape(config: ModelConfig) -> str:
    return f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, {config.n_positions} positions"


def _cells(row: Difference) -> str:
    if row.remark:
        return row.remark
    if row.identical:
        return f"{'=':>9}  {'=':>9}  {'=':>8}"
    return f"{row.largest:>9.2e}  {row.relative:>9.2e}  {row.cosine:>8.5f}"


def _open(name: str, seed: int) -> tuple[ModelConfig, dict[str, Tensor]]:
    model, _ = open_or_build(name, torch.device("cpu"), seed, finite=False)
    if family_of(model.config).model_type == "gpt2":
        return model.config, hf_tensors(model)
    return model.config, {name: view.detach() for name, view in named_views(model).items()}
