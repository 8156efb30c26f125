"""Measured steps of two processes, compared with the predictions of `scale_network.py`.

The same two processes measure in alternating rounds: collectives of several sizes, the training step without
communication, and the step with DistributedDataParallel and with FSDP2. Both processes run the step without
communication at the same time, because they share caches and memory bandwidth. A barrier precedes every measurement,
and the slower process counts.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks import scale_network as model
from benchmarks.world import world
from restomod.bench.report import Spread
from restomod.config.run import ModelConfig, OptimConfig, RunConfig
from restomod.data.batches import Batches
from restomod.data.dataset import TokenStream
from restomod.engine.device import keep_freed_memory
from restomod.engine.distributed import SINGLE, Processes, distribute, join_processes
from restomod.engine.optimizer import build_optimizer
from restomod.engine.step import BatchLoss, ComputeConfig, train_step
from restomod.model.gpt import GPT, build_model
from restomod.utils.errors import UserError

COUNT = 2
CPU = torch.device("cpu")
COLLECTIVES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
"""Collectives, and their rounds through a ring."""
WAYS = ("alone", "ddp", "fsdp")
OVERLAP = 0.0  # on a CPU the same cores compute and communicate

Samples = dict[str, list[float]]
"""Seconds per round, by name of the measurement."""


@dataclass(frozen=True)
class Trial:
    """Settings of the measurement."""

    config: RunConfig
    """Run configuration."""
    micro_batches: tuple[int, ...]
    """Numbers of micro-batches per step."""
    sizes: tuple[int, ...]
    """Sizes of collectives in bytes."""
    rounds: int
    """Number of timed rounds."""
    steps: int
    """Steps of each kind per round, of which the median counts."""


def trial(smoke: bool) -> Trial:
    """Return settings with a small GPT-2 whose communication is at least 10 % of a step; a tiny one for ``smoke``."""
    layers, width, T = (2, 64, 32) if smoke else (4, 256, 128)
    shape = ModelConfig(n_layer=layers, n_head=4, n_embd=width, n_positions=T, vocab_size=4096)
    config = RunConfig(
        steps=1000, batch_tokens=8 * T, sequence_length=T, model=shape, optim=OptimConfig(lr=1e-4, warmup_steps=10)
    )
    sizes = tuple(2**k for k in (range(12, 21, 4) if smoke else range(12, 25, 2)))
    return Trial(config, (1,) if smoke else (1, 2), sizes, 2 if smoke else 7, 1 if smoke else 3)


def payload(shape: ModelConfig) -> model.Payload:
    """Return the bytes that a model of this shape communicates in fp32."""
    with torch.device("meta"):
        net = GPT(shape)
    sizes = [model.FP32 * p.numel() for p in net.parameters()]
    blocks = tuple(model.FP32 * sum(p.numel() for p in block.parameters()) for block in net.transformer.h)
    return model.Payload(blocks, sum(sizes) - sum(blocks), model.buckets(sizes[::-1]))


class StepRunner:
    """Training steps of one rank.

    Args:
        way: "alone" for no communication, "ddp" or "fsdp".
        count: micro-batches per step.
        config: run configuration.
        processes: ranks that share the batch.
    """

    def __init__(self, way: str, count: int, config: RunConfig, processes: Processes) -> None:
        self.config, self.processes, self.way = config, processes, way
        self.micro_batch = config.batch_sequences // processes.world_size // count
        text = np.random.default_rng(0).integers(config.model.vocab_size, size=100 * config.batch_tokens)
        stream = TokenStream([text.astype(np.uint16)])
        self.batches = Batches(stream, config.sequence_length, config.batch_sequences, config.seed)
        net = build_model(config.model, config.seed, CPU)
        self.run_on_all_ranks = SINGLE if way == "alone" else processes
        loss = BatchLoss(net, ComputeConfig(CPU, torch.float32, self.micro_batch))
        self.loss_of = distribute(loss, net, "fsdp" if way == "fsdp" else "ddp", self.run_on_all_ranks)
        self.optimizer = build_optimizer(net, config.optim, torch.float32, self.run_on_all_ranks)
        self.updating = 0.0
        update = self.optimizer.update
        self.optimizer.update = lambda *given: self._timed(update, *given)  # type: ignore[method-assign]
        self.step = 0

    def _timed(self, update: Callable[..., None], *given: Any) -> None:
        start = time.perf_counter()
        update(*given)
        self.updating = time.perf_counter() - start

    def take(self) -> None:
        """Make the next step as the training loop does."""
        micro = self.batches.micro_batches(self.step, self.micro_batch, self.processes.rank, self.processes.world_size)
        train_step(self.loss_of, self.optimizer, micro, self.config, self.step, self.run_on_all_ranks).wait()
        self.step += 1


def collective(kind: str, size: int) -> Callable[[], Any]:
    """Return a function that runs a collective; ``size`` is the bytes of the whole tensor."""
    whole = torch.ones(size // model.FP32)
    part = torch.ones(len(whole) // COUNT)
    if kind == "all_reduce":
        return lambda: dist.all_reduce(whole)
    if kind == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part)  # the function that FSDP2 calls
    return lambda: dist.reduce_scatter_tensor(part, whole)


def seconds_of(work: Callable[[], Any]) -> float:
    """Measure the seconds of ``work`` in this process, after a barrier."""
    dist.barrier()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rounds_of(given: Trial, processes: Processes) -> Samples:
    """Run all measurements in one process."""
    trainings = {f"{way} {m}": StepRunner(way, m, given.config, processes) for m in given.micro_batches for way in WAYS}
    exchanges = {f"{kind} {size}": collective(kind, size) for kind in COLLECTIVES for size in given.sizes}
    samples: Samples = {name: [] for name in (*trainings, *exchanges)}
    samples |= {f"update {m}": [] for m in given.micro_batches}
    for i in range(given.rounds + 1):  # the first warms up
        for name, contender in trainings.items():
            taken, updates = [], []
            for _ in range(given.steps):
                taken.append(max(processes.gather(seconds_of(contender.take))))
                updates.append(max(processes.gather(contender.updating)))
            if i:
                samples[name].append(statistics.median(taken))
                if contender.way == "alone":
                    samples[f"update {name.split()[1]}"].append(statistics.median(updates))
        for name, exchange in exchanges.items():
            taken = [max(processes.gather(seconds_of(exchange))) for _ in range(given.steps)]
            if i:
                samples[name].append(statistics.median(taken))
    return samples


def process(environment: dict[str, str], given: Trial, pipe: Connection) -> None:
    """Run one of the two processes and send its measurements to ``pipe``."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    keep_freed_memory()  # as `restomod train` does
    with join_processes() as processes:
        samples = rounds_of(given, processes)
    pipe.send(samples)


