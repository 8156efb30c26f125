"""How `restomod prepare` works: as `restomod.config.run`, for what is not part of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from restomod.config.run import require_seed
from restomod.utils.errors import UserError

Engine = Literal["local", "ray", "slurm"]


@dataclass(frozen=True)
class PrepareConfig:
    """How `restomod prepare` reads text and cuts it into splits and shards."""

    glob: str = "**/*"
    """Which files of a folder to read. Links are followed; hidden files are left out."""
    text_column: str = "text"
    """The field of JSON, or column of CSV and Parquet files, that holds the text."""
    separator: str | None = None
    """Split plain text files into documents where this stands, such as '<|endoftext|>'. The newlines around it
    belong to neither. Without it, a plain text file is one document."""
    val_fraction: float = 0.01
    """Share of the documents held out for validation, chosen by their hash (0: none)."""
    split_seed: int = 0
    """Chooses which documents are held out."""
    hub_config: str | None = None
    """Configuration of a dataset on the hub; for fineweb-edu sample-10BT if none is named."""
    hub_split: str = "train"
    """Split of a dataset on the hub. Validation documents are taken from it by hash."""
    hub_revision: str = "main"
    """Branch, tag or commit of a dataset on the hub."""
    keep_downloads: bool = False
    """Keep what is downloaded from the hub in its client's cache; else it is deleted as soon as it is tokenized."""
    dedup: bool = False
    """Leave out documents whose text has occurred before."""
    shard_tokens: int = 100_000_000
    """Tokens per shard file, at most."""

    def __post_init__(self) -> None:
        if self.separator == "":
            raise UserError("--separator is empty; name the text that stands between two documents")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val-fraction is {self.val_fraction}; it must be at least 0 and below 1")
        if self.shard_tokens < 1:
            raise UserError(f"--shard-tokens is {self.shard_tokens}; it must be at least 1")
        require_seed("--split-seed", self.split_seed)


@dataclass(frozen=True)
class SlurmConfig:
    """What `restomod prepare --engine slurm` asks of the cluster, for each unit of work."""

    slurm_partition: str | None = None
    """With --engine slurm: the partition; without one, the cluster's default."""
    slurm_time: str | None = None
    """With --engine slurm: time limit of a unit of work, such as 2:00:00; without one, the partition's."""
    slurm_mem_gb: int = 2
    """With --engine slurm: memory for a unit of work, in GB."""

    def __post_init__(self) -> None:
        if self.slurm_mem_gb < 1:
            raise UserError(f"--slurm-mem-gb is {self.slurm_mem_gb}; it must be at least 1")
