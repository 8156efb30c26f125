"""Times, for the doctor, the quickstart's loss and its gradient in CPU seconds, as usual and with freed memory kept.

A process of its own, because the setting cannot be taken back. glibc maps large tensors anew for every use, and the
system fills them with zeros page by page.
"""

from __future__ import annotations

import ctypes
import json
import time

import torch

from restomod.presets import quickstart
from restomod.train.loss import linear_cross_entropy

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
REPETITIONS = 4


def loss_seconds() -> float:
    """CPU seconds of a loss of a step's tokens: the least of several."""
    config = quickstart()
    D, V = config.model.n_embd, config.model.vocab_size
    hidden = torch.randn(config.batch_tokens, D, requires_grad=True)
    weight = torch.randn(config.model.padded_vocab_size, D).mul_(0.02).requires_grad_()
    targets = torch.randint(V, (config.batch_tokens,))
    seconds = []
    for _ in range(REPETITIONS):
        start = time.process_time()
        linear_cross_entropy(hidden, weight, targets, V, torch.float32).backward()
        hidden.grad = weight.grad = None
        seconds.append(time.process_time() - start)
    return min(seconds)


def main() -> None:
    """Print {"usual": seconds, "kept": seconds}. Fails where there is no glibc."""
    torch.set_num_threads(1)
    usual = loss_seconds()
    mallopt = ctypes.CDLL(None).mallopt
    if not (mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1)):
        raise RuntimeError("mallopt refuses")
    print(json.dumps({"usual": usual, "kept": loss_seconds()}))


if __name__ == "__main__":
    main()
