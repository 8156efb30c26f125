from __future__ import annotations

import threading
import time
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from restomod.data.batches import STEPS_AHEAD, Batches, MicroBatches, Prefetch, assign_sources, document_ids, permute
from restomod.data.dataset import TokenStream
from restomod.utils.errors import UserError

seeds = st.integers(0, 2**40)
epochs = st.integers(0, 1000)


def counting(n: int) -> TokenStream:
    """Return a stream in which token i has the value i."""
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


def test_the_order_depends_on_the_seed_and_the_epoch() -> None:
    orders = {tuple(Batches(counting(401), 4, 100, seed).windows(step)) for seed in (1, 2) for step in (0, 1)}
    assert len(orders) == 4


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
    with pytest.raises(UserError, match=f"the validation split has {tokens} tokens, fewer than --sequence-length 4"):
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
    x, y = Batches(TokenStream([np.array([50256, 32768], dtype=np.uint16)]), 1, 1, seed=1).load(np.array([0]))
    assert (x.item(), y.item()) == (50256, 32768)


def test_a_token_beyond_the_vocabulary_is_refused() -> None:
    batches = Batches(TokenStream([np.array([1, 2, 50257, 3, 4, 5], dtype=np.uint16)]), 1, 1, seed=1)
    batches.load(np.array([3]))
    with pytest.raises(UserError, match="the token 50257, but GPT-2's vocabulary ends at 50256"):
        batches.load(np.array([0, 1]))


def starts(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[int]:
    """Return the windows of ``batches`` over `counting`, in order, as indices from their first tokens."""
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


@given(n_windows=st.integers(1, 50), step=st.integers(0, 60), data=st.data())
def test_a_part_of_a_batch_is_that_of_the_whole(n_windows: int, step: int, data: st.DataObject) -> None:
    batches = Batches([counting(n_windows * 4 + 1)] * 2, 4, 12, seed=1, shares=[Fraction(1, 3), Fraction(2, 3)])
    start = data.draw(st.integers(0, 12))
    count = data.draw(st.integers(0, 12 - start))
    assert batches.windows(step, start, count).tolist() == batches.windows(step)[start : start + count].tolist()


def test_a_rank_orders_no_windows_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        "restomod.data.batches.permute", lambda index, *key: (asked.append(len(index)), permute(index, *key))[1]
    )
    Batches(counting(4001), 4, 512, seed=1).micro_batches(0, 1, rank=200, world_size=256)
    assert asked == [2]


