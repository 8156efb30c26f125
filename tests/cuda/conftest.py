"""Where these tests run: on a GPU where there is one; with RESTOMOD_SMOKE=cpu on the CPU, at small sizes; else not."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from tests.cuda.common import REAL, SMOKE

if REAL:  # cuBLAS reads it once, at its first product; without it deterministic algorithms refuse to run
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def needs_device() -> None:
    if not REAL and not SMOKE:
        pytest.skip("no CUDA device here; RESTOMOD_SMOKE=cpu tries the tests' logic on the CPU")


@pytest.fixture(autouse=True)
def clean_device() -> Iterator[None]:
    """Leave no memory, compiled code or process-wide setting to the next test."""
    yield
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    if REAL:
        torch.cuda.set_sync_debug_mode("default")
        gc.collect()
        torch.cuda.empty_cache()
