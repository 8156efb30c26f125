"""LAMBADA (Paperno et al., 2016): prediction of the last word of a passage."""

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

_GPT2_PAPER = "the GPT-2 paper: own detokenizer; accuracy with a stop-word filter"


def example(record: Record) -> Example:
    """Convert a record: field `text`, split before its last word, or fields `context` and `continuation`."""
    if "text" in record:
        context, _, word = get_text(record, "text").rpartition(" ")
    else:
        context, word = get_text(record, "context"), get_text(record, "continuation").lstrip(" ")
    if not context:
        raise RecordError("has a single word; a context is needed before the last word")
    return Example((context,), (after_space(word),), (word,), 0)


TASKS = (
    Task(
        "lambada",
        "the last word with a space before it (OpenAI's text)",
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
