from __future__ import annotations

import pytest
import torch

from restomod.engine.chunk_sizes import CHUNK_TOKENS, EVAL_TOKENS, tokens_at_once
from restomod.engine.micro_batch import choose_chunk


@pytest.mark.parametrize("table", [CHUNK_TOKENS, EVAL_TOKENS])
def test_a_gpu_computes_more_at_once_than_a_cpu_and_a_small_one_proportionally_less(table: dict[str, int]) -> None:
    full = tokens_at_once(table, "cuda", 80 * 10**9)
    assert full == tokens_at_once(table, "cuda") == tokens_at_once(table, "cuda", 24 * 10**9) == table["cuda"]
    assert full >= 8 * table["cpu"]
    sizes = [tokens_at_once(table, "cuda", gb * 10**9) for gb in (2, 6, 8, 12, 16, 24)]
    assert sizes == sorted(sizes)
    assert all(size % 1024 == 0 for size in sizes)
    assert full / 3 - 1024 < sizes[2] <= full / 3


def test_memory_matters_on_gpus_alone() -> None:
    assert tokens_at_once(CHUNK_TOKENS, "cpu", 10**9) == CHUNK_TOKENS["cpu"]


def test_a_runs_chunk_follows_from_the_size_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 8 * 10**9

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert choose_chunk(torch.device("cuda", 0)) == tokens_at_once(CHUNK_TOKENS, "cuda", 8 * 10**9) < 16_384
    assert choose_chunk(torch.device("cpu")) == CHUNK_TOKENS["cpu"]
