"""Published results to stand beside one's own. Each says whose number it is, and under which convention.

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
    task: str
    metric: str
    """As in `restomod.evals.scoring`, the nearest one."""
    value: float
    convention: str


GPT2, GPT3 = "GPT-2 124M", "GPT-3 125M"
LR_STUDY = "reproduction, lr 6e-4", "reproduction, lr 1.2e-3"
RTX3090, LLAMA = "reproduction, 4 × 3090", "reproduction, Llama's parts"  # one project's first run and its second

_BUILD_NANOGPT = "build-nanogpt's script, all 10,042"
_HARNESS = "lm-evaluation-harness, as build-nanogpt quotes it"
_GPT2_PAPER = "the GPT-2 paper: its own detokenizer, for accuracy a stop-word filter"
_GPT3_PAPER = "the GPT-3 paper: zero-shot, its own prompts, per token"

REFERENCES = (
    Reference(GPT2, "hellaswag", "acc", 0.2859, _BUILD_NANOGPT),
    Reference(GPT2, "hellaswag", "acc_token", 0.2955, _BUILD_NANOGPT),
    Reference(GPT2, "hellaswag-harness", "acc", 0.2892, _HARNESS),
    Reference(GPT2, "hellaswag-harness", "acc_norm", 0.3114, _HARNESS),
    Reference(GPT2, "lambada", "acc", 0.4599, _GPT2_PAPER),
    Reference(GPT2, "lambada", "perplexity", 35.13, _GPT2_PAPER),
    Reference(GPT3, "hellaswag", "acc_token", 0.337, _GPT3_PAPER),
    Reference(GPT3, "lambada", "acc", 0.427, _GPT3_PAPER),
    Reference(GPT3, "lambada", "perplexity", 18.6, _GPT3_PAPER),
    Reference(GPT3, "arc-easy", "acc_token", 0.436, _GPT3_PAPER),
    Reference(GPT3, "arc-challenge", "acc_token", 0.266, _GPT3_PAPER),
    Reference(GPT3, "piqa", "acc_token", 0.646, _GPT3_PAPER),
    Reference(GPT3, "winograd", "acc", 0.663, _GPT3_PAPER),
    Reference(GPT2, "validation", "loss", 3.2924, "FineWeb-Edu's validation shard, context 1024, build-nanogpt's plot"),
    Reference(RTX3090, "validation", "loss", 3.26, "the same shard; its README"),
    Reference(LLAMA, "validation", "loss", 2.99, "the same shard, two epochs; its README"),
    Reference(LR_STUDY[0], "validation", "loss", 3.0718, "the same shard; its README"),
    Reference(LR_STUDY[1], "validation", "loss", 3.0438, "the same shard; its README"),
    Reference(RTX3090, "hellaswag", "acc_token", 0.28, "build-nanogpt's script; its README"),
    Reference(LLAMA, "hellaswag", "acc_token", 0.32, "build-nanogpt's script, two epochs; its README"),
    Reference(LR_STUDY[0], "hellaswag", "acc_token", 0.3019, "build-nanogpt's script, 3032 of 10,042; its README"),
    Reference(LR_STUDY[1], "hellaswag", "acc_token", 0.3089, "build-nanogpt's script, 3102 of 10,042; its README"),
)


def references(task: str) -> list[Reference]:
    """What is published about a task."""
    return [reference for reference in REFERENCES if reference.task == task]
