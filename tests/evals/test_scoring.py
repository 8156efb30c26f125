"""Accuracies, perplexity and standard errors compared with numpy and with given scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from restomod.checks.device_parity import random_model
from restomod.evals import scoring
from restomod.evals.likelihood import Request, Score
from restomod.evals.models import ScoredGPT
from restomod.evals.scoring import Estimate, format_estimate, proportion, score_task
from restomod.evals.tasks.registry import TASKS, LoadedTask, own_example, own_task
from restomod.evals.tasks.task import Example
from restomod.utils.errors import UserError
from tests.evals.plainly import SMALL, plain_score
from tests.models import to_transformers

QUESTIONS = [
    ("The cat sat on", ["the mat", "a very large hat", "naïve 中文"], 0),
    ("Two and two", ["make four, as everyone knows", "five"], 1),
    ("", ["One", "two three four"], 1),
    ("It ends with a space ", ["so", "does this not"], 0),
    ("Say it again:", ["again", "again"], 1),
]


def loaded(questions: Sequence[tuple[str, list[str], int]]) -> LoadedTask:
    records = [{"query": q, "choices": c, "gold": g} for q, c, g in questions]
    examples = [dataclasses.replace(own_example(record), where=f"line {i}") for i, record in enumerate(records)]
    return LoadedTask(own_task("mine"), examples)


@pytest.fixture(scope="module")
def model() -> ScoredGPT:
    return ScoredGPT(random_model(SMALL))


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace the scoring by given log-likelihoods, in order."""

    def give(*values: float, greedy: Sequence[bool] = (), truncated: Sequence[bool] = ()) -> None:
        def scores(model: Any, requests: list[Request], *_: Any) -> list[Score]:
            more = [[*flags, *[False] * len(values)] for flags in (greedy, truncated)]
            return [
                Score(value, more[0][i], len(request.continuation), more[1][i])
                for i, (value, request) in enumerate(zip(values, requests, strict=True))
            ]

        monkeypatch.setattr(scoring, "log_likelihoods", scores)

    return give


def test_choices_equal_those_of_one_row_per_ending(model: ScoredGPT) -> None:
    theirs, encode = to_transformers(model.model), model.tokenizer.encode
    result = score_task(model, loaded(QUESTIONS))
    expected: dict[str, list[int]] = {name: [] for name in result.choices}
    for query, choices, _ in QUESTIONS:
        context = encode(query.rstrip()).tolist() or [50256]
        space = " " if query.endswith(" ") else ""
        endings = [encode(f"{space} {choice}").tolist() for choice in choices]
        p = np.array([plain_score(theirs, context, ending)[0] for ending in endings])
        for name, lengths in {
            "acc": [1 for _ in choices],
            "acc_norm": [len(choice) for choice in choices],
            "acc_bytes": [len(choice.encode("utf-8")) for choice in choices],
            "acc_token": [len(ending) for ending in endings],
        }.items():
            expected[name].append(int((p / np.array(lengths)).argmax()))
    assert result.choices == expected
    assert len({tuple(chosen) for chosen in expected.values()}) > 1  # the accuracies differ here
    for name, chosen in expected.items():
        assert result.metrics[name].value == np.mean([c == g for c, (_, _, g) in zip(chosen, QUESTIONS, strict=True)])
    assert (result.gold, result.truncated) == ([0, 1, 1, 0, 1], 0)


def test_each_accuracy_divides_by_its_own_length(model: ScoredGPT, answers: Any) -> None:
    answers(-10.0, -11.0, -12.0)
    # characters 3, 8, 11; bytes 3, 8, 20; tokens 1, 2 and many
    result = score_task(model, loaded([("q", ["cat", "cat's ca", "xyzéé中中中中中中"], 1)]))
    assert {name: chosen[0] for name, chosen in result.choices.items()} == {
        "acc": 0,
        "acc_norm": 2,
        "acc_bytes": 2,
        "acc_token": 2,
    }
    answers(-10.0, -19.0)
    result = score_task(model, loaded([("q", ["ééé", "aaaa aaaa aaaa aaaa"[:5]], 0)]))
    assert (result.choices["acc_norm"], result.choices["acc_bytes"]) == ([0], [0])
    answers(-10.0, -12.0)
    result = score_task(model, loaded([("q", ["ééé", "aaaa"], 0)]))
    assert (result.choices["acc_norm"], result.choices["acc_bytes"]) == ([1], [0])  # 3.33, 3; 1.67, 3


def test_the_first_of_equal_choices_wins(model: ScoredGPT, answers: Any) -> None:
    answers(-2.0, -1.0, -1.0)
    assert score_task(model, loaded([("q", ["a", "b", "c"], 2)])).choices["acc"] == [1]


def test_standard_errors_are_those_of_a_mean() -> None:
    hits = [True, False, False, True, True, False, False]
    assert proportion(hits) == Estimate(
        pytest.approx(np.mean(hits)), pytest.approx(np.std(hits, ddof=1) / math.sqrt(len(hits)))
    )
    assert proportion([True]) == Estimate(1.0, None)


def last_words(*words: str) -> LoadedTask:
    examples = [Example(("A b",), (f" {word}",), (word,), 0, f"line {i}") for i, word in enumerate(words)]
    return LoadedTask(TASKS["lambada"], examples)


def test_lambada_counts_greedy_words_and_perplexity(model: ScoredGPT, answers: Any) -> None:
    losses = [1.0, 2.5, 4.0]
    answers(*(-loss for loss in losses), greedy=[True, False, True])
    result = score_task(model, last_words("c", "d", "e"))
    assert result.metrics["acc"] == proportion([True, False, True])
    perplexity = result.metrics["perplexity"]
    assert perplexity.value == pytest.approx(math.exp(2.5))
    assert perplexity.stderr == pytest.approx(math.exp(2.5) * np.std(losses, ddof=1) / math.sqrt(3))
    assert result.choices == {"acc": [1, 0, 1]}
    answers(-1e6)
    assert score_task(model, last_words("c")).metrics["perplexity"].value == math.inf


def test_truncated_contexts_are_counted_per_example(model: ScoredGPT, answers: Any) -> None:
    answers(-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, truncated=[True, True, False, False, False, True])
    assert score_task(model, loaded([("q", ["a", "b"], 0)] * 3)).truncated == 2


def test_a_long_question_is_cut_and_counted_and_a_long_choice_refused(model: ScoredGPT) -> None:
    assert score_task(model, loaded([("cat " * 100, ["a", "b"], 0), ("q", ["a", "b"], 0)])).truncated == 1
    with pytest.raises(
        UserError, match="line 1: a choice of 100 tokens is longer than the model's context length of 48"
    ):
        score_task(model, loaded([("q", ["a", "b"], 0), ("q", ["a", ("cat " * 100)[:-1]], 0)]))


def test_nan_scores_are_refused(model: ScoredGPT, answers: Any) -> None:
    answers(-1.0, math.nan)
    with pytest.raises(UserError, match="line 0: the model's output is not finite"):
        score_task(model, loaded([("q", ["a", "b"], 0)]))


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.29554, 0.00455), "0.2955 ± 0.0046"),
        (Estimate(3.29239, None), "3.2924"),
        (Estimate(35131.0, 1234.5), "35,131.00 ± 1,234.50"),
    ],
)
def test_estimates_are_formatted_with_their_errors(estimate: Estimate, text: str) -> None:
    assert format_estimate(estimate) == text
