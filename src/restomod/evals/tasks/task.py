"""What a task is: its official data, how a record becomes an example, what is measured, published results.

A new task is a module of this folder with a tuple ``TASKS``, and its name in `restomod.evals.tasks.registry.MODULES`.
Modules of data are imported where they are used: `restomod eval --help` lists the tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from restomod.evals.tasks.example import Example, Record
from restomod.evals.tasks.references import Reference
from restomod.utils.errors import UserError


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

    def read(self, path: Path) -> list[Example]:
        """Read the examples of a file; see `read_examples`."""
        from restomod.evals.tasks.files import read_examples

        return read_examples(path, self.example)

    def load(self, cache: Path) -> list[Example]:
        """Read the official data, downloaded where it is missing.

        Raises:
            UserError: there is none, it cannot be downloaded, or it is damaged.
        """
        if self.source is None:
            raise UserError(f"task {self.name} has no official data; name a file: {self.name}=FILE")
        otherwise = f"fetch it by other means and name that file: --tasks {self.name}=FILE"
        return [example for file in self.source.files(cache, otherwise) for example in self.read(file)]
