"""What GPUs cost: a file of offers that a user can change, read strictly."""

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

SHIPPED = Path(__file__).with_name("offers.toml")
MAX_BYTES = 2**20  # of a file of offers

Dollars = Annotated[float, Field(ge=0, le=1e9)]


class Entry(TypedDict):
    """An `[[offer]]` of the file."""

    provider: str
    gpu: str
    gpus: Annotated[int, Field(ge=1, le=10**6)]
    date: datetime.date | datetime.datetime
    source: str
    price: NotRequired[Dollars]
    watts: NotRequired[Dollars]
    kwh_price: NotRequired[Dollars]
    note: NotRequired[str]


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
        tables = tomllib.loads(read_limited(path, "file of offers", MAX_BYTES).decode("utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot read the offers ({e.strerror}); the ones shipped are {SHIPPED}") from None
    except (ValueError, RecursionError) as e:  # of UTF-8, of TOML
        why = "nested too deeply" if isinstance(e, RecursionError) else one_line(e)
        raise UserError(
            f"{path}: the offers are not valid TOML ({why}); {SHIPPED} shows how they are written"
        ) from None
    entries = tables.pop("offer", None)
    if tables or not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: it has to hold [[offer]] entries and nothing else; {SHIPPED} shows how")
    return [_offer(entry, f"{path}: offer {i}") for i, entry in enumerate(entries, 1)]


def _offer(entry: Any, at: str) -> Offer:
    if isinstance(entry, dict):
        for key in entry.keys() - Entry.__annotations__.keys():
            raise UserError(
                f"{at} has an unknown key {shortened(repr(key))}{did_you_mean(key[:80], Entry.__annotations__)}"
            )
    checked(entry, Entry, at)
    own = {"watts", "kwh_price"} & entry.keys()
    if ("price" in entry) == bool(own) or len(own) == 1:
        raise UserError(f"{at} needs a price, or else both watts and kwh_price")
    price = entry["price"] if "price" in entry else entry["watts"] / 1000 * entry["kwh_price"]
    date = entry["date"]
    day = date.date() if isinstance(date, datetime.datetime) else date
    note = entry.get("note", "")
    return Offer(entry["provider"], entry["gpu"], entry["gpus"], float(price), day, entry["source"], note)
