"""Command `prepare`: turn text into token shards."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from restomod.commands.parsing import parse, refuse_ignored
from restomod.config.model import require_size
from restomod.config.prepare import Engine, PrepareConfig, SlurmConfig
from restomod.utils.errors import UserError

MEMORY_HINT = "lower --workers"


@dataclass(frozen=True)
class PrepareArguments:
    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE ...")]
    """Text to read, in this order: files and folders (plain text, JSON, CSV or Parquet, also compressed; the content
    says which); on the hub fineweb-edu, fineweb, hf:OWNER/NAME, or token shards pretokenized:OWNER/NAME; python-stdlib;
    tinyshakespeare."""
    config: Annotated[PrepareConfig, tyro.conf.arg(name="")]
    out: str
    """Folder of the token shards. An interrupted preparation in this folder is resumed."""
    workers: int = 0
    """Files to process in parallel, each in its own process (0: one per processor; on a cluster: chosen by it)."""
    engine: Engine = "local"
    """Where workers run: processes of this machine, a Ray cluster (RAY_ADDRESS, or one that runs here, or else a new
    one), or jobs of Slurm. The output is the same. Clusters need the files and the folder on all their machines."""
    slurm: Annotated[SlurmConfig, tyro.conf.arg(name="")] = field(default_factory=SlurmConfig)


def run(arguments: list[str]) -> int:
    """Prepare the text. Returns 0."""
    parsed = parse(PrepareArguments, arguments, "restomod prepare")
    if not parsed.sources:
        raise UserError("name what to prepare: restomod prepare SOURCE --out DIR (restomod prepare --help)")
    require_size("--workers", parsed.workers, least=0)
    if os.path.isdir(parsed.out) and any(os.path.realpath(s) == os.path.realpath(parsed.out) for s in parsed.sources):
        raise UserError(f"--out {parsed.out} is also a source; name another folder")
    if os.path.lexists(parsed.out) and not os.path.isdir(parsed.out):
        raise UserError(f"--out {parsed.out} is not a folder; name another")

    from restomod.data.prepare.units import ignored_by_sources

    refuse_ignored(arguments, ignored_by_sources(parsed.sources))

    from restomod.data.prepare.run import prepare_and_report, signals_as_interrupts

    workers = parsed.workers or (os.cpu_count() or 1 if parsed.engine == "local" else 0)
    report = functools.partial(print, flush=True)
    with signals_as_interrupts():
        out = Path(parsed.out)
        prepare_and_report(parsed.sources, parsed.config, out, workers, report, parsed.engine, parsed.slurm)
    return 0
