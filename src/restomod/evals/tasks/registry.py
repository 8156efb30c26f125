"""Registry of evaluation tasks and their published results. Users write NAME, NAME=FILE or the path of a task file."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from restomod.evals.tasks.task import (
    VALIDATION_LOSSES,
    Example,
    Record,
    Reference,
    Task,
    get_choices,
    get_index,
    get_text,
    question,
)
from restomod.utils.errors import UserError, did_you_mean
from restomod.utils.text import split_items

VALIDATION = "validation"  # name of the validation loss in --tasks
MODULES = ("hellaswag", "arc", "piqa", "winograd", "lambada")  # modules of this folder; add the module of a new task
TASKS: dict[str, Task] = {
    task.name: task for module in MODULES for task in importlib.import_module(f"restomod.evals.tasks.{module}").TASKS
}


@dataclass(frozen=True)
class LoadedTask:
    """Task with its examples."""

    task: Task
    examples: list[Example]
    limited: bool = False
    """Whether the examples were cut to the first ones by a limit."""


def own_example(record: Record) -> Example:
    """Convert a record of a user's file: fields query or ctx, choices or endings, gold or label."""
    query = get_text(record, "query", "ctx")
    return question(query, get_choices(record, "choices", "endings"), get_index(record, "gold", "label"))


def own_task(name: str) -> Task:
    """Return a task for a user's file, without official data or published results."""
    return Task(name, "query, a space, the choice (your file)", own_example, "acc_norm")


def references(task: str) -> tuple[Reference, ...]:
    """Return the published results of a task; for "validation", losses on FineWeb-Edu's validation shard."""
    if task == VALIDATION:
        return VALIDATION_LOSSES
    return TASKS[task].references if task in TASKS else ()


def is_whole(task: str, examples: object) -> bool:
    """Return whether ``examples`` is the size of a task's official data, so that published results are comparable."""
    return task in TASKS and examples == TASKS[task].size


def load_task(wanted: str, cache: Path, limit: int | None = None) -> LoadedTask:
    """Load a task and its examples.

    Args:
        wanted: key of `TASKS`, NAME=FILE for the data of that task in a file, or the path of a user's task file.
        cache: folder for downloads.
        limit: maximum number of examples; None: all.

    Raises:
        UserError: the task or the file does not exist, or its data is invalid.
    """
    from restomod.evals.tasks.files import read_examples

    name, _, file = wanted.partition("=")
    _require_name(name)
    if wanted.endswith("=") and not file:
        raise UserError(f"{wanted}: no file after the =; name a file, or write {name} for the official data")
    if name in TASKS:
        task = TASKS[name]
        otherwise = f"get the file in another way and name it: --tasks {name}=FILE"
        if not file and task.source is None:
            raise UserError(f"task {name} has no official data; name a file: {name}=FILE")
        files = [Path(file)] if file or task.source is None else task.source.files(cache, otherwise)
    elif not file and (Path(name).exists() or Path(name).suffix):
        stem = Path(name).stem
        if stem in TASKS or stem == VALIDATION:  # the results must not be mistaken for the task of that name
            stem = f"own-{stem}"
        task, files = own_task(stem), [Path(name)]
    else:
        raise UserError(f"unknown task {name!r}{did_you_mean(name, TASKS)}")
    examples = [example for path in files for example in read_examples(path, task.example)]
    return LoadedTask(task, examples[:limit], limited=limit is not None and limit < len(examples))


def task_names(given: str) -> list[str]:
    """Split a comma-separated list of tasks; names of files may contain commas.

    Raises:
        UserError: an item is empty.
    """

    def names_a_file(item: str) -> bool:
        name, _, file = item.strip().partition("=")
        return Path(file).is_file() and "," not in name if file else Path(name).is_file()

    commas = [i for i, character in enumerate(given) if character == ","]
    names = [item.strip() for item in split_items(given, commas, names_a_file)]
    for name in names:
        _require_name(name)
    return names


def _require_name(name: str) -> None:
    if not name:
        raise UserError("a task has an empty name: remove the extra comma, or name one of: " + ", ".join(TASKS))


def with_absolute_path(wanted: str) -> str:
    """Return ``wanted`` (see `load_task`) with an absolute path, so that the file is found from any working folder."""
    name, _, file = wanted.partition("=")
    if file:
        return f"{name}={Path(file).absolute()}"
    return wanted if not name or name in TASKS or not Path(name).exists() else str(Path(name).absolute())
