"""The first micro-batch: timed once it is compiled, halved where memory runs out, eager where nothing compiles."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from restomod.engine import loss
from restomod.engine import micro_batch as memory
from restomod.engine.distributed import SINGLE, Processes
from restomod.engine.micro_batch import first_micro_batch
from restomod.engine.step import BatchLoss, Compute
from restomod.train.setup import make_ready
from restomod.utils.errors import UserError
from tests.models import CPU
from tests.trainee import Trainee, make_trainee

MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory", 2),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.80 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:131] DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError(),
]
Before = Callable[[int, int], None]


@pytest.fixture(autouse=True)
def eager_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling the loss's softmax would take ten seconds, and is not what is tested."""
    monkeypatch.setattr(loss, "_compiled_softmax", lambda: loss._softmax)


class PlantedLoss(BatchLoss):
    """Calls ``before(call, sequences)`` before every loss."""

    def __init__(self, trainee: Trainee, compute: Compute, before: Before) -> None:
        super().__init__(trainee.model, compute)
        self.before, self.calls = before, 0

    def forward(self, tokens: Tensor, targets: Tensor, *rest: Any) -> Tensor:
        self.calls += 1
        self.before(self.calls, len(tokens))
        return super().forward(tokens, targets, *rest)


def first(
    before: Before, compiled: bool = False, setting: str = "auto", processes: Processes = SINGLE
) -> tuple[PlantedLoss, float, Compute, list[str]]:
    """The first micro-batch of a run of eight sequences a step."""
    trainee = make_trainee(compile=setting)
    compute = Compute(CPU, torch.float32, 8, compiled)
    loss_of = PlantedLoss(trainee, compute, before)
    said: list[str] = []
    first = trainee.model, loss_of, trainee.batches, compute, trainee.config, 0, processes, said.append
    return loss_of, *first_micro_batch(*first), said


def raising(error: BaseException, above: int) -> Before:
    """Raises ``error`` for more than so many sequences."""

    def before(call: int, sequences: int) -> None:
        if sequences > above:
            raise error

    return before


# --- time ----------------------------------------------------------------------------------------------------


def test_the_time_of_a_compiled_micro_batch_is_without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LONG_MICRO_BATCH", 0.5)
    # warm what the first call of all would be slow in
    first(lambda call, n: None)
    loss_of, seconds, _, _ = first(lambda call, n: time.sleep(1.0 if call == 1 else 0.0), compiled=True)
    assert loss_of.calls == 2
    assert seconds < 0.5


@pytest.mark.parametrize(("long", "calls"), [(60.0, 2), (0.0, 1)])
def test_a_long_one_that_is_not_compiled_is_not_repeated(
    long: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "LONG_MICRO_BATCH", long)
    loss_of, *_ = first(lambda call, n: None)
    assert loss_of.calls == calls


def test_it_changes_nothing() -> None:
    trainee = make_trainee()
    before, random_state = trainee.tensors(), torch.get_rng_state()
    compute = Compute(CPU, torch.float32, 8)
    loss_of = BatchLoss(trainee.model, compute)
    first_micro_batch(trainee.model, loss_of, trainee.batches, compute, trainee.config, 0, SINGLE, print)
    assert all(p.grad is None for p in trainee.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in trainee.tensors().items())
    assert torch.equal(torch.get_rng_state(), random_state)


# --- memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=lambda e: f"{type(e).__name__} {str(e)[:30]}")
def test_out_of_memory_halves_the_micro_batch_until_it_fits(error: BaseException) -> None:
    loss_of, seconds, compute, said = first(raising(error, above=2))
    assert compute.micro_batch == loss_of.compute.micro_batch == 2
    assert 0 < seconds < 60
    assert said == [
        "warning: out of memory with a micro-batch of 8: it is 4 from here on",
        "warning: out of memory with a micro-batch of 4: it is 2 from here on",
    ]


def test_where_not_one_sequence_fits_it_is_an_error() -> None:
    with pytest.raises(UserError, match=r"one sequence at once \(CUDA out of memory.*--recompute"):
        first(raising(torch.OutOfMemoryError("CUDA out of memory"), above=0))


def test_another_error_is_not_taken_for_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        first(raising(RuntimeError("shapes cannot be multiplied"), above=2))


@dataclasses.dataclass(frozen=True)
class OneOfTwo(Processes):
    """Another process runs out of memory as often as ``left`` has entries."""

    left: list[int] = dataclasses.field(default_factory=list)

    def any(self, *flags: bool) -> list[bool]:
        elsewhere = bool(self.left) and bool(self.left.pop())
        return [flags[0] or elsewhere, *flags[1:]]


def test_a_process_halves_with_the_others() -> None:
    _, _, compute, _ = first(lambda call, n: None, processes=OneOfTwo(0, 2, 0, left=[1, 1]))
    assert compute.micro_batch == 2


# --- the compiler --------------------------------------------------------------------------------------------


def no_compiler(call: int, sequences: int) -> None:
    if call == 1:
        raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no C compiler"), None)


def test_where_torch_compile_fails_the_model_is_run_without_it() -> None:
    loss_of, _, compute, said = first(no_compiler, compiled=True)
    assert not compute.compiled
    assert not loss_of.compute.compiled
    assert loss_of.model.transformer._compiled_call_impl is None
    assert "no C compiler" in compute.compile_reason
    assert said[0].startswith("compiling the model")
    assert "no C compiler" in said[1]


def test_where_it_was_asked_for_that_is_an_error() -> None:
    with pytest.raises(UserError, match=r"torch\.compile does not work here \(.*no C compiler.*leave --compile out"):
        first(no_compiler, compiled=True, setting="on")


def test_another_micro_batch_size_is_compiled_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """After halving, torch would by default compile for any size, which is slower."""
    symbolic: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        symbolic.append(any(isinstance(x, torch.SymInt) for x in inputs))
        return graph.forward

    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile(self, backend=backend, **how))
    trainee = make_trainee(compile="on")
    compute = Compute(CPU, torch.float32, 8, compiled=True)
    torch._dynamo.reset()
    loss_of, _, compute = make_ready(trainee.model, trainee.batches, compute, trainee.config, SINGLE)
    for sequences in (8, 4, 2):
        loss_of(*trainee.batches.load(trainee.batches.windows(0)[:sequences]))
    torch._dynamo.reset()
    assert symbolic == [False, False, False]
