"""Choice of device, compute dtype, compilation and chunk sizes: the one place that decides."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import nn

from restomod.config.run import Compile, Device, Precision
from restomod.utils.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
TESTED_TORCH = (2, 11), (2, 15)  # the oldest and the newest release with which all tests have passed
# Inductor's mix-order reductions lose a part of the gradient from the first of these releases of torch on; the second
# has the fix (pytorch issues 190796, 193061)
WRONG_REDUCTIONS = (2, 10), (2, 15)
REDUCTIONS = "TORCHINDUCTOR_MIX_ORDER_REDUCTION"

# Tokens by kind of device; see `scaled_tokens`.
FORWARD_TOKENS = {"cpu": 4096, "mps": 8192, "cuda": 65_536}  # more in one forward pass are not faster
# chunk of the loss: enough rows for fast matmuls, and on CUDA few additions to the head's fp32 gradient; 100 MB and
# 1.6 GB of logits in bf16
CHUNK_TOKENS = {"cpu": 1024, "mps": 1024, "cuda": 16_384}
# rows of an eager softmax in fp32: what stays in a CPU's cache between its passes; elsewhere what fits
SOFTMAX_TOKENS = {"cpu": 32, "mps": 1024, "cuda": 1024}
EVAL_TOKENS = {"cpu": 8192, "mps": 8192, "cuda": 65_536}  # one forward pass of the validation loss
LARGE_GPU = 24 * 10**9  # bytes; smaller GPUs get proportionally fewer tokens


def scaled_tokens(table: dict[str, int], device_type: str, memory: int | None) -> int:
    """Tokens of one of the tables above; on a GPU with less memory than `LARGE_GPU` proportionally fewer.

    They follow from the device's total memory, not from its free memory, so that a resumed run computes the same bits.

    Args:
        table: tokens by kind of device.
        device_type: cpu, mps or cuda.
        memory: total memory of a GPU in bytes; None: large.

    Returns:
        A multiple of 1,024 where it is reduced.
    """
    if device_type != "cuda" or memory is None or memory >= LARGE_GPU:
        return table[device_type]
    return max(1024, table[device_type] * memory // LARGE_GPU // 1024 * 1024)


def tokens_on(device: torch.device, table: dict[str, int]) -> int:
    """`scaled_tokens` on a device of this machine."""
    return scaled_tokens(table, device.type, total_memory(device))


def choose_device(name: Device) -> torch.device:
    """Choose the device called ``name``; "auto" takes CUDA, else MPS, else the CPU.

    Raises:
        UserError: the device asked for is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available[name]:
        here = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"device {name!r} is not available here (there is: {here}); use --device auto")
    return torch.device(name)


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Choose the compute dtype of the matmuls.

    "auto" is bf16 where the hardware itself computes it; else fp16 on a GPU with tensor cores (a T4, a V100); else
    fp32. TF32 is not needed: a GPU that has it has bf16.
    """
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if _has_bf16(device):
        return torch.bfloat16
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
        return torch.float16
    return torch.float32


def choose_compile(setting: Compile, device: torch.device) -> tuple[bool, str]:
    """Choose whether to compile the model; with the reason, for the console."""
    if setting != "auto":
        return setting == "on", f"--compile {setting}"
    if device.type != "cuda":
        return False, "auto: used on CUDA only"
    problem = compiler_problem()
    return (True, "auto: CUDA, Triton and a C compiler are there") if problem is None else (False, f"auto: {problem}")


def compiler_problem() -> str | None:
    """Name what torch.compile lacks to compile for CUDA, without compiling anything; None where nothing is missing."""
    from torch.utils._triton import has_triton

    if not has_triton():
        return "Triton is missing or does not support this GPU (pip install triton)"
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return "there is no C compiler, which Triton needs (apt install gcc)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python.h is missing, which Triton needs (apt install python3-dev)"
    return None


def compile_module(module: nn.Module, device: torch.device) -> None:
    """Compile a module in place at its first call, separately for every shape of its inputs."""
    if device.type == "cuda":
        avoid_wrong_reductions()
    module.compile(dynamic=False)


def avoid_wrong_reductions() -> bool:
    """Switch Inductor's mix-order reductions off where they may compute wrong gradients; whether they are off.

    Set the environment variable TORCHINDUCTOR_MIX_ORDER_REDUCTION to 1 to keep them.
    """
    import torch._inductor.config as inductor

    first, fixed = WRONG_REDUCTIONS
    if first <= torch_release() < fixed and REDUCTIONS not in os.environ:
        inductor.triton.mix_order_reduction = False
    return not inductor.triton.mix_order_reduction


def torch_release() -> tuple[int, int]:
    """The installed release of torch, such as (2, 13)."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def release_memory(device: torch.device) -> None:
    """Return cached memory to a GPU, so that allocations of other sizes find room."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def total_memory(device: torch.device) -> int | None:
    """Total memory of a GPU in bytes; None for other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def dtype_name(dtype: torch.dtype) -> str:
    """Short name of a dtype: fp32, bf16, fp16."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # Intel's AVX-512 BF16 has half the throughput of its fp32 instructions, so that it gains nothing (measured:
        # 0.09 against 0.145 TFLOP/s a core); AMD's has the same
        cpu = _cpu()
        flags = cpu.get("flags", "").split()
        return "amx_bf16" in flags or ("avx512_bf16" in flags and cpu.get("vendor_id") == "AuthenticAMD")
    return False  # MPS: fp32 until parity with the CPU has been shown there


def _cpu() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo; none on other systems."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        lines = [line.split(":", 1) for line in f if ":" in line]
        return {key.strip(): value.strip() for key, value in reversed(lines)}
    return {}


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Compute matmuls in ``dtype``; no-op for fp32 and fp64."""
    if dtype in (torch.float32, torch.float64):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def describe_device(device: torch.device) -> str:
    """Name of a device for people: the GPU, or the processor with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = _cpu().get("model name") or platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name


def compute_deterministically() -> None:
    """Use deterministic kernels only; to be called before the GPU is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def keep_freed_memory() -> None:
    """Keep freed memory in the process for reuse, where the C library is glibc, instead of returning it to the system.

    By default every large tensor is mapped anew, and the system fills it with zeros page by page as it is first used:
    6 % of the time of a step of GPT-2 124M on a CPU, and more where the arithmetic is faster.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
