"""Comparison of contenders in alternating rounds, after a warm-up, until a deadline.

Rounds alternate between forward and backward order (A B C, C B A, …). So a steady drift of the machine's speed favours
no contender, and no contender always runs after the same one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.contenders import Absent, Contender, Measured
from benchmarks.records import Comparison, Entry, Metric

T = TypeVar("T")
Rows = list[dict[str, Measured]]
Agree = Callable[[Any, Any], float]


@dataclass
class BenchPlan:
    """Settings of a measurement."""

    scratch: Path
    """Temporary folder, deleted after the measurement."""
    device: str = "cpu"
    """Device type: cpu or cuda."""
    smoke: bool = False
    """Whether to run tiny sizes as a smoke test, with meaningless numbers."""
    peers: dict[str, Path] = field(default_factory=dict)
    """Checkouts of other projects by name."""
    data: Path | None = None
    """Folder with corpus/, eval/ and tinyshakespeare/, each of which is optional."""
    rounds: int | None = None
    """Number of timed rounds; None for the default of each item."""
    deadline: float = math.inf
    """Time at which the current item should end, on the clock of `time.monotonic`."""
    command: list[str] = field(default_factory=list)
    """Arguments of `benchmarks.run`."""
    out: Path | None = None
    """Folder of the results."""
    say: Callable[[str], None] = print
    """Function that prints a line."""

    def pick(self, full: T, smoke: T, gpu: T | None = None) -> T:
        """Return the size for a smoke test, for a GPU (``gpu``, if given), or otherwise for a CPU (``full``)."""
        if self.smoke:
            return smoke
        return gpu if gpu is not None and self.device == "cuda" else full

    def late(self) -> bool:
        """Return whether the deadline has passed."""
        return time.monotonic() > self.deadline

    def part(self, parts: int) -> BenchPlan:
        """Return a copy whose deadline is after 1 / ``parts`` of the remaining time."""
        now = time.monotonic()
        return dataclasses.replace(self, deadline=now + (self.deadline - now) / parts)

    def file(self, name: str) -> Path | None:
        """Return the path of a file or folder in `data`; None if it does not exist."""
        path = self.data / name if self.data is not None else None
        return path if path is not None and path.exists() else None

    def command_line(self) -> str:
        """Return the command line, with this machine's paths replaced by PATH, DATA and OUT."""
        hidden = {str(path): "PATH" for path in self.peers.values()}
        hidden |= {str(path): name for path, name in ((self.data, "DATA"), (self.out, "OUT")) if path is not None}
        words = list(self.command)
        for path in sorted(hidden, key=len, reverse=True):
            words = [word.replace(path, hidden[path]) for word in words]
        return shlex.join(["python", "-m", "benchmarks.run", *words])


