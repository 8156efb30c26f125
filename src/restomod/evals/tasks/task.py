"""What a task is: its official data, how a record becomes an example, what is measured, published results.

A new task is a module of this folder with a tuple ``TASKS``, and its name in `restomod.evals.tasks.registry.MODULES`.
Modules of data are imported where they are used: `restomod eval --help` lists the tasks.

Sources of published results: the docstring of build-nanogpt's hellaswag.py, measured with OpenAI's checkpoint; Radford
et al., "Language Models are Unsupervised Multitask Learners", 2019, table 3 (GPT-2); Brown et al., "Language Models
are Few-Shot Learners", 2020, table H.1 (GPT-3); README files of public reproductions on FineWeb-Edu, 10B tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from restomod.utils.errors import UserError, shortened

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


@dataclass(frozen=True)
class Reference:
    """One published number."""

    model: str
    metric: str
    """As in `restomod.evals.scoring`, the nearest one."""
    value: float
    convention: str


GPT2, GPT3 = "GPT-2 124M", "GPT-3 125M"
LR_STUDY = "reproduction, lr 6e-4", "reproduction, lr 1.2e-3"
RTX3090, LLAMA = "reproduction, 4 × 3090", "reproduction, Llama's parts"  # one project's first run and its second
GPT3_PAPER = "the GPT-3 paper: zero-shot, its own prompts, per token"

VALIDATION_LOSSES = (
    Reference(GPT2, "loss", 3.2924, "FineWeb-Edu's validation shard, context 1024, build-nanogpt's plot"),
    Reference(RTX3090, "loss", 3.26, "the same shard; its README"),
    Reference(LLAMA, "loss", 2.99, "the same shard, two epochs; its README"),
    Reference(LR_STUDY[0], "loss", 3.0718, "the same shard; its README"),
    Reference(LR_STUDY[1], "loss", 3.0438, "the same shard; its README"),
)


@dataclass(frozen=True)
class HubData:
    """Parquet files of a dataset on the Hugging Face hub, at the commit of its branch `main`."""

    repository: str
    config: str | None
    split: str

    def files(self, cache: Path, otherwise: str) -> list[Path]:
        """Download what the hub client's cache lacks. Raises UserError, which ends with ``otherwise``."""
        from restomod.data.hub_datasets import dataset_files, fetch

        try:
            return [fetch(str(file), None) for file in dataset_files(self.repository, self.config, self.split, "main")]
        except UserError as e:
            raise UserError(f"{e}; or {otherwise}") from None


@dataclass(frozen=True)
class Download:
    """A file at a URL, checked against its SHA-256."""

    url: str
    sha256: str
    name: str

    def files(self, cache: Path, otherwise: str) -> list[Path]:
        """Download the file into ``cache`` where it is missing. Raises UserError, which ends with ``otherwise``."""
        from restomod.data.sources import download

        return [download(self.url, self.sha256, self.name, cache, otherwise)]


@dataclass(frozen=True)
class Task:
    """A benchmark."""

    name: str
    """As in `--tasks`."""
    convention: str
    """How the text is put together, in a few words: only numbers of one convention can be compared."""
    example: Callable[[Record], Example]
    """Makes an example of a record; raises `RecordError`."""
    headline: str
    """The accuracy that is commonly quoted, one of `restomod.evals.scoring.ACCURACIES`."""
    source: HubData | Download | None = None
    """The official data; None: a file that the user names."""
    kind: Literal["multiple-choice", "last-word"] = "multiple-choice"
    size: int | None = None
    """Number of examples of the official data, which published results are of."""
    chance: float | None = None
    """Accuracy of uniformly random choices."""
    references: tuple[Reference, ...] = ()
    """Published results."""
