"""Search space of a sweep: fields of the configuration, and their values or ranges.

optim.lr=6e-4,1.2e-3          these values
optim.lr=1e-4..1e-2           log-uniform, as both ends are above 0 and differ by a factor of 10 or more
optim.weight_decay=0..0.2     uniform; a suffix `:log` or `:linear` overrides the default
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

if TYPE_CHECKING:  # imported when a sweep is run
    from optuna.distributions import BaseDistribution

Method = Literal["grid", "random", "tpe"]
Value = str | int | float

MOST_TRIALS = 100_000
LOG_FROM = 10.0  # ratio of the ends from which a range is log-uniform by default


@dataclass(frozen=True)
class Dimension:
    """A field with its values, as written, or its range."""

    name: str
    """Dotted path of a field of `RunConfig`."""
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    """Whether the range is of integers."""

    @property
    def greatest(self) -> Value:
        """The largest value, of an integer field."""
        return max(map(int, self.values)) if self.values else int(self.high)

    def distribution(self) -> BaseDistribution:
        """The dimension as an Optuna distribution."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.values:
            return CategoricalDistribution(self.values)
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)


def field_type(name: str) -> Any:
    """The type of a field of `RunConfig`, such as ``optim.lr``, without None.

    Raises:
        UserError: there is no such field, or it cannot be swept.
    """
    types_by_name = _field_types(RunConfig)
    kind = types_by_name.get(name)
    if typing.get_origin(kind) is tuple or any(each.startswith(f"{name}.") for each in types_by_name):
        raise UserError(f"{name} holds several values and cannot be swept")
    if kind is None:
        raise UserError(f"nothing to sweep is called {name!r}{did_you_mean(name, types_by_name)}")
    return kind


def _field_types(cls: Any, prefix: str = "") -> dict[str, Any]:
    """The types of all fields by dotted name, without None."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            hint = next(a for a in typing.get_args(hint) if a is not type(None))
        found |= _field_types(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}
    return found


def parse_dimension(text: str, method: Method) -> Dimension:
    """Read NAME=VALUE,VALUE or NAME=LOW..HIGH.

    Raises:
        UserError: it is neither, or the field does not take it.
    """
    name, equals, given = text.partition("=")
    name = name.strip().lstrip("-").replace("-", "_")
    if not equals or not given:
        raise UserError(f"--{method} {text!r} is not NAME=VALUES; for example optim.lr=6e-4,1.2e-3")
    kind = field_type(name)
    if ".." in given and kind in (int, float):
        if method == "grid":
            raise UserError(f"--grid {text}: a grid takes values, not a range; try --random {text} --trials N")
        return _range(name, given, kind)
    values = tuple(part.strip() for part in given.split(","))
    for value in values:
        _check(name, value, kind)
    if len(set(values)) < len(values):
        raise UserError(f"--{method} {text}: a value is repeated; --seeds N repeats all of them")
    return Dimension(name, values)


def _range(name: str, given: str, kind: type) -> Dimension:
    match = re.fullmatch(r"(.+?)\.\.(.+?)(?::(log|linear))?", given)
    try:
        assert match is not None
        low, high = (kind(end) for end in match.groups()[:2])
    except (ValueError, AssertionError):
        number = "whole numbers" if kind is int else "numbers"
        raise UserError(
            f"{name}={given} is not a range LOW..HIGH of {number}; for example optim.lr=1e-4..1e-2"
        ) from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{name}={given}: the first end of a range must be below the second")
    log = match[3] == "log" or (match[3] is None and low > 0 and high >= LOG_FROM * low)
    if log and low <= 0:
        raise UserError(f"{name}={given}: the logarithm needs a range above 0")
    return Dimension(name, (), low, high, log, kind is int)


def _check(name: str, value: str, kind: Any) -> None:
    """Raise UserError unless ``value`` has the field's type. Its range is checked when the run starts."""
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise UserError(f"{name}={value}: unknown value{did_you_mean(value, typing.get_args(kind))}")
    elif kind is bool:
        if value not in ("true", "false"):
            raise UserError(f"{name}={value}: it is true or false")
    elif kind in (int, float):
        try:
            kind(value)
        except ValueError:
            raise UserError(f"{name}={value}: not {'a whole number' if kind is int else 'a number'}") from None


def flags(parameters: dict[str, Value]) -> list[str]:
    """The flags of `restomod train` that give a run these parameters."""
    result = []
    for name, value in parameters.items():
        if field_type(name) is bool:
            group, dot, field = name.rpartition(".")
            result.append(f"--{group}{dot}{'' if value == 'true' else 'no-'}{field}".replace("_", "-"))
        else:
            result += [f"--{name.replace('_', '-')}", str(value)]
    return result


def grid(dimensions: Iterable[Dimension]) -> list[dict[str, Value]]:
    """All combinations of the values; the last field varies fastest.

    Raises:
        UserError: there are more than `MOST_TRIALS`.
    """
    dimensions = list(dimensions)
    require_size("the number of the grid's trials", math.prod(len(d.values) for d in dimensions), most=MOST_TRIALS)
    return [
        dict(zip((d.name for d in dimensions), values, strict=True))
        for values in itertools.product(*(d.values for d in dimensions))
    ]


def label(parameters: dict[str, Value]) -> str:
    """Parameters as text: ``optim.lr=0.00231 seed=1``."""
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in parameters.items()
    )
