"""`PrepareConfig` and `SlurmConfig`: settings of the command `prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from restomod.config.model import require, require_size
from restomod.config.run import require_fraction, require_seed

Engine = Literal["local", "ray", "slurm"]


@dataclass(frozen=True)
class PrepareConfig:
    """How text is read, split and cut into shards."""

    glob: str = "**/*"
    """Which files of a folder to read. Links are followed; hidden files are skipped."""
    text_column: str = "text"
    """Field of JSON files, or column of CSV and Parquet files, that holds the text."""
    separator: str | None = None
    """Text that separates the documents of a plain text file, such as '<|endoftext|>'. Newlines around it are
    dropped. None: a plain text file is one document."""
    val_fraction: float = 0.01
    """Fraction of the documents held out for validation, chosen by the hash of their text (0: none). Of a single
    document, its last part is held out."""
    split_seed: int = 0
    """Seed that chooses which documents are held out."""
    hub_config: str | None = None
    """Configuration of a dataset on the Hugging Face hub. None: its default; for fineweb and
    fineweb-edu sample-10BT."""
    hub_split: str = "train"
    """Split of a dataset on the hub. Validation documents are taken from the same split."""
    hub_revision: str = "main"
    """Branch, tag or commit of a dataset on the hub."""
    keep_downloads: bool = False
    """Keep downloads in the hub client's cache; otherwise each file is deleted once it is tokenized."""
    dedup: bool = False
    """Drop documents whose text is identical to that of an earlier document."""
    shard_tokens: int = 100_000_000
    """Maximum number of tokens per shard file."""

    def __post_init__(self) -> None:
        require(self.separator != "", "--separator is empty; name the text that stands between two documents")
        require_fraction("--val-fraction", self.val_fraction)
        require_size("--shard-tokens", self.shard_tokens)
        require_seed("--split-seed", self.split_seed)


@dataclass(frozen=True)
class SlurmConfig:
    """Slurm options for each unit of work; used with --engine slurm."""

    slurm_partition: str | None = None
    """Slurm partition. None: the cluster's default."""
    slurm_time: str | None = None
    """Slurm time limit of a unit of work, such as 2:00:00. None: the partition's default."""
    slurm_mem_gb: int = 2
    """Slurm memory for a unit of work, in GB."""

    def __post_init__(self) -> None:
        require_size("--slurm-mem-gb", self.slurm_mem_gb)
