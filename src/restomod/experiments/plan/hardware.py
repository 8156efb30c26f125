"""GPUs, and published speeds of training GPT-2 124M on them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from restomod.config.model import ModelConfig
from restomod.config.run import RunConfig
from restomod.model.flops import flops_per_token, mfu, peak_flops
from restomod.utils.errors import UserError, did_you_mean, shortened

GB = 2**30

Kind = Literal["eager", "compiled", "kernels", "unknown"]
"""Software of a measurement: eager PyTorch, torch.compile, custom kernels, or not stated."""

NARROWEST, SHORTEST, LONGEST = 768, 512, 2048  # n_embd and sequence_length that the measurements cover
ONE_MACHINE = 8  # GPUs; no measurement includes a network


@dataclass(frozen=True)
class GPU:
    """GPU model with figures from its data sheet."""

    key: str
    """Name for --gpu and in price files."""
    name: str
    """Part of the name that the driver reports; key of `restomod.model.flops.PEAK_FLOPS`."""
    memory: int
    """Memory in bytes."""
    half: Literal["bf16", "fp16"] = "bf16"
    """16-bit dtype that its tensor cores support."""

    @property
    def peak(self) -> float | None:
        """Peak dense bf16 FLOP/s; None if unknown or without bf16."""
        return peak_flops(self.name)


GPUS = (
    GPU("a100", "A100", 80 * GB),
    GPU("a100-40gb", "A100", 40 * GB),
    GPU("h100", "H100", 80 * GB),
    GPU("h100-pcie", "H100 PCIe", 80 * GB),
    GPU("h200", "H200", 141 * 10**9),
    GPU("l40s", "L40S", 48 * GB),
    GPU("rtx3090", "RTX 3090", 24 * GB),
    GPU("rtx3090ti", "RTX 3090 Ti", 24 * GB),
    GPU("rtx4090", "RTX 4090", 24 * GB),
    GPU("t4", "Tesla T4", 16 * GB, "fp16"),
    GPU("v100", "Tesla V100", 16 * GB, "fp16"),
)


def find_gpu(name: str) -> GPU:
    """Return the GPU of a name, ignoring case and punctuation: a100, A100 and "RTX 3090" are valid.

    Raises:
        UserError: the name is unknown.
    """
    gpu = known_gpu(name)
    if gpu is None:
        keys = [gpu.key for gpu in GPUS]
        raise UserError(
            f"--gpu {shortened(name)}: unknown GPU (for another GPU, run --measure on it)"
            f"{did_you_mean(_plain(name)[:80], keys)}"
        )
    return gpu


def known_gpu(name: str) -> GPU | None:
    """Return the GPU of a name as `find_gpu` does; None if the name is unknown."""
    plain = _plain(name)
    return next((gpu for gpu in GPUS if _plain(gpu.key) == plain), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def precision_on(gpu: GPU | None, config: RunConfig) -> Literal["fp32", "bf16", "fp16"]:
    """Return the compute dtype of a run on a GPU.

    Args:
        gpu: GPU of the run; None for an unknown one, which is assumed to support bf16.
        config: run configuration.
    """
    if config.precision != "auto":
        return config.precision
    return gpu.half if gpu is not None else "bf16"


@dataclass(frozen=True)
class Speed:
    """Published speed of training GPT-2 124M on sequences of 1,024 tokens."""

    gpu: str
    """Name of the GPU, equal to a `GPU.name`."""
    gpus: int
    """Number of GPUs."""
    tokens_per_second: float
    """Tokens per second of all GPUs together."""
    kind: Kind
    """Kind of software."""
    software: str
    """Name of the software."""
    source: str
    """Source of the measurement."""

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, 0 to 1."""
        share = mfu(self.tokens_per_second, flops_per_token(ModelConfig(), 1024), peak_flops(self.gpu))
        assert share is not None  # a test checks every entry
        return share / self.gpus


TOKENS_10B = 19_073 * 524_288  # one epoch of FineWeb-Edu's 10B sample: build-nanogpt's number of steps

