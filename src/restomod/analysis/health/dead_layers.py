"""Symptom "dead layers": matrices of the blocks that training has not changed. torch is imported when needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from restomod.analysis.health.symptoms import Finding
from restomod.runs.reader import Run
from restomod.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

NAME = "dead layers"
FEWEST_UPDATES = 20
UNMOVED = 0.01  # fraction of the median change of all matrices
NAMED = 4  # maximum number of matrices in a message


def find_dead_layers(run: Run) -> Finding:
    """Look for matrices in the newest checkpoint that are constant or have not changed since initialisation.

    The change of a matrix is its component orthogonal to the initial matrix, which is rebuilt from the seed. (Weight
    decay alone only scales a matrix.) A matrix counts as unchanged below `UNMOVED` times the median change. In a run
    that started from pretrained weights, only constant matrices are found.
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
    except (UserError, OSError) as e:  # for example, training has deleted the checkpoint
        return Finding(NAME, "unknown", str(e))
    at = f"at step {step_of(checkpoints[-1])}"
    if broken := [name for name, value in trained.items() if not torch.isfinite(value).all()]:
        return Finding(NAME, "fail", f"not finite {at}: {_listed(broken)}")
    dead = [name for name, value in trained.items() if value.numel() > 1 and bool((value == value.flatten()[0]).all())]
    if dead:
        return Finding(NAME, "fail", f"constant {at}: {_listed(dead)}")
    if run.config.init is not None:
        return Finding(NAME, "ok", f"no block matrix is constant {at}")
    started = _matrices(build_model(run.config.model, run.config.seed, cpu).named_parameters())
    moved = {name: _moved(value, started[name]) for name, value in trained.items() if name in started}
    usual = sorted(moved.values())[len(moved) // 2]
    still = [name for name, by in moved.items() if by <= UNMOVED * usual]
    if still:
        return Finding(NAME, "fail", f"not changed by training {at}: {_listed(still)}; check their gradients")
    return Finding(
        NAME,
        "ok",
        f"all {len(moved)} block matrices have changed {at}, by {min(moved.values()):.2g} to "
        f"{max(moved.values()):.2g} times their initial norm",
    )


def _matrices(parameters: object) -> dict[str, Tensor]:
    return {
        name.removeprefix("transformer."): value.detach()
        for name, value in parameters  # type: ignore[attr-defined]
        if ".h." in name and value.ndim == 2
    }


def _moved(now: Tensor, before: Tensor) -> float:
    """Return the norm of the component of ``now`` orthogonal to ``before``, divided by the norm of ``before``.

    The result is 1 if ``before`` is zero.
    """
    length = float(before.norm())
    if length == 0:
        return 1.0
    across = now - before * ((now * before).sum() / length**2)
    return float(across.norm()) / length


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
