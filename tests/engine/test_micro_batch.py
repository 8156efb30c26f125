"""Micro-batch and chunk sizes: memory, divisibility, and a first micro-batch that fails or is slow."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from restomod.config.run import ModelConfig, OptimConfig
from restomod.engine import loss
from restomod.engine import micro_batch as module
from restomod.engine.device import CHUNK_TOKENS, EVAL_TOKENS, scaled_tokens, tokens_on
from restomod.engine.distributed import SINGLE, Processes
from restomod.engine.micro_batch import (
    choose_micro_batch,
    first_micro_batch,
    fitting_micro_batch,
    next_smaller_divisor,
    sequences_that_fit,
    split_micro_batches,
)
from restomod.engine.step import BatchLoss, ComputeConfig, batch_loss
from restomod.model.gpt import GPT
from restomod.train.setup import make_ready
from restomod.utils.errors import UserError
from tests.models import CPU
from tests.trainee import Trainee, make_subject, make_trainee


@pytest.mark.parametrize("table", [CHUNK_TOKENS, EVAL_TOKENS])
def test_a_gpu_has_more_tokens_than_a_cpu_and_a_small_gpu_proportionally_fewer(table: dict[str, int]) -> None:
    full = scaled_tokens(table, "cuda", 80 * 10**9)
    assert full == scaled_tokens(table, "cuda", None) == scaled_tokens(table, "cuda", 24 * 10**9) == table["cuda"]
    assert full >= 8 * table["cpu"]
    sizes = [scaled_tokens(table, "cuda", gb * 10**9) for gb in (2, 6, 8, 12, 16, 24)]
    assert sizes == sorted(sizes)
    assert all(size % 1024 == 0 for size in sizes)
    assert full / 3 - 1024 < sizes[2] <= full / 3


def test_memory_affects_gpus_only() -> None:
    assert scaled_tokens(CHUNK_TOKENS, "cpu", 10**9) == CHUNK_TOKENS["cpu"]


def test_the_chunk_size_depends_on_the_memory_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 8 * 10**9

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert tokens_on(torch.device("cuda", 0), CHUNK_TOKENS) == scaled_tokens(CHUNK_TOKENS, "cuda", 8 * 10**9) < 16_384
    assert tokens_on(torch.device("cpu"), CHUNK_TOKENS) == CHUNK_TOKENS["cpu"]


@given(sequences=st.integers(1, 200), processes=st.integers(1, 40))
def test_proposals_for_an_uneven_batch_are_valid(sequences: int, processes: int) -> None:
    config = make_trainee(batch_tokens=16 * sequences).config
    if sequences % processes == 0:
        assert choose_micro_batch(config, CPU, processes) >= 1
        return
    with pytest.raises(UserError) as caught:
        choose_micro_batch(config, CPU, processes)
    said = str(caught.value)
    tokens = said.split("--batch-tokens ")[1].split(",")[0].split(" or ")
    numbers = said.split("start ")[1].removesuffix(" processes").split(" or ")
    for proposed in tokens:
        choose_micro_batch(make_trainee(batch_tokens=int(proposed)).config, CPU, processes)
    for proposed in numbers:
        choose_micro_batch(config, CPU, int(proposed))


def test_a_micro_batch_must_divide_the_share_of_each_rank() -> None:
    config = make_trainee(batch_tokens=16 * 24, micro_batch=8).config
    assert choose_micro_batch(config, CPU, 3) == 8
    with pytest.raises(UserError, match="the 12 sequences of a step per process; choose --micro-batch 6 or 12"):
        choose_micro_batch(config, CPU, 2)


@pytest.mark.parametrize("sequences", [1, 7, 12, 97, 512, 600])
@pytest.mark.parametrize("length", [16, 1024, 8192])
def test_the_chosen_micro_batch_divides_the_batch_and_fits(sequences: int, length: int) -> None:
    shape = ModelConfig(n_layer=1, n_head=2, n_embd=32, n_positions=length, vocab_size=97)
    config = make_trainee(model=shape, sequence_length=16).config
    config = dataclasses.replace(config, sequence_length=length, batch_tokens=sequences * length)
    fitting = [n for n in range(1, sequences + 1) if sequences % n == 0 and n * length <= 4096]
    assert choose_micro_batch(config, CPU) == max(fitting, default=1)


@given(fixed=st.integers(0, 10**9), each=st.integers(1, 10**9), room=st.integers(1, 10**11))
def test_memory_is_extrapolated_linearly_from_two_measurements(fixed: int, each: int, room: int) -> None:
    n = sequences_that_fit((2, fixed + 2 * each), (4, fixed + 4 * each), room)
    assert n >= 1
    assert n == 1 or fixed + n * each <= room
    assert fixed + (n + 1) * each > room


def test_any_number_fits_if_both_measurements_are_equal() -> None:
    assert sequences_that_fit((2, 100), (4, 100), 1e9) > 10**6
    assert sequences_that_fit((2, 100), (4, 90), 1e9) > 10**6
    assert sequences_that_fit((2, 100), (4, 100), 10) == 1


def test_a_gpu_gets_the_largest_divisor_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = make_subject()
    taken = {2: 1_000_000 + 2 * 50_000, 4: 1_000_000 + 4 * 50_000}
    current = [0]
    workspace = [10**9]  # bytes that cuBLAS allocates in the first pass

    def allocated(model: GPT, tokens: torch.Tensor, *rest: object) -> torch.Tensor:
        current[0] = len(tokens)
        return batch_loss(model, tokens, *rest)  # type: ignore[arg-type]

    def peak(device: torch.device) -> int:
        return 7 + taken[current[0]] + (workspace.pop() if workspace else 0)

    parameters = sum(p.numel() for p in GPT(ModelConfig(2, 2, 32, 16, 97)).parameters())
    state = 8 * parameters
    for name, function in {
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 7,
        "max_memory_allocated": peak,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device: (round((1_000_000 + 11 * 50_000) / 0.9) + 1 + state, 10**12),
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(module, "batch_loss", allocated)
    compute = ComputeConfig(CPU, torch.float32, 24, chunk=32)
    assert fitting_micro_batch(subject.model, subject.batches, compute, OptimConfig()) == 8  # 11 fit
    # chunks that two small micro-batches do not fill: the chunk is limited to the 384 tokens of 24 sequences
    for chunk in (384, 10**6):
        larger = dataclasses.replace(compute, chunk=chunk)
        assert fitting_micro_batch(subject.model, subject.batches, larger, OptimConfig()) == 6  # 7 fit
    # compiled chunks take twice the memory, because the gradient of the logits is a separate tensor
    compiled = dataclasses.replace(compute, chunk=32 + 176, compiled=True)
    assert fitting_micro_batch(subject.model, subject.batches, compiled, OptimConfig()) == 6
    assert all(p.grad is None for p in subject.model.parameters())


@pytest.mark.parametrize(("sequences", "sizes"), [(1, [1] * 8), (2, [2] * 4), (4, [4, 4]), (8, [4, 4])])
def test_split_micro_batches_contain_all_sequences(sequences: int, sizes: list[int]) -> None:
    batches = make_trainee().batches
    parts = split_micro_batches(batches.micro_batches(3, 4), sequences)
    assert [len(tokens) for tokens, _ in parts] == sizes
    (whole,) = batches.micro_batches(3, 8)
    assert torch.equal(torch.cat([tokens for tokens, _ in parts]), whole[0])
    assert torch.equal(torch.cat([targets for _, targets in parts]), whole[1])


@pytest.mark.parametrize(("sequences", "less"), [(2, 1), (3, 1), (12, 6), (15, 5), (64, 32)])
def test_the_next_smaller_size_divides_it(sequences: int, less: int) -> None:
    assert next_smaller_divisor(sequences) == less


# --- the first micro-batch ---------------------------------------------------------------------------------

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
    """Run the loss's softmax in eager mode, because its compilation takes ten seconds."""
    monkeypatch.setattr(loss, "_compiled_softmax", lambda: loss._softmax)


