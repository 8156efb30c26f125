"""`RunConfig`: all settings of a training run, as frozen dataclasses that check their values.

The docstring of a field is its help text on the command line. Only the standard library is imported, so that
`restomod --help` is instant and a report reads a run without torch.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from restomod.config.model import ModelConfig, nearest_divisor, neighbours, require, require_size
from restomod.utils.errors import UserError
from restomod.utils.text import split_items

MIX_ITEM_END = re.compile(r":\s*[-+]?[\d.]+(?:e[-+]?\d+)?\s*(?=,)", re.IGNORECASE)  # a weight, and a comma after it
MIX_PRECISION = 10**6  # shares of a mix are rounded to millionths
LARGEST_BATCH = 2**30  # tokens of an optimizer step; published runs use up to 2**26
LARGEST_SAMPLE = 2**20  # tokens of a sample

Source = Literal["python-stdlib", "text", "tinyshakespeare", "tokens"]
SOURCES_WITH_PATH = ("text", "tinyshakespeare", "tokens")
Optimizer = Literal["adamw", "muon"]
Decay = Literal["cosine", "linear", "wsd", "1-sqrt"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Parallel = Literal["ddp", "fsdp"]
Compile = Literal["auto", "on", "off"]
ResidualDtype = Literal["fp32", "bf16"]
OnSpike = Literal["stop", "skip", "rollback"]
OnSaveError = Literal["stop", "continue"]
Tracker = Literal["tensorboard", "wandb", "trackio"]


def require_seed(name: str, seed: int) -> None:
    """Raise UserError unless ``seed`` is one that every random generator takes."""
    require(0 <= seed < 2**32, f"{name} is {seed}; it must be at least 0 and below 2**32")


def require_fraction(name: str, value: float) -> None:
    """Raise UserError unless ``value`` is at least 0 and below 1."""
    require(0 <= value < 1, f"{name} is {value}; it must be at least 0 and below 1")


@dataclass(frozen=True)
class DataConfig:
    """The training text: where it is, how it is read, and what is held out for validation."""

    source: Source = "python-stdlib"
    """What to train on. python-stdlib: the source of the running Python's standard library; text: the file or folder
    data.path; tinyshakespeare: downloaded, or data.path; tokens: the folder data.path of token shards, made by
    `restomod prepare` or published (llm.c's .bin, build-nanogpt's .npy)."""
    path: str | None = None
    """File or folder to read: plain text, JSON, CSV or Parquet, also compressed. The format is detected from the
    content."""
    mix: str | None = None
    """Folders of token shards and their weights, FOLDER:WEIGHT,FOLDER:WEIGHT, in place of source and path. Every
    step takes its share of sequences from each folder; smaller folders are repeated more often."""
    glob: str = "**/*"
    """Which files of a folder to read. Links are followed; hidden files are skipped."""
    text_column: str = "text"
    """Field of JSON files, or column of CSV and Parquet files, that holds the text."""
    separator: str | None = None
    """Text that separates the documents of a plain text file, such as '<|endoftext|>'. Newlines around it are
    dropped. None: a plain text file is one document."""
    val_fraction: float = 0.05
    """Fraction of the documents held out for validation, chosen by the hash of their text (0: none). Of a single
    document, its last part is held out."""
    split_seed: int = 0
    """Seed that chooses which documents are held out."""
    cache: str = "data"
    """Folder in which prepared token shards are cached."""

    def __post_init__(self) -> None:
        require_fraction("data.val_fraction", self.val_fraction)
        require_seed("data.split_seed", self.split_seed)
        require(
            self.source in SOURCES_WITH_PATH or self.path is None,
            f"data.path has no effect with data.source {self.source}; for your own text add --data.source text",
        )
        require(self.separator != "", "data.separator is empty; name the text that stands between two documents")
        require(
            self.separator is None or (self.source == "text" and self.mix is None),
            "data.separator splits text of your own; it needs data.source text",
        )
        if self.mix is not None:
            require(self.path is None, "data.mix names the folders of tokens itself; leave data.path out")
            self.mixed()

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation split, as far as the settings tell: prepared tokens may lack one."""
        return self.val_fraction > 0 or self.source == "tokens" or self.mix is not None

    def mixed(self) -> list[tuple[str, Fraction]]:
        """The folders of `mix` and their shares, which add up to 1.

        An item ends at a comma after a colon and a weight, so that names of folders may hold commas and colons. Where
        a name holds such an end itself, the longest name of a folder that exists is taken.

        Raises:
            UserError: ``mix`` is not of the form FOLDER:WEIGHT,FOLDER:WEIGHT with positive weights.
        """
        weights: dict[str, float] = {}
        mix = self.mix or ""
        commas = [found.end() for found in MIX_ITEM_END.finditer(mix)]
        for item in split_items(mix, commas, lambda item: os.path.isdir(item.rpartition(":")[0])):
            folder, _, number = item.rpartition(":")
            folder = folder if os.path.isdir(folder) else folder.strip()
            try:
                weight = float(number)
            except ValueError:
                weight = math.nan
            require(
                bool(folder) and 0 < weight < math.inf,
                f"data.mix: {item.strip()!r} is not FOLDER:WEIGHT with a weight above 0; for example web:0.7,books:0.3",
            )
            require(folder not in weights, f"data.mix names a folder twice: {mix}")
            weights[folder] = weight
        total = sum(weights.values())
        millionths = {folder: round(MIX_PRECISION * weight / total) for folder, weight in weights.items()}
        require(min(millionths.values()) > 0, f"data.mix: a weight is less than a millionth of the whole: {mix}")
        return [(folder, Fraction(part, sum(millionths.values()))) for folder, part in millionths.items()]


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning-rate schedule: linear warm-up, then decay to a fraction of the maximum."""

    optimizer: Optimizer = "adamw"
    """adamw: AdamW for all parameters; muon: Muon for the matrices of the blocks, AdamW for all other parameters."""
    lr: float = 6e-4
    """Maximum learning rate of AdamW."""
    muon_lr: float = 0.02
    """Maximum learning rate of Muon."""
    decay: Decay = "cosine"
    """Learning-rate decay after the warm-up. cosine: half a cosine; linear: linear; wsd (warm-up, stable, decay):
    constant, then linear over the last part, given by cooldown; 1-sqrt: as wsd, but by 1 - sqrt(progress)."""
    cooldown: float = 0.4
    """Fraction of the steps after the warm-up over which wsd and 1-sqrt decay."""
    min_lr_ratio: float = 0.1
    """Final learning rate, as a fraction of the maximum."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0 to the maximum. Unless given, a preset's warm-up is scaled with --steps."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's beta1 and beta2: decay of its running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay, on matrices and embeddings only."""
    muon_momentum: float = 0.95
    """Momentum of Muon."""
    muon_weight_decay: float = 0.0
    """Muon's decoupled weight decay."""
    grad_clip: float = 1.0
    """Maximum global gradient norm; larger gradients are scaled down to it."""

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr", "eps", "grad_clip"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"optim.{name} is {value}; it must be a finite number above 0")
        for name in ("weight_decay", "muon_weight_decay"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"optim.{name} is {value}; it must be 0 or more")
        require_size("optim.warmup_steps", self.warmup_steps, least=0)
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas are {self.betas}; each must be at least 0 and below 1",
        )
        require_fraction("optim.muon_momentum", self.muon_momentum)
        require(0 < self.cooldown <= 1, f"optim.cooldown is {self.cooldown}; it must be above 0 and at most 1")
        ratio = self.min_lr_ratio
        require(0 <= ratio <= 1, f"optim.min_lr_ratio is {ratio}; it must lie between 0 and 1")


