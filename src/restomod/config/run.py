"""`RunConfig`: all settings of a training run, as frozen dataclasses that check their values.

The docstring of a field is the help text of its flag. If a field can be None, the docstring ends with the sentence
"None: MEANING.", and the help shows MEANING as the default. Only the standard library is imported, so that a report
can read a run without torch.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from restomod.config.model import ModelConfig, nearest_divisor, nearest_multiples, require, require_size
from restomod.utils.errors import UserError
from restomod.utils.text import split_items

MIX_ITEM_END = re.compile(r":\s*[-+]?[\d.]+(?:e[-+]?\d+)?\s*(?=,)", re.IGNORECASE)  # a weight before a comma
MIX_PRECISION = 10**6  # shares of a mix are rounded to millionths
LARGEST_BATCH = 2**30  # tokens per optimizer step; published runs use up to 2**26
LARGEST_SAMPLE = 2**20  # tokens per sample

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
    """Raise UserError unless ``seed`` is in [0, 2**32), the range that Python, NumPy and torch accept."""
    require(0 <= seed < 2**32, f"{name} is {seed}; it must be at least 0 and below 2**32")


def require_fraction(name: str, value: float) -> None:
    """Raise UserError unless ``value`` is in [0, 1)."""
    require(0 <= value < 1, f"{name} is {value}; it must be at least 0 and below 1")


@dataclass(frozen=True)
class DataConfig:
    """Training data: source, file format and validation split."""

    source: Source = "python-stdlib"
    """Kind of training data. python-stdlib: source code of Python's standard library; text: text files in data.path;
    tinyshakespeare: downloaded, or read from data.path; tokens: token shards in data.path, written by `restomod
    prepare`, llm.c (.bin) or build-nanogpt (.npy)."""
    path: str | None = None
    """File or folder with the training data. Text can be plain text, JSON, CSV or Parquet, also compressed; the format
    is detected from the content. None: no path."""
    mix: str | None = None
    """Folders of token shards with weights, instead of data.source and data.path: FOLDER:WEIGHT,FOLDER:WEIGHT. In
    every batch, the number of sequences from a folder is proportional to its weight; a small folder is repeated more
    often. None: a single source."""
    glob: str = "**/*"
    """Glob pattern for the files of a folder. Links are followed, and hidden files are skipped."""
    text_column: str = "text"
    """Name of the JSON field, or of the CSV or Parquet column, that contains the text."""
    separator: str | None = None
    """Separator of the documents in a plain text file, such as '<|endoftext|>'. Newlines around it are removed.
    None: one document per file."""
    val_fraction: float = 0.05
    """Fraction of the documents in the validation split (0: no validation). A document's split depends on the hash of
    its text. If there is only one document, the validation split is its last part."""
    split_seed: int = 0
    """Random seed of the validation split."""
    cache: str = "data"
    """Cache folder for TinyShakespeare and for token shards of text."""

    def __post_init__(self) -> None:
        require_fraction("data.val_fraction", self.val_fraction)
        require_seed("data.split_seed", self.split_seed)
        require(
            self.source in SOURCES_WITH_PATH or self.path is None,
            f"data.path has no effect with data.source {self.source}; for your own text, add --data.source text",
        )
        require(self.separator != "", "data.separator is empty; set it to the text between two documents")
        require(
            self.separator is None or (self.source == "text" and self.mix is None),
            "data.separator needs data.source text",
        )
        if self.mix is not None:
            require(self.path is None, "data.mix and data.path exclude each other; omit data.path")
            self.mixed()

    @property
    def has_validation(self) -> bool:
        """Whether the settings provide a validation split; token shards can still lack one."""
        return self.val_fraction > 0 or self.source == "tokens" or self.mix is not None

    def mixed(self) -> list[tuple[str, Fraction]]:
        """Return the folders of `mix` and their shares of a batch, which sum to 1.

        Folder names can contain commas and colons: an item ends at a comma after ":WEIGHT". If a name contains such a
        sequence, the longest name of an existing folder is used.

        Raises:
            UserError: `mix` does not have the form FOLDER:WEIGHT,FOLDER:WEIGHT with positive weights.
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
        require(min(millionths.values()) > 0, f"data.mix: a weight is less than a millionth of the sum: {mix}")
        return [(folder, Fraction(part, sum(millionths.values()))) for folder, part in millionths.items()]


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule: linear warm-up, then decay to a fraction of the maximum."""

    optimizer: Optimizer = "adamw"
    """Optimizer. adamw: AdamW for all parameters; muon: Muon for the matrices of the blocks, AdamW for the others."""
    lr: float = 6e-4
    """Maximum learning rate of AdamW."""
    muon_lr: float = 0.02
    """Maximum learning rate of Muon."""
    decay: Decay = "cosine"
    """Learning-rate schedule after the warm-up. cosine: half a cosine period; linear: a straight line; wsd (warm-up,
    stable, decay): constant, then linear during the cooldown; 1-sqrt: constant, then 1 - sqrt(progress) during the
    cooldown."""
    cooldown: float = 0.4
    """Length of the cooldown of wsd and 1-sqrt, as a fraction of the steps after the warm-up."""
    min_lr_ratio: float = 0.1
    """Final learning rate, as a fraction of the maximum."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0 to the maximum learning rate. If this flag is not given, the preset's value is
    scaled in proportion to --steps."""
    betas: tuple[float, float] = (0.9, 0.95)
    """beta1 and beta2 of AdamW: decay rates of the running means of the gradient and of the squared gradient."""
    eps: float = 1e-8
    """Epsilon of AdamW, added to the denominator of the update."""
    weight_decay: float = 0.1
    """Decoupled weight decay of AdamW; applied to matrices and embeddings, not to biases and norms."""
    muon_momentum: float = 0.95
    """Momentum of Muon."""
    muon_weight_decay: float = 0.0
    """Decoupled weight decay of Muon."""
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
        require(0 <= ratio <= 1, f"optim.min_lr_ratio is {ratio}; it must be between 0 and 1")


@dataclass(frozen=True)
class SamplingConfig:
    """Text generation during training."""

    prompts: tuple[str, ...] = ("",)
    """Prompts of the samples. An empty prompt or <|endoftext|> in a prompt starts a new document."""
    max_tokens: int = 64
    """Tokens to generate per prompt."""
    temperature: float = 0.8
    """Sampling temperature: below 1 sharpens the distribution, above 1 flattens it, 0 is greedy decoding."""
    top_k: int = 50
    """Number of most likely tokens to sample from (0: all)."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the smallest set of most likely tokens whose total probability is at least this
    value (1: all tokens)."""

    def __post_init__(self) -> None:
        require_size("sampling.max_tokens", self.max_tokens, most=LARGEST_SAMPLE)
        require(0 <= self.temperature < math.inf, f"sampling.temperature is {self.temperature}; it must be 0 or more")
        require_size("sampling.top_k", self.top_k, least=0)
        require(0 < self.top_p <= 1, f"sampling.top_p is {self.top_p}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class RunConfig:
    """All settings of a training run."""

    steps: int
    """Number of optimizer steps."""
    batch_tokens: int
    """Batch size: tokens per optimizer step, over all micro-batches and ranks."""
    sequence_length: int
    """Sequence length T, in tokens."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    micro_batch: int | None = None
    """Micro-batch B: sequences per forward and backward pass. Gradients are accumulated over several micro-batches up
    to batch_tokens. None: chosen automatically, and lowered when memory runs out."""
    target_loss: float | None = None
    """Training loss in nats at which training stops. None: train for all steps."""
    eval_every: int = 250
    """Steps between validations. The last step is always followed by a validation."""
    eval_tokens: int | None = None
    """Maximum number of tokens per validation; every validation uses the same tokens. None: the complete split."""
    eval_tasks: tuple[str, ...] = ()
    """Tasks to evaluate at every validation, such as hellaswag or lambada=FILE; `restomod eval --help` lists all."""
    eval_limit: int | None = None
    """Maximum number of examples per task of --eval-tasks; the first ones are used. None: all."""
    sample_every: int = 250
    """Steps between samples. The last step is always followed by samples."""
    save_every: int | None = None
    """Steps between checkpoints. The last step is always followed by a checkpoint. None: by time only."""
    save_every_minutes: float | None = 10.0
    """Minutes between checkpoints; at the step of a validation, half of this time suffices. None: by steps only."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep (0: all)."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss, in addition to the newest ones."""
    keep_every: int = 0
    """Interval in steps of checkpoints that are kept permanently, up to --keep-gb (0: none)."""
    keep_gb: float | None = None
    """Maximum size of all checkpoints in GB; the newest one is always kept. None: no limit."""
    track: tuple[Tracker, ...] = ()
    """Experiment trackers, one or several, that receive the records of metrics.jsonl. tensorboard: files in
    RUN/tensorboard; wandb: offline in RUN/wandb, or the mode in the environment variable WANDB_MODE; trackio: its
    local database."""
    on_save_error: OnSaveError = "stop"
    """Action if a checkpoint cannot be written, for example because the disk is full. stop: end the run; continue: try
    again at the next checkpoint."""
    on_spike: OnSpike = "rollback"
    """Action if the loss is not finite or a spike (see --spike-sigmas). The update of such a step is always skipped.
    stop: end the run; skip: continue, and end the run after 10 consecutive skipped steps; rollback: after 3
    consecutive skipped steps, return to the newest checkpoint and skip the data since then."""
    spike_sigmas: float = 10.0
    """Threshold of a loss spike, in standard deviations above the mean loss of the last 128 steps (0: no spike
    detection)."""
    init: str | None = None
    """Initial weights: a model on the Hugging Face hub such as gpt2, a model folder, or a run. None: random."""
    sanity_checks: bool = True
    """Run sanity checks of the model before the first step, and stop if a check fails; `restomod check` runs more."""
    seed: int = 1337
    """Random seed of the initial weights, the data order and the samples."""
    device: Device = "auto"
    """Device to train on. auto: CUDA, else MPS, else CPU."""
    precision: Precision = "auto"
    """Compute dtype of matmuls (mixed precision); weights and optimizer state are always fp32. auto: bf16 if the
    hardware supports it, else fp16 with loss scaling on a GPU that supports it, else fp32."""
    residual_dtype: ResidualDtype = "fp32"
    """Dtype of the residual stream in training. bf16 saves memory and time on a GPU but adds rounding errors; it
    requires precision bf16. Evaluation and sampling always use fp32."""
    document_mask: bool = False
    """Mask attention between documents in training, so that a token attends only to its own document."""
    parallel: Parallel = "ddp"
    """Parallelism of several ranks (torchrun). ddp: every rank has the complete model; fsdp: parameters, gradients and
    optimizer state are sharded over the ranks, for large models."""
    gradient_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass instead of storing them (also called activation
    checkpointing). This saves memory; a step takes about a third longer."""
    deterministic: bool = False
    """Use only deterministic kernels. This is slower on a GPU and has no effect on a CPU."""
    compile: Compile = "auto"
    """Compile the model with torch.compile. auto: on a CUDA device with Triton and a C compiler; on: always (a CPU
    needs a C++ compiler); off: never, the model runs in eager mode."""

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
            f"omit one of them",
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
            f"the nearest that are: {nearest_multiples(self.batch_tokens, T)}",
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
        """Sequences per optimizer step, over all micro-batches and ranks."""
        return self.batch_tokens // self.sequence_length

    def compiles_on(self, device_type: str) -> bool:
        """Return whether the model is compiled on ``device_type`` (cpu, mps, cuda), if a compiler is installed."""
        return self.compile == "on" or (self.compile == "auto" and device_type == "cuda")


COMMON_FIELDS = (
    *("data.source", "data.path", "data.mix"),
    *("steps", "batch_tokens", "sequence_length", "micro_batch", "optim.optimizer", "optim.lr", "target_loss"),
    *("eval_every", "eval_tasks", "sample_every", "save_every", "init", "track", "seed"),
    *("device", "precision", "compile", "gradient_checkpointing", "parallel"),
)
"""Fields that `--help` lists first, in this order."""
RARELY_USED_FIELDS = (
    *("eval_tokens", "eval_limit", "save_every_minutes", "keep_checkpoints", "keep_best", "keep_every", "keep_gb"),
    *("on_save_error", "on_spike", "spike_sigmas", "sanity_checks"),
    *("residual_dtype", "document_mask", "deterministic"),
)
"""Fields that `--help` lists last. The fields in neither tuple follow in groups: model, data, optim, sampling."""
