"""Prices of GPUs, from a TOML file that users can replace."""

from __future__ import annotations

import datetime
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from restomod.utils.errors import UserError, did_you_mean, one_line, shortened
from restomod.utils.files import read_limited
from restomod.utils.json_files import checked

SHIPPED = Path(__file__).with_name("prices.toml")
MAX_BYTES = 2**20  # maximum size of a price file

Dollars = Annotated[float, Field(ge=0, le=1e9)]


class PriceEntry(TypedDict):
    """Entry `[[price]]` of a price file; `prices.toml` explains the fields."""

    provider: str
    gpu: str
    gpus: Annotated[int, Field(ge=1, le=10**6)]
    date: datetime.date | datetime.datetime
    source: str
    dollars_per_gpu_hour: NotRequired[Dollars]
    watts: NotRequired[Dollars]
    dollars_per_kwh: NotRequired[Dollars]
    note: NotRequired[str]


@dataclass(frozen=True)
class GpuPrice:
    """Price of one or more GPUs that are rented together."""

    provider: str
    """Name of the provider."""
    gpu: str
    """Name of the GPU."""
    gpus: int
    """Number of GPUs in the machine."""
    dollars_per_gpu_hour: float
    """US dollars per GPU and hour."""
    date: datetime.date
    """Date on which the price was read."""
    source: str
    """Source of the price, such as a web page."""
    note: str
    """Remark; empty if there is none."""


def read_prices(path: Path | None = None) -> list[GpuPrice]:
    """Read a TOML file of GPU prices.

    Args:
        path: price file; None for the file of this package.

    Raises:
        UserError: the file is unreadable, or an entry does not follow the format that `prices.toml` explains.
    """
    path = path or SHIPPED
    try:
        tables = tomllib.loads(read_limited(path, "price file", MAX_BYTES).decode("utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot read the prices ({e.strerror}); {SHIPPED} is an example") from None
    except (ValueError, RecursionError) as e:  # not UTF-8, not TOML
        why = "nested too deeply" if isinstance(e, RecursionError) else one_line(e)
        raise UserError(f"{path}: not valid TOML ({why}); {SHIPPED} is an example") from None
    entries = tables.pop("price", None)
    if tables or not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: the file must contain only [[price]] entries; {SHIPPED} is an example")
    return [_price(entry, f"{path}: price {i}") for i, entry in enumerate(entries, 1)]


def _price(entry: Any, at: str) -> GpuPrice:
    if isinstance(entry, dict):
        for key in entry.keys() - PriceEntry.__annotations__.keys():
            raise UserError(
                f"{at} has an unknown key {shortened(repr(key))}{did_you_mean(key[:80], PriceEntry.__annotations__)}"
            )
    checked(entry, PriceEntry, at)
    own = {"watts", "dollars_per_kwh"} & entry.keys()
    if ("dollars_per_gpu_hour" in entry) == bool(own) or len(own) == 1:
        raise UserError(f"{at} needs dollars_per_gpu_hour, or both watts and dollars_per_kwh")
    dollars = entry["watts"] / 1000 * entry["dollars_per_kwh"] if own else entry["dollars_per_gpu_hour"]
    date = entry["date"]
    day = date.date() if isinstance(date, datetime.datetime) else date
    note = entry.get("note", "")
    return GpuPrice(entry["provider"], entry["gpu"], entry["gpus"], float(dollars), day, entry["source"], note)
