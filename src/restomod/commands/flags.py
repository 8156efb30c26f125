"""The flags of every verb: a dataclass each, of which tyro makes flags. A field's docstring is its help text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from restomod.config.prepare import Engine, PrepareConfig, SlurmConfig
from restomod.config.run import Device, Precision, RunConfig, SamplingConfig, require_seed
from restomod.evals.tasks.registry import TASKS, VALIDATION


@dataclass(frozen=True)
class ResumeArguments:
    config: Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class GoOnArguments(ResumeArguments):
    then: str | None = None
    """Run this command of the shell at the very end, however it ends (--then "sudo shutdown now")."""


@dataclass(frozen=True, kw_only=True)
class TrainArguments(GoOnArguments):
    out: str
    """Folder of the run; it must not exist yet."""


@dataclass(frozen=True, kw_only=True)
class _WritingArguments:
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; may be given several times. <|endoftext|> in it becomes that token: a new document begins."""
    prompt_file: str | None = None
    """Continue every line of this file (UTF-8) instead; blank ones are left out."""
    max_tokens: int = 100
    """Length of each continuation, in tokens."""
    temperature: float = 0.8
    """Below 1 sharpens the distribution, above 1 flattens it; 0 always takes the likeliest token."""
    top_k: int = 50
    """Sample among this many likeliest tokens (0: all)."""
    top_p: float = 1.0
    """Sample among the fewest likeliest tokens whose probabilities add up to this (1: all)."""
    seed: int = 1337
    """The same seed gives the same text of a prompt, whatever the other prompts are."""
    device: Device = "auto"
    """Where to compute. auto: CUDA, else MPS, else CPU."""
    precision: Precision = "auto"
    """Of the matrix products."""

    def settings(self) -> SamplingConfig:
        """How to sample.

        Raises:
            UserError: a value is out of its range.
        """
        require_seed("--seed", self.seed)
        return SamplingConfig(
            max_tokens=self.max_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
        )


@dataclass(frozen=True, kw_only=True)
class SampleArguments(_WritingArguments):
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run (its newest checkpoint is used), a model folder, or a name on the Hugging Face hub, such as gpt2."""
    num_samples: int = 3
    """How many continuations of each prompt. Without a prompt they start new documents."""
    stream: bool = False
    """Print texts as they are made, one after the other. A single one in a terminal always is."""


@dataclass(frozen=True, kw_only=True)
class CompareSamplesArguments(_WritingArguments):
    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """A run (its newest checkpoint is used), a model folder, or a name on the Hugging Face hub, such as gpt2."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """The other one."""
    out: str | None = None
    """Write them into this file too: Markdown (.md) or a page for the browser (.html)."""


EVAL_TASKS_HELP = (
    f"Names, separated by commas: {', '.join([VALIDATION, *TASKS])}. NAME=FILE takes a task's data from a file. "
    f"Default: {VALIDATION} (where there is data) and hellaswag."
)


@dataclass(frozen=True)
class EvalArguments:
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run (its newest checkpoint is used), a model folder, or a name on the Hugging Face hub, such as gpt2. Models
    other than GPT-2 are run by transformers."""
    tasks: Annotated[str | None, tyro.conf.arg(help=EVAL_TASKS_HELP)] = None
    task: str | None = None
    """Your own questions: a .jsonl file with query (or ctx), choices (or endings) and gold (or label) in every line."""
    limit: int | None = None
    """Ask only the first so many examples of each task."""
    data: str | None = None
    """Folder of tokens for the validation loss. Default: the validation split of the run's data."""
    context: int | None = None
    """Tokens of the windows of the validation loss. Default: as many as the run trained on."""
    batch: int | None = None
    """Contexts (windows) per forward pass. It changes the speed and no result. Default: what is fast."""
    json: str | None = None
    """Write all results to this file. Those of a run's model are written into its folder evals/ as well."""
    cache: str = "data"
    """Folder for HellaSwag's file; other data sets go into the cache of the hub's client."""
    device: Device = "auto"
    """Where to compute. auto: CUDA, else MPS, else CPU."""
    precision: Precision = "auto"
    """Of the matrix products."""


@dataclass(frozen=True)
class InspectArguments:
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run, a model folder, a name on the Hugging Face hub, such as gpt2, or a preset (its initial weights)."""
    plots: str | None = None
    """Draw the weights into this folder as PNG files."""
    diff: str | None = None
    """Compare with this model instead, tensor by tensor; named like MODEL."""
    seed: int = 1337
    """Of a preset's initial weights."""


@dataclass(frozen=True)
class CheckArguments:
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = "gpt2-124m"
    """A preset (its initial weights), a run, a model folder, or a name on the Hugging Face hub, such as gpt2."""
    seed: int = 1337
    """Of a preset's initial weights."""
    device: Device = "auto"
    """Where to compute. auto: CUDA, else MPS, else CPU."""
    precision: Precision = "auto"
    """Of the matrix products."""


@dataclass(frozen=True)
class PrepareArguments:
    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE ...")]
    """Text to read, in this order: files and folders (plain text, JSON, CSV or Parquet, also compressed; the content
    says which); on the hub fineweb-edu, fineweb, hf:OWNER/NAME, or token shards pretokenized:OWNER/NAME; python-stdlib;
    tinyshakespeare."""
    config: Annotated[PrepareConfig, tyro.conf.arg(name="")]
    out: str
    """Folder of the token shards; what an interrupted run left there is gone on with."""
    workers: int = 0
    """Files to work on at once, each in a process of its own (0: one per processor; on a cluster, as it has room)."""
    engine: Engine = "local"
    """Where to work: processes of this machine, a Ray cluster (RAY_ADDRESS, or one that runs here, or else a new one),
    or jobs of Slurm. The bytes are the same. Clusters need the files and the folder on all their machines."""
    slurm: Annotated[SlurmConfig, tyro.conf.arg(name="")] = field(default_factory=SlurmConfig)


@dataclass(frozen=True)
class DataArguments:
    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A folder that `restomod prepare` made, or one of published shards (llm.c's .bin, build-nanogpt's .npy)."""
    verify: bool = False
    """Read every byte and compare its SHA-256 with the manifest."""


@dataclass(frozen=True)
class DoctorArguments:
    device: Device = "auto"
    """The device to examine. auto: CUDA, else MPS, else CPU."""
    precision: Precision = "auto"
    """Of the matrix products that are compared with exact ones."""
    preset: str = "gpt2-124m"
    """Is there disk and memory for this one?"""
    out: str = "runs"
    """Folder where runs are to go."""
