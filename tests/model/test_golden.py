"""Golden values: first-step loss and gradient norm of every recipe.

These numbers may change only with a deliberate change of the model, its initialisation or the loss that CHANGELOG.md
lists. Any other commit that changes them is wrong.

Recipes have a tiny size and run in fp32 on the CPU with one thread. "perturbed" is the same model with noise added to
all parameters, because projections and factors that start at 0 hide most of the model. The values were computed in
fp64. In fp32 the loss differs by at most 8e-7 and the norm by a fraction of at most 3e-8, with and without AVX2 and
AVX-512.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from restomod.config.presets import SIZES
from restomod.engine.step import ComputeConfig, batch_loss
from restomod.model.gpt import GPT, build_model
from tests.models import CPU, random_tokens

GOLDEN = {  # loss, gradient norm
    ("gpt2", "initial"): (6.9310733, 1.92676246),
    ("gpt2", "perturbed"): (7.0847456, 1.77032419),
    ("llama", "initial"): (6.9316975, 1.52626144),
    ("llama", "perturbed"): (7.1306512, 2.63809633),
    ("modern", "initial"): (6.9083253, 1.44040190),
    ("modern", "perturbed"): (7.0642733, 2.98121931),
    ("speedrun", "initial"): (6.9487628, 1.00395951),
    ("speedrun", "perturbed"): (7.1340742, 1.26543770),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(name: str, weights: str) -> GPT:
    """Build a model of a recipe with two layers and width 128."""
    model = build_model(dataclasses.replace(SIZES[name](2).model, n_positions=64, vocab_size=997), 1337, CPU)
    if weights == "perturbed":
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
            for matrix in model.vocabulary_matrices():
                matrix[model.config.vocab_size :] = 0.0
    return model


@pytest.mark.parametrize(("name", "weights"), GOLDEN, ids="-".join)
def test_first_loss_and_gradient_norm_are_unchanged(name: str, weights: str) -> None:
    model = recipe(name, weights)
    tokens = random_tokens(model.config, 4, 65)
    loss = batch_loss(model, tokens[:, :-1], tokens[:, 1:], ComputeConfig(CPU, torch.float32, micro_batch=4))
    loss.backward()
    norm = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm()
    expected_loss, expected_norm = GOLDEN[name, weights]
    assert loss.item() == pytest.approx(expected_loss, abs=4e-6)
    assert norm.item() == pytest.approx(expected_norm, rel=3e-7)
