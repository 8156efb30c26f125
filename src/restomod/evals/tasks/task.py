"""Definition of an evaluation task: official data, conversion of records to examples, metrics, published results.

To add a task, write a module in this folder with a tuple ``TASKS`` and add its name to
`restomod.evals.tasks.registry.MODULES`. Data modules are imported inside functions, so that `restomod eval --help`,
which lists the tasks, starts quickly.

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
KINDS = {str: "text", list: "a list", dict: "an object", (int, str): "an integer"}


@dataclass(frozen=True)
class Example:
    """One multiple-choice question. A task that predicts the last word has a single choice."""

    contexts: tuple[str, ...]
    """Text before each choice; usually the same for all choices."""
    continuations: tuple[str, ...]
    """Scored text of each choice, including the space before it."""
    choices: tuple[str, ...]
    """Text of each choice; its length is the divisor of normalised accuracies."""
    gold: int
    """Index of the right choice."""
    where: str = ""
    """File and line of the record, for error messages."""


class RecordError(Exception):
    """Error in a record of a task file. The reader of the file adds the path and the line."""


def get_field(record: Record, kind: Any, *names: str) -> Any:
    """Return the value of the first field in ``names`` that exists in the record.

    Args:
        record: parsed JSON object or Parquet row.
        kind: expected type, one of the keys of `KINDS`.
        names: alternative names of the field, in order of preference.

    Raises:
        RecordError: no field has one of the names, or the value has another type.
    """
    for name in names:
        if name in record:
            value = record[name]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise RecordError(f"{name!r} should be {KINDS[kind]}, not {value!r:.40}")
            return value
    there = ", ".join(shortened(repr(key)) for key in list(record)[:20]) or "no fields"
    raise RecordError(f"has no {' or '.join(map(repr, names))}; it has {there}")


def get_text(record: Record, *names: str) -> str:
    """Return a string field of a record; see `get_field`."""
    return str(get_field(record, str, *names))


def get_index(record: Record, *names: str) -> int:
    """Return the index of the right choice, stored as an integer or as text; see `get_field`."""
    value = get_field(record, (int, str), *names)
    try:
        return int(value)
    except ValueError:
        raise RecordError(f"{names[0]!r} should be the number of the right choice, not {value!r:.40}") from None


def get_choices(record: Record, *names: str) -> tuple[str, ...]:
    """Return a list field of two or more strings; see `get_field`."""
    values = get_field(record, list, *names)
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise RecordError(f"choice {i} should be text, not {value!r:.40}")
    if len(values) < 2:
        raise RecordError(f"has {len(values)} choices; a question needs two or more")
    return tuple(values)


def question(context: str, choices: tuple[str, ...], gold: int) -> Example:
    """Return an example with the same context for all choices and a space before each choice."""
    return Example((context,) * len(choices), tuple(after_space(c) for c in choices), choices, gold)


def after_space(text: str) -> str:
    """Return the text with a leading space; empty text stays empty."""
    return f" {text}" if text else ""


@dataclass(frozen=True)
class Reference:
    """One published result."""

    model: str
    metric: str
    """Name of the closest metric in `restomod.evals.scoring`."""
    value: float
    convention: str
    """Data, prompt format and source of the published value."""


GPT2, GPT3 = "GPT-2 124M", "GPT-3 125M"
LR_STUDY = "reproduction, lr 6e-4", "reproduction, lr 1.2e-3"
RTX3090, LLAMA = "reproduction, 4 × 3090", "reproduction, Llama's parts"  # two runs of one project
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
    """Parquet files of a dataset on the Hugging Face hub, at the newest commit of branch `main`."""

    repository: str
    config: str | None
    split: str

    def files(self, cache: Path, otherwise: str) -> list[Path]:
        """Download missing files into the hub client's cache and return their paths.

        Args:
            cache: not used; the hub client has its own cache.
            otherwise: advice that ends an error message.

        Raises:
            UserError: the download failed.
        """
        from restomod.data.hub_datasets import dataset_files, fetch

        try:
            return [fetch(str(file), None) for file in dataset_files(self.repository, self.config, self.split, "main")]
        except UserError as e:
            raise UserError(f"{e}; or {otherwise}") from None


@dataclass(frozen=True)
class Download:
    """File at a URL with a known SHA-256."""

    url: str
    sha256: str
    name: str

    def files(self, cache: Path, otherwise: str) -> list[Path]:
        """Download the file into ``cache`` if it is missing and return its path.

        Args:
            cache: folder for downloads.
            otherwise: advice that ends an error message.

        Raises:
            UserError: the download failed, or the file has another SHA-256.
        """
        from restomod.data.sources import download

        return [download(self.url, self.sha256, self.name, cache, otherwise)]


@dataclass(frozen=True)
class Task:
    """Evaluation benchmark."""

    name: str
    """Name of the task in `--tasks`."""
    convention: str
    """Short description of the prompt format. Results are comparable only if they have the same convention."""
    example: Callable[[Record], Example]
    """Function that converts a record to an example; raises `RecordError`."""
    headline: str
    """Most commonly quoted accuracy, one of `restomod.evals.scoring.ACCURACIES`."""
    source: HubData | Download | None = None
    """Official data; None: the user names a file."""
    kind: Literal["multiple-choice", "last-word"] = "multiple-choice"
    size: int | None = None
    """Number of examples in the official data; published results cover all of them."""
    chance: float | None = None
    """Accuracy of uniformly random choices; None: no fixed number of choices."""
    references: tuple[Reference, ...] = ()
    """Published results on the official data."""
