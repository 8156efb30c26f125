"""AdamW against its definition, and its state out and back in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from restomod.config import OptimConfig
from restomod.train.optimizer import build_optimizer, gradient_norm, optimizer_tensors
from tests.train.trainee import assert_identical, make_trainee, set_optimizer_tensors

YES, NO = torch.tensor(True), torch.tensor(False)

CONFIG = OptimConfig(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def test_matrices_and_embeddings_are_decayed_and_biases_and_norms_are_not() -> None:
    trainee = make_trainee()
    decay = {id(p): group["weight_decay"] for group in trainee.optimizer.param_groups for p in group["params"]}
    decayed = {name for name, p in trainee.model.named_parameters() if decay[id(p)] == 0.1}
    spared = {name for name, p in trainee.model.named_parameters() if decay[id(p)] == 0.0}
    products = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    matrices = {f"transformer.h.{i}.{name}.weight" for i in (0, 1) for name in products}
    assert decayed == {"transformer.wte.weight", "transformer.wpe.weight"} | matrices
    assert len(decayed) + len(spared) == len(list(trainee.model.parameters()))


def test_five_steps_are_those_of_adamw_written_out_in_fp64() -> None:
    torch.manual_seed(0)
    model = nn.Linear(7, 5)  # a matrix, decayed, and a bias, not
    optimizer = build_optimizer(model, CONFIG)
    state = {name: [p.detach().double(), 0.0, 0.0] for name, p in model.named_parameters()}
    for t in range(1, 6):
        lr = 1e-3 * t  # the schedule's, another one in every step
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            w, m, v = state[name]
            g = parameter.grad.double() / (3.0 * t)
            m = 0.9 * m + (1 - 0.9) * g
            v = 0.95 * v + (1 - 0.95) * g**2
            w = w - lr * (0.1 if name == "weight" else 0.0) * w
            w = w - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            state[name] = [w, m, v]
        optimizer.update(t, torch.tensor(3.0 * t), NO)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), state[name][0], atol=1e-7, rtol=1e-6)


def test_a_refused_update_changes_nothing_and_drops_the_gradients() -> None:
    touched, spared = make_trainee(), make_trainee()
    touched.train(0, 2)
    spared.train(0, 2)
    for p in touched.model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    touched.optimizer.update(1.0, torch.tensor(float("nan")), YES)
    assert all(p.grad is None for p in touched.model.parameters())
    assert touched.train(2, 4) == spared.train(2, 4)
    assert_identical(touched.tensors(), spared.tensors())


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


def test_state_goes_into_a_fresh_optimizer_bit_for_bit() -> None:
    old, new = make_trainee(seed=1), make_trainee(seed=2)
    old.train(0, 3)
    set_optimizer_tensors(new, copied(optimizer_tensors(old.model, old.optimizer)))
    new.model.load_state_dict(old.model.state_dict())
    assert_identical(new.tensors(), old.tensors())


def test_state_replaces_that_of_an_optimizer_that_has_stepped() -> None:
    old, new = make_trainee(seed=1), make_trainee(seed=2)
    old.train(0, 3)
    new.train(0, 5)
    set_optimizer_tensors(new, copied(optimizer_tensors(old.model, old.optimizer)))
    new.model.load_state_dict(old.model.state_dict())
    assert_identical(new.tensors(), old.tensors())


def test_loading_state_keeps_the_hyperparameters_as_configured() -> None:
    old, new = make_trainee(), make_trainee(optim=OptimConfig(lr=7e-4, betas=(0.8, 0.9), weight_decay=0.3))
    old.train(0, 3)
    set_optimizer_tensors(new, copied(optimizer_tensors(old.model, old.optimizer)))
    for group, decay in zip(new.optimizer.param_groups, (0.3, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["weight_decay"]) == (7e-4, (0.8, 0.9), decay)


def test_asking_for_the_state_changes_nothing() -> None:
    trainee = make_trainee()
    trainee.train(0, 3)
    before = trainee.tensors()
    optimizer_tensors(trainee.model, trainee.optimizer)
    assert_identical(trainee.tensors(), before)


# --- the gradients' norm -------------------------------------------------------------------------------------


def test_the_norm_is_that_of_all_gradients_together() -> None:
    model = nn.Linear(2, 2)
    model.weight.grad = torch.tensor([[2.0, 4.0], [4.0, 0.0]])
    assert gradient_norm(model).item() == 6.0
    model.bias.grad = torch.tensor([8.0, 0.0])
    assert gradient_norm(model).item() == 10.0
    assert model.weight.grad.tolist() == [[2.0, 4.0], [4.0, 0.0]]
