"""Flags that several commands share: dataclasses for tyro. The docstring of a field is the help text of its flag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from restomod.commands.parsing import refuse_ignored
from restomod.config.run import Device, Precision, RunConfig, SamplingConfig, require_seed

IGNORED_BY_GREEDY = {"--top-k": "with --temperature 0", "--top-p": "with --temperature 0"}


@dataclass(frozen=True)
class ConfigArguments:
    """All settings of a run as flags."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class DeviceArguments:
    """Flags for device and precision."""

    device: Device = "auto"
    """Device to use. auto: CUDA, else MPS, else CPU."""
    precision: Precision = "auto"
    """Compute dtype of matmuls. auto: bf16 if the hardware supports it, else fp16 on a GPU that supports it, else
    fp32."""


@dataclass(frozen=True, kw_only=True)
class ModelArguments(DeviceArguments):
    """Flags for a trained model and its device."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run (newest checkpoint), model folder, or name on the Hugging Face hub such as gpt2."""


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(DeviceArguments):
    """Flags for text generation."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Prompt to continue. <|endoftext|> in a prompt starts a new document."""
    prompt_file: str | None = None
    """Text file (UTF-8) with one prompt per line; blank lines are skipped. None: no file."""
    max_tokens: int = 100
    """Tokens to generate per prompt."""
    temperature: float = 0.8
    """Sampling temperature: below 1 sharpens the distribution, above 1 flattens it, 0 is greedy decoding."""
    top_k: int = 50
    """Number of most likely tokens to sample from (0: all)."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the smallest set of most likely tokens whose total probability is at least this
    value (1: all tokens)."""
    seed: int = 1337
    """Random seed. The text of a prompt depends on the seed but not on the other prompts."""

    def settings(self, arguments: list[str]) -> SamplingConfig:
        """Return the sampling settings.

        Args:
            arguments: command line, for the check of flags without effect.

        Raises:
            UserError: a value is out of range, or a flag has no effect.
        """
        refuse_ignored(arguments, IGNORED_BY_GREEDY if self.temperature == 0 else {})
        require_seed("--seed", self.seed)
        return SamplingConfig(
            max_tokens=self.max_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
        )
