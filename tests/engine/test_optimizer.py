"""Optimizers: AdamW against its formula, skipped updates of any optimizer, state for checkpoints, gradient norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from restomod.config.run import OptimConfig
from restomod.config.run import Optimizer as OptimizerName
from restomod.engine.loss_scale import LossScale
from restomod.engine.optimizer import Optimizers, build_optimizer, changed_by_nan, gradient_norm, optimizer_tensors
from tests.models import CPU
from tests.trainee import assert_identical, make_trainee, set_optimizer_tensors

CONFIG = OptimConfig(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def test_weight_decay_applies_to_matrices_and_embeddings_only() -> None:
    trainee = make_trainee()
    decay = {id(p): group["weight_decay"] for group in trainee.optimizer.param_groups for p in group["params"]}
    decayed = {name for name, p in trainee.model.named_parameters() if decay[id(p)] == 0.1}
    spared = {name for name, p in trainee.model.named_parameters() if decay[id(p)] == 0.0}
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    matrices = {f"transformer.h.{i}.{name}.weight" for i in (0, 1) for name in layers}
    assert decayed == {"transformer.wte.weight", "transformer.wpe.weight"} | matrices
    assert len(decayed) + len(spared) == len(list(trainee.model.parameters()))


def test_five_steps_match_the_formula_of_adamw_in_fp64() -> None:
    torch.manual_seed(0)
    model = nn.Linear(7, 5)  # a matrix with weight decay and a bias without
    optimizer = build_optimizer(model, CONFIG)
    state = {name: [p.detach().double(), 0.0, 0.0] for name, p in model.named_parameters()}
    for t in range(1, 6):
        lr = 1e-3 * t  # a different rate in every step
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            w, m, v = state[name]
            g = parameter.grad.double() / (3.0 * t)
            m = 0.9 * m + (1 - 0.9) * g
            v = 0.95 * v + (1 - 0.95) * g**2
            w = w - lr * (0.1 if name == "weight" else 0.0) * w
            w = w - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            state[name] = [w, m, v]
        optimizer.update(t, torch.tensor(3.0 * t), torch.tensor(False))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), state[name][0], atol=1e-7, rtol=1e-6)


# --- any optimizer -------------------------------------------------------------------------------------------

OF_TORCH: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "fused sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1),
    "fused adam": lambda p: torch.optim.Adam(p, 0.1, amsgrad=True, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, centered=True),
    "fused adagrad": lambda p: torch.optim.Adagrad(p, 0.1, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.1),
}


@pytest.mark.parametrize("name", OF_TORCH)
def test_any_optimizer_gets_divided_gradients_and_ignores_skipped_updates(name: str) -> None:
    """The reference is the same optimizer without the skipped updates. The first update is skipped, too."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    optimizer, alone = OF_TORCH[name](list(ours.parameters())), OF_TORCH[name](list(theirs.parameters()))
    wrapped = Optimizers([optimizer], LossScale(torch.float32, CPU))
    for refused in (True, True, False, False, True, False):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = torch.randn_like(q)
            p.grad = torch.full_like(p, float("nan")) if refused else q.grad * 8
        wrapped.update(0.5, torch.tensor(float("nan") if refused else 8.0), torch.tensor(refused))
        if not refused:
            alone.param_groups[0]["lr"] = 0.05
            alone.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert p.grad is None
            assert torch.equal(p, q)
            assert not any(value.isnan().any() for value in optimizer.state[p].values())
            for key, value in alone.state[q].items():
                assert torch.equal(optimizer.state[p][key], value), key


