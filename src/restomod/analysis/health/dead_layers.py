"""Dead layers: block matrices that training has not moved. Imports torch when called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from restomod.analysis.health.symptoms import Finding
from restomod.runs.reader import Run
from restomod.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

NAME = "dead layers"
FEWEST_UPDATES = 20
UNMOVED = 0.01  # of the median change of all matrices
NAMED = 4  # matrices, at most


def find_dead_layers(run: Run) -> Finding:
    """Look for block matrices, in the newest checkpoint, that are constant or have not moved.

    The change of a matrix is its component orthogonal to the initial matrix, which the seed determines: weight decay
    alone only shrinks a matrix. It counts as unmoved below `UNMOVED` times the median change. In a run that started
    from given weights only constant matrices are found.
    """
    import torch

    from restomod.model.gpt import build_model
    from restomod.model.hf_io import load_model
    from restomod.runs.checkpoint import require_shape, verify_model
    from restomod.utils.run_files import list_checkpoints, step_of

    cpu = torch.device("cpu")
    try:
        checkpoints = list_checkpoints(run.folder)
        if not checkpoints or step_of(checkpoints[-1]) < FEWEST_UPDATES:
            return Finding(NAME, "unknown", f"needs a checkpoint of step {FEWEST_UPDATES} or later")
        verify_model(checkpoints[-1])
        require_shape(checkpoints[-1], run.config.model)
        trained = _matrices(load_model(checkpoints[-1], cpu, finite=False).named_parameters())
    except (UserError, OSError) as e:  # such as a checkpoint deleted meanwhile, by a run in progress
        return Finding(NAME, "unknown", str(e))
    at = f"at step {step_of(checkpoints[-1])}"
    if broken := [name for name, value in trained.items() if not torch.isfinite(value).all()]:
        return Finding(NAME, "fail", f"{at} not finite: {_listed(broken)}")
    dead = [name for name, value in trained.items() if value.numel() > 1 and bool((value == value.flatten()[0]).all())]
    if dead:
        return Finding(NAME, "fail", f"{at} constant: {_listed(dead)}")
    if run.config.init is not None:
        return Finding(NAME, "ok", f"{at} no matrix of a block is constant")
    started = _matrices(build_model(run.config.model, run.config.seed, cpu).named_parameters())
    moved = {name: _moved(value, started[name]) for name, value in trained.items() if name in started}
    usual = sorted(moved.values())[len(moved) // 2]
    still = [name for name, by in moved.items() if by <= UNMOVED * usual]
    if still:
        return Finding(NAME, "fail", f"{at} not moved: {_listed(still)}; do gradients reach them?")
    return Finding(
        NAME,
        "ok",
        f"{at} all {len(moved)} matrices of the blocks have moved, by {min(moved.values()):.2g} to "
        f"{max(moved.values()):.2g} times their initial norm",
    )


def _matrices(parameters: object) -> dict[str, Tensor]:
    return {
        name.removeprefix("transformer."): value.detach()
        for name, value in parameters  # type: ignore[attr-defined]
        if ".h." in name and value.ndim == 2
    }


def _moved(now: Tensor, before: Tensor) -> float:
    """Norm of the component of ``now`` orthogonal to ``before``, over the norm of ``before`` (1 where that is 0)."""
    length = float(before.norm())
    if length == 0:
        return 1.0
    across = now - before * ((now * before).sum() / length**2)
    return float(across.norm()) / length


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
