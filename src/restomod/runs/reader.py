"""Reading of run folders without importing torch, for comparisons and reports."""

from __future__ import annotations

import bisect
import calendar
import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Required

from pydantic import BeforeValidator, Field
from typing_extensions import TypedDict

from restomod.config.run import RunConfig
from restomod.config.serialize import read_config
from restomod.data.manifest import Count, Finite
from restomod.data.same_tokens import read_run_data
from restomod.model.flops import flops_per_token, parameter_count
from restomod.runs.metrics import Record, SampleRecord, iterate_jsonl
from restomod.utils.errors import UserError, describe_os_error
from restomod.utils.json_files import read_json
from restomod.utils.output import print_error
from restomod.utils.run_files import list_checkpoints

MAX_EVALUATIONS = 5000  # more files take too long to read


def _replace_surrogates(value: Any) -> Any:
    """Replace lone surrogates, which come from command lines that are not UTF-8, with U+FFFD."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_replace_surrogates)]


class Environment(TypedDict, total=False):
    """Start or resumption in `environment.json`."""

    restomod: Text | None
    git_revision: Text | None
    python: Text | None
    torch: Text | None
    platform: Text | None
    device: Text | None
    precision: Text | None
    threads: Count | None
    parameters: Count
    flops_per_token: Count
    processes: Annotated[int, Field(ge=1, le=2**20)]
    command: list[Text] | Text
    started: Text | None


class Metric(TypedDict, total=False):
    """Metric of an evaluation, with its standard error."""

    value: Finite | None
    stderr: Finite | None


class EvaluatedData(TypedDict, total=False):
    """Data on which a validation loss was measured."""

    name: Text
    fingerprint: str


class EvalRecord(TypedDict, total=False):
    """Contents of a file in `evals/`."""

    task: Required[Text]
    step: Count | None
    metrics: dict[Text, Metric | Finite | None]
    loss: Finite | None
    perplexity: float | None
    bits_per_byte: Finite | None
    examples: Count | None
    tokens: Count | None
    data: EvaluatedData
    convention: Text | None


@dataclass(frozen=True)
class Run:
    """Finished, stopped or running training, as read from its folder."""

    folder: Path
    config: RunConfig
    environments: list[Record]
    """Versions, machine and command of the start and of every resumption."""
    records: list[Record]
    """Records of `metrics.jsonl`, in the order of the file."""
    warn: Callable[[str], None] = field(default=print_error, compare=False)
    """Function called with a message for each damaged part that is skipped."""

    @property
    def name(self) -> str:
        """Name of the folder, without its parents."""
        return self.folder.resolve().name

    @cached_property
    def train(self) -> list[Record]:
        """Train records, one per step, sorted; a step repeated after a rollback has its last record."""
        return self._last("train")

    @cached_property
    def val(self) -> list[Record]:
        """Validation records, one per step, sorted."""
        return self._last("val")

    def _last(self, kind: str) -> list[Record]:
        by_step = {record["step"]: record for record in self.records if record["kind"] == kind}
        return [by_step[step] for step in sorted(by_step)]

    @property
    def updates(self) -> int:
        """Number of updates made so far."""
        return self.train[-1]["step"] + 1 if self.train else 0

    @cached_property
    def starts(self) -> list[tuple[float, int]]:
        """Time (seconds since 1970) and number of processes of each start and resumption, sorted.

        Starts with unknown times are omitted, except the first, whose time is -infinity.
        """
        known = [(start_time(e), process_count(e)) for e in self.environments]
        first = [(-math.inf, known[0][1])] if known and known[0][0] is None else []
        return first + sorted((at, count) for at, count in known if at is not None)

    def processes_at(self, seconds: float) -> int:
        """Return the number of processes (GPUs) at a time, in seconds since 1970.

        Times before the first start have the number of the first start.
        """
        after = bisect.bisect_right(self.starts, seconds, key=lambda start: start[0])
        return self.starts[max(0, after - 1)][1] if self.starts else 1

    def processes_of(self, record: Record) -> int:
        """Return the number of processes in the step of a train record.

        A record without a time has the number of the first start.
        """
        at, ms = record.get("time"), record.get("ms")
        return self.processes_at(-math.inf if at is None else at - (ms or 0.0) / 2000)  # middle of the step

    def tokens_at(self, step: int) -> int:
        """Return the number of training tokens after ``step`` updates."""
        return step * self.config.batch_tokens

    def flops_at(self, step: int) -> int:
        """Return the FLOPs of ``step`` updates."""
        return self.tokens_at(step) * self.flops_per_token

    @cached_property
    def flops_per_token(self) -> int:
        """FLOPs per training token: recorded at the start, or computed, which imports torch."""
        recorded = self._recorded("flops_per_token")
        return flops_per_token(self.config.model, self.config.sequence_length) if recorded is None else recorded

    @cached_property
    def parameters(self) -> int:
        """Number of parameters: recorded at the start, or computed, which imports torch."""
        recorded = self._recorded("parameters")
        return parameter_count(self.config.model) if recorded is None else recorded

    def _recorded(self, name: str) -> int | None:
        return next((start[name] for start in self.environments if name in start), None)

    @cached_property
    def manifest(self) -> Record:
        """Manifest of the training tokens; empty if missing. Raises UserError if the file is damaged."""
        return read_run_data(self.folder)

    @cached_property
    def samples(self) -> list[Record]:
        """Samples generated during training: ``step``, ``prompt``, ``text``."""
        path = self.folder / "samples.jsonl"
        try:
            return list(iterate_jsonl(path, lambda damage: self.warn(f"warning: {damage}"), SampleRecord))
        except (UserError, OSError) as e:
            self.warn(f"warning: samples are skipped: {describe_os_error(e) if isinstance(e, OSError) else e}")
            return []

    @cached_property
    def evaluations(self) -> list[Record]:
        """Evaluations that `restomod eval` wrote into `evals/`, in the order of their file names."""
        paths = sorted(self.folder.glob("evals/*.json"))
        if len(paths) > MAX_EVALUATIONS:
            self.warn(f"warning: only the last {MAX_EVALUATIONS:,} of {len(paths):,} evaluations in evals/ are read")
        found = [read_optional(path, "evaluation", EvalRecord, self.warn) for path in paths[-MAX_EVALUATIONS:]]
        return [values for values in found if values is not None]


def newest_checkpoint(folder: Path) -> str | None:
    """Return the folder name of a run's newest checkpoint; None without checkpoints or read access."""
    with contextlib.suppress(OSError):
        return next((path.name for path in reversed(list_checkpoints(folder))), None)
    return None


