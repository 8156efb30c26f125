"""What is checked and measured on the first micro-batch, before the first step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from torch import Tensor, nn

INITIAL_LOSS_TOLERANCE = 0.3  # nats around ln(vocab_size) within which GPT-2's initialisation lies
INITIAL_LOSS_TOKENS = 4096  # fewer, and a few repeated words move the mean
REPEAT_BELOW_SECONDS = 20.0


def time_micro_batch(model: nn.Module, micro_batch_loss: Callable[[], Tensor]) -> float:
    """Seconds of one micro-batch forward and backward; a quick one runs twice, to warm up. Changes nothing."""
    for attempt in range(2):
        start = time.perf_counter()
        loss = micro_batch_loss()
        loss.backward()
        model.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        seconds = time.perf_counter() - start
        if attempt == 0 and seconds > REPEAT_BELOW_SECONDS:
            break
    return seconds


def initial_loss_verdict(loss: float, vocab_size: int) -> str:
    """One line: is the loss of untrained weights that of guessing evenly among the vocabulary, ln(V)?"""
    expected = math.log(vocab_size)
    if abs(loss - expected) <= INITIAL_LOSS_TOLERANCE:
        return f"initial loss {loss:.2f} ≈ ln({vocab_size}) = {expected:.2f}: as it should be for random weights"
    return (
        f"warning: initial loss {loss:.2f}, but random weights should give ln({vocab_size}) = {expected:.2f} "
        f"(± {INITIAL_LOSS_TOLERANCE}): the model's initialisation or the data is unusual"
    )
