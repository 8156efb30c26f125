"""How long the loss takes: ours against torch's on full logits, alternately in one run.

    python benchmarks/loss.py [--tokens 4096] [--width 256] [--rounds 5]

Three ways to the same loss and gradient in bf16: `F.cross_entropy` on all logits in fp32; ours with the softmax over
whole chunks of 1,024 tokens; ours as it is on a CPU, over blocks of 32 tokens that stay in cache. Prints the median
milliseconds of forward and backward together and the ratio to the last.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import restomod.train.loss as loss_module
from restomod.device import choose_dtype, describe_device, dtype_name

VOCAB_SIZE = 50257
PADDED = 50304
DTYPE = choose_dtype("auto", torch.device("cpu"))


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden.to(DTYPE) @ weight[:VOCAB_SIZE].to(DTYPE).t()).float(), targets)


def torchs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's own, in chunks as it chooses them. Its softmax is in the type of the products."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden.to(DTYPE), weight[:VOCAB_SIZE].to(DTYPE), targets, options=options)


def ours(block: int, compiled: bool = False) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        loss_module.SOFTMAX_TOKENS["cpu"] = block
        return loss_module.linear_cross_entropy(hidden, weight, targets, VOCAB_SIZE, DTYPE, compiled)

    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    hidden = torch.randn(arguments.tokens, arguments.width, requires_grad=True)
    weight = (0.02 * torch.randn(PADDED, arguments.width)).requires_grad_()
    targets = torch.randint(0, VOCAB_SIZE, (arguments.tokens,))
    ways = {
        "F.cross_entropy on full logits": full_logits,
        "F.linear_cross_entropy, chunked": torchs,
        "ours, whole chunks": ours(loss_module.CHUNK_TOKENS["cpu"]),
        "ours, blocks of 32": ours(32),
        "ours, compiled": ours(32, compiled=True),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for attempt in range(arguments.rounds + 1):
        for name, way in ways.items():
            hidden.grad = weight.grad = None
            start = time.perf_counter()
            way(hidden, weight, targets).backward()
            if attempt > 0:  # the first round warms up
                times[name].append(1000 * (time.perf_counter() - start))
    reference = statistics.median(times["ours, blocks of 32"])
    print(
        f"{describe_device(torch.device('cpu'))}, torch {torch.__version__}: {arguments.tokens} tokens, "
        f"width {arguments.width}, {dtype_name(DTYPE)}, median of {arguments.rounds}"
    )
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:<32} {median:7.0f} ms  ({min(values):.0f} to {max(values):.0f})  {median / reference:.2f}x")


if __name__ == "__main__":
    main()
