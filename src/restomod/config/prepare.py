"""`PrepareConfig` and `SlurmConfig`: settings of the command `prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from restomod.config.model import require, require_size
from restomod.config.run import require_fraction, require_seed

Engine = Literal["local", "ray", "slurm"]


@dataclass(frozen=True)
class PrepareConfig:
    """Settings for reading text, splitting it and writing shards."""

    glob: str = "**/*"
    """Glob pattern for the files of a folder. Links are followed, and hidden files are skipped."""
    text_column: str = "text"
    """Name of the JSON field, or of the CSV or Parquet column, that contains the text."""
    separator: str | None = None
    """Separator of the documents in a plain text file, such as '<|endoftext|>'. Newlines around it are removed.
    None: one document per file."""
    val_fraction: float = 0.01
    """Fraction of the documents in the validation split (0: no validation). A document's split depends on the hash of
    its text. If there is only one document, the validation split is its last part."""
    split_seed: int = 0
    """Random seed of the validation split."""
    hub_config: str | None = None
    """Configuration of a dataset on the Hugging Face hub. None: its default; sample-10BT for fineweb and
    fineweb-edu."""
    hub_split: str = "train"
    """Split of a dataset on the hub. The validation documents are taken from this split too."""
    hub_revision: str = "main"
    """Branch, tag or commit of a dataset on the hub."""
    keep_downloads: bool = False
    """Keep downloaded files in the cache of the hub client; otherwise each file is deleted after tokenization."""
    dedup: bool = False
    """Remove documents whose text equals that of an earlier document (deduplication)."""
    shard_tokens: int = 100_000_000
    """Maximum number of tokens per shard."""

    def __post_init__(self) -> None:
        require(self.separator != "", "--separator is empty; set it to the text between two documents")
        require_fraction("--val-fraction", self.val_fraction)
        require_size("--shard-tokens", self.shard_tokens)
        require_seed("--split-seed", self.split_seed)


@dataclass(frozen=True)
class SlurmConfig:
    """Slurm options of the jobs of --engine slurm."""

    slurm_partition: str | None = None
    """Slurm partition. None: the cluster's default."""
    slurm_time: str | None = None
    """Slurm time limit of each job of the array, such as 2:00:00. None: the partition's default."""
    slurm_mem_gb: int = 2
    """Slurm memory of each job of the array, in GB."""

    def __post_init__(self) -> None:
        require_size("--slurm-mem-gb", self.slurm_mem_gb)
