"""ARC (Clark et al., 2018): multiple-choice school science questions, an easy and a challenge set."""

from __future__ import annotations

from restomod.evals.tasks.task import (
    GPT3,
    GPT3_PAPER,
    Example,
    HubData,
    Record,
    RecordError,
    Reference,
    Task,
    get_choices,
    get_field,
    get_text,
    question,
)
from restomod.utils.errors import shortened


def example(record: Record) -> Example:
    """Convert a record as lm-evaluation-harness does: lines "Question: …" and "Answer:", then a choice's text."""
    choices = get_field(record, dict, "choices")
    labels, key = get_field(choices, list, "label"), get_text(record, "answerKey")
    if key not in labels:
        raise RecordError(f"the answer {shortened(repr(key))} is not in the choices' labels {shortened(repr(labels))}")
    context = f"Question: {get_text(record, 'question')}\nAnswer:"
    return question(context, get_choices(choices, "text"), labels.index(key))


TASKS = tuple(
    Task(
        f"arc-{level.lower()}",
        "Question: …, Answer:, the choice's text (lm-evaluation-harness)",
        example,
        headline="acc_norm",
        source=HubData("allenai/ai2_arc", f"ARC-{level}", "test"),
        size=size,
        references=(Reference(GPT3, "acc_token", gpt3, GPT3_PAPER),),
    )
    for level, size, gpt3 in (("Easy", 2_376, 0.436), ("Challenge", 1_172, 0.266))
)
