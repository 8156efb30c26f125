"""Several ranks compute the results of one, average gradients once per step, and report an error once."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import signal
import socket
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from restomod.config.run import Parallel
from restomod.engine import barrier, distributed
from restomod.engine.distributed import SINGLE, Processes, device_of, distribute, join_processes, synchronised
from restomod.engine.gather import gather_full_model
from restomod.engine.lr_schedule import learning_rate
from restomod.engine.optimizer import build_optimizer
from restomod.engine.step import BatchLoss, ComputeConfig, train_step
from restomod.utils.errors import UserError
from tests.models import CPU
from tests.processes import error_lines, launch, member, results
from tests.trainee import Trainee, assert_identical, make_trainee

STEPS = 20
MICRO_BATCHES = (1, 2, 4)


def trainee(**changes: Any) -> Trainee:
    """Build a run with 16 sequences per step, which four ranks can share in micro-batches of four."""
    return make_trainee(**{"batch_tokens": 256, **changes})


# --- equality with a single process --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Course:
    """Results of a training in one rank."""

    numbers: Tensor
    """Loss and gradient norm of every step, (steps, 2)."""
    windows: list[list[int]]
    """Indices of the windows of each step."""
    gradients: dict[str, Tensor]
    """Clipped gradients of the first step."""
    weights: dict[str, Tensor]
    """Final weights."""


def plain_course() -> Course:
    """Train 20 steps in plain torch: one micro-batch, full logits, clipping and AdamW by their formulas."""
    t = trainee()
    o, parameters = t.config.optim, dict(t.model.named_parameters())
    means = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    numbers, windows, first = [], [], {}
    for step in range(STEPS):
        windows.append(t.batches.windows(step).tolist())
        tokens, targets = t.batches.load(t.batches.windows(step))
        loss = F.cross_entropy(t.model(tokens).flatten(0, 1), targets.flatten())
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        numbers.append([loss.item(), norm.item()])
        gradients = {name: g * min(1.0, o.grad_clip / norm.item()) for name, g in gradients.items()}
        first = first or gradients
        lr, n = learning_rate(o, step, t.config.steps), step + 1
        with torch.no_grad():
            for name, p in parameters.items():
                m, v = means[name]
                m.mul_(o.betas[0]).add_((1 - o.betas[0]) * gradients[name])
                v.mul_(o.betas[1]).add_((1 - o.betas[1]) * gradients[name] ** 2)
                p.mul_(1 - lr * (o.weight_decay if p.ndim >= 2 else 0.0))
                p.sub_(lr * (m / (1 - o.betas[0] ** n)) / ((v / (1 - o.betas[1] ** n)).sqrt() + o.eps))
    return Course(torch.tensor(numbers), windows, first, {name: p.detach() for name, p in parameters.items()})


def full(tensor: Tensor) -> Tensor:
    """Return a full copy of a tensor or DTensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def course(parallel: Parallel, micro_batch: int, processes: Processes) -> Course:
    """Train 20 steps in one of several ranks, with the code under test."""
    t = trainee()
    loss_of = distribute(
        BatchLoss(t.model, ComputeConfig(CPU, torch.float32, micro_batch)), t.model, parallel, processes
    )
    optimizer = build_optimizer(t.model, t.config.optim)
    gradients: dict[str, Tensor] = {}

    def keep_first(*_: object) -> None:
        for name, p in t.model.named_parameters():
            assert p.grad is not None
            gradients.setdefault(name, full(p.grad) / optimizer.parts[0].grad_scale)

    optimizer.parts[0].register_step_pre_hook(keep_first)
    numbers, windows = [], []
    load = t.batches.load

    def recorded(which: np.ndarray) -> tuple[Tensor, Tensor]:
        windows[-1].extend(which.tolist())
        return load(which)

    t.batches.load = recorded  # type: ignore[method-assign]
    for step in range(STEPS):
        windows.append([])
        batch = t.batches.micro_batches(step, micro_batch, processes.rank, processes.world_size)
        made = train_step(loss_of, optimizer, batch, t.config, step, processes).wait()
        numbers.append((made.loss, made.grad_norm))
    weights = {name: full(p) for name, p in t.model.named_parameters()}
    return Course(torch.tensor(numbers), windows, gradients, weights)


def courses(processes: Processes, parallel: Parallel) -> list[Course]:
    return [course(parallel, micro_batch, processes) for micro_batch in MICRO_BATCHES]


@pytest.fixture(scope="module")
def expected() -> Course:
    return plain_course()


