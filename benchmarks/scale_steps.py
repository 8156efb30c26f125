"""Measured steps of two processes, compared with the predictions of `scale_network.py`.

Everything is measured in the same two processes, in alternating rounds: collectives of several sizes; the training step
without any communication, in both at once, because they share the caches and the memory's bandwidth; and the step with
DistributedDataParallel and with FSDP2. Before every measurement the processes wait for each other; a measurement is
that of the slower one.
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
"""Rounds of each through a ring."""
WAYS = ("alone", "ddp", "fsdp")
OVERLAP = 0.0  # on a CPU the sending, the copying and the adding are done by the cores that compute

Samples = dict[str, list[float]]
"""Seconds by what was measured, a number for each round."""


@dataclass(frozen=True)
class Trial:
    """Settings of the measurement."""

    config: RunConfig
    micro_batches: tuple[int, ...]
    sizes: tuple[int, ...]
    """Sizes of collectives, in bytes."""
    rounds: int
    steps: int
    """Steps of each kind per round; their median counts."""


def trial(smoke: bool) -> Trial:
    """A small GPT-2 whose gradients take a tenth of a step or more to exchange; with ``smoke`` a tiny one."""
    layers, width, T = (2, 64, 32) if smoke else (4, 256, 128)
    shape = ModelConfig(n_layer=layers, n_head=4, n_embd=width, n_positions=T, vocab_size=4096)
    config = RunConfig(
        steps=1000, batch_tokens=8 * T, sequence_length=T, model=shape, optim=OptimConfig(lr=1e-4, warmup_steps=10)
    )
    sizes = tuple(2**k for k in (range(12, 21, 4) if smoke else range(12, 25, 2)))
    return Trial(config, (1,) if smoke else (1, 2), sizes, 2 if smoke else 7, 1 if smoke else 3)


def payload(shape: ModelConfig) -> model.Payload:
    """Bytes that a model of this shape communicates, in fp32."""
    with torch.device("meta"):
        net = GPT(shape)
    sizes = [model.FP32 * p.numel() for p in net.parameters()]
    blocks = tuple(model.FP32 * sum(p.numel() for p in block.parameters()) for block in net.transformer.h)
    return model.Payload(blocks, sum(sizes) - sum(blocks), model.buckets(sizes[::-1]))


class StepRunner:
    """A training in one process of two, and its next steps."""

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
        """Make a step, as the training loop does."""
        micro = self.batches.micro_batches(self.step, self.micro_batch, self.processes.rank, self.processes.world_size)
        train_step(self.loss_of, self.optimizer, micro, self.config, self.step, self.run_on_all_ranks).wait()
        self.step += 1


def collective(kind: str, size: int) -> Callable[[], Any]:
    """A collective of ``size`` bytes: of all that an all-gather ends with, or that a reduce-scatter begins with."""
    whole = torch.ones(size // model.FP32)
    part = torch.ones(len(whole) // COUNT)
    if kind == "all_reduce":
        return lambda: dist.all_reduce(whole)
    if kind == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part)  # as FSDP2 does; newer names exist
    return lambda: dist.reduce_scatter_tensor(part, whole)


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds in this process, after both have come here."""
    dist.barrier()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rounds_of(given: Trial, processes: Processes) -> Samples:
    """All measurements of one process."""
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
    """One of the two; the target of a new process."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    keep_freed_memory()  # as `restomod train` does
    with join_processes() as processes:
        samples = rounds_of(given, processes)
    pipe.send(samples)


def measure(given: Trial) -> Samples:
    """Run the trial in two processes.

    Raises:
        UserError: one of them has failed; it has said why.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["restomod.data.batches", "restomod.engine.step"])
    _store, environments = world(COUNT)  # kept until both have ended
    started, pipes = [], []
    for own in environments:
        ours, theirs = context.Pipe(duplex=False)
        started.append(context.Process(target=process, args=(own, given, theirs), daemon=True))
        started[-1].start()
        theirs.close()  # or its end would not be noticed here
        pipes.append(ours)
    try:
        ours, _ = (pipe.recv() for pipe in pipes)  # both have the times of the slower one
        return ours
    except EOFError:
        raise UserError("a process of the measured steps has failed; its message is above") from None
    finally:
        for one in started:
            one.join(30)


def compared(given: Trial, samples: Samples) -> dict[str, Any]:
    """Measured steps beside predicted ones, and what the predictions are made of.

    The compute of a prediction is that of its own round, so that what else a machine does in one round does not
    become an error of the model; the network is that of all rounds.
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
