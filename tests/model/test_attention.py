"""Choice of attention backends. The kernels themselves are tested in `tests/cuda`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from restomod.model import attention as module
from restomod.model.attention import BACKENDS, attention

CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH


def enabled() -> set[SDPBackend]:
    """Return the backends that torch may currently choose from."""
    switches = {
        CUDNN: torch.backends.cuda.cudnn_sdp_enabled,
        FLASH: torch.backends.cuda.flash_sdp_enabled,
        EFFICIENT: torch.backends.cuda.mem_efficient_sdp_enabled,
        MATH: torch.backends.cuda.math_sdp_enabled,
    }
    return {backend for backend, is_enabled in switches.items() if is_enabled()}


def on_cuda(queries: int, mask: bool, monkeypatch: pytest.MonkeyPatch) -> set[SDPBackend]:
    """Return the backends that `attention` enables for CUDA tensors with ``queries`` queries per sequence."""
    seen: list[set[SDPBackend]] = []
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: seen.append(enabled()))
        q: Any = SimpleNamespace(
            shape=(2, 12, queries, 64), device=torch.device("cuda"), dtype=torch.bfloat16, is_cuda=True
        )
        attention(q, q, q, causal=not mask, mask=torch.ones(1) if mask else None)
    assert len(seen) == 1
    return seen[0]


def test_training_may_use_all_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_cuda(64, False, monkeypatch) == {CUDNN, FLASH, EFFICIENT, MATH}


def test_training_uses_the_backends_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "training", [FLASH, MATH])
    assert on_cuda(64, False, monkeypatch) == {FLASH, MATH}


def test_training_with_a_mask_uses_neither_cudnn_nor_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_cuda(64, True, monkeypatch) == {EFFICIENT, MATH}


@pytest.mark.parametrize("queries", [1, 64])
@pytest.mark.parametrize("mask", [False, True])
def test_without_gradients_cudnn_is_not_used(queries: int, mask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        assert on_cuda(queries, mask, monkeypatch) == {FLASH, EFFICIENT, MATH}


def test_backends_are_restored_after_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    before = enabled()
    on_cuda(64, True, monkeypatch)
    assert enabled() == before


def test_a_compiled_graph_uses_the_chosen_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend must be part of the traced graph, without a graph break. On a CPU torch would choose flash."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        def keep(traced: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
            graphs.append(traced.code)
            return traced.forward

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, inputs)

    monkeypatch.setattr(module, "allowed_backends", lambda q, mask: [MATH])
    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    mask = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    torch._dynamo.reset()
    y = torch.compile(lambda q: attention(q, q, q, False, mask), backend=backend, fullgraph=True)(q)
    torch._dynamo.reset()
    expected = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    torch.testing.assert_close(y, expected)
    assert graphs
    assert "flash" not in graphs[0]