@pytest.fixture(
    scope="module",
    params=[(1, "ddp"), (2, "ddp"), (4, "ddp"), (2, "fsdp"), pytest.param((4, "fsdp"), marks=pytest.mark.slow)],
    ids=lambda way: f"{way[0]}-{way[1]}",
)
def found(request: pytest.FixtureRequest) -> list[list[Course]]:
    """Return the results by rank and micro-batch size."""
    count, parallel = request.param
    return results(count, member, courses, parallel)


def without_key_bias(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove key biases: their true gradient is 0, and AdamW turns rounding errors into full steps."""
    return {n: torch.cat([p[:32], p[64:]]) if n.endswith("c_attn.bias") else p for n, p in weights.items()}


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> bool:
    assert a.keys() == b.keys()
    return all((a[n] - b[n]).norm() <= tolerance * b[n].norm() for n in b)


def test_losses_norms_gradients_and_weights_equal_plain_torch(found: list[list[Course]], expected: Course) -> None:
    assert expected.numbers[-1, 0] < expected.numbers[0, 0] - 0.1, "the loss has decreased"
    for ours in (c for rank in found for c in rank):
        assert ours.numbers.allclose(expected.numbers, rtol=1e-4, atol=0)
        assert close(without_key_bias(ours.gradients), without_key_bias(expected.gradients), 1e-4)
        assert close(without_key_bias(ours.weights), without_key_bias(expected.weights), 1e-3)


def test_all_ranks_have_equal_results(found: list[list[Course]]) -> None:
    first, *others = found
    for rank in others:
        for ours, theirs in zip(rank, first, strict=True):
            assert torch.equal(ours.numbers, theirs.numbers)
            assert_identical(ours.weights, theirs.weights)


def test_ranks_together_read_the_batches_of_one_process_in_order(found: list[list[Course]], expected: Course) -> None:
    for k in range(len(MICRO_BATCHES)):
        for step in range(STEPS):
            assert [w for rank in found for w in rank[k].windows[step]] == expected.windows[step]


# --- communication -------------------------------------------------------------------------------------------


def averaged(processes: Processes, parallel: Parallel) -> list[tuple[int, bool]]:
    """Return after each backward pass of a step the number of averaged gradients, and whether all ranks are equal."""
    t = trainee()
    loss_of = distribute(BatchLoss(t.model, ComputeConfig(CPU, torch.float32, 2)), t.model, parallel, processes)
    batch = t.batches.micro_batches(0, 2, processes.rank, processes.world_size)
    called = []
    if isinstance(loss_of, DistributedDataParallel):

        def counted(state, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations that are text
            called.extend(bucket.gradients())
            return allreduce_hook(dist.group.WORLD, bucket)

        loss_of.register_comm_hook(None, counted)
    found = []
    for i, (tokens, targets) in enumerate(batch):
        called.clear()
        with synchronised(loss_of, last=i + 1 == len(batch)):
            loss_of(tokens, targets).backward()
        gradients = [p.grad for p in t.model.parameters() if p.grad is not None]
        norms: list[Any] = [None] * processes.world_size
        dist.all_gather_object(norms, [full(g).norm().item() for g in gradients])
        found.append((len(gradients if parallel == "fsdp" else called), all(n == norms[0] for n in norms)))
    return found


@pytest.mark.parametrize(("parallel", "before_last"), [("ddp", (0, False)), ("fsdp", (0, True))])
def test_gradients_are_averaged_only_after_the_last_micro_batch(
    parallel: Parallel, before_last: tuple[int, bool]
) -> None:
    """FSDP2 has no visible gradients before they are averaged, so its ranks are equal then."""
    parameters = len(list(trainee().model.parameters()))
    for found in results(2, member, averaged, parallel):
        assert found == [*[before_last] * 3, (parameters, True)]


def elementary(processes: Processes) -> tuple[list[float], float, list[bool]]:
    flags = processes.any(processes.rank == 1, False)
    mean = processes.mean(torch.tensor(float(processes.rank)))
    return processes.sum(1.0, 2.0**-60 * processes.rank), mean.item(), flags


def test_sums_means_and_flags_are_equal_in_all_ranks() -> None:
    assert results(3, member, elementary) == [([3.0, 3 * 2.0**-60], 1.0, [True, False])] * 3


# --- errors of ranks -----------------------------------------------------------------------------------------


def fails(rank: int, error: type[BaseException]) -> None:
    if os.environ["RANK"] == str(rank):
        raise error(f"rank {rank} cannot")


def alone(processes: Processes, rank: int) -> None:
    processes.run_on_all_ranks(lambda: fails(rank, UserError))


def in_its_turn(processes: Processes, rank: int) -> None:
    processes.run_on_all_ranks(lambda: fails(rank, UserError), one_first=True)


def nested(processes: Processes, rank: int) -> None:
    processes.run_on_all_ranks(lambda: processes.run_on_all_ranks(lambda: fails(rank, UserError), one_first=True))


def thrice_nested(processes: Processes, rank: int) -> None:
    processes.run_on_all_ranks(lambda: nested(processes, rank))


def everywhere(processes: Processes, rank: int) -> None:
    def work() -> None:
        raise UserError("rank 0 cannot, and so say all")

    processes.run_on_all_ranks(work)


def known_everywhere(processes: Processes, rank: int) -> None:
    def work() -> None:
        raise processes.error("rank 0 cannot, which all know")

    processes.run_on_all_ranks(work)


def before_agreeing(processes: Processes, rank: int) -> None:
    """Fail in one rank while the others call a collective of torch itself."""

    def work() -> None:
        fails(rank, UserError)
        processes.agree()
        dist.broadcast(torch.ones(1000), src=0)

    processes.run_on_all_ranks(work)


def system_refuses(processes: Processes, rank: int) -> None:
    processes.run_on_all_ranks(lambda: fails(rank, OSError))


def outside(processes: Processes, rank: int) -> None:
    """Fail in one rank while the others wait in a collective."""
    fails(rank, UserError)
    processes.any(True)


def outside_everywhere(processes: Processes, rank: int) -> None:
    raise UserError("rank 0 cannot, nor the others")


@pytest.mark.parametrize("work", [alone, in_its_turn, nested, thrice_nested, before_agreeing, system_refuses, outside])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_error_in_one_rank_ends_all_with_one_line(work: Any, rank: int) -> None:
    ended = launch(3, member, work, rank, timeout=20)
    (line,) = error_lines(ended)
    assert f"rank {rank} cannot" in line
    assert [e.code for e in ended] == [2, 2, 2]


@pytest.mark.parametrize("work", [everywhere, known_everywhere, outside_everywhere])
def test_an_error_in_all_ranks_is_one_line(work: Any) -> None:
    ended = launch(3, member, work, 0, timeout=20)
    (line,) = error_lines(ended)
    assert "rank 0 cannot" in line
    assert [e.code for e in ended] == [2, 2, 2]


def turns(processes: Processes) -> tuple[float, float]:
    """Return the start and end of 0.1 s of work in this rank."""

    def work() -> tuple[float, float]:
        began = time.monotonic()
        time.sleep(0.1)
        return began, time.monotonic()

    return processes.run_on_all_ranks(work, one_first=True)


def test_one_first_runs_local_rank_0_before_the_others() -> None:
    (_, ended), *others = results(3, member, turns)
    assert all(ended <= began for began, _ in others)


def killed(processes: Processes) -> None:
    processes.any(True)
    if processes.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    processes.any(True)


def test_a_killed_rank_is_reported_by_one_of_the_others() -> None:
    ended = launch(3, member, killed, timeout=20)
    (line,) = error_lines(ended)
    assert "another process of this run was lost" in line
    assert line.endswith("; start all processes again")
    assert [e.code for e in ended] == [2, -signal.SIGKILL, 2]


def bug(processes: Processes) -> None:
    fails(1, ZeroDivisionError)
    processes.any(True)


def test_a_bug_in_one_rank_is_one_traceback() -> None:
    ended = launch(2, member, bug, timeout=20)
    assert "ZeroDivisionError: rank 1 cannot" in ended[1].error
    assert ended[0].error == ""
    assert [e.code for e in ended] == [2, 1]


def left_at_the_end(error: bool, cycle: bool) -> bool:
    """Return whether a DistributedDataParallel still exists when the process group is destroyed."""
    seen: list[weakref.ref[Any]] = []
    left = []
    destroy = dist.destroy_process_group

    def training(processes: Processes) -> None:
        t = trainee()
        loss_of = distribute(BatchLoss(t.model, ComputeConfig(CPU, torch.float32, 2)), t.model, "ddp", processes)
        seen.append(weakref.ref(loss_of))
        if cycle:
            loss_of.itself = [loss_of]  # type: ignore[assignment]
        if error:
            raise UserError("an error")

    def observed() -> None:
        left.append(seen[0]() is not None)
        destroy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "destroy_process_group", observed)
        try:
            with join_processes() as processes:
                training(processes)
        except UserError:
            assert error
    return left != [False]


@pytest.mark.parametrize(("error", "cycle"), [(False, False), (False, True), (True, False), (True, True)])
def test_ddp_modules_are_deleted_before_the_process_group(error: bool, cycle: bool) -> None:
    """A later deletion can deadlock: it waits for gloo's threads while it holds the interpreter's lock."""
    assert results(2, left_at_the_end, error, cycle) == [False, False]


def left(error: bool) -> list[str]:
    """Return the operations on the process group at the end."""
    done = []
    abort, destroy = dist.ProcessGroup.abort, dist.destroy_process_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist.ProcessGroup, "abort", lambda group: (done.append("abort"), abort(group)))
        patch.setattr(dist, "destroy_process_group", lambda: (done.append("destroy"), destroy()))
        with contextlib.suppress(UserError), join_processes():
            if error:
                raise UserError("an error")
    return done


@pytest.mark.parametrize(("error", "expected"), [(False, ["destroy"]), (True, ["abort", "destroy"])])
def test_after_an_error_nothing_waits_for_pending_operations(error: bool, expected: list[str]) -> None:
    """NCCL's destroy_process_group waits for pending operations, forever if a rank has failed."""
    assert results(2, left, error) == [expected, expected]


# --- a single process ----------------------------------------------------------------------------------------


def test_a_store_that_does_not_answer_is_a_quick_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # without listen()
        port = str(silent.getsockname()[1])
        environment = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        for name, value in {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(distributed, "CONNECTING", datetime.timedelta(seconds=1))
        began = time.monotonic()
        with (
            pytest.raises(UserError, match=f"cannot connect to the other processes at 127.0.0.1:{port}"),
            join_processes(),
        ):
            pass
    assert time.monotonic() - began < 30


def test_one_process_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_processes() as processes:
        assert processes == SINGLE
    assert processes.mean(torch.tensor(3.0)) == 3
    assert processes.sum(1.5, 2) == [1.5, 2]
    assert processes.any(True) == [True]
    assert processes.any(False) == [False]
    t = trainee()
    loss = BatchLoss(t.model, ComputeConfig(CPU, torch.float32, 2))
    assert distribute(loss, t.model, "ddp", processes) is loss
    assert gather_full_model(t.model) is t.model
    with pytest.raises(UserError, match="torchrun"):
        distribute(loss, t.model, "fsdp", processes)


def test_every_rank_has_one_gpu_and_too_many_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cuda = torch.device("cuda")
    assert device_of(CPU, Processes(3, 4, 3)) == CPU
    assert device_of(cuda, SINGLE) == cuda
    assert device_of(cuda, Processes(3, 4, 1)) == torch.device("cuda", 1)  # two machines of two
    with pytest.raises(UserError, match="--nproc-per-node 2"):
        device_of(cuda, Processes(2, 4, 2))


# --- barrier: one rank works, the others wait ----------------------------------------------------------------


@contextlib.contextmanager
def impatient(silence: float) -> Iterator[None]:
    """Set the time-out of collective operations to 3 s, and that of heartbeats to ``silence`` seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "PATIENCE", datetime.timedelta(seconds=3))
        patch.setattr(barrier, "HEARTBEAT_EVERY", 0.1)
        patch.setattr(barrier, "SILENCE", silence)
        yield


def slow_alone(rank: int, one_first: bool, work: str) -> list[Any]:
    """Work in one rank for longer than the time-out of collective operations."""

    def slow(processes: Processes) -> Any:
        if processes.rank == rank:
            time.sleep(4.5)
        return work

    with impatient(silence=60), join_processes() as processes:
        found = [processes.run_on_all_ranks(lambda: slow(processes), one_first)]
        if rank == 0:
            found.append(processes.from_main(lambda: slow(processes)))
        return [*found, processes.sum(processes.rank)]


@pytest.mark.parametrize(("rank", "one_first"), [pytest.param(0, True, marks=pytest.mark.slow), (1, False)])
def test_ranks_wait_for_a_working_rank_beyond_the_time_out(rank: int, one_first: bool) -> None:
    for found in results(3, slow_alone, rank, one_first, "work"):
        assert found == ["work"] * (2 if rank == 0 else 1) + [[3.0]]


def dies_alone(how: str) -> None:
    def work(processes: Processes) -> None:
        if processes.rank == 0:
            time.sleep(1)
            if how != "fault":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError("a fault")

    with impatient(silence=2 if how == "killed elsewhere" else 60), pytest.MonkeyPatch.context() as patch:
        if how == "killed elsewhere":  # on another machine, whose processes are not visible
            patch.setattr(barrier, "_is_dead", lambda process: False)
        member(together, work)


def together(processes: Processes, work: Any) -> None:
    processes.run_on_all_ranks(lambda: work(processes))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("killed", "rank 0 has ended"),
        ("killed elsewhere", "no heartbeat from rank 0"),
        ("fault", "ZeroDivisionError: a fault"),
    ],
)
def test_the_death_of_a_working_rank_is_reported_soon(how: str, said: str) -> None:
    began = time.monotonic()
    ended = launch(2, dies_alone, how, timeout=60)
    assert time.monotonic() - began < 30
    assert said in ended[0].error + ended[1].error
    assert ended[1].code == 2
    assert ("another process of this run was lost" in ended[1].error) == (how != "fault")
