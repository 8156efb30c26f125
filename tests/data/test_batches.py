from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from restomod.data.batches import Batches, permute
from restomod.data.shards import TokenStream
from restomod.errors import UserError

seeds = st.integers(0, 2**40)
epochs = st.integers(0, 1000)


def counting(n: int) -> TokenStream:
    """A stream in which token i is i."""
    return TokenStream([np.arange(n, dtype=np.uint16)])


# --- the permutation ----------------------------------------------------------------------------------------


@given(n=st.integers(1, 3000), seed=seeds, epoch=epochs)
def test_permute_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    permuted = permute(np.arange(n), n, seed, epoch)
    assert np.array_equal(np.sort(permuted), np.arange(n))
    assert permuted.dtype == np.int64


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 4**8 - 1, 4**8, 4**8 + 1])
def test_permute_is_a_bijection_around_the_powers_of_four(n: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, 1, 2)), np.arange(n))


@pytest.mark.parametrize("n", [2**31 - 1, 2**32 + 1, 2**40 + 7, 2**53 + 1, 2**62 + 3])
def test_permute_of_a_huge_range_stays_inside_it_and_repeats_nothing(n: int) -> None:
    ends = np.concatenate([np.arange(5000), n - 1 - np.arange(5000)])
    permuted = permute(ends, n, 1, 2)
    assert permuted.min() >= 0
    assert permuted.max() < n
    assert len(np.unique(permuted)) == len(ends)


@given(n=st.integers(1, 10**12), seed=seeds, epoch=epochs, data=st.data())
def test_each_index_is_permuted_independently_of_those_asked_with_it(
    n: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5)))
    together = permute(index, n, seed, epoch)
    assert together.tolist() == [int(permute(index[i : i + 1], n, seed, epoch)[0]) for i in range(len(index))]


def test_permute_leaves_its_argument_alone() -> None:
    index = np.arange(10, dtype=np.uint64)
    permute(index, 10, 1, 2)
    assert index.tolist() == list(range(10))


@pytest.mark.parametrize("vary", ["seed", "epoch"])
@pytest.mark.parametrize("n", [7, 16])
def test_every_index_goes_everywhere_equally_often(n: int, vary: str) -> None:
    trials = 1500
    counts = np.zeros((n, n))
    for i in range(trials):
        counts[np.arange(n), permute(np.arange(n), n, *((i, 0) if vary == "seed" else (0, i)))] += 1
    chi_square = ((counts - trials / n) ** 2 / (trials / n)).sum() * (n - 1) / n
    freedom = (n - 1) ** 2  # mean of chi-square, whose variance is twice that
    assert abs(chi_square - freedom) < 6 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [10_000, 16_384])
def test_neighbours_do_not_stay_together(n: int) -> None:
    permuted = permute(np.arange(n), n, 0, 0)
    assert abs(np.corrcoef(np.arange(n), permuted)[0, 1]) < 5 / np.sqrt(n)
    assert abs(np.corrcoef(permuted[:-1], permuted[1:])[0, 1]) < 5 / np.sqrt(n)
    assert (np.abs(np.diff(permuted)) == 1).sum() < 20  # 2 are expected


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = {tuple(permute(np.arange(50), 50, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


# --- windows ------------------------------------------------------------------------------------------------


@given(n_windows=st.integers(1, 50), batch_sequences=st.integers(1, 120), seed=seeds)
def test_every_epoch_visits_every_window_once(n_windows: int, batch_sequences: int, seed: int) -> None:
    batches = Batches(counting(n_windows * 4 + 1), 4, batch_sequences, seed)
    steps = -(-3 * n_windows // batch_sequences)
    visited = np.concatenate([batches.windows(step) for step in range(steps)])
    for epoch in range(3):
        part = visited[epoch * n_windows : (epoch + 1) * n_windows]
        assert sorted(part.tolist()) == list(range(n_windows))


def test_epochs_have_different_orders() -> None:
    batches = Batches(counting(401), 4, 100, seed=1)
    assert batches.windows(0).tolist() != batches.windows(1).tolist()


def test_the_order_depends_on_the_seed() -> None:
    orders = [Batches(counting(401), 4, 100, seed).windows(0).tolist() for seed in (1, 2)]
    assert orders[0] != orders[1]


def test_a_step_needs_nothing_from_the_steps_before_it() -> None:
    started, resumed = (Batches(counting(401), 4, 30, seed=1) for _ in range(2))
    run = [started.windows(step).tolist() for step in range(9)]
    assert [resumed.windows(step).tolist() for step in (8, 3, 5)] == [run[8], run[3], run[5]]


def test_the_order_draws_on_no_global_random_state() -> None:
    orders = []
    for seed in (1, 2):
        np.random.seed(seed)
        torch.manual_seed(seed)
        orders.append(Batches(counting(401), 4, 100, seed=1).windows(0).tolist())
    assert orders[0] == orders[1]


@pytest.mark.parametrize(("tokens", "T", "n_windows"), [(5, 4, 1), (8, 4, 1), (9, 4, 2), (12, 4, 2), (13, 4, 3)])
def test_the_last_token_is_only_a_target(tokens: int, T: int, n_windows: int) -> None:
    assert Batches(counting(tokens), T, 1, seed=1).n_windows == n_windows


@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_a_text_shorter_than_a_window_and_its_target_is_refused(tokens: int) -> None:
    stream = counting(tokens) if tokens else TokenStream([])
    with pytest.raises(UserError, match=f"the validation text has {tokens} tokens, fewer than a window of 4"):
        Batches(stream, 4, 1, seed=1, split="validation")


# --- batches ------------------------------------------------------------------------------------------------


def test_windows_are_consecutive_tokens_and_their_targets_one_ahead() -> None:
    x, y = Batches(counting(41), 4, 1, seed=1).load(np.array([3, 0, 9]))
    assert x.tolist() == [[12, 13, 14, 15], [0, 1, 2, 3], [36, 37, 38, 39]]
    assert y.tolist() == [[13, 14, 15, 16], [1, 2, 3, 4], [37, 38, 39, 40]]
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous()
    assert y.is_contiguous()


def test_large_token_ids_stay_positive() -> None:
    x, y = Batches(TokenStream([np.array([50256, 65535], dtype=np.uint16)]), 1, 1, seed=1).load(np.array([0]))
    assert (x.item(), y.item()) == (50256, 65535)


def starts(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[int]:
    """The windows of ``batches`` over `counting`, by the first token of each, in order."""
    return [first // 4 for x, _ in batches for first in x[:, 0].tolist()]


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 6, 12])
def test_micro_batches_together_are_the_batch(micro_batch: int) -> None:
    batches = Batches(counting(41), 4, 12, seed=1)
    parts = batches.micro_batches(2, micro_batch)
    assert [len(x) for x, _ in parts] == [micro_batch] * (12 // micro_batch)
    x, y = batches.load(batches.windows(2))
    assert torch.equal(torch.cat([x for x, _ in parts]), x)
    assert torch.equal(torch.cat([y for _, y in parts]), y)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_ranks_together_are_the_batch_in_order(world_size: int, micro_batch: int) -> None:
    batches = Batches(counting(41), 4, 12, seed=1)
    shares = [starts(batches.micro_batches(2, micro_batch, rank, world_size)) for rank in range(world_size)]
    assert [len(share) for share in shares] == [12 // world_size] * world_size
    assert [window for share in shares for window in share] == batches.windows(2).tolist()
