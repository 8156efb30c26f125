"""Measurements and their JSON file, with the raw values of every round, from which tables and plots are computed."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from restomod.utils.errors import UserError
from restomod.utils.files import write_json_atomically
from restomod.utils.json_files import read_json

Values = dict[str, float]

RENAMED = Path(__file__).with_name("renamed.json")  # current names of fields and titles in earlier measurements


@dataclass(frozen=True)
class Metric:
    """Measured quantity."""

    name: str
    """Name, such as "peak memory"."""
    unit: str
    """Unit; empty if the name includes it (tokens/s)."""
    better: Literal["higher", "lower"]
    """Direction that is better."""


@dataclass(frozen=True)
class Entry:
    """Results of one contender of a comparison."""

    name: str
    """Name of the contender."""
    values: dict[str, list[float]] = field(default_factory=dict)
    """One value per round, by name of the metric."""
    paired: dict[str, list[float]] = field(default_factory=dict)
    """Values of the first contender in the same rounds, by name of the metric."""
    agreement: list[float] = field(default_factory=list)
    """Share of the output that equals the first contender's, 0 to 1, per round; empty if outputs are not compared."""
    absent: str | None = None
    """Reason why the contender did not run; None if it ran."""


@dataclass(frozen=True)
class Comparison:
    """Results of contenders that did the same work in alternating rounds; the first is restomod."""

    case: str
    """Title, a few words."""
    metrics: list[Metric]
    """Measured quantities."""
    entries: list[Entry]
    """Results by contender."""
    warmup: int
    """Number of warm-up rounds, which are not recorded."""
    notes: list[str] = field(default_factory=list)
    """Remarks."""

    @property
    def rounds(self) -> int:
        """Number of timed rounds of the first contender."""
        return max((len(values) for values in self.entries[0].values.values()), default=0)


@dataclass(frozen=True)
class Series:
    """Curve of a quantity over time or steps."""

    case: str
    """Title, a few words."""
    x: str
    """Name and unit of the horizontal axis."""
    y: str
    """Name and unit of the vertical axis."""
    points: list[tuple[float, float]]
    """Points (x, y)."""
    published: list[tuple[float, float]] = field(default_factory=list)
    """Points (x, y) of the same curve in a published run."""


@dataclass(frozen=True)
class Item:
    """Results of one benchmark."""

    title: str
    """Title."""
    comparisons: list[Comparison] = field(default_factory=list)
    """Comparisons with peers."""
    series: list[Series] = field(default_factory=list)
    """Curves."""
    left_out: list[str] = field(default_factory=list)
    """Parts that were not measured, each with the reason."""
    notes: list[str] = field(default_factory=list)
    """Remarks."""
    seconds: float = 0.0
    """Duration of the measurement."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Environment from `benchmarks.machine`."""


class File(TypedDict):
    """Content of a file of measurements."""

    format: Literal[1]
    items: dict[str, Item]


def to_dict(items: dict[str, Item]) -> dict[str, Any]:
    """Return items as JSON values."""
    return {"format": 1, "items": {name: dataclasses.asdict(item) for name, item in items.items()}}


def write(path: Path, items: dict[str, Item]) -> None:
    """Write the file atomically; raises UserError if the system reports an error."""
    write_json_atomically(path, to_dict(items))


def read(path: Path) -> dict[str, Item]:
    """Return the items of a file; empty if the file does not exist.

    Raises:
        UserError: the file is damaged or has another format.
    """
    if not path.exists():
        return {}
    names: dict[str, str] = json.loads(RENAMED.read_text(encoding="utf-8"))
    try:
        content = _renamed(read_json(path, "file of measurements"), names)
        return TypeAdapter(File).validate_python(content)["items"]
    except ValidationError as e:
        reason = e.errors()[0]["msg"]
        raise UserError(f"{path}: not a file of `python -m benchmarks.run` ({reason}); delete it") from None


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """Return JSON values with keys and texts replaced by their names in `RENAMED`."""
    if isinstance(value, dict):
        return {names.get(key, key): _renamed(one, names) for key, one in value.items()}
    if isinstance(value, list):
        return [_renamed(one, names) for one in value]
    return names.get(value, value) if isinstance(value, str) else value
