"""Command `data`: show the contents of a folder of token shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from restomod.commands.parsing import parse


@dataclass(frozen=True)
class DataArguments:
    """Flags of `restomod data`."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of token shards, written by `restomod prepare`, llm.c (.bin) or build-nanogpt (.npy)."""
    verify: bool = False
    """Read all shards and compare their SHA-256 with the manifest."""


def run(arguments: list[str]) -> int:
    """Print an overview of the folder, and return 0."""
    parsed = parse(DataArguments, arguments, "restomod data")

    from restomod.data.overview import overview

    for line in overview(parsed.folder, parsed.verify):
        print(line)
    return 0
