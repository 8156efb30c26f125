"""Search space of a sweep: fields of the configuration with values or ranges.

optim.lr=6e-4,1.2e-3          list of values
optim.lr=1e-4..1e-2           range; log-uniform if both ends are positive and differ by a factor of 10 or more
optim.weight_decay=0..0.2     range; otherwise uniform. The suffixes `:log` and `:linear` override the default
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from restomod.config.model import require_size
from restomod.config.run import RunConfig
from restomod.utils.errors import UserError, did_you_mean

if TYPE_CHECKING:  # slow to import
    from optuna.distributions import BaseDistribution

Method = Literal["grid", "random", "tpe"]
Value = str | int | float

MOST_TRIALS = 100_000
LOG_FROM = 10.0  # ranges with at least this ratio of the ends are log-uniform by default


@dataclass(frozen=True)
class Dimension:
    """Swept field with a list of values or a range."""

    name: str
    """Dotted path of a field of `RunConfig`."""
    values: tuple[str, ...] = ()
    """Values as text; empty for a range."""
    low: float = 0.0
    """Lower end of the range."""
    high: float = 0.0
    """Upper end of the range."""
    log: bool = False
    """Whether the range is log-uniform."""
    whole: bool = False
    """Whether the range consists of integers."""

    @property
    def greatest(self) -> Value:
        """Largest value of an integer field."""
        return max(map(int, self.values)) if self.values else int(self.high)

    def distribution(self) -> BaseDistribution:
        """Return the dimension as an Optuna distribution."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.values:
            return CategoricalDistribution(self.values)
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)


def field_type(name: str) -> Any:
    """Return the type of a field of `RunConfig` such as ``optim.lr``; for "X | None" return X.

    Raises:
        UserError: the field does not exist or has several values.
    """
    types_by_name = _field_types(RunConfig)
    kind = types_by_name.get(name)
    if typing.get_origin(kind) is tuple or any(each.startswith(f"{name}.") for each in types_by_name):
        raise UserError(f"{name} has several values and cannot be swept")
    if kind is None:
        raise UserError(f"unknown field {name!r} to sweep{did_you_mean(name, types_by_name)}")
    return kind


def _field_types(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Return the types of all fields by dotted name; for "X | None" X."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            hint = next(a for a in typing.get_args(hint) if a is not type(None))
        found |= _field_types(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}
    return found


def parse_dimension(text: str, method: Method) -> Dimension:
    """Parse NAME=VALUE,VALUE or NAME=LOW..HIGH.

    Args:
        text: text to parse.
        method: search method; a grid has no ranges.

    Raises:
        UserError: the text has another form, the field is unknown, or a value has the wrong type.
    """
    name, equals, given = text.partition("=")
    name = name.strip().lstrip("-").replace("-", "_")
    if not equals or not given:
        raise UserError(f"--{method} {text!r} is not NAME=VALUES; write for example optim.lr=6e-4,1.2e-3")
    kind = field_type(name)
    if ".." in given and kind in (int, float):
        if method == "grid":
            raise UserError(f"--grid {text}: a grid needs a list of values; for a range use --random {text} --trials N")
        return _range(name, given, kind)
    values = tuple(part.strip() for part in given.split(","))
    for value in values:
        _check(name, value, kind)
    if len(set(values)) < len(values):
        raise UserError(f"--{method} {text}: a value is repeated; to repeat all values use --seeds N")
    return Dimension(name, values)


def _range(name: str, given: str, kind: type) -> Dimension:
    match = re.fullmatch(r"(.+?)\.\.(.+?)(?::(log|linear))?", given)
    try:
        assert match is not None
        low, high = (kind(end) for end in match.groups()[:2])
    except (ValueError, AssertionError):
        number = "integers" if kind is int else "numbers"
        raise UserError(
            f"{name}={given} is not a range LOW..HIGH of {number}; write for example optim.lr=1e-4..1e-2"
        ) from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{name}={given}: the lower end of a range must be below the upper end")
    log = match[3] == "log" or (match[3] is None and low > 0 and high >= LOG_FROM * low)
    if log and low <= 0:
        raise UserError(f"{name}={given}: a log-uniform range must be above 0; raise the lower end or use :linear")
    return Dimension(name, (), low, high, log, kind is int)


def _check(name: str, value: str, kind: Any) -> None:
    """Raise UserError unless ``value`` has the field's type; the run itself checks limits when it starts."""
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise UserError(f"{name}={value}: unknown value{did_you_mean(value, typing.get_args(kind))}")
    elif kind is bool:
        if value not in ("true", "false"):
            raise UserError(f"{name}={value}: the value must be true or false")
    elif kind in (int, float):
        try:
            kind(value)
        except ValueError:
            raise UserError(f"{name}={value}: not {'an integer' if kind is int else 'a number'}") from None


def flags(parameters: dict[str, Value]) -> list[str]:
    """Return the flags of `restomod train` that set these parameters."""
    result = []
    for name, value in parameters.items():
        if field_type(name) is bool:
            group, dot, field = name.rpartition(".")
            result.append(f"--{group}{dot}{'' if value == 'true' else 'no-'}{field}".replace("_", "-"))
        else:
            result += [f"--{name.replace('_', '-')}", str(value)]
    return result


def grid(dimensions: Iterable[Dimension]) -> list[dict[str, Value]]:
    """Return all combinations of the values; the last field varies fastest.

    Raises:
        UserError: the grid has more than `MOST_TRIALS` combinations.
    """
    dimensions = list(dimensions)
    require_size("the number of grid trials", math.prod(len(d.values) for d in dimensions), most=MOST_TRIALS)
    return [
        dict(zip((d.name for d in dimensions), values, strict=True))
        for values in itertools.product(*(d.values for d in dimensions))
    ]


def label(parameters: dict[str, Value]) -> str:
    """Format parameters as text, such as ``optim.lr=0.00231 seed=1``."""
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in parameters.items()
    )
