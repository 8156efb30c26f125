"""Command `prepare`: tokenize text into token shards."""

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
RARE = (
    *("split_seed", "shard_tokens", "hub_config", "hub_split", "hub_revision", "keep_downloads"),
    *("engine", "slurm_partition", "slurm_time", "slurm_mem_gb"),
)


@dataclass(frozen=True)
class PrepareArguments:
    """Flags of `restomod prepare`."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE ...")]
    """Sources, read in this order. Files and folders: plain text, JSON, CSV or Parquet, also compressed, detected from
    the content. Hugging Face hub: fineweb-edu, fineweb, hf:OWNER/NAME, or pretokenized:OWNER/NAME for token shards.
    Built-in: python-stdlib, tinyshakespeare."""
    config: Annotated[PrepareConfig, tyro.conf.arg(name="")]
    out: str
    """Folder for the token shards. If a preparation in this folder was interrupted, it is resumed."""
    workers: int = 0
    """Number of worker processes. Each prepares a group of small files, a large file or a part of one at a time (0: one
    per CPU; on a cluster: no limit)."""
    engine: Engine = "local"
    """Place of the workers. local: processes on this machine; ray: a Ray cluster (RAY_ADDRESS, a running local one, or
    a new one); slurm: Slurm jobs. The output is the same. A cluster needs a file system that its machines share."""
    slurm: Annotated[SlurmConfig, tyro.conf.arg(name="")] = field(default_factory=SlurmConfig)


def run(arguments: list[str]) -> int:
    """Write the token shards, and return 0."""
    parsed = parse(PrepareArguments, arguments, "restomod prepare", rare=RARE)
    if not parsed.sources:
        raise UserError("name a source: restomod prepare SOURCE --out DIR (restomod prepare --help)")
    require_size("--workers", parsed.workers, least=0)
    if os.path.isdir(parsed.out) and any(os.path.realpath(s) == os.path.realpath(parsed.out) for s in parsed.sources):
        raise UserError(f"--out {parsed.out} is also a source; choose another folder")
    if os.path.lexists(parsed.out) and not os.path.isdir(parsed.out):
        raise UserError(f"--out {parsed.out} is not a folder; choose another path")

    from restomod.data.prepare.units import ignored_by_sources

    refuse_ignored(arguments, ignored_by_sources(parsed.sources))

    from restomod.data.prepare.run import prepare_and_report, signals_as_interrupts

    workers = parsed.workers or (os.cpu_count() or 1 if parsed.engine == "local" else 0)
    report = functools.partial(print, flush=True)
    with signals_as_interrupts():
        out = Path(parsed.out)
        prepare_and_report(parsed.sources, parsed.config, out, workers, report, parsed.engine, parsed.slurm)
    return 0