class PlantedLoss(BatchLoss):
    """Loss that calls ``before(call, sequences)`` first."""

    def __init__(self, trainee: Trainee, compute: ComputeConfig, before: Before) -> None:
        super().__init__(trainee.model, compute)
        self.before, self.calls = before, 0

    def forward(self, tokens: Tensor, targets: Tensor, *rest: Any) -> Tensor:
        self.calls += 1
        self.before(self.calls, len(tokens))
        return super().forward(tokens, targets, *rest)


def first(
    before: Before, compiled: bool = False, setting: str = "auto", processes: Processes = SINGLE
) -> tuple[PlantedLoss, float, ComputeConfig, list[str]]:
    """Run `first_micro_batch` for a run of eight sequences per step."""
    trainee = make_trainee(compile=setting)
    compute = ComputeConfig(CPU, torch.float32, 8, compiled)
    loss_of = PlantedLoss(trainee, compute, before)
    said: list[str] = []
    first = trainee.model, loss_of, trainee.batches, compute, trainee.config, 0, processes, said.append
    return loss_of, *first_micro_batch(*first), said


def raising(error: BaseException, above: int) -> Before:
    """Return a function that raises ``error`` for more than ``above`` sequences."""

    def before(call: int, sequences: int) -> None:
        if sequences > above:
            raise error

    return before


