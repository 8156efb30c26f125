"""Flags that several commands share: dataclasses that tyro turns into flags. A field's docstring is its help text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from restomod.commands.parsing import refuse_ignored
from restomod.config.run import Device, Precision, RunConfig, SamplingConfig, require_seed

IGNORED_BY_GREEDY = {"--top-k": "with --temperature 0", "--top-p": "with --temperature 0"}


@dataclass(frozen=True)
class ConfigArguments:
    config: Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class DeviceArguments:
    device: Device = "auto"
    """Device to compute on. auto: CUDA, else MPS, else CPU."""
    precision: Precision = "auto"
    """Compute dtype of matmuls. auto: bf16 if supported in hardware, else fp16 on a GPU that has it, else fp32."""


@dataclass(frozen=True, kw_only=True)
class ModelArguments(DeviceArguments):
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run (its newest checkpoint is used), a model folder, or a name on the Hugging Face hub, such as gpt2."""


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(DeviceArguments):
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue. The flag may be repeated. <|endoftext|> in the text becomes that token: a new document."""
    prompt_file: str | None = None
    """Text file (UTF-8) with one prompt per line. Blank lines are skipped."""
    max_tokens: int = 100
    """Length of each continuation, in tokens."""
    temperature: float = 0.8
    """Sampling temperature: below 1 sharpens the distribution, above 1 flattens it, 0 is greedy decoding."""
    top_k: int = 50
    """Sample from this many most likely tokens (0: all)."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens whose probabilities add up to this value (1: all)."""
    seed: int = 1337
    """Random seed. The text of a prompt depends on the seed, and not on the other prompts."""

    def settings(self, arguments: list[str]) -> SamplingConfig:
        """Return the sampling settings; raises UserError for a value out of range, or a flag without effect."""
        refuse_ignored(arguments, IGNORED_BY_GREEDY if self.temperature == 0 else {})
        require_seed("--seed", self.seed)
        return SamplingConfig(
            max_tokens=self.max_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
        )
