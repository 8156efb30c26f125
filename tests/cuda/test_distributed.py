"""DDP and distributed Muon over NCCL (gloo on a CPU), with a process group of one rank."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from restomod.engine.distributed import Processes, distribute, synchronised
from restomod.engine.loss import HeadGradient
from restomod.engine.optimizer import build_optimizer
from restomod.engine.step import BatchLoss
from tests.cuda.common import (
    REAL,
    Trainee,
    assert_identical,
    compile_transformer,
    make_trainee,
    relative_errors,
    worst,
)

pytestmark = pytest.mark.cuda

ONE_OF_TWO = Processes(rank=0, world_size=2, local_rank=0)
"""Ranks that select the code for several ranks; the process group has one, so that every sum equals its argument."""


@pytest.fixture
def group() -> Iterator[None]:
    backend = "cpu:gloo,cuda:nccl" if REAL else "gloo"
    dist.init_process_group(backend, store=dist.TCPStore("127.0.0.1", 0, 1, is_master=True), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(run: Trainee, loss_of: torch.nn.Module) -> dict[str, Tensor]:
    """Compute the gradients of a step of two micro-batches, averaged after the last."""
    micro_batches, head_gradient = run.micro_batches(0), HeadGradient()
    for i, (tokens, targets) in enumerate(micro_batches):
        head_gradient.last = i + 1 == len(micro_batches)
        with synchronised(loss_of, head_gradient.last):
            (loss_of(tokens, targets, head_gradient) / len(micro_batches)).backward()
    found = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
    run.model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(
    ("family", "compiled"),
    [("gpt2-124m", False), ("speedrun-124m", False), ("gpt2-124m", True)],  # speedrun has an untied lm_head
    ids=["gpt2", "speedrun", "gpt2-compiled"],
)
def test_ddp_gradients_equal_those_of_a_single_process(family: str, compiled: bool, group: None) -> None:
    """The expected gradients are accumulated by autograd, without `HeadGradient`."""
    run = make_trainee(dtype=torch.float32, family=family, rows=16 if REAL else 8)
    for tokens, targets in run.micro_batches(0):
        (run.loss_of(tokens, targets) / 2).backward()
    alone = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
    run.model.zero_grad(set_to_none=True)
    if compiled:
        compile_transformer(run.model)
    compute = dataclasses.replace(run.compute, compiled=compiled and REAL)
    ddp = distribute(BatchLoss(run.model, compute), run.model, "ddp", ONE_OF_TWO)
    assert isinstance(ddp, DistributedDataParallel)
    for _ in range(2):  # the first backward pass rebuilds DDP's buckets
        errors = relative_errors(gradients(run, ddp), alone)
        print(f"\nDDP, compiled {compiled}: worst gradient {worst(errors)}")
        assert worst(errors)[1] < (1e-4 if compiled else 1e-5)
    del ddp


def test_distributed_muon_equals_muon(group: None) -> None:
    run = make_trainee("muon")
    other = copy.deepcopy(run.model)
    optim = run.config.optim
    optimizers = [
        build_optimizer(run.model, optim, torch.bfloat16),
        build_optimizer(other, optim, torch.bfloat16, ONE_OF_TWO),
    ]
    assert [part.distributed for part in (optimizers[0].parts[1], optimizers[1].parts[1])] == [False, True]  # type: ignore[union-attr]
    tokens, targets = run.micro_batches(0)[0]
    run.loss_of(tokens, targets).backward()
    for p, q in zip(run.model.parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        q.grad = p.grad.clone()
    one, no = torch.ones((), device=run.compute.device), torch.zeros((), dtype=torch.bool, device=run.compute.device)
    before = run.tensors()
    for optimizer in optimizers:
        optimizer.update(1.0, one, no)
    assert_identical(dict(other.named_parameters()), dict(run.model.named_parameters()))
    name = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(dict(other.named_parameters())[name], before[name])


def test_collectives_of_numbers_on_the_cpu_and_on_the_device(group: None) -> None:
    value = torch.tensor(3.0, device=make_trainee().compute.device)
    assert ONE_OF_TWO.mean(value).item() == 1.5  # the sum 3 of one rank, divided by world size 2
    assert value.item() == 3.0
    assert ONE_OF_TWO.sum(1.0, 2.0) == [1.0, 2.0]
    assert ONE_OF_TWO.least(7) == 7
