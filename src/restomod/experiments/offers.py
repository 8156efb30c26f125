"""What GPUs cost: a file of offers that a user can change, read strictly."""

from __future__ import annotations

import datetime
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restomod.errors import UserError, did_you_mean

SHIPPED = Path(__file__).with_name("offers.toml")
TYPES: dict[str, type | tuple[type, ...]] = {
    "provider": str,
    "gpu": str,
    "gpus": int,
    "price": (int, float),
    "watts": (int, float),
    "kwh_price": (int, float),
    "date": datetime.date,
    "source": str,
    "note": str,
}
NEEDED = ("provider", "gpu", "gpus", "date", "source")


@dataclass(frozen=True)
class Offer:
    """GPUs at a price."""

    provider: str
    gpu: str
    gpus: int
    price: float
    """US dollars for one GPU and one hour."""
    date: datetime.date
    """When the price was read."""
    source: str
    note: str


def read_offers(path: Path | None = None) -> list[Offer]:
    """The offers of a TOML file, by default those that come with this package.

    Raises:
        UserError: it cannot be read, or an entry is not as `offers.toml` explains.
    """
    path = path or SHIPPED
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot read the offers ({e.strerror}); the ones shipped are {SHIPPED}") from None
    except ValueError as e:  # of UTF-8, of TOML
        raise UserError(f"{path}: the offers are not valid TOML ({e}); {SHIPPED} shows how they are written") from None
    entries = tables.pop("offer", None)
    if tables or not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: it has to hold [[offer]] entries and nothing else; {SHIPPED} shows how")
    return [_offer(entry, f"{path}: offer {i}") for i, entry in enumerate(entries, 1)]


def _offer(entry: Any, at: str) -> Offer:
    if not isinstance(entry, dict):
        raise UserError(f"{at} is not a table; write [[offer]] above it")
    for key, value in entry.items():
        if key not in TYPES:
            raise UserError(f"{at} has an unknown key {key!r}{did_you_mean(key, TYPES)}")
        if not isinstance(value, TYPES[key]) or isinstance(value, bool):
            raise UserError(f"{at}: {key} is {value!r}, which is of the wrong type")
        if isinstance(value, (int, float)) and not (0 <= value < math.inf and (key != "gpus" or value >= 1)):
            raise UserError(f"{at}: {key} is {value}; it must be {'1 or more' if key == 'gpus' else '0 or more'}")
    missing = [key for key in NEEDED if key not in entry]
    if missing:
        raise UserError(f"{at} lacks {' and '.join(missing)}")
    own = {"watts", "kwh_price"} & entry.keys()
    if ("price" in entry) == bool(own) or len(own) == 1:
        raise UserError(f"{at} needs a price, or else both watts and kwh_price")
    price = entry["price"] if "price" in entry else entry["watts"] / 1000 * entry["kwh_price"]
    date = entry["date"]
    day = date.date() if isinstance(date, datetime.datetime) else date
    note = entry.get("note", "")
    return Offer(entry["provider"], entry["gpu"], entry["gpus"], float(price), day, entry["source"], note)
