"""What a run's folder says, for comparisons and reports. Only files are read, and nothing here needs torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from restomod.config import RunConfig
from restomod.config_json import read_config
from restomod.errors import UserError
from restomod.files import read_json
from restomod.model.flops import flops_per_token
from restomod.train.metrics import read_jsonl

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it: finished, stopped, or still going on."""

    folder: Path
    config: RunConfig
    environments: list[Record]
    """Versions, machine and command of the start and of every resumption."""
    records: list[Record]
    """`metrics.jsonl`, in order."""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @cached_property
    def train(self) -> list[Record]:
        """The steps, each once, in order: after a return to an earlier checkpoint the later record counts."""
        return self._last("train")

    @cached_property
    def val(self) -> list[Record]:
        """The held-out losses, each step once, in order."""
        return self._last("val")

    def _last(self, kind: str) -> list[Record]:
        found = [
            record for record in self.records if record.get("kind") == kind and isinstance(record.get("step"), int)
        ]
        by_step = {record["step"]: record for record in found}
        return [by_step[step] for step in sorted(by_step)]

    @property
    def seconds(self) -> float:
        """Spent in steps, what had to be done again included."""
        return sum(r.get("ms") or 0.0 for r in self.records if r.get("kind") == "train") / 1000

    def tokens_at(self, step: int) -> int:
        """Tokens seen after ``step`` updates."""
        return step * self.config.batch_tokens

    def flops_at(self, step: int) -> int:
        """Floating-point operations of ``step`` updates."""
        return self.tokens_at(step) * flops_per_token(self.config.model, self.config.sequence_length)

    @cached_property
    def samples(self) -> list[Record]:
        """What the model wrote along the way: ``step``, ``prompt``, ``text``."""
        return read_jsonl(self.folder / "samples.jsonl")

    @cached_property
    def evaluations(self) -> list[Record]:
        """What `restomod eval` wrote into `evals/`, by name of the file."""
        found = [read_json(path, "evaluation") for path in sorted(self.folder.glob("evals/*.json"))]
        return [values for values in found if isinstance(values, dict)]


def open_run(folder: str | Path) -> Run:
    """Read a run's folder.

    Raises:
        UserError: there is no run, or a file of it is damaged.
    """
    folder = Path(os.path.expanduser(folder))
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run; `ls runs` shows what there is")
    path = folder / "environment.json"
    starts = read_json(path, "record of the run's environments") if path.exists() else []
    return Run(
        folder,
        read_config(folder),
        starts if isinstance(starts, list) else [starts],
        read_jsonl(folder / "metrics.jsonl"),
    )
