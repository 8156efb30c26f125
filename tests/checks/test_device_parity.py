"""Device parity finds faults in kernels, and accepts rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from restomod.checks import device_parity as parity
from restomod.checks.device_parity import Differences, device_parity, parity_errors
from restomod.cli import main
from restomod.model import attention
from tests.models import CPU

ATTENTION = "_scaled_dot_product_flash_attention_for_cpu.default"
ATTENTION_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward.default"


class WrongKernel(TorchDispatchMode):
    """Alters the result of one kernel, except in fp64, the dtype of the reference."""

    def __init__(self, kernel: str, alter: Callable[[Any], Any]) -> None:
        super().__init__()
        self.kernel, self.alter, self.calls = kernel, alter, 0

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = f(*args, **(kwargs or {}))
        tensors = [x for x in args if isinstance(x, Tensor)]
        if f.__name__ == self.kernel and tensors[0].dtype != torch.float64:
            self.calls += 1
            return self.alter(result)
        return result


def first(alter: Callable[[Tensor], Tensor]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Apply ``alter`` to the first of several results."""
    return lambda results: (alter(results[0]), *results[1:])


FAULTS = {
    "attention 2 % too large": (ATTENTION, first(lambda y: y * 1.02)),
    "attention of another head": (ATTENTION, first(lambda y: y.flip(1))),
    "attention that is not a number": (ATTENTION, first(lambda y: y * float("nan"))),
    "a gradient of attention that is lost": (ATTENTION_BACKWARD, first(torch.zeros_like)),
    "a GELU without its tail": ("gelu.default", lambda y: y.clamp(min=0)),
    "a GELU's gradient 10 % off": ("gelu_backward.default", lambda y: y * 1.1),
    "a norm 10 % too small": ("native_layer_norm.default", first(lambda y: y * 0.9)),
    "an embedding's gradient lost": ("embedding_dense_backward.default", torch.zeros_like),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(3))
def test_rounding_passes_with_room(dtype: torch.dtype, seed: int) -> None:
    found = parity_errors(CPU, dtype, seed)
    assert 0 < found.loss < parity.LOSS_TOLERANCE[dtype] / 4
    assert 0 < found.gradients[found.worst] < parity.GRADIENT_TOLERANCE[dtype] / 3


def test_every_parameter_is_compared() -> None:
    assert len(parity_errors(CPU, torch.float32).gradients) == len(list(parity.random_model(parity.SHAPE).parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sound_device_passes(dtype: torch.dtype) -> None:
    verdict = device_parity(CPU, dtype)
    assert (verdict.check, verdict.status) == ("parity", "pass")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_found_in_fp32(fault: str) -> None:
    with WrongKernel(*FAULTS[fault]) as planted:
        verdict = device_parity(CPU, torch.float32)
    assert planted.calls
    assert verdict.status == "fail"
    assert "another torch release, or --device cpu" in verdict.reason


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if "2 %" not in fault])
def test_a_wrong_kernel_is_found_in_bf16(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "PLAIN_ATTENTION_TOKENS", 0)
    with WrongKernel(*FAULTS[fault]):
        verdict = device_parity(CPU, torch.bfloat16)
    assert verdict.status == "fail"
    assert verdict.reason.endswith("use --precision fp32")


def test_a_wrong_softmax_of_the_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = torch.Tensor.exp_
    monkeypatch.setattr(torch.Tensor, "exp_", lambda self: sound(self).mul_(1.02))
    assert device_parity(CPU, torch.float32).status == "fail"


def test_a_gradient_that_is_missing_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = parity.loss_gradients

    def without_positions(model: Any, loss: Tensor) -> dict[str, Tensor]:
        found = sound(model, loss)
        return found if loss.dtype == torch.float64 else {n: g for n, g in found.items() if "wpe" not in n}

    monkeypatch.setattr(parity, "loss_gradients", without_positions)
    found = parity_errors(CPU, torch.float32)
    assert (found.worst, found.gradients["transformer.wpe.weight"]) == ("transformer.wpe.weight", pytest.approx(1))
    assert device_parity(CPU, torch.float32).status == "fail"


def test_nan_is_the_worst_difference() -> None:
    assert Differences(0.0, {"a": 0.5, "b": float("nan"), "c": 0.7}).worst == "b"


# --- before training ----------------------------------------------------------------------------------------

TRAIN = (
    *("train", "quickstart", "--data.source", "text", "--data.path", "text.txt", "--data.val-fraction", "0"),
    *("--sequence-length", "64", "--batch-tokens", "256", "--model.n-layer", "1", "--model.n-head", "2"),
    *("--model.n-embd", "32", "--steps", "1", "--device", "cpu", "--precision", "fp32", "--sampling.max-tokens", "2"),
)


@contextmanager
def wrong_attention() -> Iterator[None]:
    with WrongKernel(*FAULTS["attention of another head"]):
        yield


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("A text that is long enough to be trained on.\n" * 200)
    return tmp_path


def test_mps_is_checked_before_training() -> None:
    assert {"mps"} == parity.CHECKED_BEFORE_TRAINING


def test_training_on_a_device_that_computes_wrongly_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("restomod.train.setup.CHECKED_BEFORE_TRAINING", {"cpu"})
    with wrong_attention():
        assert main([*TRAIN]) == 2
    error = capsys.readouterr().err
    assert error.startswith("restomod: error: this device computes wrong results: cpu in fp32, ")
    assert error.count("\n") == 1
    assert not (here / "runs").exists()
    with wrong_attention():
        assert main([*TRAIN, "--no-sanity-checks", "--out", "unchecked"]) == 0


def test_a_resumed_run_is_checked_too(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("restomod.train.setup.CHECKED_BEFORE_TRAINING", {"cpu"})
    assert main([*TRAIN]) == 0
    with wrong_attention():
        assert main(["train", "--resume", "runs/quickstart", "--steps", "2"]) == 2
    assert "this device computes wrong results" in capsys.readouterr().err


def test_training_on_a_cpu_is_not_checked(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("restomod.train.setup.device_parity", lambda *_: pytest.fail("the CPU was checked"))
    assert main([*TRAIN]) == 0