def test_the_order_of_ten_billion_tokens_takes_little_memory() -> None:
    class Long(TokenStream):
        def __len__(self) -> int:
            return 10**13

    batches = Batches(Long([]), 1024, 512, seed=1)
    tracemalloc.start()
    batches.windows(9_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


# --- mixes --------------------------------------------------------------------------------------------------

weights = st.lists(st.integers(1, 1000), min_size=1, max_size=5)


def shares_of(parts: list[int]) -> list[Fraction]:
    return [Fraction(part, sum(parts)) for part in parts]


@given(parts=weights, n=st.integers(1, 400), start=st.integers(0, 10**12))
def test_after_any_number_of_sequences_each_source_has_had_its_share(parts: list[int], n: int, start: int) -> None:
    shares = shares_of(parts)
    source, index = assign_sources(np.arange(start, start + n), shares)
    for k, share in enumerate(shares):
        mine = index[source == k].tolist()
        assert mine == list(range(mine[0], mine[0] + len(mine))) if mine else True
        if mine:
            given_after = mine[-1] + 1
            last = start + int(np.flatnonzero(source == k)[-1]) + 1
            assert abs(given_after - share * last) < len(parts)


@given(parts=weights)
def test_dealing_begins_at_the_first_sequence_of_every_source(parts: list[int]) -> None:
    source, index = assign_sources(np.arange(3 * sum(parts)), shares_of(parts))
    assert np.bincount(source, minlength=len(parts)).tolist() == [3 * part for part in parts]
    for k in range(len(parts)):
        assert index[source == k].tolist() == list(range(3 * parts[k]))


@given(windows=st.lists(st.integers(1, 20), min_size=2, max_size=3), seed=seeds, data=st.data())
def test_each_source_of_a_mix_is_visited_in_epochs_of_its_own(
    windows: list[int], seed: int, data: st.DataObject
) -> None:
    parts = data.draw(st.lists(st.integers(1, 9), min_size=len(windows), max_size=len(windows)))
    streams = [counting(n * 4 + 1) for n in windows]
    batches = Batches(streams, 4, 6, seed, shares=shares_of(parts))
    seen = np.concatenate([batches.windows(step) for step in range(40)])
    first = np.cumsum([0, *windows])
    for k, n in enumerate(windows):
        mine = (seen[(seen >= first[k]) & (seen < first[k + 1])] - first[k]).tolist()
        for epoch in range(len(mine) // n):
            assert sorted(mine[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_a_mix_loads_each_window_from_its_source() -> None:
    a, b = (TokenStream([np.arange(n, n + 21, dtype=np.uint16)]) for n in (1000, 2000))
    batches = Batches([a, b], 4, 10, seed=1, shares=[Fraction(7, 10), Fraction(3, 10)])
    assert batches.n_windows == 10
    x, y = batches.load(np.array([0, 4, 5, 9]))
    assert x[:, 0].tolist() == [1000, 1016, 2000, 2016]
    assert y[:, 3].tolist() == [1004, 1020, 2004, 2020]
    for step in range(5):
        x, _ = batches.load(batches.windows(step))
        assert (x < 2000).all(dim=1).sum() == 7


def test_sources_of_equal_length_have_orders_of_their_own() -> None:
    batches = Batches([counting(401), counting(401)], 4, 200, seed=1, shares=[Fraction(1, 2)] * 2)
    windows = batches.windows(0)
    assert windows[windows < 100].tolist() != (windows[windows >= 100] - 100).tolist()


def test_a_source_of_a_mix_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(UserError, match="has 4 tokens, fewer than --sequence-length 4"):
        Batches([counting(9), counting(4)], 4, 2, seed=1, shares=[Fraction(1, 2)] * 2)


# --- documents ----------------------------------------------------------------------------------------------


def test_document_ids_change_at_every_separator() -> None:
    tokens = torch.tensor([[5, 50256, 7, 8, 50256, 50256], [50256, 1, 2, 3, 4, 5]])
    assert document_ids(tokens).tolist() == [[0, 1, 1, 1, 2, 3], [1, 1, 1, 1, 1, 1]]
    assert document_ids(tokens).dtype == torch.int32


# --- prefetching --------------------------------------------------------------------------------------------


class Watched(Batches):
    """Slow batches that record which steps were loaded in which thread."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(TokenStream([np.arange(401, dtype=np.uint16)]), 4, 8, seed=1)
        self.seconds = seconds
        self.loaded: list[int] = []
        self.threads: set[int] = set()

    def micro_batches(self, step: int, micro_batch: int, rank: int = 0, world_size: int = 1) -> MicroBatches:
        self.loaded.append(step)
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        if step == 7:
            raise UserError("step 7 cannot be loaded")
        return super().micro_batches(step, micro_batch, rank, world_size)


def same(a: MicroBatches, b: MicroBatches) -> bool:
    return len(a) == len(b) and all(
        torch.equal(p, q) for x, y in zip(a, b, strict=True) for p, q in zip(x, y, strict=True)
    )


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2)])
def test_every_step_gets_its_own_share_of_its_own_batch(rank: int, world_size: int) -> None:
    batches = Watched()
    with Prefetch(batches, 2, 7, rank, world_size) as data:
        for step in range(7):
            assert same(data.get(step)[0], Batches.micro_batches(batches, step, 2, rank, world_size))


def test_a_run_can_begin_anywhere_and_ask_in_any_order() -> None:
    batches = Watched()
    with Prefetch(batches, 2, 100) as data:
        for step in (40, 41, 12, 42, 99):
            assert same(data.get(step)[0], Batches.micro_batches(batches, step, 2))


def test_next_steps_are_prefetched_in_one_thread_up_to_the_last_step() -> None:
    batches = Watched()
    with Prefetch(batches, 2, 5) as data:
        data.get(0)
        deadline = time.monotonic() + 10
        while len(batches.loaded) < 1 + STEPS_AHEAD and time.monotonic() < deadline:
            time.sleep(0.001)
        assert batches.loaded == list(range(1 + STEPS_AHEAD))
        for step in range(1, 5):
            data.get(step)
    assert batches.loaded == [0, 1, 2, 3, 4]
    assert len(batches.threads) == 1
    assert threading.get_ident() not in batches.threads


def test_loading_overlaps_with_computing_and_the_wait_is_returned() -> None:
    with Prefetch(Watched(seconds=0.05), 2, 6) as data:
        first = data.get(0)[1]
        assert first > 0.04
        for step in range(1, 6):
            time.sleep(0.2)  # as long as a step computes
            assert data.get(step)[1] < 0.04


def test_an_error_while_loading_is_raised_by_get() -> None:
    with Prefetch(Watched(), 2, 20) as data:
        data.get(5)
        data.get(6)
        with pytest.raises(UserError, match="step 7 cannot be loaded"):
            data.get(7)
        data.get(8)


def test_nothing_is_loaded_after_closing() -> None:
    batches = Watched(seconds=0.05)
    with Prefetch(batches, 2, 100) as data:
        data.get(0)
    time.sleep(0.3)
    assert len(batches.loaded) <= 1 + STEPS_AHEAD


def test_pages_for_a_gpu_are_locked_in_a_thread_that_uses_that_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every process of a machine creates a context on GPU 0."""
    chosen: dict[int, object] = {}
    pinned: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.update({threading.get_ident(): device}))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(threading.get_ident()) or self)
    with Prefetch(Watched(), 2, 1, device=torch.device("cuda", 3)) as data:
        data.get(0)
    assert set(pinned) == set(chosen)
    assert list(chosen.values()) == [torch.device("cuda", 3)]


@pytest.mark.parametrize("device", [None, torch.device("cpu"), torch.device("mps")])
def test_without_a_gpu_no_pages_are_locked(device: torch.device | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(1) or self)
    with Prefetch(Watched(), 2, 3, device=device) as data:
        data.get(0)
    assert not pinned
