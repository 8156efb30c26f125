"""Comparison of contenders in alternating rounds, after a warm-up, until a deadline.

Rounds alternate between forward and backward order (A B C, C B A, …): a machine that grows slower or faster at a steady
pace favours nobody, and nobody always follows the same other.
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
    """A folder that is deleted afterwards."""
    device: str = "cpu"
    """cpu or cuda."""
    smoke: bool = False
    """Tiny sizes: does everything work? The numbers mean nothing."""
    peers: dict[str, Path] = field(default_factory=dict)
    """Checkouts of other projects by name."""
    data: Path | None = None
    """A folder with corpus/, eval/ and tinyshakespeare/, any of which may be missing."""
    rounds: int | None = None
    """Instead of each item's own number."""
    deadline: float = math.inf
    """When the item at work should end, on the clock of `time.monotonic`."""
    command: list[str] = field(default_factory=list)
    """Arguments of `benchmarks.run`."""
    out: Path | None = None
    """Where the results go."""
    say: Callable[[str], None] = print

    def pick(self, full: T, smoke: T, gpu: T | None = None) -> T:
        """A size: that of a smoke test, else that for a GPU where it differs, else that for a CPU."""
        if self.smoke:
            return smoke
        return gpu if gpu is not None and self.device == "cuda" else full

    def late(self) -> bool:
        """Whether the item at work has had its time."""
        return time.monotonic() > self.deadline

    def part(self, parts: int) -> BenchPlan:
        """Copy with a deadline after 1 / ``parts`` of the time that is left."""
        now = time.monotonic()
        return dataclasses.replace(self, deadline=now + (self.deadline - now) / parts)

    def file(self, name: str) -> Path | None:
        """A file or folder of the data; None where it is not there."""
        path = self.data / name if self.data is not None else None
        return path if path is not None and path.exists() else None

    def command_line(self) -> str:
        """The command without what is particular to this machine."""
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
    """Run contenders, ours first, in alternating rounds.

    Args:
        plan: its number of rounds overrides ``rounds``; after its deadline no round begins, except the first.
        case: what they do, in a few words.
        contenders: ours first.
        metrics: the values of a round to keep.
        rounds: number of timed rounds, after ``warmup`` others.
        warmup: number of rounds that do not count.
        together: how many contenders are started at once, if memory does not hold all; ours takes part in each group.
        agree: the share of the second output that equals the first, which is ours.
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
            parts[-1].notes.append("the time was up before all rounds were made")
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
    """Make a comparison of rounds: ``rows`` has a dictionary per round, by names of contenders not ``absent``."""
    absent = absent or {}
    mine = _entry(names[0], rows, absent, metrics, None, None)
    entries = [mine, *(_entry(name, rows, absent, metrics, mine, agree) for name in names[1:])]
    return Comparison(case, metrics, entries, warmup, list(notes))


def _rounds(plan: BenchPlan, contenders: list[Contender], rounds: int, warmup: int) -> tuple[Rows, dict[str, str]]:
    """The timed rounds of those who made all of them, and why the others did not."""
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
        contender.stop()  # one that hangs would otherwise keep computing
        return None


def _entry(
    name: str,
    rows: Rows,
    absent: dict[str, str],
    metrics: list[Metric],
    mine: Entry | None,
    agree: Agree | None,
) -> Entry:
    """One contender's part of the rounds; ``mine`` is that of ours, where this is another's."""
    if name in absent:
        return Entry(name, absent=absent[name])
    values = {
        metric.name: [row[name].values[metric.name] for row in rows]
        for metric in metrics
        if all(metric.name in row[name].values for row in rows)
    }
    if mine is None or mine.absent is not None:
        return Entry(name, values)
    beside = {metric: mine.values[metric] for metric in values if metric in mine.values}
    agreement = [agree(row[mine.name].output, row[name].output) for row in rows] if agree else []
    return Entry(name, values, beside, agreement)


def _joined(first: Entry, more: Entry) -> Entry:
    """Ours over several groups; absent from one, it is absent."""
    if first.absent or more.absent:
        return Entry(more.name, absent=first.absent or more.absent)
    values = {name: [*first.values.get(name, []), *values] for name, values in more.values.items()}
    return Entry(more.name, values)


def together(contenders: int, each_bytes: float, available: int | None) -> int:
    """Number of contenders of ``each_bytes`` that fit into memory at once, at least two."""
    return contenders if available is None else max(2, min(contenders, int(available / each_bytes)))
