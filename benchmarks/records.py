"""Measurements and their JSON: raw values of every round, from which tables and plots are computed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from restomod.utils.errors import UserError
from restomod.utils.files import write_json_atomically
from restomod.utils.json_files import read_json

Values = dict[str, float]


@dataclass(frozen=True)
class Metric:
    """A number that is measured."""

    name: str
    unit: str
    """Empty where the name says it (tokens/s)."""
    better: Literal["higher", "lower"]


@dataclass(frozen=True)
class Entry:
    """One contender of a comparison."""

    name: str
    values: dict[str, list[float]] = field(default_factory=dict)
    """By metric, one value per round."""
    beside: dict[str, list[float]] = field(default_factory=dict)
    """By metric, the first contender's values in the same rounds."""
    agreement: list[float] = field(default_factory=list)
    """Per round, the share of the output that equals the first contender's; empty where it is not compared."""
    absent: str | None = None
    """Why it did not take part; None if it did."""


@dataclass(frozen=True)
class Comparison:
    """Contenders that did the same, in turns. The first is ours."""

    case: str
    metrics: list[Metric]
    entries: list[Entry]
    warmup: int
    """Rounds before those that count."""
    notes: list[str] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        """Number of rounds of the first contender."""
        return max((len(values) for values in self.entries[0].values.values()), default=0)


@dataclass(frozen=True)
class Series:
    """A number over time, or over steps."""

    case: str
    x: str
    y: str
    """Name and unit of either axis."""
    points: list[tuple[float, float]]
    published: list[tuple[float, float]] = field(default_factory=list)
    """Points of the same curve that others have published."""


@dataclass(frozen=True)
class Item:
    """A subject that was measured."""

    title: str
    comparisons: list[Comparison] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Parts that were not measured, with the reason."""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    environment: dict[str, Any] = field(default_factory=dict)
    """See `benchmarks.machine`."""


class File(TypedDict):
    """Content of a file of measurements."""

    format: Literal[1]
    items: dict[str, Item]


def to_dict(items: dict[str, Item]) -> dict[str, Any]:
    """For JSON."""
    return {"format": 1, "items": {name: dataclasses.asdict(item) for name, item in items.items()}}


def write(path: Path, items: dict[str, Item]) -> None:
    """Write the file, whole or not at all; raises UserError where that is refused."""
    write_json_atomically(path, to_dict(items))


def read(path: Path) -> dict[str, Item]:
    """The items of a file; none where there is no file.

    Raises:
        UserError: it is damaged, or of another format.
    """
    if not path.exists():
        return {}
    try:
        return TypeAdapter(File).validate_python(read_json(path, "file of measurements"))["items"]
    except ValidationError as e:
        reason = e.errors()[0]["msg"]
        raise UserError(f"{path} is not what `python -m benchmarks.run` writes ({reason}); delete it") from None