class Lion(torch.optim.Optimizer):
    """Ordinary optimizer without loss scaling and skipped updates. Source: Chen et al., 2023."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(group["lr"] * (beta1 * m + (1 - beta1) * p.grad).sign())
                    m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


class ClaimsToRefuse(Lion):
    refuses_on_device = True


class InheritsTheClaim(ClaimsToRefuse):
    pass


def changed(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], loss_scale: float) -> list[str]:
    def build(model: nn.Module) -> Optimizers:
        return Optimizers([make(list(model.parameters()))], LossScale(torch.float32, CPU))

    return changed_by_nan(build, CPU, loss_scale)


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**16])
@pytest.mark.parametrize("name", [*OF_TORCH, "lion", "inherits"])
def test_nan_gradients_change_neither_weights_nor_state(name: str, loss_scale: float) -> None:
    makers = OF_TORCH | {"lion": lambda p: Lion(p, 0.1), "inherits": lambda p: InheritsTheClaim(p, 0.1)}
    assert changed(makers[name], loss_scale) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_nan_gradients_change_nothing_with_any_optimizer_of_the_package(
    name: OptimizerName, dtype: torch.dtype
) -> None:
    config = OptimConfig(optimizer=name)
    assert changed_by_nan(lambda model: build_optimizer(model, config, dtype), CPU, 2.0**16) == []


def test_an_optimizer_that_wrongly_claims_to_skip_updates_is_found() -> None:
    assert "transformer.wte.weight" in changed(lambda p: ClaimsToRefuse(p, 0.1), 1.0)


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    parameters = list(nn.Linear(3, 2).parameters())
    with pytest.raises(TypeError, match=r"LBFGS cannot be used: .*closure"):
        Optimizers([torch.optim.LBFGS(parameters)], LossScale(torch.float32, CPU))


def test_reset_clears_all_state() -> None:
    used, fresh = make_trainee(seed=1), make_trainee(seed=1)
    used.train(0, 3)
    used.optimizer.reset()
    used.model.load_state_dict(fresh.model.state_dict())
    assert used.train(0, 3) == fresh.train(0, 3)
    assert_identical(used.tensors(), fresh.tensors())


# --- state ---------------------------------------------------------------------------------------------------


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}


def test_state_is_named_after_its_parameters() -> None:
    trainee = make_trainee()
    trainee.train(0, 1)
    names = {name for name, _ in trainee.model.named_parameters()}
    kinds = ("step", "exp_avg", "exp_avg_sq")
    expected = {f"state.{name}.{kind}" for name in names for kind in kinds}
    assert optimizer_tensors(trainee.model, trainee.optimizer).keys() == expected


@pytest.mark.parametrize("steps", [0, 5])
def test_state_is_restored_into_another_optimizer_bit_for_bit(steps: int) -> None:
    old, new = make_trainee(seed=1), make_trainee(seed=2)
    old.train(0, 3)
    new.train(0, steps)
    set_optimizer_tensors(new, copied(optimizer_tensors(old.model, old.optimizer)))
    new.model.load_state_dict(old.model.state_dict())
    assert_identical(new.tensors(), old.tensors())


def test_loading_state_keeps_the_configured_hyperparameters() -> None:
    old, new = make_trainee(), make_trainee(optim=OptimConfig(lr=7e-4, betas=(0.8, 0.9), weight_decay=0.3))
    old.train(0, 3)
    set_optimizer_tensors(new, copied(optimizer_tensors(old.model, old.optimizer)))
    for group, decay in zip(new.optimizer.param_groups, (0.3, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["weight_decay"]) == (7e-4, (0.8, 0.9), decay)


def test_reading_the_state_changes_nothing() -> None:
    trainee = make_trainee()
    trainee.train(0, 3)
    before = trainee.tensors()
    optimizer_tensors(trainee.model, trainee.optimizer)
    assert_identical(trainee.tensors(), before)


# --- gradient norm -------------------------------------------------------------------------------------------


def test_the_norm_is_global() -> None:
    model = nn.Linear(2, 2)
    model.weight.grad = torch.tensor([[2.0, 4.0], [4.0, 0.0]])
    assert gradient_norm(model).item() == 6.0
    model.bias.grad = torch.tensor([8.0, 0.0])
    assert gradient_norm(model).item() == 10.0
    assert model.weight.grad.tolist() == [[2.0, 4.0], [4.0, 0.0]]
