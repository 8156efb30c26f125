"""Muon against singular value decompositions, against its formula, and in several ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from restomod.config.run import OptimConfig
from restomod.engine.distributed import SINGLE, Processes, distribute
from restomod.engine.optimizer import build_optimizer, optimizer_tensors
from restomod.engine.optimizers import muon as module
from restomod.engine.optimizers.muon import Muon, orthogonalise, step_factor
from restomod.engine.step import BatchLoss, ComputeConfig, train_step
from tests.models import CPU
from tests.processes import member, results
from tests.trainee import assert_identical, make_trainee, set_optimizer_tensors

MUON = OptimConfig(optimizer="muon", lr=3e-3, muon_lr=0.02, muon_weight_decay=0.1, warmup_steps=3)


def with_singular_values(values: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return a random matrix (rows, columns) with the given singular values, and its U Vᵀ."""
    n = len(values)
    u = torch.linalg.qr(torch.randn(rows, n, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, n, dtype=torch.float64))[0]
    return (u * values.double()) @ v.T, u @ v.T


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (64, 192), (192, 64)])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 0.145), (torch.bfloat16, 0.16)])
def test_singular_values_become_about_one_and_singular_vectors_stay(
    rows: int, columns: int, dtype: torch.dtype, near: float
) -> None:
    torch.manual_seed(0)
    # the smallest singular value is 0.0012 of the norm, the root of the sum of squares
    x, direction = with_singular_values(torch.logspace(0, -2.5, 64), rows, columns)
    found = orthogonalise(x.float()[None], dtype)[0]
    assert found.dtype == dtype
    values = torch.linalg.svdvals(found.double())
    assert (values - 1).abs().max() < near
    cosine = (found.double() * direction).sum() / (found.double().norm() * direction.norm())
    assert cosine > 0.99


def test_matrices_are_orthogonalised_separately() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 16, 48) * torch.tensor([1.0, 1e-3, 1e3])[:, None, None]
    together = orthogonalise(x)
    for one, found in zip(x, together, strict=True):
        torch.testing.assert_close(orthogonalise(one[None])[0], found)


def test_the_scale_of_a_gradient_does_not_matter_and_zero_stays_zero() -> None:
    x = torch.randn(2, 16, 16)
    torch.testing.assert_close(orthogonalise(x * 1e-4), orthogonalise(x), atol=1e-3, rtol=1e-3)
    assert orthogonalise(torch.zeros(1, 8, 8)).abs().max() == 0


def test_five_steps_match_the_formula() -> None:
    """The formula has Nesterov momentum, weight decay, and separate orthogonalisation of stacked matrices."""
    torch.manual_seed(0)
    wide, stacked = torch.nn.Parameter(torch.randn(8, 24)), torch.nn.Parameter(torch.randn(36, 12))
    optimizer = Muon([{"params": [wide], "stacked": 1}, {"params": [stacked], "stacked": 3}], 0.02, 0.9, 0.1)
    expected = {p: p.detach().clone() for p in (wide, stacked)}
    sums = {p: torch.zeros_like(p) for p in expected}
    optimizer.found_inf = torch.tensor(0.0)
    for t in range(1, 6):
        optimizer.grad_scale = torch.tensor(2.0 * t)
        for p, parts in ((wide, 1), (stacked, 3)):
            p.grad = torch.randn_like(p)
            g = p.grad / (2.0 * t)
            sums[p] = 0.9 * sums[p] + g
            pieces = [orthogonalise(piece[None])[0] for piece in (g + 0.9 * sums[p]).chunk(parts)]
            scale = (max(1.0, p.shape[0] / parts / p.shape[1])) ** 0.5
            expected[p] = expected[p] * (1 - 0.02 * 0.1) - 0.02 * scale * torch.cat(pieces)
        optimizer.step()
    for p, value in expected.items():
        torch.testing.assert_close(p.detach(), value, atol=1e-5, rtol=1e-5)


def test_tall_matrices_have_larger_updates() -> None:
    assert step_factor(768, 768) == step_factor(768, 3072) == 1.0
    assert step_factor(3072, 768) == 2.0


# --- as part of a model's optimizers -------------------------------------------------------------------------


def test_muon_has_the_matrices_of_the_blocks_and_adamw_all_others() -> None:
    trainee = make_trainee(optim=MUON)
    adamw, muon = trainee.optimizer.parts
    held = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {name for name, p in trainee.model.named_parameters() if id(p) in held}
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names == {f"transformer.h.{i}.{kind}.weight" for i in (0, 1) for kind in kinds}
    others = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert len(held) + len(others) == len(list(trainee.model.parameters()))
    assert not held & others


def test_a_model_learns() -> None:
    losses = [loss for loss, _ in make_trainee(optim=MUON).train(0, 20)]
    assert losses[-1] < losses[0] - 0.3


def test_state_is_restored_bit_for_bit() -> None:
    old, new = make_trainee(optim=MUON), make_trainee(optim=MUON)
    new.train(0, 1)
    old.train(0, 3)
    saved = {name: value.clone() for name, value in optimizer_tensors(old.model, old.optimizer).items()}
    assert "state.transformer.h.0.attn.c_attn.weight.momentum" in saved
    set_optimizer_tensors(new, saved)
    new.model.load_state_dict(old.model.state_dict())
    assert_identical(new.tensors(), old.tensors())
    assert new.train(3, 6) == old.train(3, 6)


def course(processes: Processes, parallel: str) -> dict[str, Tensor]:
    """Return all weights after ten steps."""
    t = make_trainee(optim=MUON)
    compute = ComputeConfig(CPU, torch.float32, 2)
    loss_of = distribute(BatchLoss(t.model, compute), t.model, parallel, processes)  # type: ignore[arg-type]
    optimizer = build_optimizer(t.model, t.config.optim, torch.float32, processes)
    for step in range(10):
        batch = t.batches.micro_batches(step, 2, processes.rank, processes.world_size)
        train_step(loss_of, optimizer, batch, t.config, step, processes).wait()
    whole = {name: p.detach() for name, p in t.model.named_parameters()}
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for name, p in whole.items()}


@pytest.mark.parametrize(("count", "parallel"), [(2, "ddp"), (4, "ddp"), (2, "fsdp")])
def test_ranks_that_share_the_work_end_with_the_weights_of_one(count: int, parallel: str) -> None:
    alone = make_trainee(optim=MUON)
    alone.train(0, 10, micro_batch=2)
    for weights in results(count, member, course, parallel):
        for name, parameter in alone.model.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), atol=2e-5, rtol=1e-4)


def orthogonalised(processes: Processes, parallel: str) -> int:
    """Return the number of matrices that this rank orthogonalises in a step."""
    found = []

    def counted(matrices: Tensor, dtype: torch.dtype) -> Tensor:
        found.append(len(matrices))
        return orthogonalise(matrices, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "orthogonalise", counted)
        t = make_trainee(optim=MUON)
        loss = BatchLoss(t.model, ComputeConfig(CPU, torch.float32, 2))
        loss_of = distribute(loss, t.model, parallel, processes)  # type: ignore[arg-type]
        optimizer = build_optimizer(t.model, t.config.optim, torch.float32, processes)
        batch = t.batches.micro_batches(0, 2, processes.rank, processes.world_size)
        train_step(loss_of, optimizer, batch, t.config, 0, processes).wait()
    return sum(found)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_orthogonalise_half_of_the_matrices_each(parallel: str) -> None:
    assert orthogonalised(SINGLE, "ddp") == 12  # 6 per layer; queries, keys and values are separate
    assert results(2, member, orthogonalised, parallel) == [6, 6]
