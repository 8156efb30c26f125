"""Command `watch`: serve the page of a run while it trains."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from restomod.commands.parsing import parse
from restomod.commands.report import PAGE_HOLDS, PriceArguments
from restomod.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class WatchArguments(PriceArguments):
    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", name="run")]
    """Folder of a run; it may begin later."""
    port: int = 8124
    """Where the page is served (0: any port that is free)."""
    host: str = "127.0.0.1"
    """Address to listen on. The default is reached from this machine alone; 0.0.0.0 from all that reach this one."""


def run(arguments: list[str]) -> int:
    """Serve the page of a run until Ctrl-C."""
    given = parse(WatchArguments, arguments, "restomod watch", description=PAGE_HOLDS)
    if not 0 <= given.port < 2**16:
        raise UserError(f"--port is {given.port}; it must lie between 0 and {2**16 - 1}")
    prices = given.prices()

    from restomod.analysis.report.serve import watch
    from restomod.config.serialize import refuse_model

    folder = Path(os.path.expanduser(given.folder))
    refuse_model(folder)  # it would wait for a run to begin there
    watch(folder, given.host, given.port, prices, lambda line: print(line, flush=True))
    return 0