def compare(
    plan: BenchPlan,
    case: str,
    contenders: Sequence[Contender],
    metrics: list[Metric],
    rounds: int,
    warmup: int = 1,
    together: int | None = None,
    agree: Agree | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Run contenders in alternating rounds.

    Args:
        plan: settings. Its number of rounds overrides ``rounds``; after its deadline only the first round starts.
        case: title of the comparison, a few words.
        contenders: contenders, restomod's first.
        metrics: metrics to record.
        rounds: number of timed rounds.
        warmup: number of warm-up rounds.
        together: number of contenders that run in one group, if memory is insufficient for all; None for one group.
            The first contender is in every group.
        agree: function of two outputs, restomod's first, that returns the equal share of them, 0 to 1.
        notes: remarks.
    """
    ours, others = contenders[0], list(contenders[1:])
    size = max(1, (together or len(contenders)) - 1)
    groups = [others[i : i + size] for i in range(0, len(others), size)] or [[]]
    parts = []
    for number, group in enumerate(groups):
        members = [ours, *group]
        rows, absent = _rounds(plan.part(len(groups) - number), members, plan.rounds or rounds, warmup)
        for name, why in absent.items():
            plan.say(f"  absent: {name}: {why}")
        parts.append(comparison_of(case, [c.name for c in members], rows, metrics, absent, warmup, agree))
        if len(rows) < (plan.rounds or rounds):
            parts[-1].notes.append("time limit reached before all rounds")
    first = functools.reduce(_joined, (part.entries[0] for part in parts))
    remarks = dict.fromkeys([*notes, *(note for part in parts for note in part.notes)])
    return Comparison(case, metrics, [first, *(e for part in parts for e in part.entries[1:])], warmup, list(remarks))


def comparison_of(
    case: str,
    names: list[str],
    rows: Rows,
    metrics: list[Metric],
    absent: dict[str, str] | None = None,
    warmup: int = 0,
    agree: Agree | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Return the comparison of measured rounds.

    Args:
        case: title of the comparison.
        names: names of all contenders, restomod's first.
        rows: results by name for every round, without absent contenders.
        metrics: metrics to record.
        absent: reasons by name of the contenders that did not run.
        warmup: number of warm-up rounds.
        agree: function of two outputs, as for `compare`.
        notes: remarks.
    """
    absent = absent or {}
    mine = _entry(names[0], rows, absent, metrics, None, None)
    entries = [mine, *(_entry(name, rows, absent, metrics, mine, agree) for name in names[1:])]
    return Comparison(case, metrics, entries, warmup, list(notes))


def _rounds(plan: BenchPlan, contenders: list[Contender], rounds: int, warmup: int) -> tuple[Rows, dict[str, str]]:
    """Return the timed rounds of the contenders that completed all, and the reasons of the others by name."""
    rows: Rows = []
    absent: dict[str, str] = {}
    try:
        for contender in contenders:
            _try(contender, contender.start, absent)
        for number in range(warmup + rounds):
            if plan.late() and len(rows) > 0:
                break
            measured = {}
            for contender in _in_turn(contenders, number):
                if contender.name not in absent:
                    found = _try(contender, contender.round, absent)
                    if found is not None:
                        measured[contender.name] = found
            if number >= warmup:
                rows.append(measured)
    finally:
        for contender in contenders:
            contender.stop()
    return [{name: found for name, found in row.items() if name not in absent} for row in rows], absent


def _in_turn(contenders: list[Contender], number: int) -> Iterator[Contender]:
    return iter(contenders) if number % 2 == 0 else reversed(contenders)


def _try(contender: Contender, act: Callable[[], T], absent: dict[str, str]) -> T | None:
    try:
        return act()
    except Absent as e:
        absent[contender.name] = str(e)
        contender.stop()  # a hanging process would slow the others down
        return None


def _entry(
    name: str,
    rows: Rows,
    absent: dict[str, str],
    metrics: list[Metric],
    mine: Entry | None,
    agree: Agree | None,
) -> Entry:
    """Return the entry of one contender; ``mine`` is restomod's entry, None for restomod itself."""
    if name in absent:
        return Entry(name, absent=absent[name])
    values = {
        metric.name: [row[name].values[metric.name] for row in rows]
        for metric in metrics
        if all(metric.name in row[name].values for row in rows)
    }
    if mine is None or mine.absent is not None:
        return Entry(name, values)
    paired = {metric: mine.values[metric] for metric in values if metric in mine.values}
    agreement = [agree(row[mine.name].output, row[name].output) for row in rows] if agree else []
    return Entry(name, values, paired, agreement)


def _joined(first: Entry, more: Entry) -> Entry:
    """Join restomod's entries of several groups; absent in one group means absent."""
    if first.absent or more.absent:
        return Entry(more.name, absent=first.absent or more.absent)
    values = {name: [*first.values.get(name, []), *values] for name, values in more.values.items()}
    return Entry(more.name, values)


def together(contenders: int, each_bytes: float, available: int | None) -> int:
    """Return the number of contenders, ``each_bytes`` each, that fit into ``available`` bytes, at least two."""
    return contenders if available is None else max(2, min(contenders, int(available / each_bytes)))
