"""What each verb takes: dataclasses from which tyro makes its flags. The docstring under a field is its help text."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from restomod.config import Device, Precision, RunConfig
from restomod.config_prepare import Engine, PrepareConfig, SlurmConfig


@dataclasses.dataclass(frozen=True)
class ResumeArguments:
    config: Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True)
class TrainArguments(ResumeArguments):
    out: str
    """Folder of the run; it must not exist yet."""


@dataclasses.dataclass(frozen=True)
class SampleArguments:
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run (its newest checkpoint is used), a model folder, or a name on the Hugging Face hub, such as gpt2."""
    prompt: str = ""
    """Text to continue; empty starts a new document."""
    num_samples: int = 3
    """How many continuations."""
    max_tokens: int = 100
    """Length of each, in tokens."""
    temperature: float = 0.8
    """Below 1 sharpens the distribution, above 1 flattens it; 0 always takes the likeliest token."""
    top_k: int = 50
    """Sample among this many likeliest tokens (0: all)."""
    seed: int = 1337
    """The same seed gives the same text."""
    device: Device = "auto"
    """Where to compute. auto: CUDA, else MPS, else CPU."""
    precision: Precision = "auto"
    """Of the matrix products."""


@dataclasses.dataclass(frozen=True)
class InspectArguments:
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run, a model folder, a name on the Hugging Face hub, such as gpt2, or a preset (its initial weights)."""
    plots: str | None = None
    """Draw the weights into this folder as PNG files."""
    diff: str | None = None
    """Compare with this model instead, tensor by tensor; named like MODEL."""
    seed: int = 1337
    """Of a preset's initial weights."""


@dataclasses.dataclass(frozen=True)
class CheckArguments:
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = "gpt2-124m"
    """A preset (its initial weights), a run, a model folder, or a name on the Hugging Face hub, such as gpt2."""
    seed: int = 1337
    """Of a preset's initial weights."""
    device: Device = "auto"
    """Where to compute. auto: CUDA, else MPS, else CPU."""
    precision: Precision = "auto"
    """Of the matrix products."""


@dataclasses.dataclass(frozen=True)
class PrepareArguments:
    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE ...")]
    """Text to read, in this order: files and folders (text, .jsonl or .parquet, also .gz, .xz or .zst); on the hub
    fineweb-edu, fineweb, hf:OWNER/NAME, or token shards pretokenized:OWNER/NAME; python-stdlib; tinyshakespeare."""
    config: Annotated[PrepareConfig, tyro.conf.arg(name="")]
    out: str
    """Folder of the token shards; what an interrupted run left there is gone on with."""
    workers: int = 0
    """Files to work on at once, each in a process of its own (0: one per processor; on a cluster, as it has room)."""
    engine: Engine = "local"
    """Where to work: processes of this machine, a Ray cluster (RAY_ADDRESS, or one that runs here, or else a new one),
    or jobs of Slurm. The bytes are the same. Clusters need the files and the folder on all their machines."""
    slurm: Annotated[SlurmConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=SlurmConfig)


@dataclasses.dataclass(frozen=True)
class DataArguments:
    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A folder that `restomod prepare` made, or one of published shards (llm.c's .bin, build-nanogpt's .npy)."""
    verify: bool = False
    """Read every byte and compare its SHA-256 with the manifest."""
