from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from restomod.data.batches import Batches
from restomod.data.dataset import TokenStream
from restomod.data.prefetch import STEPS_AHEAD, MicroBatches, Prefetch
from restomod.utils.errors import UserError


class Watched(Batches):
    """Batches that note which steps were loaded, where, and that take their time."""

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


def test_what_comes_is_loaded_meanwhile_in_one_other_thread_and_nothing_beyond_the_last_step() -> None:
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


def test_waiting_is_hidden_behind_computing_and_what_is_left_is_told() -> None:
    with Prefetch(Watched(seconds=0.05), 2, 6) as data:
        first = data.get(0)[1]
        assert first > 0.04
        for step in range(1, 6):
            time.sleep(0.2)  # as long as a step computes
            assert data.get(step)[1] < 0.04


def test_what_goes_wrong_while_loading_is_raised_where_the_step_is_asked_for() -> None:
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
    """Otherwise every process of a machine makes a context on GPU 0."""
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