# within a GPU and kind, the software most similar to this package is first
# fmt: off
SPEEDS = (
    Speed("A100", 8, 3 * TOKENS_10B / ((10.86 - 3) * 3600), "eager", "build-nanogpt as shipped",
          "README of a learning-rate study: three runs in 10.86 h with 3 h idle; validation and HellaSwag included"),
    Speed("A100", 8, 1.1e6, "unknown", "a run based on build-nanogpt",
          "debtirthasaha.github.io/blog/2026/gpt2-124m: sustained; torch.compile not stated"),
    Speed("A100", 1, 16 * 1024 / 0.090, "compiled", "build-nanogpt in its lecture",
          'lecture "Let\'s reproduce GPT-2 (124M)": 90 ms for 16 × 1024 tokens'),
    Speed("A100", 8, 300e9 / (4 * 86_400), "compiled", "nanoGPT", "nanoGPT's README: 300B tokens in 4 days"),
    Speed("A100", 8, 524_288 / 0.300, "kernels", "llm.c", "llm.c's run_gpt2_124M.sh: about 300 ms for 524,288 tokens"),
    Speed("H100", 8, 8 * 468e3, "compiled", "modded-nanogpt, first record", "its log: 468k tokens/s on each of 8"),
    Speed("H200", 1, 490e3, "compiled", "modded-nanogpt, track 3",
          "log of 2026-05-17, torch 2.11, 64 × 1024 tokens"),
    Speed("L40S", 1, 106e3, "eager", "rsaketh002/gpt2-fineweb-edu",
          "its README: 4.9 s for 524,288 tokens; torch.compile not mentioned"),
    Speed("RTX 3090", 4, TOKENS_10B / (11 * 3600), "compiled", "PersonalRec/reproduce-gpt2",
          "results/230126: 19,073 steps in about 11 h, $7"),
    Speed("RTX 3090 Ti", 1, 69_163.8, "compiled", "a series of optimizations like build-nanogpt's",
          'README of "Build a GPT2 from Scratch": the last line of its table'),
    Speed("RTX 4090", 2, 220.7e3, "compiled", "llm.c's PyTorch trainer",
          "tylerromero.com/posts/nanogpt-speedrun-worklog: baseline, 2025-01-16"),
)
# fmt: on


def speeds_on(gpu: GPU, compiled: bool) -> list[Speed]:
    """Return all measurements on a GPU, most similar to the run first.

    Measurements of the same kind as the run, compiled or eager, come first; custom kernels come last.
    """
    found = [speed for speed in SPEEDS if speed.gpu == gpu.name]
    wanted = "compiled" if compiled else "eager"
    return sorted(found, key=lambda speed: (speed.kind != wanted, speed.kind == "kernels"))  # stable


def not_covered(config: RunConfig, gpu: GPU, gpus: int) -> str | None:
    """Return the reason why measurements of GPT-2 124M do not apply to a run; None if they apply."""
    m, T = config.model, config.sequence_length
    if m.n_embd < NARROWEST:
        return f"speeds are known for widths of at least {NARROWEST}, and this model has {m.n_embd}"
    if not SHORTEST <= T <= LONGEST:
        return f"speeds are known for sequences of {SHORTEST} to {LONGEST} tokens, and this run has {T}"
    if gpus > ONE_MACHINE:
        return f"speeds are known for at most {ONE_MACHINE} GPUs, in one machine"
    if config.precision not in ("auto", gpu.half):
        return f"speeds are known for {gpu.half}, and this run uses {config.precision}"
    if config.document_mask:
        return "speeds are known only without document masks, which the fastest attention kernels do not support"
    if config.parallel == "fsdp" and gpus > 1:
        return "speeds are known only for DDP; omit --parallel to see the time with DDP"
    return None


def tokens_per_second(speed: Speed, config: RunConfig, gpus: int) -> float:
    """Predict the tokens/s of a run on ``gpus`` GPUs from the MFU of a measurement.

    Gradient checkpointing repeats the forward pass, one third of the FLOPs of forward and backward.
    """
    peak = peak_flops(speed.gpu)
    assert peak is not None
    work = flops_per_token(config.model, config.sequence_length) * (4 / 3 if config.gradient_checkpointing else 1)
    return speed.mfu * peak * gpus / work
