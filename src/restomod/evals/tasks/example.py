"""An example of a task, and the fields of the record that it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from restomod.utils.errors import shortened

Record = dict[str, Any]
KINDS = {str: "text", list: "a list", dict: "an object", (int, str): "a whole number"}


@dataclass(frozen=True)
class Example:
    """A question: which of the choices is right? Where a word is predicted there is one choice."""

    contexts: tuple[str, ...]
    """Text before each choice; mostly the same."""
    continuations: tuple[str, ...]
    """What is scored, with the space before it."""
    choices: tuple[str, ...]
    """Text of each choice: normalised accuracies divide by its length."""
    gold: int
    """Index of the right choice."""
    where: str = ""
    """File and line, for messages."""


class RecordError(Exception):
    """Says what is wrong with a record; its reader adds the file and the line."""


def get_field(record: Record, kind: Any, *names: str) -> Any:
    """The value of the first of ``names`` that the record has. Raises RecordError: none, or not of type ``kind``."""
    for name in names:
        if name in record:
            value = record[name]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise RecordError(f"{name!r} should be {KINDS[kind]}, not {value!r:.40}")
            return value
    there = ", ".join(shortened(repr(key)) for key in list(record)[:20]) or "no fields"
    raise RecordError(f"has no {' or '.join(map(repr, names))}; it has {there}")


def get_text(record: Record, *names: str) -> str:
    """Like `get_field`, of a string."""
    return str(get_field(record, str, *names))


def get_index(record: Record, *names: str) -> int:
    """Like `get_field`, of the index of the right choice, which some files hold as text."""
    value = get_field(record, (int, str), *names)
    try:
        return int(value)
    except ValueError:
        raise RecordError(f"{names[0]!r} should be the number of the right choice, not {value!r:.40}") from None


def get_choices(record: Record, *names: str) -> tuple[str, ...]:
    """Like `get_field`, of two or more strings."""
    values = get_field(record, list, *names)
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise RecordError(f"choice {i} should be text, not {value!r:.40}")
    if len(values) < 2:
        raise RecordError(f"has {len(values)} choices; a question needs two or more")
    return tuple(values)


def question(context: str, choices: tuple[str, ...], gold: int) -> Example:
    """An example with one context, and a space before each choice."""
    return Example((context,) * len(choices), tuple(after_space(c) for c in choices), choices, gold)


def after_space(text: str) -> str:
    """The text after a space; an empty one as it is."""
    return f" {text}" if text else ""
