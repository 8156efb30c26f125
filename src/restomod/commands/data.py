"""Command `data`: show what is in a folder of token shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from restomod.commands.parsing import parse


@dataclass(frozen=True)
class DataArguments:
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A folder made by `restomod prepare`, or one of published shards (llm.c's .bin, build-nanogpt's .npy)."""
    verify: bool = False
    """Read every byte and compare its SHA-256 with the manifest."""


def run(arguments: list[str]) -> int:
    """Print the overview. Returns 0."""
    parsed = parse(DataArguments, arguments, "restomod data")

    from restomod.data.overview import overview

    for line in overview(parsed.folder, parsed.verify):
        print(line)
    return 0
