"""Types of manifests, plans and unit records, and functions that read and validate them.

Unknown keys are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, BeforeValidator, Field
from typing_extensions import TypedDict

from restomod.utils.errors import UserError
from restomod.utils.json_files import as_tuple, checked, file_name, read_json

MANIFEST = "manifest.json"
MANIFEST_FORMAT = "restomod-tokens-1"
MAX_BYTES = 512 * 2**20  # limit of a manifest; 10 trillion tokens of local files are 900,000 units
READ = "read"  # key of the counts from `restomod.data.read_counts`; missing in older manifests
PREPARE_AGAIN = "delete the folder and prepare it again"

Count = Annotated[int, Field(ge=0, le=2**53)]
Finite = Annotated[float, Field(ge=-1e100, le=1e100)]  # finite, and small enough for finite sums of squares


class Shard(TypedDict):
    """Manifest entry of a shard."""

    file: Annotated[str, AfterValidator(file_name)]
    tokens: Annotated[int, Field(ge=0, lt=2**31)]  # the header has 32 bits for the count
    sha256: str


class Split(TypedDict):
    """Shards of a split, in order."""

    tokens: Count
    shards: list[Shard]
    documents: NotRequired[Count]
    text_bytes: NotRequired[Count]


class Splits(TypedDict):
    """Training and validation split."""

    train: Split
    val: Split


class Read(TypedDict, total=False):
    """Counts of files that were read or skipped, from `ReadCounts.to_dict`."""

    files: dict[str, dict[str, Count]]
    bytes: dict[str, Count]
    left_out: dict[str, Count]  # skipped files and folders, by reason
    end_of_text_literals: Count
    separators: Count


class UnitPlan(TypedDict):
    """Unit of work in a plan, from `restomod.data.prepare.units.describe`."""

    files: list[str]
    bytes: Count
    source: str | None


class PreparePlan(TypedDict):
    """Plan of a folder: everything that determines its shards, from `restomod.data.prepare.units.describe`."""

    name: str
    settings: dict[str, str | int | float | bool | None]
    datasets: dict[str, list[Annotated[tuple[str, Count], BeforeValidator(as_tuple)]]]  # (address, bytes)
    units: list[UnitPlan]
    tokenizer: str


class UnitSplit(Split):
    """Shards and counts of one split of a unit."""

    documents: Count  # type: ignore[misc]
    text_bytes: Count  # type: ignore[misc]


class UnitSplits(TypedDict):
    """Training and validation split of a unit."""

    train: UnitSplit
    val: UnitSplit


class UnitRecord(TypedDict):
    """Record of a finished unit: its shards and counts."""

    splits: UnitSplits
    documents: Count
    duplicates: Count
    read: NotRequired[Read]


class TokenizerRecord(TypedDict):
    """Tokenizer of a folder of shards: its name and the SHA-256 of its vocabulary."""

    name: str
    sha256: str


class Manifest(TypedDict):
    """Manifest of a folder of token shards."""

    name: str
    fingerprint: str
    tokenizer: TokenizerRecord
    documents: Count | None  # None: unknown, for published shards
    tokens: Count
    splits: Splits
    duplicates: NotRequired[Count]
    plan: NotRequired[PreparePlan]
    read: NotRequired[Read]


class Prepared(Manifest):
    """Manifest of a folder that `restomod prepare` has written."""

    documents: Count  # type: ignore[misc]
    duplicates: Count  # type: ignore[misc]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder of token shards, with all its keys.

    Raises:
        UserError: the manifest is missing, has another format, has values of wrong types, or its counts are
            inconsistent.
    """
    path = folder / MANIFEST
    manifest = read_json(path, "manifest of token shards", max_bytes=MAX_BYTES)
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise UserError(f"{path} is not a manifest of format {MANIFEST_FORMAT!r}; {PREPARE_AGAIN}")
    try:
        checked(manifest, Manifest, f"{path} is damaged: the manifest of token shards")
    except UserError as e:
        raise UserError(f"{e}; {PREPARE_AGAIN}") from None
    parts = {name: manifest["splits"][name] for name in Splits.__annotations__}
    sums = [(f"splits.{name}.tokens", part["tokens"], part["shards"]) for name, part in parts.items()]
    for key, tokens, summed in [*sums, ("tokens", manifest["tokens"], parts.values())]:
        if tokens != (total := sum(part["tokens"] for part in summed)):
            raise UserError(
                f"{path} is damaged: {key} is {tokens:,}, but the sum of its parts is {total:,}; {PREPARE_AGAIN}"
            )
    return manifest


def read_plan(path: Path) -> dict[str, Any]:
    """Read the plan of a folder, with all its keys.

    Raises:
        UserError: the plan is damaged.
    """
    plan = read_json(path, "plan of this folder", max_bytes=MAX_BYTES)
    checked(plan, PreparePlan, f"{path} is damaged: the plan of this folder")
    assert isinstance(plan, dict)
    return plan


def read_unit(path: Path) -> dict[str, Any]:
    """Read the record of a finished unit.

    Raises:
        UserError: the record is damaged; after its deletion the unit is prepared again.
    """
    try:
        return dict(read_json(path, "record of a finished unit", UnitRecord))
    except UserError as e:
        raise UserError(f"{e}; delete this file and run the same command again") from None


def merge_counts(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum the counts of several units, each from `ReadCounts.to_dict`."""
    whole: dict[str, Any] = {}
    for record in records:
        for key, value in record.items():
            if key in Read.__annotations__:  # unknown keys can have any type
                whole[key] = _sum(whole.get(key), value)
    return whole


def _sum(a: Any, b: Any) -> Any:
    if isinstance(b, dict):
        a = a or {}
        return {key: _sum(a.get(key), b[key]) if key in b else a[key] for key in sorted({*a, *b})}
    return b if a is None else a + b


def is_fineweb_edu(manifest: Mapping[str, Any]) -> bool:
    """Return whether a dataset is FineWeb-Edu, by its name or the names of its validation shards; False for a mix.

    The published validation losses of GPT-2 reproductions are on FineWeb-Edu.
    """
    splits = manifest.get("splits")
    val = splits.get("val") if isinstance(splits, dict) else None
    shards = val.get("shards") if isinstance(val, dict) else None
    files = [str(shard.get("file")) for shard in shards if isinstance(shard, dict)] if isinstance(shards, list) else []
    names = [str(manifest.get("name", "")), *files]
    plain = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in names]
    return "+" not in names[0] and any("finewebedu" in name or "edufineweb" in name for name in plain)
