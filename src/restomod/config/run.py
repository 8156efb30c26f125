"""What a run is: frozen dataclasses, checked when they are made.

The docstring under each field is also its help text on the command line. Nothing here imports more than the
standard library, so that `restomod --help` is instant and a report can read a run without torch.
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
MIX_PRECISION = 10**6  # shares of a mix are multiples of about this part of 1

Source = Literal["python-stdlib", "text", "tinyshakespeare", "tokens"]
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


@dataclass(frozen=True)
class DataConfig:
    """What the model reads."""

    source: Source = "python-stdlib"
    """python-stdlib: the running Python's own library; text: your file or folder; tinyshakespeare; tokens: a folder
    that `restomod prepare` made, or one of published shards (llm.c's .bin, build-nanogpt's .npy)."""
    path: str | None = None
    """File or folder to read: plain text, JSON, CSV or Parquet, also compressed; its content says which. For
    tinyshakespeare: no download."""
    mix: str | None = None
    """Several folders of tokens and their weights, FOLDER:WEIGHT,FOLDER:WEIGHT, in place of source and path. Every
    step has its share of each, whatever their sizes; a small folder is repeated more often."""
    glob: str = "**/*"
    """Which files of a folder to read. Links are followed; hidden files are left out."""
    text_column: str = "text"
    """The field of JSON, or column of CSV and Parquet files, that holds the text."""
    separator: str | None = None
    """Split plain text files into documents where this stands, such as '<|endoftext|>'. The newlines around it
    belong to neither. Without it, a plain text file is one document."""
    val_fraction: float = 0.05
    """Share of the documents held out for validation (0: none). A single document is cut by position."""
    split_seed: int = 0
    """Chooses which documents are held out."""
    cache: str = "data"
    """Folder where prepared token shards are kept and found again."""

    def __post_init__(self) -> None:
        require(
            0 <= self.val_fraction < 1,
            f"data.val_fraction is {self.val_fraction}; it must be at least 0 and below 1",
        )
        require_seed("data.split_seed", self.split_seed)
        require(
            self.source != "python-stdlib" or self.path is None,
            "data.path has no meaning for data.source python-stdlib; for your own text add --data.source text",
        )
        require(self.separator != "", "data.separator is empty; name the text that stands between two documents")
        require(
            self.separator is None or (self.source == "text" and self.mix is None),
            "data.separator splits text of your own; it needs data.source text",
        )
        if self.mix is not None:
            require(self.path is None, "data.mix names the folders of tokens itself; leave data.path out")
            self.mixed()

    def mixed(self) -> list[tuple[str, Fraction]]:
        """The folders of `mix` and their shares, which add up to 1.

        An item ends at a comma after a colon and a weight, so that names of folders may hold commas and colons. Where
        a name holds such an end itself, the longest name of a folder that exists is taken.

        Raises:
            UserError: ``mix`` is not of the form FOLDER:WEIGHT,FOLDER:WEIGHT with positive weights.
        """
        parts = []
        mix = self.mix or ""
        commas = [found.end() for found in MIX_ITEM_END.finditer(mix)]
        for item in split_items(mix, commas, lambda item: os.path.isdir(item.rpartition(":")[0])):
            folder, _, weight = item.rpartition(":")
            folder = folder if os.path.isdir(folder) else folder.strip()
            try:
                parts.append((folder, float(weight)))
            except ValueError:
                parts.append((folder, math.nan))
            require(
                bool(folder) and 0 < parts[-1][1] < math.inf,
                f"data.mix: {item.strip()!r} is not FOLDER:WEIGHT with a weight above 0; for example web:0.7,books:0.3",
            )
        folders = [folder for folder, _ in parts]
        require(len(set(folders)) == len(folders), f"data.mix names a folder twice: {self.mix}")
        total = sum(weight for _, weight in parts)
        millionths = [round(MIX_PRECISION * weight / total) for _, weight in parts]
        require(min(millionths) > 0, f"data.mix: a weight is less than a millionth of the whole: {self.mix}")
        return [(folder, Fraction(part, sum(millionths))) for folder, part in zip(folders, millionths, strict=True)]


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule: linear warm-up, then down to a fraction of the maximum."""

    optimizer: Optimizer = "adamw"
    """adamw: for all parameters; muon: for the matrices of the blocks, and AdamW for all others."""
    lr: float = 6e-4
    """Maximum learning rate of AdamW."""
    muon_lr: float = 0.02
    """Maximum learning rate of Muon."""
    decay: Decay = "cosine"
    """How the rates go down. cosine: half a cosine; linear: evenly; wsd: evenly in the last part, cooldown, and not at
    all before (warm-up, stable, decay); 1-sqrt: like wsd, by 1 - sqrt(progress)."""
    cooldown: float = 0.4
    """The part of the steps after the warm-up in which wsd and 1-sqrt go down."""
    min_lr_ratio: float = 0.1
    """The rates end at this fraction of their maximum."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0 to the maximum. That of a preset is scaled with --steps unless it is given."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's running means of the gradient and its square."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay, on matrices and embeddings only."""
    muon_momentum: float = 0.95
    """Decay of Muon's running sum of the gradient."""
    muon_weight_decay: float = 0.0
    """Muon's decoupled weight decay."""
    grad_clip: float = 1.0
    """Largest global gradient norm; longer gradients are scaled down to it."""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, f"optim.lr is {self.lr}; it must be a finite number above 0")
        require(
            0 <= self.min_lr_ratio <= 1,
            f"optim.min_lr_ratio is {self.min_lr_ratio}; it must lie between 0 and 1",
        )
        require_size("optim.warmup_steps", self.warmup_steps, least=0)
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas are {self.betas}; each must be at least 0 and below 1",
        )
        require(0 < self.muon_lr < math.inf, f"optim.muon_lr is {self.muon_lr}; it must be a finite number above 0")
        require(0 < self.cooldown <= 1, f"optim.cooldown is {self.cooldown}; it must be above 0 and at most 1")
        require(
            0 <= self.muon_momentum < 1,
            f"optim.muon_momentum is {self.muon_momentum}; it must be at least 0 and below 1",
        )
        for name in ("weight_decay", "muon_weight_decay"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"optim.{name} is {value}; it must be 0 or more")
        require(0 < self.eps < math.inf, f"optim.eps is {self.eps}; it must be a finite number above 0")
        require(
            0 < self.grad_clip < math.inf, f"optim.grad_clip is {self.grad_clip}; it must be a finite number above 0"
        )


