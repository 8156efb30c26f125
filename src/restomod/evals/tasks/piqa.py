"""PIQA (Bisk et al., 2020): two-choice questions about everyday physics, a goal and two solutions."""

from __future__ import annotations

from restomod.evals.tasks.task import (
    GPT3,
    GPT3_PAPER,
    Example,
    HubData,
    Record,
    Reference,
    Task,
    get_index,
    get_text,
    question,
)


def example(record: Record) -> Example:
    """Convert a record as lm-evaluation-harness does: lines "Question: …" and "Answer:", then a solution."""
    context = f"Question: {get_text(record, 'goal')}\nAnswer:"
    return question(context, (get_text(record, "sol1"), get_text(record, "sol2")), get_index(record, "label"))


TASKS = (
    Task(
        "piqa",
        "Question: …, Answer:, the solution (lm-evaluation-harness)",
        example,
        headline="acc_norm",
        source=HubData("baber/piqa", None, "validation"),
        size=1_838,
        chance=0.5,
        references=(Reference(GPT3, "acc_token", 0.646, GPT3_PAPER),),
    ),
)
