"""Questions out of files: JSON lines or Parquet, a record each, with errors that name the file and the line.

A function of this file turns a record into an `Example`; which one is said by the task (`restomod.evals.tasks`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restomod.data.file_format import detect_format
from restomod.data.readers import open_parquet, without_surrogates
from restomod.data.records import json_objects
from restomod.data.streams import checked_reads, compression_of, decoded, open_stream
from restomod.utils.errors import UserError, one_line, shortened
from restomod.utils.json_files import parse_json

Record = dict[str, Any]

LONGEST_LINE = 16_000_000  # bytes
MOST_EXAMPLES, MOST_CHARACTERS = 500_000, 250_000_000  # of a file: what fits into memory
ROWS_AT_ONCE = 256
POSSESSIVE = ("my", "his", "her", "our", "their")
LOWERED = ("A", "An", "The", "She", "He", "It", "They", "My", "His", "Her", "Their")
KINDS = {str: "text", list: "a list", dict: "an object", (int, str): "a whole number"}
OWN_FIELDS = (("query", "ctx"), ("choices", "endings"), ("gold", "label"))


@dataclass(frozen=True)
class Example:
    """A question: which of the choices is right? Of a text with a word to predict there is one choice."""

    contexts: tuple[str, ...]
    """What stands before each choice; mostly the same."""
    continuations: tuple[str, ...]
    """What is scored, with the space before it."""
    choices: tuple[str, ...]
    """The choices' own text: its length is what normalised accuracies divide by."""
    gold: int
    """Which of them is right."""
    where: str
    """File and line, for messages."""


class _Wrong(Exception):
    """What is wrong with a record; the file and the line are added where they are known."""


def read_examples(path: Path, example: Callable[[Record, str], Example]) -> list[Example]:
    """All examples of a file of JSON lines, JSON objects or Parquet, in its order; empty lines are left out.

    Raises:
        UserError: the file is missing or damaged, or a record is not as it should be; its line (row) is named.
    """
    examples, characters = [], 0
    kind = detect_format(path).kind
    for where, record in {"Parquet": _parquet, "JSON": _json}.get(kind, _json_lines)(path):
        try:
            examples.append(_checked(example(record, where)))
        except _Wrong as e:
            raise UserError(f"{where}: {e}") from None
        characters += sum(map(len, (*examples[-1].contexts[:1], *examples[-1].choices)))
        if len(examples) > MOST_EXAMPLES or characters > MOST_CHARACTERS:
            raise UserError(
                f"{where}: a task's file holds at most {MOST_EXAMPLES:,} examples and {MOST_CHARACTERS:,} characters"
            )
    if not examples:
        raise UserError(f"{path} is empty: it holds no examples")
    return examples


def _json_lines(path: Path) -> Iterator[tuple[str, Record]]:
    number = 0
    with open_stream(path) as f:
        for line in checked_reads(path, iter(lambda: f.readline(LONGEST_LINE + 1), b"")):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > LONGEST_LINE:
                raise UserError(f"{where}: it is longer than {LONGEST_LINE:,} bytes")
            if not line.strip():
                continue
            try:
                record = parse_json(line)
            except ValueError as e:
                raise UserError(
                    f"{where}: not JSON ({one_line(e)}); a task's file has one JSON object a line"
                ) from None
            if not isinstance(record, dict):
                raise UserError(f'{where}: should be an object such as {{"query": …, "choices": […], "gold": 0}}')
            yield where, record


def _json(path: Path) -> Iterator[tuple[str, Record]]:
    for number, record in enumerate(json_objects(path, decoded(path)), 1):
        yield f"{path}, record {number}", record


def _parquet(path: Path) -> Iterator[tuple[str, Record]]:
    number = 0
    with open_parquet(path, compression_of(path) is not None) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record


def _checked(example: Example) -> Example:
    n = len(example.choices)
    if not 0 <= example.gold < n:
        gold = shortened(str(example.gold))
        raise _Wrong(f"the right choice is {gold}, but the {n} choices are numbered 0 to {n - 1}")
    for i, (choice, continuation) in enumerate(zip(example.choices, example.continuations, strict=True)):
        if not choice or not continuation.strip():  # accuracies are divided by the length of a choice, too
            raise _Wrong(f"choice {i} is empty; there is nothing to score")
    return example


def _get(record: Record, kind: Any, *names: str) -> Any:
    """The first field there is of ``names``, which has to be of type ``kind``."""
    for name in names:
        if name in record:
            value = record[name]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise _Wrong(f"{name!r} should be {KINDS[kind]}, not {value!r:.40}")
            return without_surrogates(value) if isinstance(value, str) else value
    there = ", ".join(shortened(repr(key)) for key in list(record)[:20]) or "no fields"
    raise _Wrong(f"has no {' or '.join(map(repr, names))}; it has {there}")


