"""Command `watch`: serve the report of a run while it trains."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from restomod.commands.parsing import parse
from restomod.commands.report import PAGE_CONTENT, PriceArguments
from restomod.config.model import require_size

RARE = ("host", "watts")


@dataclass(frozen=True, kw_only=True)
class WatchArguments(PriceArguments):
    """Flags of `restomod watch`."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", name="run")]
    """Folder of a run, which may not exist yet."""
    port: int = 8124
    """Port of the server (0: any free port)."""
    host: str = "127.0.0.1"
    """Address of the server. 127.0.0.1 accepts connections from this machine only, 0.0.0.0 from all machines."""


def run(arguments: list[str]) -> int:
    """Serve the report of a run until Ctrl-C, and return 0."""
    given = parse(WatchArguments, arguments, "restomod watch", rare=RARE, notes=PAGE_CONTENT)
    require_size("--port", given.port, least=0, most=2**16 - 1)
    rates = given.rates()

    from restomod.analysis.report.watch import watch
    from restomod.config.serialize import refuse_model

    folder = Path(os.path.expanduser(given.folder))
    refuse_model(folder)  # otherwise the server would wait for a run in a model folder
    watch(folder, given.host, given.port, rates, lambda line: print(line, flush=True))
    return 0