@dataclass(frozen=True)
class SamplingConfig:
    """Samples that are generated during training."""

    prompts: tuple[str, ...] = ("",)
    """Prompts to continue. <|endoftext|> in a prompt, or an empty prompt, starts a new document."""
    max_tokens: int = 64
    """Tokens to generate for each prompt."""
    temperature: float = 0.8
    """Sampling temperature: below 1 sharpens the distribution, above 1 flattens it; 0 is greedy decoding."""
    top_k: int = 50
    """Sample from the k most likely tokens only (0: from all)."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the smallest set of most likely tokens with at least this total probability
    (1: from all)."""

    def __post_init__(self) -> None:
        require_size("sampling.max_tokens", self.max_tokens, most=LARGEST_SAMPLE)
        require(0 <= self.temperature < math.inf, f"sampling.temperature is {self.temperature}; it must be 0 or more")
        require_size("sampling.top_k", self.top_k, least=0)
        require(0 < self.top_p <= 1, f"sampling.top_p is {self.top_p}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class RunConfig:
    """All settings of a training run."""

    steps: int
    """Optimizer steps."""
    batch_tokens: int
    """Tokens per optimizer step, summed over micro-batches and processes."""
    sequence_length: int
    """Tokens per training window (T)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    micro_batch: int | None = None
    """Sequences per forward pass (B); gradients are accumulated up to batch_tokens. None: chosen automatically, and
    lowered when memory runs out."""
    target_loss: float | None = None
    """Stop when the training loss of a step is at or below this."""
    eval_every: int = 250
    """Steps between validations. The last step is always followed by one."""
    eval_tokens: int | None = None
    """Maximum number of validation tokens; always the same tokens. None: the whole validation split."""
    eval_tasks: tuple[str, ...] = ()
    """Tasks to score at every validation, such as hellaswag or lambada=FILE (`restomod eval --help` lists them)."""
    eval_limit: int | None = None
    """Maximum number of examples per task; the first ones are taken. None: all."""
    sample_every: int = 250
    """Steps between samples. The last step is always followed by them."""
    save_every: int | None = None
    """Steps between checkpoints. None: by time only. The last step is always followed by one."""
    save_every_minutes: float | None = 10.0
    """Minutes between checkpoints; after a validation, half of that. None: by steps only."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep (0: all)."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""
    keep_every: int = 0
    """Also keep the checkpoints at multiples of this many steps (0: none)."""
    keep_gb: float | None = None
    """Keep at most this many gigabytes of checkpoints; the newest is always kept. None: no limit."""
    track: tuple[Tracker, ...] = ()
    """Experiment trackers that also get the records of `metrics.jsonl`; several may be named. tensorboard: files in
    RUN/tensorboard; wandb: offline in RUN/wandb unless WANDB_MODE says otherwise; trackio: its local database."""
    on_save_error: OnSaveError = "stop"
    """What to do when a checkpoint cannot be written, as on a full disk. stop: end the run; continue: try again at the
    next checkpoint."""
    on_spike: OnSpike = "rollback"
    """What to do when the loss is not finite or is a spike (see spike_sigmas). The update of such a step is always
    skipped. stop: end the run; skip: continue, and end the run after 10 such steps in a row; rollback: after 3 in a
    row, go back to the newest checkpoint and skip the data that followed it."""
    spike_sigmas: float = 10.0
    """A loss is a spike if it is this many standard deviations above the mean of the last 128 (0: no spike
    detection)."""
    init: str | None = None
    """Initial weights: a model on the Hugging Face hub (gpt2), a model folder, or a run. None: random."""
    sanity_checks: bool = True
    """Run sanity checks of the model before the first step, and stop if one fails (`restomod check` runs more)."""
    seed: int = 1337
    """Random seed of the initial weights, the order of the data and the samples."""
    device: Device = "auto"
    """Device to train on. auto: CUDA, else MPS, else CPU."""
    precision: Precision = "auto"
    """Compute dtype of matmuls; weights are always fp32. auto: bf16 where the hardware supports it, else fp16 with loss
    scaling on a GPU that supports it, else fp32."""
    residual_dtype: ResidualDtype = "fp32"
    """Dtype of the residual stream in training. bf16 saves memory and time on a GPU and adds rounding errors; it needs
    precision bf16. Evaluation and sampling always use fp32."""
    document_mask: bool = False
    """Mask attention across document boundaries in training."""
    parallel: Parallel = "ddp"
    """How several processes (torchrun) train one model. ddp: every process has the whole model; fsdp: parameters,
    gradients and optimizer state are sharded, for large models."""
    gradient_checkpointing: bool = False
    """Gradient checkpointing (activation checkpointing): recompute the activations of each block in the backward pass
    instead of storing them. Uses less memory; a step takes about a third longer."""
    deterministic: bool = False
    """Use deterministic kernels only. This is slower on a GPU and changes nothing on a CPU."""
    compile: Compile = "auto"
    """Compile the model with torch.compile before training. auto: only on a CUDA device with Triton and a C compiler;
    on: always (a CPU needs a C++ compiler); off: never."""

    def __post_init__(self) -> None:
        for name in ("steps", "sequence_length", "eval_every", "sample_every", "save_every", "eval_limit"):
            require_size(name, getattr(self, name))
        require_size("batch_tokens", self.batch_tokens, most=LARGEST_BATCH)
        require_seed("seed", self.seed)
        for name in ("keep_checkpoints", "keep_every"):
            require_size(name, getattr(self, name), least=0)
        require(0 <= self.spike_sigmas < math.inf, f"spike_sigmas is {self.spike_sigmas}; it must be 0 or more")
        for name in ("save_every_minutes", "keep_gb"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"{name} is {value}; it must be above 0")
        require(
            self.residual_dtype == "fp32" or self.precision in ("auto", "bf16"),
            f"residual_dtype {self.residual_dtype} needs precision bf16, and precision is {self.precision}; "
            f"leave one of them out",
        )
        T = self.sequence_length
        require(
            self.model.n_positions >= T,
            f"sequence_length {T} is longer than model.n_positions {self.model.n_positions}; "
            f"lower the first or raise the second",
        )
        require(
            self.batch_tokens % T == 0,
            f"batch_tokens {self.batch_tokens} is not a multiple of sequence_length {T}; "
            f"the nearest that are: {neighbours(self.batch_tokens, T)}",
        )
        B = self.micro_batch
        if B is not None and (B < 1 or self.batch_sequences % B):
            raise UserError(
                f"micro_batch {B} does not divide the {self.batch_sequences} sequences of a step "
                f"(batch_tokens / sequence_length); "
                f"the nearest that does is {nearest_divisor(self.batch_sequences, B)}"
            )
        target = self.target_loss
        require(target is None or math.isfinite(target), f"target_loss is {target}; it must be a number")
        if self.eval_tokens is not None:
            require_size("eval_tokens", self.eval_tokens)
            require(
                self.eval_tokens >= T,
                f"eval_tokens {self.eval_tokens} is less than one window of sequence_length {T} tokens",
            )

    @property
    def batch_sequences(self) -> int:
        """Sequences per optimizer step, over all micro-batches and processes."""
        return self.batch_tokens // self.sequence_length

    def compiles_on(self, device_type: str) -> bool:
        """Whether the model is compiled on a kind of device (cpu, mps, cuda) that has a working compiler."""
        return self.compile == "on" or (self.compile == "auto" and device_type == "cuda")
