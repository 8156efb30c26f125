"""Tests of the search space of a sweep."""

from __future__ import annotations

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from restomod.commands.parsing import parse
from restomod.commands.sweep import SweepArguments, build_plan
from restomod.commands.train import TrainArguments
from restomod.config.presets import preset
from restomod.experiments.sweep.space import flags, grid, parse_dimension
from restomod.utils.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim.lr=1e-4..1e-2", FloatDistribution(1e-4, 1e-2, log=True)),
        ("optim.lr=1e-4..1e-2:linear", FloatDistribution(1e-4, 1e-2)),
        ("optim.weight-decay=0..0.2", FloatDistribution(0.0, 0.2)),
        ("optim.weight_decay=0.1..0.2:log", FloatDistribution(0.1, 0.2, log=True)),
        ("model.n-layer=2..12", IntDistribution(2, 12)),
        ("steps=10..1000", IntDistribution(10, 1000, log=True)),
        ("micro-batch=1..4", IntDistribution(1, 4)),
        ("optim.lr=6e-4, 1.2e-3", CategoricalDistribution(("6e-4", "1.2e-3"))),
    ],
)
def test_ranges_and_values_become_optuna_distributions(text: str, expected: object) -> None:
    assert parse_dimension(text, "random").distribution() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lr", "not NAME=VALUES"),
        ("optim.learning=1", "unknown field 'optim.learning'"),
        ("optim.llr=1", "did you mean 'optim.lr'"),
        ("optim=1", "has several values"),
        ("optim.betas=0.9", "has several values"),
        ("optim.lr=fast", "not a number"),
        ("model.n_layer=1.5", "not an integer"),
        ("model.n_layer=1.5..3", "not a range LOW..HIGH of integers"),
        ("optim.lr=2..1", "must be below the upper end"),
        ("optim.lr=0..1:log", "must be above 0"),
        ("optim.decay=cosine,linnear", "did you mean 'linear'"),
        ("gradient_checkpointing=yes", "true or false"),
        ("optim.lr=1e-3,1e-3", "is repeated"),
    ],
)
def test_a_mistake_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        parse_dimension(text, "random")
    with pytest.raises(UserError, match="--random"):
        parse_dimension("optim.lr=1e-4..1e-2", "grid")  # a grid has no ranges


def test_a_grid_has_every_combination_once() -> None:
    points = grid([parse_dimension(text, "grid") for text in ("optim.lr=1,2", "model.n_layer=3,4,5")])
    assert points == [{"optim.lr": a, "model.n_layer": b} for a in "12" for b in "345"]


def test_too_many_trials_are_rejected_before_they_are_enumerated() -> None:
    values = ",".join(map(str, range(1, 1001)))
    with pytest.raises(UserError, match="the number of grid trials is 1000000000; it must be at most"):
        grid([parse_dimension(f"{name}={values}", "grid") for name in ("steps", "eval_every", "sample_every")])
    for n, seeds in ((10**11, 1), (1, 10**9)):
        given = SweepArguments(random=("optim.lr=1e-4..1e-2",), out="s", trials=n, seeds=seeds)
        with pytest.raises(UserError, match="it must be at most 100,000"):
            build_plan("quickstart", preset("quickstart"), given, [])


def test_flags_set_the_parameters_of_a_run() -> None:
    given = {"optim.lr": 0.0123, "model.n_layer": 3, "optim.decay": "wsd", "micro_batch": "None"}
    given |= {
        "model.bias": "false",
        "compile": "on",
        "gradient_checkpointing": "true",
        "model.qk_norm": "true",
        "sanity_checks": "false",
    }
    default = TrainArguments(preset("quickstart"), out="x")
    config = parse(TrainArguments, flags(given), "restomod train", default).config  # type: ignore[arg-type]
    assert (config.optim.lr, config.model.n_layer, config.optim.decay) == (0.0123, 3, "wsd")
    assert (config.model.bias, config.compile, config.gradient_checkpointing, config.model.qk_norm) == (
        False,
        "on",
        True,
        True,
    )
    assert (config.sanity_checks, config.micro_batch) == (False, None)
