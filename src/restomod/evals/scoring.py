"""Scoring of tasks: accuracies and perplexity with standard errors."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from restomod.engine.distributed import SINGLE, Processes
from restomod.evals.likelihood import LanguageModel, Request, Score, encode_pair, log_likelihoods
from restomod.evals.tasks.registry import LoadedTask
from restomod.evals.tasks.task import Example
from restomod.utils.errors import NOT_FINITE, UserError

ACCURACIES = {
    "acc": "highest log-likelihood",
    "acc_norm": "highest log-likelihood per character (lm-evaluation-harness's acc_norm)",
    "acc_bytes": "highest log-likelihood per byte",
    "acc_token": "highest log-likelihood per token (build-nanogpt, GPT-3 paper)",
}


@dataclass(frozen=True)
class Estimate:
    """Mean over examples with its standard error."""

    value: float
    stderr: float | None
    """One standard error; None if it is unknown, for example with a single example."""


@dataclass(frozen=True)
class TaskResult:
    """Result of a model on a task."""

    metrics: dict[str, Estimate]
    choices: dict[str, list[int]]
    """Choice of the model for each example, by accuracy; for last words, 1 if greedy decoding generates the word."""
    gold: list[int]
    """Right choice of each example."""
    truncated: int
    """Number of examples whose context was cut to fit into the context length."""
    seconds: float
    """Wall-clock time of the evaluation."""

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {"examples": len(self.gold)} | dataclasses.asdict(self)


def score_task(
    model: LanguageModel, loaded: LoadedTask, batch: int | None = None, processes: Processes = SINGLE
) -> TaskResult:
    """Score a model on all loaded examples of a task.

    Args:
        model: model to evaluate.
        loaded: task and examples.
        batch: contexts per forward pass; None: chosen automatically.
        processes: ranks that share the work.

    Raises:
        UserError: an example cannot be scored, or the model's output is not finite.
    """
    began = time.perf_counter()
    examples = loaded.examples
    requests = [_requests(model, example) for example in examples]
    flat = log_likelihoods(model, [request for part in requests for request in part], batch, processes)
    answers = iter(flat)
    scores = [[next(answers) for _ in part] for part in requests]
    for example, part in zip(examples, scores, strict=True):
        if any(math.isnan(score.log_likelihood) for score in part):
            raise UserError(f"{example.where}: {NOT_FINITE}")
    truncated = sum(any(score.truncated for score in part) for part in scores)
    measure = _last_words if loaded.task.kind == "last-word" else _multiple_choice
    metrics, choices = measure(examples, scores)
    gold = [example.gold for example in examples]
    return TaskResult(metrics, choices, gold, truncated, time.perf_counter() - began)


def _requests(model: LanguageModel, example: Example) -> list[Request]:
    pairs = zip(example.contexts, example.continuations, strict=True)
    try:
        requests = [encode_pair(model.encode, model.prefix, *pair) for pair in pairs]
    except UserError as e:
        raise UserError(f"{example.where}: {e}") from None
    longest = max(len(request.continuation) for request in requests)
    if longest > model.max_length:
        raise UserError(
            f"{example.where}: a choice of {longest:,} tokens is longer than the model's context length of "
            f"{model.max_length:,}; shorten or remove it"
        )
    return requests


def _multiple_choice(
    examples: Sequence[Example], scores: Sequence[Sequence[Score]]
) -> tuple[dict[str, Estimate], dict[str, list[int]]]:
    """Compute the four accuracies. The first of equal choices wins, as in lm-evaluation-harness."""
    choices: dict[str, list[int]] = {name: [] for name in ACCURACIES}
    for example, part in zip(examples, scores, strict=True):
        summed = np.array([score.log_likelihood for score in part])
        divisors = {
            "acc": np.ones(len(part)),
            "acc_norm": np.array([len(choice) for choice in example.choices]),
            "acc_bytes": np.array([len(choice.encode()) for choice in example.choices]),
            "acc_token": np.array([score.tokens for score in part]),
        }
        for name, divisor in divisors.items():
            choices[name].append(int(np.argmax(summed / divisor)))
    gold = [example.gold for example in examples]
    metrics = {
        name: proportion([a == b for a, b in zip(chosen, gold, strict=True)]) for name, chosen in choices.items()
    }
    return metrics, choices


def _last_words(
    examples: Sequence[Example], scores: Sequence[Sequence[Score]]
) -> tuple[dict[str, Estimate], dict[str, list[int]]]:
    """Compute the accuracy of greedy decoding, and the perplexity: exp of the mean negative log-likelihood."""
    greedy = [part[0].greedy for part in scores]
    losses = [-part[0].log_likelihood for part in scores]
    mean = math.fsum(losses) / len(losses)
    perplexity = math.exp(mean) if mean < 700 else math.inf
    error = None
    if len(losses) > 1:  # delta method: the standard error of the mean times the derivative of exp
        variance = math.fsum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1)
        error = perplexity * math.sqrt(variance / len(losses))
    return {"acc": proportion(greedy), "perplexity": Estimate(perplexity, error)}, {"acc": [int(g) for g in greedy]}


def proportion(hits: Sequence[bool]) -> Estimate:
    """Return the proportion p of hits among n, with the standard error sqrt(p (1 - p) / (n - 1))."""
    n = len(hits)
    p = sum(hits) / n
    return Estimate(p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None)


def headline(loaded: LoadedTask, result: TaskResult) -> str:
    """Format the most commonly quoted accuracy with its standard error and the number of examples."""
    name = loaded.task.headline
    return f"{name} {format_estimate(result.metrics[name])} ({len(result.gold):,} examples)"


def format_estimate(estimate: Estimate) -> str:
    """Format a value and its standard error, with four decimals below 10 and two from 10 on."""
    digits = 4 if estimate.value < 10 else 2
    error = "" if estimate.stderr is None else f" ± {estimate.stderr:,.{digits}f}"
    return f"{estimate.value:,.{digits}f}{error}"