def measure(given: Trial) -> Samples:
    """Run the measurement in two processes.

    Raises:
        UserError: a process has failed and has printed the reason.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["restomod.data.batches", "restomod.engine.step"])
    _store, environments = world(COUNT)  # must exist until both have ended
    started, pipes = [], []
    for own in environments:
        ours, theirs = context.Pipe(duplex=False)
        started.append(context.Process(target=process, args=(own, given, theirs), daemon=True))
        started[-1].start()
        theirs.close()  # otherwise the pipe stays open after the process has ended
        pipes.append(ours)
    try:
        ours, _ = (pipe.recv() for pipe in pipes)  # both have the times of the slower process
        return ours
    except EOFError:
        raise UserError("a measuring process failed; see its message above") from None
    finally:
        for one in started:
            one.join(30)


def compared(given: Trial, samples: Samples) -> dict[str, Any]:
    """Compare measured steps with predicted steps.

    A prediction uses the compute time of the same round, so that other load on the machine in a round does not count as
    an error of the model. The network is fitted to all rounds.
    """
    networks = {}
    for kind, times in COLLECTIVES.items():
        medians = [statistics.median(samples[f"{kind} {size}"]) for size in given.sizes]
        networks[kind] = model.fit(given.sizes, medians, times, COUNT)
    load, rows = payload(given.config.model), []
    for m in given.micro_batches:
        alone, updates = samples[f"alone {m}"], samples[f"update {m}"]
        for way in WAYS[1:]:
            steps = []
            for whole, update in zip(alone, updates, strict=True):
                work = model.Work(m, (whole - update) / m, update)
                if way == "ddp":
                    steps.append(model.ddp(load, work, COUNT, networks["all_reduce"], OVERLAP))
                else:
                    args = (networks["all_reduce"], networks["all_gather"], networks["reduce_scatter"])
                    steps.append(model.fsdp(load, work, COUNT, *args, OVERLAP))
            measured = samples[f"{way} {m}"]
            errors = [100 * (step.seconds / t - 1) for step, t in zip(steps, measured, strict=True)]
            rows.append(
                {
                    "way": way,
                    "micro_batches": m,
                    "alone_seconds": Spread.of(alone).to_dict(),
                    "predicted_communication_seconds": steps[0].communication,
                    "predicted_seconds": Spread.of([step.seconds for step in steps]).to_dict(),
                    "measured_seconds": Spread.of(measured).to_dict(),
                    "error_percent": Spread.of(errors).to_dict(),
                }
            )
    return {
        "model": dataclasses.asdict(given.config.model),
        "batch_tokens": given.config.batch_tokens,
        "rounds": given.rounds,
        "steps": given.steps,
        "parameters_bytes": load.total,
        "overlap": OVERLAP,
        "networks": {k: {"latency": v.latency, "bandwidth": v.bandwidth} for k, v in networks.items()},
        "collectives": {k: Spread.of(v).to_dict() for k, v in samples.items() if k.split()[0] in COLLECTIVES},
        "rows": rows,
    }
