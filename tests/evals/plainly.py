"""Direct computation of scores: one row per continuation through `transformers`, from all its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from restomod.config.run import ModelConfig
from restomod.data.tokenizer import Tokenizer

SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=48)


@torch.no_grad()
def plain_score(model: Any, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """Return the log-likelihood in float64 and whether greedy decoding generates the continuation."""
    tokens = torch.tensor([*context, *continuation])
    logits = model(tokens[None, :-1]).logits[0].double()[len(context) - 1 :]  # (len(continuation), V)
    targets = tokens[len(context) :]
    total = logits.log_softmax(-1)[torch.arange(len(targets)), targets].sum().item()
    return total, bool((logits.argmax(-1) == targets).all())


def harness_split(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Encode a pair as TemplateLM._encode_pair and loglikelihood of lm-evaluation-harness 0.4.13 do."""
    if context == "":
        return [50256], tokenizer.encode(continuation).tolist()
    spaces = len(context) - len(context.rstrip())
    head, tail = context[: len(context) - spaces], context[len(context) - spaces :] + continuation
    whole = tokenizer.encode(head + tail).tolist()
    length = len(tokenizer.encode(head))
    return tokenizer.encode(head).tolist(), whole[length:]
