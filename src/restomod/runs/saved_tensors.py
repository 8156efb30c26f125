"""The safetensors files of a checkpoint: opened, finite, and of the size that a configuration describes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from restomod.config.run import ModelConfig
from restomod.model.flops import parameter_count
from restomod.model.hf_format import as_saved
from restomod.model.hf_io import WEIGHTS, read_model_config, require_short_header
from restomod.utils.errors import UserError, one_line
from restomod.utils.files import require_regular

STATE = "training_state"
NEVER_NEGATIVE = (".exp_avg_sq", ".step")  # of AdamW: their roots, or powers, would make the weights NaN


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        UserError: it is damaged, or a tensor is of a kind that torch cannot compute with.
    """
    require_regular(path)
    try:
        require_short_header(path)
        with safe_open(path, "pt") as saved:
            yield saved
    except (SafetensorError, OSError, TypeError, ValueError, KeyError, NotImplementedError) as e:
        raise UserError(f"{path} is damaged: {one_line(e)}") from None


def require_shape(folder: Path, config: ModelConfig) -> None:
    """See that a checkpoint is of the model that a run's configuration describes, before memory is taken for that.

    Raises:
        UserError: its config.json, or the number of its parameters, is another.
    """
    if read_model_config(folder) != as_saved(config):
        raise UserError(f"{folder} is of another model than config.json of the run; restore the original files")
    with opened(folder / WEIGHTS) as saved:
        sizes = [math.prod(saved.get_slice(name).get_shape()) for name in saved.keys()]  # noqa: SIM118
    if sum(sizes) != parameter_count(config):
        raise UserError(
            f"{folder / WEIGHTS} holds {sum(sizes):,} parameters, but the run's config.json describes a model of "
            f"{parameter_count(config):,}; restore the original config.json"
        )


def require_finite(folder: Path) -> None:
    """Raise UserError if a tensor of a verified checkpoint holds NaN or infinity, or a mean of squares below 0."""
    for path in [folder / WEIGHTS, *sorted((folder / STATE).glob("*.safetensors"))]:
        with opened(path) as saved:
            for name in saved.keys():  # noqa: SIM118  # it is no mapping
                values = saved.get_tensor(name)
                if not values.isfinite().all():
                    raise UserError(f"{path}: {name} holds values that are not finite")
                if name.endswith(NEVER_NEGATIVE) and (values < 0).any():
                    raise UserError(f"{path}: {name} holds values below 0")
