"""The tasks: where each one's data comes from, how it is read, and what is measured.

HellaSwag's file is downloaded from its authors and compared with its SHA-256. The other data sets come from the
Hugging Face hub, at the commit that `main` stands at; each file has the hash that the hub announces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from restomod.data.hub_datasets import dataset_files, fetch
from restomod.data.sources import download
from restomod.evals import examples as of
from restomod.evals.examples import Example, Record, read_examples
from restomod.utils.errors import UserError, did_you_mean
from restomod.utils.text import split_items

HELLASWAG_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
HELLASWAG_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"

VALIDATION = "validation"  # the validation loss, which is asked for by a task's name
Kind = Literal["multiple-choice", "last-word"]


@dataclass(frozen=True)
class OnHub:
    """Parquet files of a dataset on the Hugging Face hub."""

    repository: str
    config: str | None
    split: str


@dataclass(frozen=True)
class Task:
    """What to ask a model."""

    name: str
    convention: str
    """How the text is put together, in a few words: numbers compare only under the same one."""
    example: Callable[[Record, str], Example]
    headline: str
    """The accuracy that is commonly quoted."""
    source: OnHub | None = None
    """None: HellaSwag's own file, or one that is named."""
    kind: Kind = "multiple-choice"
    size: int | None = None
    """Examples of the official data, of which published results are; None: there is none."""

    def read(self, path: Path) -> list[Example]:
        """The examples of a file; see `read_examples`."""
        return read_examples(path, self.example)

    def load(self, cache: Path) -> list[Example]:
        """The examples of the official data, downloaded where they are not here yet.

        Raises:
            UserError: they cannot be downloaded, or are not as they should be.
        """
        instead = f"fetch it by other means and name that file: --tasks {self.name}=FILE"
        if self.source is None:
            return self.read(download(HELLASWAG_URL, HELLASWAG_SHA256, "hellaswag_val.jsonl", cache, instead))
        try:
            files = dataset_files(self.source.repository, self.source.config, self.source.split, "main")
            return [example for file in files for example in self.read(fetch(str(file), None))]
        except UserError as e:
            raise UserError(f"{self.name}: {e}; or {instead}") from None


@dataclass(frozen=True)
class LoadedTask:
    """A task with its examples."""

    task: Task
    examples: list[Example]
    limited: bool = False
    """Whether these are only the first ones."""


TASKS = {
    task.name: task
    for task in (
        Task("hellaswag", "ctx as it is, a space, the ending (build-nanogpt)", of.hellaswag, "acc_token", size=10_042),
        Task(
            "hellaswag-harness",
            "activity: ctx, a space, the ending, without brackets (lm-evaluation-harness)",
            of.hellaswag_harness,
            "acc_norm",
            size=10_042,
        ),
        Task(
            "arc-easy",
            "Question: …, Answer:, the choice's text (lm-evaluation-harness)",
            of.arc,
            "acc_norm",
            OnHub("allenai/ai2_arc", "ARC-Easy", "test"),
            size=2_376,
        ),
        Task(
            "arc-challenge",
            "Question: …, Answer:, the choice's text (lm-evaluation-harness)",
            of.arc,
            "acc_norm",
            OnHub("allenai/ai2_arc", "ARC-Challenge", "test"),
            size=1_172,
        ),
        Task(
            "piqa",
            "Question: …, Answer:, the solution (lm-evaluation-harness)",
            of.piqa,
            "acc_norm",
            OnHub("baber/piqa", None, "validation"),
            size=1_838,
        ),
        Task(
            "winograd",
            "WSC273, the rest of the sentence after each candidate (partial evaluation)",
            of.winograd,
            "acc",
            OnHub("lighteval/winograd_wsc", "wsc273", "test"),
            size=273,
        ),
        Task(
            "lambada",
            "the last word, a space before it (OpenAI's text)",
            of.lambada,
            "acc",
            OnHub("EleutherAI/lambada_openai", "default", "test"),
            "last-word",
            size=5_153,
        ),
    )
}


def is_whole(task: str, examples: object) -> bool:
    """Whether a task was asked as a whole, as published results are; of one of the user's own there are none."""
    return task in TASKS and examples == TASKS[task].size


def load_task(wanted: str, cache: Path, limit: int | None = None) -> LoadedTask:
    """The task that ``wanted`` names, with its examples.

    Args:
        wanted: a name of `TASKS`, NAME=FILE for its data in a file, or a `.jsonl` file with questions of one's own.
        cache: folder for downloads.
        limit: take the first examples only.

    Raises:
        UserError: there is no such task or file, or its data is wrong.
    """
    name, _, file = wanted.partition("=")
    _require_name(name)
    if wanted.endswith("=") and not file:
        raise UserError(f"{wanted}: there is no file after the =; name one, or leave the = out for the official data")
    if name in TASKS:
        task = TASKS[name]
        examples = task.read(Path(file)) if file else task.load(cache)
    elif not file and (Path(name).exists() or Path(name).suffix):
        stem = Path(name).stem
        if stem in TASKS or stem == VALIDATION:  # not the task of that name
            stem = f"own-{stem}"
        task = Task(stem, "query, a space, the choice (your own file)", of.own, "acc_norm")
        examples = task.read(Path(name))
    else:
        raise UserError(f"unknown task {name!r}{did_you_mean(name, TASKS)}")
    return LoadedTask(task, examples[:limit], limited=limit is not None and limit < len(examples))


def task_names(given: str) -> list[str]:
    """The tasks of a list with commas between them, as `load_task` takes them; a file's name may hold commas, too.

    Raises:
        UserError: one is empty.
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
        raise UserError("a task has no name (a comma too many?); leave it out, or name one of: " + ", ".join(TASKS))


def with_absolute_path(wanted: str) -> str:
    """``wanted`` (see `load_task`) such that it names the same file from any folder."""
    name, _, file = wanted.partition("=")
    if file:
        return f"{name}={Path(file).absolute()}"
    return wanted if not name or name in TASKS or not Path(name).exists() else str(Path(name).absolute())
