from __future__ import annotations

import io
import platform
import subprocess
import sys

import pytest
import torch

import restomod.device
from restomod.config import Precision
from restomod.device import autocast, choose_device, choose_dtype, describe_device, dtype_name, keep_freed_memory
from restomod.errors import UserError

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

    monkeypatch.setattr(restomod.device, "open", open_cpuinfo, raising=False)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_cuda_then_mps_then_the_cpu(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
) -> None:
    pretend(monkeypatch, cuda, mps)
    assert choose_device("auto") == torch.device(expected)


def test_a_device_that_is_there_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=True, mps=True)
    assert [choose_device(name) for name in ("cpu", "cuda", "mps")] == [CPU, CUDA, MPS]


def test_a_device_that_is_not_there_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, mps=True)
    with pytest.raises(UserError, match=r"device 'cuda' is not available here \(there is: mps, cpu\)"):
        choose_device("cuda")


@pytest.mark.parametrize("device", [CPU, CUDA, MPS])
def test_a_precision_that_is_asked_for_is_used(device: torch.device) -> None:
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
def test_auto_is_what_a_gpu_computes_fast(
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
def test_auto_is_bf16_on_processors_that_compute_it(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str | None, expected: torch.dtype
) -> None:
    pretend_cpuinfo(monkeypatch, cpuinfo)
    assert choose_dtype("auto", CPU) == expected


def test_auto_is_fp32_on_mps() -> None:
    assert choose_dtype("auto", MPS) == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_autocast_computes_matrix_products_in_the_type_asked_for(precision: Precision) -> None:
    dtype = choose_dtype(precision, CPU)
    weight = torch.ones(2, 2)
    with autocast(CPU, dtype):
        assert (weight @ weight).dtype == dtype
    assert weight.dtype == (weight @ weight).dtype == torch.float32


def test_names_of_types_are_those_of_the_precision_flag() -> None:
    assert [dtype_name(dtype) for dtype in (torch.float32, torch.bfloat16)] == ["fp32", "bf16"]


def test_a_processor_is_described_by_its_model_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cpuinfo(monkeypatch, "processor : 0\nmodel name\t: Abacus 9: Turbo\nprocessor : 1\nmodel name\t: Other\n")
    assert describe_device(CPU) == f"Abacus 9: Turbo, {torch.get_num_threads()} threads"


def test_a_processor_without_cpuinfo_is_described_by_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cpuinfo(monkeypatch, None)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert describe_device(CPU) == f"arm64, {torch.get_num_threads()} threads"


def test_a_gpu_is_described_by_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert describe_device(CUDA) == "NVIDIA H100 80GB HBM3"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_used_again() -> None:
    program = """
import resource, torch
from restomod.device import keep_freed_memory
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


def test_where_the_c_library_has_no_such_setting_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: None) -> None:
        raise OSError

    monkeypatch.setattr(restomod.device.ctypes, "CDLL", refuse)
    keep_freed_memory()
