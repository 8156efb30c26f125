"""The tasks by name, their published results, and how users name them: NAME, NAME=FILE or a file of their own."""

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

VALIDATION = "validation"  # the validation loss, which is asked for by a task's name
MODULES = ("hellaswag", "arc", "piqa", "winograd", "lambada")  # of this folder; a new task: its module, here
TASKS: dict[str, Task] = {
    task.name: task for module in MODULES for task in importlib.import_module(f"restomod.evals.tasks.{module}").TASKS
}


@dataclass(frozen=True)
class LoadedTask:
    """A task with its examples."""

    task: Task
    examples: list[Example]
    limited: bool = False
    """Whether these are only the first ones."""


def own_example(record: Record) -> Example:
    """Make an example of a user's own record: query or ctx, choices or endings, gold or label."""
    query = get_text(record, "query", "ctx")
    return question(query, get_choices(record, "choices", "endings"), get_index(record, "gold", "label"))


def own_task(name: str) -> Task:
    """The task of a file without official data."""
    return Task(name, "query, a space, the choice (your own file)", own_example, "acc_norm")


def references(task: str) -> tuple[Reference, ...]:
    """Published results of a task or, of "validation", losses on FineWeb-Edu's validation shard."""
    if task == VALIDATION:
        return VALIDATION_LOSSES
    return TASKS[task].references if task in TASKS else ()


def is_whole(task: str, examples: object) -> bool:
    """Whether ``examples`` is the number of all examples of a task, which published results are of."""
    return task in TASKS and examples == TASKS[task].size


def load_task(wanted: str, cache: Path, limit: int | None = None) -> LoadedTask:
    """Load the task that ``wanted`` names, or its first ``limit`` examples; downloads go into ``cache``.

    ``wanted`` is a name of `TASKS`, NAME=FILE for its data in a file, or a file of one's own questions.

    Raises:
        UserError: there is no such task or file, or its data is wrong.
    """
    from restomod.evals.tasks.files import read_examples

    name, _, file = wanted.partition("=")
    _require_name(name)
    if wanted.endswith("=") and not file:
        raise UserError(f"{wanted}: there is no file after the =; name one, or leave the = out for the official data")
    if name in TASKS:
        task = TASKS[name]
        otherwise = f"fetch it by other means and name that file: --tasks {name}=FILE"
        if not file and task.source is None:
            raise UserError(f"task {name} has no official data; name a file: {name}=FILE")
        files = [Path(file)] if file or task.source is None else task.source.files(cache, otherwise)
    elif not file and (Path(name).exists() or Path(name).suffix):
        stem = Path(name).stem
        if stem in TASKS or stem == VALIDATION:  # not the task of that name
            stem = f"own-{stem}"
        task, files = own_task(stem), [Path(name)]
    else:
        raise UserError(f"unknown task {name!r}{did_you_mean(name, TASKS)}")
    examples = [example for path in files for example in read_examples(path, task.example)]
    return LoadedTask(task, examples[:limit], limited=limit is not None and limit < len(examples))


def task_names(given: str) -> list[str]:
    """Split a list of tasks at its commas; names of files may contain some. Raises UserError: an empty item."""

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
        raise UserError("a task has no name (a comma too many?); leave it out, or name one of: " + ", ".join(TASKS))


def with_absolute_path(wanted: str) -> str:
    """Make a task's file absolute in ``wanted`` (see `load_task`), so that it is found from any folder."""
    name, _, file = wanted.partition("=")
    if file:
        return f"{name}={Path(file).absolute()}"
    return wanted if not name or name in TASKS or not Path(name).exists() else str(Path(name).absolute())