def _index(record: Record, *names: str) -> int:
    """The number of the right choice, which some files hold as text."""
    value = _get(record, (int, str), *names)
    try:
        return int(value)
    except ValueError:
        raise _Wrong(f"{names[0]!r} should be the number of the right choice, not {value!r:.40}") from None


def _texts(record: Record, *names: str) -> tuple[str, ...]:
    values = _get(record, list, *names)
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise _Wrong(f"choice {i} should be text, not {value!r:.40}")
    if len(values) < 2:
        raise _Wrong(f"has {len(values)} choices; a question needs two or more")
    return tuple(map(without_surrogates, values))


def _question(context: str, choices: tuple[str, ...], gold: int, where: str) -> Example:
    return Example((context,) * len(choices), tuple(_after_space(c) for c in choices), choices, gold, where)


def _after_space(choice: str) -> str:
    return f" {choice}" if choice else ""


def own(record: Record, where: str) -> Example:
    """A user's own question: query or ctx, choices or endings, gold or label; a space goes before each choice."""
    context, choices, gold = OWN_FIELDS
    return _question(_get(record, str, *context), _texts(record, *choices), _index(record, *gold), where)


def hellaswag(record: Record, where: str) -> Example:
    """HellaSwag as build-nanogpt scores it: the file's `ctx` as it is, a space, an ending as it is."""
    return _question(_get(record, str, "ctx"), _texts(record, "endings"), _index(record, "label"), where)


def hellaswag_harness(record: Record, where: str) -> Example:
    """HellaSwag as lm-evaluation-harness scores it: the activity before the context, WikiHow's brackets removed.

    Where a file has no `ctx_a` and `ctx_b`, its `ctx` is taken for the two.
    """
    if "ctx_a" in record:
        context = f"{_get(record, str, 'ctx_a')} {_get(record, str, 'ctx_b').capitalize()}"
    else:
        context = _get(record, str, "ctx")
    endings = tuple(_without_brackets(ending) for ending in _texts(record, "endings"))
    query = _without_brackets(f"{_get(record, str, 'activity_label')}: {context}")
    return _question(query, endings, _index(record, "label"), where)


def _without_brackets(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def arc(record: Record, where: str) -> Example:
    """ARC (Clark et al., 2018) as lm-evaluation-harness scores it: "Question: …\\nAnswer:", then a choice's text."""
    choices = _get(record, dict, "choices")
    labels, key = _get(choices, list, "label"), _get(record, str, "answerKey")
    if key not in labels:
        raise _Wrong(f"the answer {shortened(repr(key))} is none of the choices' labels {shortened(repr(labels))}")
    context = f"Question: {_get(record, str, 'question')}\nAnswer:"
    return _question(context, _texts(choices, "text"), labels.index(key), where)


def piqa(record: Record, where: str) -> Example:
    """PIQA (Bisk et al., 2020) as lm-evaluation-harness scores it: "Question: …\\nAnswer:", then a solution."""
    context = f"Question: {_get(record, str, 'goal')}\nAnswer:"
    solutions = (_get(record, str, "sol1"), _get(record, str, "sol2"))
    return _question(context, solutions, _index(record, "label"), where)


def winograd(record: Record, where: str) -> Example:
    """A Winograd schema by partial evaluation (Trinh and Le, 2018): how likely is the rest after each candidate?

    The candidate takes the pronoun's place. As in lm-evaluation-harness, it gets 's for a possessive pronoun, and a
    small letter within a sentence.
    """
    text = _get(record, str, "text").replace("  ", " ")
    pronoun, at = _get(record, str, "pronoun"), _index(record, "pronoun_loc")
    if text[at : at + len(pronoun)] != pronoun:
        place = shortened(str(at))
        raise _Wrong(f"the pronoun {shortened(repr(pronoun))} does not stand at character {place} of the text")
    rest = text[at + len(pronoun) :]
    options = tuple(_in_place(option, pronoun, text[:at]) for option in _texts(record, "options"))
    contexts = tuple(text[:at] + option for option in options)
    return Example(contexts, (rest,) * len(options), options, _index(record, "label"), where)


def _in_place(option: str, pronoun: str, before: str) -> str:
    if pronoun.lower() in POSSESSIVE:
        option += "'s"
    first, _, others = option.partition(" ")
    if first in LOWERED and before.rstrip()[-1:] not in ("", "."):
        return f"{first.lower()} {others}" if others else first.lower()
    return option


def lambada(record: Record, where: str) -> Example:
    """LAMBADA (Paperno et al., 2016): the last word after all before it; of a `text`, or already apart."""
    if "text" in record:
        context, _, word = _get(record, str, "text").rpartition(" ")
    else:
        context, word = _get(record, str, "context"), _get(record, str, "continuation").lstrip(" ")
    if not context:
        raise _Wrong("has no word before its last one")
    return Example((context,), (_after_space(word),), (word,), 0, where)