@dataclass(frozen=True)
class SamplingConfig:
    """The samples that a run writes while it trains."""

    prompts: tuple[str, ...] = ("",)
    """Texts to continue; an empty one starts a new document, and so does <|endoftext|> in one."""
    max_tokens: int = 64
    """Length of each continuation, in tokens."""
    temperature: float = 0.8
    """Below 1 sharpens the distribution, above 1 flattens it; 0 always takes the likeliest token."""
    top_k: int = 50
    """Sample among this many likeliest tokens (0: all)."""
    top_p: float = 1.0
    """Sample among the fewest likeliest tokens whose probabilities add up to this (1: all)."""

    def __post_init__(self) -> None:
        require_size("sampling.max_tokens", self.max_tokens)
        require(0 <= self.temperature < math.inf, f"sampling.temperature is {self.temperature}; it must be 0 or more")
        require_size("sampling.top_k", self.top_k, least=0)
        require(0 < self.top_p <= 1, f"sampling.top_p is {self.top_p}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class RunConfig:
    """A complete training run."""

    steps: int
    """Optimizer steps."""
    batch_tokens: int
    """Tokens per optimizer step, whatever the micro-batch and the number of processes."""
    sequence_length: int
    """Tokens per training window (T)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    micro_batch: int | None = None
    """Sequences per forward pass (B); gradients are accumulated up to batch_tokens. None: as many as are fast and fit.
    Where memory runs out on the way, they become fewer."""
    target_loss: float | None = None
    """Stop as soon as a step's training loss is at or below this."""
    eval_every: int = 250
    """Steps between validations; one more follows the last step."""
    eval_tokens: int | None = None
    """Validate on at most this many tokens, always the same ones. None: the whole validation split."""
    eval_tasks: tuple[str, ...] = ()
    """Tasks that every validation asks too, such as hellaswag or lambada=FILE (`restomod eval --help` lists them)."""
    eval_limit: int | None = None
    """Ask only the first so many examples of each task. None: all."""
    sample_every: int = 250
    """Steps between samples; one more follows the last step."""
    save_every: int | None = None
    """Steps between checkpoints. None: only by time. One more follows the last step."""
    save_every_minutes: float | None = 10.0
    """Minutes between checkpoints; at a validation, half as many are enough. None: only by steps."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep (0: all)."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss, too."""
    keep_every: int = 0
    """Keep the checkpoints at multiples of so many steps, too (0: none)."""
    keep_gb: float | None = None
    """Keep no more than so many gigabytes of them; the newest is kept in any case."""
    track: tuple[Tracker, ...] = ()
    """Where to send the numbers of `metrics.jsonl` too; several may be named. tensorboard: RUN/tensorboard; wandb:
    offline in RUN/wandb unless WANDB_MODE says otherwise; trackio: its local database."""
    on_save_error: OnSaveError = "stop"
    """What to do where a checkpoint cannot be written, as on a full disk: stop, or continue and try at the next."""
    on_spike: OnSpike = "rollback"
    """What to do about a loss that is not finite or far above the last ones. Its update is never made. stop: the run
    ends; skip: it goes on, and ends after 10 in a row; rollback: after 3 in a row it goes back to the newest
    checkpoint and passes over the data that followed it."""
    spike_sigmas: float = 10.0
    """How many standard deviations above the mean of the last 128 a loss is a spike (0: only what is not finite)."""
    init: str | None = None
    """Start from these weights: a name on the hub (gpt2), a model folder, or a run. None: random ones."""
    sanity_checks: bool = True
    """Check before the first step that the model can learn, and stop if it cannot (`restomod check` does more)."""
    seed: int = 1337
    """Decides the initial weights, the order of the data, and the samples."""
    device: Device = "auto"
    """Where to compute. auto: CUDA, else MPS, else CPU."""
    precision: Precision = "auto"
    """Of the matrix products; weights stay fp32. auto: bf16 where the hardware has it, else fp16 on a GPU that has that
    (the loss is then scaled)."""
    residual_dtype: ResidualDtype = "fp32"
    """Dtype of the residual stream in training. bf16 saves memory and time on a GPU, and adds rounding errors; it needs
    bf16 matrix products. Evaluation and sampling always use fp32."""
    document_mask: bool = False
    """In training, let a token see only its own document of a window, not those before."""
    parallel: Parallel = "ddp"
    """How several processes (torchrun) share a model. ddp: each has all of it; fsdp: each a part, for large ones."""
    recompute: bool = False
    """Compute a block's activations anew in the backward pass instead of keeping them: less memory, a third slower."""
    deterministic: bool = False
    """Use only kernels that give the same bits every time. On a CPU they do so anyway; on a GPU it costs speed."""
    compile: Compile = "auto"
    """Compile the model with torch.compile before training. auto: on a CUDA device with Triton and a C compiler; off
    elsewhere. on: always (on a CPU this needs a C++ compiler). off: never."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_tokens",
            "sequence_length",
            "eval_every",
            "sample_every",
            "save_every",
            "eval_limit",
        ):
            require_size(name, getattr(self, name))
        require_seed("seed", self.seed)
        for name in ("keep_checkpoints", "keep_every"):
            require_size(name, getattr(self, name), least=0)
        require(0 <= self.spike_sigmas < math.inf, f"spike_sigmas is {self.spike_sigmas}; it must be 0 or more")
        for name in ("save_every_minutes", "keep_gb"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"{name} is {value}; it must be above 0")
        require(
            self.residual_dtype == "fp32" or self.precision in ("auto", "bf16"),
            f"residual_dtype {self.residual_dtype} needs bf16 matrix products, and precision is {self.precision}; "
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
