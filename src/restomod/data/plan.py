"""What is to be prepared: the settings, and the files cut into units of work that do not depend on each other.

The plan of a folder is a pure function of the settings and the files' names and sizes. A unit's shards are a pure
function of its files. So any number of workers, killed and started again at any moment, write the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restomod.config import DataConfig, PrepareConfig
from restomod.data.readers import Document, read_documents
from restomod.data.sources import documents, files_of
from restomod.errors import UserError

UNIT_BYTES = 64_000_000  # small files are put together up to this; a larger one is a unit by itself
BUILT_IN = ("python-stdlib", "tinyshakespeare")


@dataclass(frozen=True)
class Unit:
    """Files that one task turns into shards, or a built-in source."""

    files: tuple[str, ...]
    bytes: int
    """Size of the files as stored."""
    built_in: str | None = None


def plan(sources: tuple[str, ...], config: PrepareConfig) -> list[Unit]:
    """Cut the sources into units, in order.

    Raises:
        UserError: a source does not exist or holds no file with anything in it.
    """
    units: list[Unit] = []
    for source in sources:
        if source in BUILT_IN and not Path(source).exists():
            units.append(Unit((), 0, source))
            continue
        path = Path(source)
        if not path.exists():
            raise UserError(f"{source}: no such file or folder, and no built-in source ({', '.join(BUILT_IN)})")
        group: list[str] = []
        size = 0
        for file in files_of(path.absolute(), config.glob):
            group.append(str(file))
            size += file.stat().st_size
            if size >= UNIT_BYTES:
                units.append(Unit(tuple(group), size))
                group, size = [], 0
        if group:
            units.append(Unit(tuple(group), size))
    return units


def describe(
    sources: tuple[str, ...], config: PrepareConfig, units: list[Unit], tokenizer_sha256: str
) -> dict[str, Any]:
    """The plan as JSON values: equal plans make equal shards."""
    names = [Path(source).name for source in sources]
    return {
        "name": "+".join(names) if len(names) <= 3 else f"{names[0]}+{len(names) - 1} more",
        "settings": dataclasses.asdict(config),
        "units": [dataclasses.asdict(unit) | {"files": list(unit.files)} for unit in units],
        "tokenizer": tokenizer_sha256,
    }


def unit_documents(unit: Unit, config: PrepareConfig) -> Iterator[Document]:
    """The documents of a unit, in order."""
    if unit.built_in == "tinyshakespeare":
        yield from documents(DataConfig(source="tinyshakespeare"))
    elif unit.built_in == "python-stdlib":
        yield from documents(DataConfig(source="python-stdlib"))
    for file in unit.files:
        yield from read_documents(Path(file), config.text_column)
