"""LAMBADA (Paperno et al., 2016): the last word of a passage, given all before it."""

from __future__ import annotations

from restomod.evals.tasks.task import (
    GPT2,
    GPT3,
    GPT3_PAPER,
    Example,
    HubData,
    Record,
    RecordError,
    Reference,
    Task,
    after_space,
    get_text,
)

_GPT2_PAPER = "the GPT-2 paper: its own detokenizer, for accuracy a stop-word filter"


def example(record: Record) -> Example:
    """The last word of `text`; or `context` and `continuation`, apart already."""
    if "text" in record:
        context, _, word = get_text(record, "text").rpartition(" ")
    else:
        context, word = get_text(record, "context"), get_text(record, "continuation").lstrip(" ")
    if not context:
        raise RecordError("has no word before its last one")
    return Example((context,), (after_space(word),), (word,), 0)


TASKS = (
    Task(
        "lambada",
        "the last word, a space before it (OpenAI's text)",
        example,
        headline="acc",
        source=HubData("EleutherAI/lambada_openai", "default", "test"),
        kind="last-word",
        size=5_153,
        references=(
            Reference(GPT2, "acc", 0.4599, _GPT2_PAPER),
            Reference(GPT2, "perplexity", 35.13, _GPT2_PAPER),
            Reference(GPT3, "acc", 0.427, GPT3_PAPER),
            Reference(GPT3, "perplexity", 18.6, GPT3_PAPER),
        ),
    ),
)
