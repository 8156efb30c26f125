"""One training step of GPT-2 124M: ours beside build-nanogpt's and nanoGPT's, in alternating rounds, on this CPU.

    python benchmarks/step_peers.py --peer build-nanogpt=PATH --peer nanogpt=PATH [--batch 16] [--length 64]

Every contender is a process of its own and does the same: forward, backward, clip to 1, AdamW, on the same tokens, with
50,304 embeddings. The peers' classes and optimizers are taken from their files as shipped; the lines of their loops are
repeated here (bf16 autocast in build-nanogpt's; fp32 on a CPU in nanoGPT's). Ours is `--precision auto --compile`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from restomod.memory import peak_resident_bytes

PADDED_VOCABULARY = 50304


def ours(path: str, x: torch.Tensor, y: torch.Tensor) -> Callable[[], float]:
    import dataclasses

    from restomod.device import choose_dtype, keep_freed_memory
    from restomod.model.gpt import build_model
    from restomod.presets import preset
    from restomod.train.distributed import SINGLE
    from restomod.train.optimizer import build_optimizer
    from restomod.train.step import BatchLoss, Compute, train_step

    cpu = torch.device("cpu")
    keep_freed_memory()  # as `restomod train` does
    config = dataclasses.replace(preset("gpt2-124m"), batch_tokens=x.numel(), sequence_length=x.shape[1])
    model = build_model(config.model, 1, cpu)
    model.transformer.compile()
    compute = Compute(cpu, choose_dtype("auto", cpu), len(x), compiled=True)
    loss_of, optimizer = BatchLoss(model, compute), build_optimizer(model, config.optim, compute.dtype)
    return lambda: train_step(loss_of, optimizer, [(x, y)], config, 1000, SINGLE).wait().loss


def definitions(path: Path) -> dict[str, Any]:
    """The imports, classes and functions of a script, without what it does."""
    kept = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, kept) and "hellaswag" not in ast.unparse(node)[:40]]
    module = type(sys)(path.stem)
    sys.modules[path.stem] = module
    exec(compile(tree, str(path), "exec"), module.__dict__)
    return module.__dict__


def build_nanogpt(path: str, x: torch.Tensor, y: torch.Tensor) -> Callable[[], float]:
    names = definitions(Path(path) / "train_gpt2.py")
    names["master_process"] = False
    torch.set_float32_matmul_precision("high")
    model = names["GPT"](names["GPTConfig"](vocab_size=PADDED_VOCABULARY))
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=6e-4, device_type="cpu")

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(device_type="cpu", dtype=torch.bfloat16):
            _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.item())

    return step


def nanogpt(path: str, x: torch.Tensor, y: torch.Tensor) -> Callable[[], float]:
    names = definitions(Path(path) / "model.py")
    config = names["GPTConfig"](block_size=1024, vocab_size=PADDED_VOCABULARY, dropout=0.0, bias=True)
    with contextlib.redirect_stdout(sys.stderr):
        model = names["GPT"](config)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")

    def step() -> float:
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return step


CONTENDERS = {"restomod": ours, "build-nanogpt": build_nanogpt, "nanogpt": nanogpt}


def contend(name: str, path: str, batch: int, length: int, threads: int, pipe: Connection) -> None:
    """Make a step whenever asked to, and answer with its seconds, the loss and the peak memory in bytes."""
    torch.set_num_threads(threads)
    tokens = torch.randint(50257, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    step = CONTENDERS[name](path, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    with contextlib.suppress(EOFError):  # the parent has ended
        while pipe.recv():
            start = time.perf_counter()
            loss = step()
            seconds = time.perf_counter() - start
            pipe.send((seconds, loss, peak_resident_bytes() or 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    paths = {"restomod": "", **dict(peer.split("=", 1) for peer in arguments.peer)}
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name, path in paths.items():
        pipes[name], theirs = context.Pipe()
        sizes = (arguments.batch, arguments.length, torch.get_num_threads())
        context.Process(target=contend, args=(name, path, *sizes, theirs), daemon=True).start()
    results: dict[str, list[tuple[float, float, int]]] = {name: [] for name in paths}
    for _ in range(1 + arguments.rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            results[name].append(pipe.recv())
    tokens = arguments.batch * arguments.length
    print(
        f"{arguments.batch} x {arguments.length} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for name, steps in results.items():
        times = [seconds for seconds, _, _ in steps[1:]]  # the first warms up
        middle = statistics.median(times)
        ratio = statistics.median(t / o[0] for t, o in zip(times, results["restomod"][1:], strict=True))
        print(
            f"{name:<14} {tokens / middle:7,.0f} tokens/s ({tokens / max(times):,.0f} to {tokens / min(times):,.0f})  "
            f"{ratio:5.2f}x our time  {steps[-1][2] / 1e9:.2f} GB  losses {steps[0][1]:.4f} {steps[-1][1]:.4f}"
        )


if __name__ == "__main__":
    main()
