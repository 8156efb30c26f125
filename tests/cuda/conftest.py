"""Fixtures of GPU tests. Without a GPU they are skipped, or run on the CPU at small sizes with RESTOMOD_SMOKE=cpu."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from tests.cuda.common import REAL, SMOKE

if REAL:  # required by deterministic algorithms; cuBLAS reads it once, at its first matmul
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def needs_device() -> None:
    if not REAL and not SMOKE:
        pytest.skip("no CUDA device; RESTOMOD_SMOKE=cpu runs these tests on the CPU")


@pytest.fixture(autouse=True)
def clean_device() -> Iterator[None]:
    """Release memory, compiled code and process-wide settings after each test."""
    yield
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    if REAL:
        torch.cuda.set_sync_debug_mode("default")
        gc.collect()
        torch.cuda.empty_cache()
