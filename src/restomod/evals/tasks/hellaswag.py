"""HellaSwag (Zellers et al., 2019): four-choice questions, the correct ending of a description.

The official file is downloaded. There are two tasks: the prompt format of build-nanogpt and the one of
lm-evaluation-harness.
"""

from __future__ import annotations

import re

from restomod.evals.tasks.task import (
    GPT2,
    GPT3,
    GPT3_PAPER,
    LLAMA,
    LR_STUDY,
    RTX3090,
    Download,
    Example,
    Record,
    Reference,
    Task,
    get_choices,
    get_index,
    get_text,
    question,
)

DATA = Download(
    "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
    "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    "hellaswag_val.jsonl",
)
_BUILD_NANOGPT = "build-nanogpt's script, all 10,042"
_HARNESS = "lm-evaluation-harness, as build-nanogpt quotes it"


def plain_example(record: Record) -> Example:
    """Convert a record as build-nanogpt does: the unchanged field `ctx`, a space, an unchanged ending."""
    return question(get_text(record, "ctx"), get_choices(record, "endings"), get_index(record, "label"))


def harness_example(record: Record) -> Example:
    """Convert a record as lm-evaluation-harness does: activity label, context, ending, without WikiHow's brackets.

    Records without the fields `ctx_a` and `ctx_b` use `ctx` as the context.
    """
    if "ctx_a" in record:
        context = f"{get_text(record, 'ctx_a')} {get_text(record, 'ctx_b').capitalize()}"
    else:
        context = get_text(record, "ctx")
    endings = tuple(_without_brackets(ending) for ending in get_choices(record, "endings"))
    query = _without_brackets(f"{get_text(record, 'activity_label')}: {context}")
    return question(query, endings, get_index(record, "label"))


def _without_brackets(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


TASKS = (
    Task(
        "hellaswag",
        "unchanged ctx, a space, the ending (build-nanogpt)",
        plain_example,
        headline="acc_token",
        source=DATA,
        size=10_042,
        chance=0.25,
        references=(
            Reference(GPT2, "acc", 0.2859, _BUILD_NANOGPT),
            Reference(GPT2, "acc_token", 0.2955, _BUILD_NANOGPT),
            Reference(GPT3, "acc_token", 0.337, GPT3_PAPER),
            Reference(RTX3090, "acc_token", 0.28, "build-nanogpt's script; its README"),
            Reference(LLAMA, "acc_token", 0.32, "build-nanogpt's script, two epochs; its README"),
            Reference(LR_STUDY[0], "acc_token", 0.3019, "build-nanogpt's script, 3032 of 10,042; its README"),
            Reference(LR_STUDY[1], "acc_token", 0.3089, "build-nanogpt's script, 3102 of 10,042; its README"),
        ),
    ),
    Task(
        "hellaswag-harness",
        "activity: ctx, a space, the ending, without brackets (lm-evaluation-harness)",
        harness_example,
        headline="acc_norm",
        source=DATA,
        size=10_042,
        chance=0.25,
        references=(Reference(GPT2, "acc", 0.2892, _HARNESS), Reference(GPT2, "acc_norm", 0.3114, _HARNESS)),
    ),
)
