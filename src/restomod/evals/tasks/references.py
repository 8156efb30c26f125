"""Published results to compare with: whose number it is, and under which convention.

Sources: the docstring of build-nanogpt's hellaswag.py, measured with OpenAI's checkpoint; Radford et al., "Language
Models are Unsupervised Multitask Learners", 2019, table 3 (GPT-2); Brown et al., "Language Models are Few-Shot
Learners", 2020, table H.1 (GPT-3); README files of public reproductions on FineWeb-Edu, 10B tokens.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reference:
    """One published number."""

    model: str
    metric: str
    """As in `restomod.evals.scoring`, the nearest one."""
    value: float
    convention: str


GPT2, GPT3 = "GPT-2 124M", "GPT-3 125M"
LR_STUDY = "reproduction, lr 6e-4", "reproduction, lr 1.2e-3"
RTX3090, LLAMA = "reproduction, 4 × 3090", "reproduction, Llama's parts"  # one project's first run and its second
GPT3_PAPER = "the GPT-3 paper: zero-shot, its own prompts, per token"

VALIDATION_LOSSES = (
    Reference(GPT2, "loss", 3.2924, "FineWeb-Edu's validation shard, context 1024, build-nanogpt's plot"),
    Reference(RTX3090, "loss", 3.26, "the same shard; its README"),
    Reference(LLAMA, "loss", 2.99, "the same shard, two epochs; its README"),
    Reference(LR_STUDY[0], "loss", 3.0718, "the same shard; its README"),
    Reference(LR_STUDY[1], "loss", 3.0438, "the same shard; its README"),
)
