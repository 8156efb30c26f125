from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from restomod.config.run import ModelConfig, OptimConfig
from restomod.engine import micro_batch as memory
from restomod.engine.micro_batch import choose_micro_batch, cut, fitting_micro_batch, sequences_that_fit, smaller
from restomod.engine.step import Compute, batch_loss
from restomod.model.gpt import GPT
from restomod.utils.errors import UserError
from tests.models import CPU
from tests.trainee import make_subject, make_trainee


@given(sequences=st.integers(1, 200), processes=st.integers(1, 40))
def test_what_is_proposed_for_an_uneven_batch_is_even(sequences: int, processes: int) -> None:
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


def test_a_micro_batch_has_to_divide_what_each_process_has() -> None:
    config = make_trainee(batch_tokens=16 * 24, micro_batch=8).config
    assert choose_micro_batch(config, CPU, 3) == 8
    with pytest.raises(
        UserError, match="the 12 sequences of a step that each process has; choose --micro-batch 6 or 12"
    ):
        choose_micro_batch(config, CPU, 2)


def test_without_a_wish_it_is_what_is_fast_and_divides() -> None:
    config = make_trainee(batch_tokens=16 * 600).config
    assert choose_micro_batch(config, CPU) == 200  # 4,096 tokens are 256 sequences
    assert choose_micro_batch(config, CPU, 2) == 150


@given(fixed=st.integers(0, 10**9), each=st.integers(1, 10**9), room=st.integers(1, 10**11))
def test_as_many_fit_as_the_line_through_two_measurements_says(fixed: int, each: int, room: int) -> None:
    n = sequences_that_fit((2, fixed + 2 * each), (4, fixed + 4 * each), room)
    assert n >= 1
    assert n == 1 or fixed + n * each <= room
    assert fixed + (n + 1) * each > room


def test_where_both_numbers_take_the_same_any_number_fits() -> None:
    assert sequences_that_fit((2, 100), (4, 100), 1e9) > 10**6
    assert sequences_that_fit((2, 100), (4, 90), 1e9) > 10**6
    assert sequences_that_fit((2, 100), (4, 100), 10) == 1


def test_a_gpu_gets_the_largest_divisor_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = make_subject()
    taken = {2: 1_000_000 + 2 * 50_000, 4: 1_000_000 + 4 * 50_000}
    current = [0]
    workspace = [10**9]  # that cuBLAS takes once, from the same memory

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
    monkeypatch.setattr(memory, "batch_loss", allocated)
    compute = Compute(CPU, torch.float32, 24, chunk=32)
    assert fitting_micro_batch(subject.model, subject.batches, compute, OptimConfig()) == 8  # 11 fit
    # chunks of the loss that two small micro-batches do not fill: 352 tokens more, all of the 24 sequences
    for chunk in (384, 10**6):
        larger = dataclasses.replace(compute, chunk=chunk)
        assert fitting_micro_batch(subject.model, subject.batches, larger, OptimConfig()) == 6  # 7 fit
    # half as many when compiled: the logits' gradient is another tensor
    compiled = dataclasses.replace(compute, chunk=32 + 176, compiled=True)
    assert fitting_micro_batch(subject.model, subject.batches, compiled, OptimConfig()) == 6
    assert all(p.grad is None for p in subject.model.parameters())


@pytest.mark.parametrize(("sequences", "sizes"), [(1, [1] * 8), (2, [2] * 4), (4, [4, 4]), (8, [4, 4])])
def test_a_batch_is_cut_and_nothing_is_lost(sequences: int, sizes: list[int]) -> None:
    batches = make_trainee().batches
    parts = cut(batches.micro_batches(3, 4), sequences)
    assert [len(tokens) for tokens, _ in parts] == sizes
    (whole,) = batches.micro_batches(3, 8)
    assert torch.equal(torch.cat([tokens for tokens, _ in parts]), whole[0])
    assert torch.equal(torch.cat([targets for _, targets in parts]), whole[1])


@pytest.mark.parametrize(("sequences", "less"), [(2, 1), (3, 1), (12, 6), (15, 5), (64, 32)])
def test_the_next_smaller_size_divides_it(sequences: int, less: int) -> None:
    assert smaller(sequences) == less