def read_optional(path: Path, what: str, kind: Any, warn: Callable[[str], None]) -> Any | None:
    """Read an optional JSON file of a run; warn if it is damaged.

    Args:
        path: path of the file.
        what: contents in words, for messages.
        kind: type to validate against.
        warn: function called with a warning.

    Returns:
        Contents; None if the file is missing or damaged.
    """
    if not path.exists():
        return None
    try:
        return read_json(path, what, kind)
    except UserError as e:
        warn(f"warning: skipped: {e}")
        return None


def read_environments(run: Path, warn: Callable[[str], None]) -> list[Record]:
    """Read the environments of all starts of a run, with the keys of `Environment`."""
    kind = list[Environment] | Environment
    starts = read_optional(run / "environment.json", "record of the run's environments", kind, warn) or []
    return list(starts) if isinstance(starts, list) else [starts]


def start_time(environment: Record) -> float | None:
    """Return the start time of an environment, in seconds since 1970; None if unknown."""
    try:
        return float(calendar.timegm(time.strptime(environment.get("started") or "", "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return None


def process_count(environment: Record) -> int:
    """Return the number of processes of an environment; 1 if unknown."""
    return int(environment.get("processes", 1))


def open_run(folder: str | Path, warn: Callable[[str], None] = print_error) -> Run:
    """Read a run folder.

    Args:
        folder: path of the run folder.
        warn: function called with a message for each damaged part (records, samples, evaluations) that is skipped.

    Raises:
        UserError: the folder is not a run, or `config.json` or `metrics.jsonl` cannot be read.
    """
    folder = Path(os.path.expanduser(folder))
    if not folder.exists():
        raise UserError(f"{folder}: no such run; list the existing ones with `ls runs`")
    return Run(
        folder,
        read_config(folder),  # first, because it refuses links that lead out of the folder
        read_environments(folder, warn),
        list(iterate_jsonl(folder / "metrics.jsonl", lambda damage: warn(f"warning: {damage}"))),
        warn,
    )
