"""What a run's folder says, for comparisons and reports. Only files are read, and nothing here needs torch."""

from __future__ import annotations

import bisect
import calendar
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from restomod.config import RunConfig
from restomod.config_json import read_config
from restomod.errors import UserError
from restomod.json_files import read_json
from restomod.model.flops import flops_per_token
from restomod.output import complain
from restomod.train.metrics import iterate_jsonl, read_jsonl

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

    @cached_property
    def starts(self) -> list[tuple[float, int]]:
        """When the run was started and resumed, in seconds since 1970, and with how many processes; in order.

        A start whose record does not say when is left out, but for the first (-infinity).
        """
        known = [(started(e), process_count(e)) for e in self.environments]
        first = [(-math.inf, known[0][1])] if known and known[0][0] is None else []
        return first + sorted((at, count) for at, count in known if at is not None)

    def processes_at(self, seconds: float) -> int:
        """Processes at a time in seconds since 1970: on a GPU, as many GPUs. Before the first start: the first's."""
        after = bisect.bisect_right(self.starts, seconds, key=lambda start: start[0])
        return self.starts[max(0, after - 1)][1] if self.starts else 1

    def processes_of(self, record: Record) -> int:
        """Processes in the step of a train record; those of the first start where it does not say when it was made."""
        at, ms = record.get("time"), record.get("ms")
        if not isinstance(at, int | float):
            return self.processes_at(-math.inf)
        return self.processes_at(at - (ms / 2000 if isinstance(ms, int | float) else 0))  # in the middle of the step

    def tokens_at(self, step: int) -> int:
        """Tokens seen after ``step`` updates."""
        return step * self.config.batch_tokens

    def flops_at(self, step: int) -> int:
        """Floating-point operations of ``step`` updates."""
        return self.tokens_at(step) * flops_per_token(self.config.model, self.config.sequence_length)

    @cached_property
    def manifest(self) -> Record:
        """The manifest of the tokens that the run trains on; empty if there is none.

        Raises:
            UserError: it is damaged.
        """
        path = self.folder / "data.json"
        found = read_json(path, "manifest of the run's data") if path.exists() else {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def samples(self) -> list[Record]:
        """What the model wrote along the way: ``step``, ``prompt``, ``text``."""
        return read_jsonl(self.folder / "samples.jsonl")

    @cached_property
    def evaluations(self) -> list[Record]:
        """What `restomod eval` wrote into `evals/`, by name of the file."""
        found = [read_json(path, "evaluation") for path in sorted(self.folder.glob("evals/*.json"))]
        return [values for values in found if isinstance(values, dict)]


def started(environment: Record) -> float | None:
    """When a session began, in seconds since 1970, or None where its record does not say so."""
    try:
        return float(calendar.timegm(time.strptime(str(environment.get("started")), "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return None


def process_count(environment: Record) -> int:
    """With how many processes a session trained; 1 where its record does not say so."""
    count = environment.get("processes")
    return count if isinstance(count, int) and count > 0 else 1


def open_run(folder: str | Path, warn: Callable[[str], None] = complain) -> Run:
    """Read a run's folder.

    Args:
        folder: the run's.
        warn: told of lines of `metrics.jsonl` that cannot be read.

    Raises:
        UserError: there is no run, or a file of it is damaged.
    """
    folder = Path(os.path.expanduser(folder))
    if not folder.exists():
        raise UserError(f"{folder}: no such run; `ls runs` shows what there is")
    path = folder / "environment.json"
    starts = read_json(path, "record of the run's environments") if path.exists() else []
    return Run(
        folder,
        read_config(folder),
        starts if isinstance(starts, list) else [starts],
        list(iterate_jsonl(folder / "metrics.jsonl", lambda damage: warn(f"warning: {damage}"))),
    )