# --- time ----------------------------------------------------------------------------------------------------


def test_the_time_of_a_compiled_micro_batch_excludes_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG_MICRO_BATCH", 0.5)
    # warm-up, because the first call in a process is slow
    first(lambda call, n: None)
    loss_of, seconds, _, _ = first(lambda call, n: time.sleep(1.0 if call == 1 else 0.0), compiled=True)
    assert loss_of.calls == 2
    assert seconds < 0.5


@pytest.mark.parametrize(("long", "calls"), [(60.0, 2), (0.0, 1)])
def test_a_long_eager_micro_batch_is_not_repeated(long: float, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG_MICRO_BATCH", long)
    loss_of, *_ = first(lambda call, n: None)
    assert loss_of.calls == calls


def test_the_first_micro_batch_changes_neither_weights_nor_random_state() -> None:
    trainee = make_trainee()
    before, random_state = trainee.tensors(), torch.get_rng_state()
    compute = ComputeConfig(CPU, torch.float32, 8)
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
        "warning: out of memory with a micro-batch of 8; reduced to 4",
        "warning: out of memory with a micro-batch of 4; reduced to 2",
    ]


def test_out_of_memory_with_one_sequence_is_an_error() -> None:
    with pytest.raises(UserError, match=r"a micro-batch of 1 \(CUDA out of memory.*--gradient-checkpointing"):
        first(raising(torch.OutOfMemoryError("CUDA out of memory"), above=0))


def test_another_error_is_not_treated_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        first(raising(RuntimeError("shapes cannot be multiplied"), above=2))


@dataclasses.dataclass(frozen=True)
class OneOfTwo(Processes):
    """Ranks of which another one runs out of memory for each nonzero entry of ``left``."""

    left: list[int] = dataclasses.field(default_factory=list)

    def any(self, *flags: bool) -> list[bool]:
        elsewhere = bool(self.left) and bool(self.left.pop())
        return [flags[0] or elsewhere, *flags[1:]]


def test_all_ranks_halve_the_micro_batch() -> None:
    _, _, compute, _ = first(lambda call, n: None, processes=OneOfTwo(0, 2, 0, left=[1, 1]))
    assert compute.micro_batch == 2


# --- torch.compile -------------------------------------------------------------------------------------------


def no_compiler(call: int, sequences: int) -> None:
    if call == 1:
        raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no C compiler"), None)


def test_training_continues_in_eager_mode_if_torch_compile_fails() -> None:
    loss_of, _, compute, said = first(no_compiler, compiled=True)
    assert not compute.compiled
    assert not loss_of.compute.compiled
    assert loss_of.model.transformer._compiled_call_impl is None
    assert "no C compiler" in compute.compile_reason
    assert said[0].startswith("compiling the model")
    assert "no C compiler" in said[1]


def test_a_failure_of_torch_compile_with_compile_on_is_an_error() -> None:
    with pytest.raises(UserError, match=r"torch\.compile fails \(.*no C compiler.*--compile off"):
        first(no_compiler, compiled=True, setting="on")


def test_every_micro_batch_size_is_compiled_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default torch would compile for a dynamic size after halving, which is slower."""
    symbolic: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        symbolic.append(any(isinstance(x, torch.SymInt) for x in inputs))
        return graph.forward

    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile(self, backend=backend, **how))
    trainee = make_trainee(compile="on")
    compute = ComputeConfig(CPU, torch.float32, 8, compiled=True)
    torch._dynamo.reset()
    loss_of, _, compute = make_ready(trainee.model, trainee.batches, compute, trainee.config, SINGLE)
    for sequences in (8, 4, 2):
        loss_of(*trainee.batches.load(trainee.batches.windows(0)[:sequences]))
    torch._dynamo.reset()
    assert symbolic == [False, False, False]
