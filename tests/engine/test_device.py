"""Choice of device, compute dtype and compilation; names of devices; settings of memory."""

from __future__ import annotations

import io
import platform
import subprocess
import sys

import pytest
import torch

import restomod.engine.device
from restomod.config.run import Precision
from restomod.engine.device import (
    autocast,
    choose_compile,
    choose_device,
    choose_dtype,
    describe_device,
    dtype_name,
    keep_freed_memory,
    torch_release,
)
from restomod.utils.errors import UserError, is_out_of_memory
from restomod.utils.text import counted

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


def pretend(monkeypatch: pytest.MonkeyPatch, cuda: bool = False, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def pretend_cpuinfo(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    def open_cpuinfo(path: str) -> io.StringIO:
        assert path == "/proc/cpuinfo"
        if text is None:
            raise FileNotFoundError(path)
        return io.StringIO(text)

    monkeypatch.setattr(restomod.engine.device, "open", open_cpuinfo, raising=False)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_cuda_then_mps_then_the_cpu(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
) -> None:
    pretend(monkeypatch, cuda, mps)
    assert choose_device("auto") == torch.device(expected)


def test_an_available_device_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=True, mps=True)
    assert [choose_device(name) for name in ("cpu", "cuda", "mps")] == [CPU, CUDA, MPS]


def test_an_unavailable_device_is_refused_with_the_available_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, mps=True)
    with pytest.raises(UserError, match=r"device 'cuda' is not available \(available: mps, cpu\)"):
        choose_device("cuda")


@pytest.mark.parametrize("device", [CPU, CUDA, MPS])
def test_a_given_precision_is_used(device: torch.device) -> None:
    assert choose_dtype("fp32", device) == torch.float32
    assert choose_dtype("bf16", device) == torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((6, 1), torch.float32),  # Pascal
        ((7, 5), torch.float16),  # Turing
        ((8, 0), torch.bfloat16),  # Ampere
        ((9, 0), torch.bfloat16),  # Hopper
    ],
)
def test_auto_is_a_fast_dtype_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype("auto", CUDA) == expected


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f avx512_bf16\n", torch.bfloat16),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16\n", torch.float32),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512_bf16 amx_bf16\n", torch.bfloat16),
        ("processor : 0\nflags\t\t: fpu amx_bf16 amx_tile\n", torch.bfloat16),
        ("processor : 0\nflags\t\t: fpu avx2 avx512f\n", torch.float32),
        ("processor : 0\nBogoMIPS : 48.00\n", torch.float32),
        (None, torch.float32),
    ],
)
def test_auto_is_bf16_on_processors_with_fast_bf16(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str | None, expected: torch.dtype
) -> None:
    pretend_cpuinfo(monkeypatch, cpuinfo)
    assert choose_dtype("auto", CPU) == expected


def test_auto_is_fp32_on_mps() -> None:
    assert choose_dtype("auto", MPS) == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_autocast_computes_matmuls_in_the_given_dtype(precision: Precision) -> None:
    dtype = choose_dtype(precision, CPU)
    weight = torch.ones(2, 2)
    with autocast(CPU, dtype):
        assert (weight @ weight).dtype == dtype
    assert weight.dtype == (weight @ weight).dtype == torch.float32


def test_dtype_names_are_values_of_the_precision_flag() -> None:
    assert [dtype_name(dtype) for dtype in (torch.float32, torch.bfloat16)] == ["fp32", "bf16"]


def test_a_processor_is_described_by_its_model_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cpuinfo(monkeypatch, "processor : 0\nmodel name\t: Abacus 9: Turbo\nprocessor : 1\nmodel name\t: Other\n")
    assert describe_device(CPU) == f"Abacus 9: Turbo, {counted(torch.get_num_threads(), 'thread')}"


def test_a_processor_without_cpuinfo_is_described_by_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cpuinfo(monkeypatch, None)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert describe_device(CPU) == f"arm64, {counted(torch.get_num_threads(), 'thread')}"


def test_a_gpu_is_described_by_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert describe_device(CUDA) == "NVIDIA H100 80GB HBM3"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_freed_memory_is_reused() -> None:
    program = """
import resource, torch
from restomod.engine.device import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(5_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
usual = faults()
keep_freed_memory()
faults()
print(usual, faults())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    usual, kept = map(int, done.stdout.split())
    assert usual > 3_000
    assert kept < 1_000


def test_keeping_freed_memory_is_a_no_op_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: None) -> None:
        raise OSError

    monkeypatch.setattr(restomod.engine.device.ctypes, "CDLL", refuse)
    keep_freed_memory()


# --- compiling ------------------------------------------------------------------------------------------------


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Simulate a machine with everything that torch.compile needs for CUDA."""
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(restomod.engine.device.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(restomod.engine.device.Path, "exists", lambda path: True)
    monkeypatch.delenv("CC", raising=False)
    return monkeypatch


def test_auto_compiles_on_cuda_only(complete: pytest.MonkeyPatch) -> None:
    assert choose_compile("auto", CUDA)[0]
    for device in (CPU, MPS):
        on, why = choose_compile("auto", device)
        assert not on
        assert "on CUDA only" in why


@pytest.mark.parametrize("device", [CPU, CUDA, MPS])
def test_compilation_can_be_switched_on_and_off(device: torch.device) -> None:
    assert choose_compile("on", device) == (True, "--compile on")
    assert choose_compile("off", device) == (False, "--compile off")


@pytest.mark.parametrize(
    ("missing", "said"), [("triton", "pip install triton"), ("cc", "install gcc"), ("Python.h", "python3-dev")]
)
def test_auto_is_off_without_a_compiler_and_names_what_is_missing(
    complete: pytest.MonkeyPatch, missing: str, said: str
) -> None:
    if missing == "triton":
        complete.setattr("torch.utils._triton.has_triton", lambda: False)
    if missing == "cc":
        complete.setattr(restomod.engine.device.shutil, "which", lambda name: None)
    if missing == "Python.h":
        complete.setattr(restomod.engine.device.Path, "exists", lambda path: path.name != "Python.h")
    on, why = choose_compile("auto", CUDA)
    assert not on
    assert said in why


@pytest.mark.parametrize(
    ("release", "environment", "off"),
    [
        ((2, 9), None, False),
        ((2, 11), None, True),
        ((2, 14), None, True),
        ((2, 15), None, False),
        ((2, 11), "1", False),
    ],
)
def test_wrong_reductions_are_disabled_in_affected_releases(
    release: tuple[int, int], environment: str | None, off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(restomod.engine.device, "torch_release", lambda: release)
    monkeypatch.delenv(restomod.engine.device.REDUCTIONS, raising=False)
    if environment is not None:
        monkeypatch.setenv(restomod.engine.device.REDUCTIONS, environment)
    with inductor.patch({"triton.mix_order_reduction": True}):
        assert restomod.engine.device.avoid_wrong_reductions() == off
        assert inductor.triton.mix_order_reduction != off


def test_the_release_of_torch() -> None:
    assert f"{torch_release()[0]}.{torch_release()[1]}." in torch.__version__


# --- memory ---------------------------------------------------------------------------------------------------


def test_an_error_caused_by_out_of_memory_is_recognised() -> None:
    """`tests/engine/test_micro_batch.py` tests each kind of error."""
    error = RuntimeError("compiled code failed")
    assert not is_out_of_memory(error)
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(error)
    assert not is_out_of_memory(ValueError("CUDA out of memory"))
