"""Are there parts of a model that training has not touched? Needs torch, which is imported when it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from restomod.analysis.health.symptoms import Finding
from restomod.runs.reader import Run
from restomod.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

NAME = "dead layers"
FEWEST_UPDATES = 20
UNMOVED = 0.01  # of the median of all matrices
NAMED = 4


def dead_layers(run: Run) -> Finding:
    """Matrices of the blocks, in the newest checkpoint, that are one number throughout or have not moved.

    A matrix has moved by what it has gained across its initial direction, which is known from the seed: a matrix
    without a gradient only shrinks, by weight decay. It counts as unmoved where that is a hundredth of the median of
    all matrices. Of a run that started from given weights only the former can be told.
    """
    import torch

    from restomod.model.gpt import build_model
    from restomod.model.hf_io import load_model
    from restomod.runs.checkpoint import list_checkpoints, require_shape, step_of, verify_model

    cpu = torch.device("cpu")
    try:
        checkpoints = list_checkpoints(run.folder)
        if not checkpoints or step_of(checkpoints[-1]) < FEWEST_UPDATES:
            return Finding(NAME, "unknown", f"needs a checkpoint of step {FEWEST_UPDATES} or later")
        verify_model(checkpoints[-1])
        require_shape(checkpoints[-1], run.config.model)
        trained = _matrices(load_model(checkpoints[-1], cpu, finite=False).named_parameters())
    except (UserError, OSError) as e:  # deleted meanwhile, by a run that goes on
        return Finding(NAME, "unknown", str(e))
    at = f"at step {step_of(checkpoints[-1])}"
    if broken := [name for name, value in trained.items() if not torch.isfinite(value).all()]:
        return Finding(NAME, "sick", f"{at} these hold numbers that are not finite: {_listed(broken)}")
    dead = [name for name, value in trained.items() if value.numel() > 1 and bool((value == value.flatten()[0]).all())]
    if dead:
        return Finding(NAME, "sick", f"{at} these are one number throughout: {_listed(dead)}")
    if run.config.init is not None:
        return Finding(NAME, "well", f"{at} no matrix of a block is one number throughout")
    started = _matrices(build_model(run.config.model, run.config.seed, cpu).named_parameters())
    moved = {name: _moved(value, started[name]) for name, value in trained.items() if name in started}
    usual = sorted(moved.values())[len(moved) // 2]
    still = [name for name, by in moved.items() if by <= UNMOVED * usual]
    if still:
        return Finding(NAME, "sick", f"{at} training has not moved {_listed(still)}: do gradients reach them?")
    return Finding(
        NAME,
        "well",
        f"{at} all {len(moved)} matrices of the blocks have moved, by {min(moved.values()):.2g} to "
        f"{max(moved.values()):.2g} of what they were drawn with",
    )


def _matrices(parameters: object) -> dict[str, Tensor]:
    return {
        name.removeprefix("transformer."): value.detach()
        for name, value in parameters  # type: ignore[attr-defined]
        if ".h." in name and value.ndim == 2
    }


def _moved(now: Tensor, before: Tensor) -> float:
    """Length of what ``now`` has across ``before``, in lengths of ``before`` (1 where that is zero)."""
    length = float(before.norm())
    if length == 0:
        return 1.0
    across = now - before * ((now * before).sum() / length**2)
    return float(across.norm()) / length


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
