"""Winograd schemas (Levesque et al., 2012; WSC273): two-choice questions, the referent of a pronoun."""

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
    get_index,
    get_text,
)
from restomod.utils.errors import shortened

POSSESSIVE = ("my", "his", "her", "our", "their")
LOWERED = ("A", "An", "The", "She", "He", "It", "They", "My", "His", "Her", "Their")


def example(record: Record) -> Example:
    """Convert a record for partial evaluation (Trinh and Le, 2018).

    Each candidate replaces the pronoun, and the rest of the sentence is scored. As in lm-evaluation-harness, "'s" is
    added for a possessive pronoun, and a candidate within a sentence begins in lower case.
    """
    text = get_text(record, "text").replace("  ", " ")
    pronoun, at = get_text(record, "pronoun"), get_index(record, "pronoun_loc")
    if text[at : at + len(pronoun)] != pronoun:
        place = shortened(str(at))
        raise RecordError(f"the pronoun {shortened(repr(pronoun))} is not at character {place} of the text")
    before, rest = text[:at], text[at + len(pronoun) :]
    options = tuple(_in_place(option, pronoun, before) for option in get_choices(record, "options"))
    contexts = tuple(before + option for option in options)
    return Example(contexts, (rest,) * len(options), options, get_index(record, "label"))


def _in_place(option: str, pronoun: str, before: str) -> str:
    if pronoun.lower() in POSSESSIVE:
        option += "'s"
    first, space, others = option.partition(" ")
    if first in LOWERED and before.rstrip()[-1:] not in ("", "."):
        return f"{first.lower()}{space}{others}"
    return option


TASKS = (
    Task(
        "winograd",
        "WSC273, the rest of the sentence after each candidate (partial evaluation)",
        example,
        headline="acc",
        source=HubData("lighteval/winograd_wsc", "wsc273", "test"),
        size=273,
        chance=0.5,
        references=(Reference(GPT3, "acc", 0.663, GPT3_PAPER),),
    ),
)
