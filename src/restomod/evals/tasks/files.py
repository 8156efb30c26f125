"""Reader of task files: JSON lines, JSON or Parquet, one record per example. Errors name the file and the line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from restomod.data.file_format import detect_format
from restomod.data.readers import open_parquet, without_surrogates
from restomod.data.records import json_objects
from restomod.data.streams import checked_reads, compression_of, decoded, open_stream
from restomod.evals.tasks.task import Example, Record, RecordError
from restomod.utils.errors import UserError, one_line, shortened
from restomod.utils.json_files import parse_json

LONGEST_LINE = 16_000_000  # bytes
MOST_EXAMPLES, MOST_CHARACTERS = 500_000, 250_000_000  # per file, so that it fits into memory
PARQUET_BATCH = 256  # rows


def read_examples(path: Path, example: Callable[[Record], Example]) -> list[Example]:
    """Read all examples of a JSON lines, JSON or Parquet file, in file order. Empty lines are skipped.

    Args:
        path: task file, compressed or not.
        example: conversion of a record to an example, such as `Task.example`.

    Raises:
        UserError: the file is missing, damaged, empty or too large, or a record is invalid; the message names the
            line or row.
    """
    examples, characters = [], 0
    kind = detect_format(path).kind
    for where, record in {"Parquet": _parquet, "JSON": _json}.get(kind, _json_lines)(path):
        try:
            examples.append(_checked(example(record), where))
        except RecordError as e:
            raise UserError(f"{where}: {e}") from None
        characters += sum(map(len, (*examples[-1].contexts[:1], *examples[-1].choices)))
        if len(examples) > MOST_EXAMPLES or characters > MOST_CHARACTERS:
            raise UserError(
                f"{where}: a task file may have at most {MOST_EXAMPLES:,} examples and {MOST_CHARACTERS:,} characters"
            )
    if not examples:
        raise UserError(f"{path} is empty: it has no examples")
    return examples


def _json_lines(path: Path) -> Iterator[tuple[str, Record]]:
    number = 0
    with open_stream(path) as f:
        for line in checked_reads(path, iter(lambda: f.readline(LONGEST_LINE + 1), b"")):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > LONGEST_LINE:
                raise UserError(f"{where}: the line is longer than {LONGEST_LINE:,} bytes")
            if not line.strip():
                continue
            try:
                record = parse_json(line)
            except ValueError as e:
                raise UserError(
                    f"{where}: not JSON ({one_line(e)}); a task file needs one JSON object per line"
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
        for batch in file.iter_batches(PARQUET_BATCH):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record


def _checked(example: Example, where: str) -> Example:
    n = len(example.choices)
    if not 0 <= example.gold < n:
        gold = shortened(str(example.gold))
        raise RecordError(f"the right choice is {gold}, but the {n} choices are numbered 0 to {n - 1}")
    for i, (choice, continuation) in enumerate(zip(example.choices, example.continuations, strict=True)):
        if not choice or not continuation.strip():  # the length of a choice is also a divisor of accuracies
            raise RecordError(f"choice {i} is empty; every choice needs text")
    texts = (
        tuple(map(without_surrogates, part)) for part in (example.contexts, example.continuations, example.choices)
    )
    contexts, continuations, choices = texts
    return dataclasses.replace(example, contexts=contexts, continuations=continuations, choices=choices, where=where)
