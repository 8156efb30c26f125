"""Choice of device, compute dtype (mixed precision), torch.compile, and tokens per forward pass and per chunk."""

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
from restomod.utils.text import counted

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
TESTED_TORCH = (2, 11), (2, 15)
"""Oldest and newest torch release with which all tests have passed."""
WRONG_REDUCTIONS = (2, 10), (2, 15)
"""First torch release whose mix-order reductions in Inductor lose a part of the gradient, and the release with the fix
(pytorch issues 190796, 193061)."""
REDUCTIONS = "TORCHINDUCTOR_MIX_ORDER_REDUCTION"

# Tokens by device type; see `scaled_tokens`.
FORWARD_TOKENS = {"cpu": 4096, "mps": 8192, "cuda": 65_536}
"""Tokens of a micro-batch; larger ones are not faster."""
CHUNK_TOKENS = {"cpu": 1024, "mps": 1024, "cuda": 16_384}
"""Tokens of a chunk of the loss: enough rows for fast matmuls, and on CUDA few additions to lm_head's fp32 gradient.
The bf16 logits of a chunk take 100 MB on a CPU and 1.6 GB on CUDA."""
SOFTMAX_TOKENS = {"cpu": 32, "mps": 1024, "cuda": 1024}
"""Rows of an eager fp32 softmax. On a CPU they stay in the cache between its passes."""
EVAL_TOKENS = {"cpu": 8192, "mps": 8192, "cuda": 65_536}
"""Tokens of a forward pass of the validation loss."""
LARGE_GPU = 24 * 10**9
"""Memory in bytes below which a GPU gets proportionally fewer tokens."""


def scaled_tokens(table: dict[str, int], device_type: str, memory: int | None) -> int:
    """Return the number of tokens for a device type, reduced in proportion on a GPU smaller than `LARGE_GPU`.

    The reduction follows from total memory, not free memory, so that a resumed run computes the same bits.

    Args:
        table: tokens by device type.
        device_type: cpu, mps or cuda.
        memory: total memory of a GPU in bytes; None: `LARGE_GPU` or more.

    Returns:
        Tokens; a reduced number is a multiple of 1,024.
    """
    if device_type != "cuda" or memory is None or memory >= LARGE_GPU:
        return table[device_type]
    return max(1024, table[device_type] * memory // LARGE_GPU // 1024 * 1024)


def tokens_on(device: torch.device, table: dict[str, int]) -> int:
    """Return the number of tokens for a device of this machine; see `scaled_tokens`."""
    return scaled_tokens(table, device.type, total_memory(device))


def choose_device(name: Device) -> torch.device:
    """Choose the device.

    Args:
        name: device type; "auto": CUDA if available, else MPS, else the CPU.

    Raises:
        UserError: the device is not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = [kind for kind, is_available in available.items() if is_available]
    if name == "auto":
        return torch.device(usable[0])
    if not available[name]:
        raise UserError(f"device {name!r} is not available (available: {', '.join(usable)}); use --device auto")
    return torch.device(name)


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Choose the compute dtype of matmuls for mixed precision.

    Args:
        precision: fp32, bf16 or fp16. "auto": bf16 if the hardware supports it natively, else fp16 on a GPU with tensor
            cores (T4, V100), else fp32. TF32 is not considered, because GPUs with TF32 support bf16.
        device: device of the model.
    """
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if _has_bf16(device):
        return torch.bfloat16
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
        return torch.float16
    return torch.float32


def choose_compile(setting: Compile, device: torch.device) -> tuple[bool, str]:
    """Choose whether to use torch.compile.

    Args:
        setting: on or off; "auto": on for CUDA if Triton and a C compiler are installed.
        device: device of the model.

    Returns:
        Whether to compile, and the reason for the console.
    """
    if setting != "auto":
        return setting == "on", f"--compile {setting}"
    if device.type != "cuda":
        return False, "auto: used on CUDA only"
    problem = compiler_problem()
    return (True, "auto: CUDA, Triton and a C compiler found") if problem is None else (False, f"auto: {problem}")


def compiler_problem() -> str | None:
    """Find a missing requirement of torch.compile on CUDA, without compiling.

    Returns:
        Missing requirement and how to install it; None if all are met.
    """
    from torch.utils._triton import has_triton

    if not has_triton():
        return "Triton is missing or does not support this GPU (pip install triton)"
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return "a C compiler is missing, which Triton needs (apt install gcc)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python.h is missing, which Triton needs (apt install python3-dev)"
    return None


def compile_module(module: nn.Module, device: torch.device) -> None:
    """Compile a module in place with torch.compile, at its first call and again for every new input shape."""
    if device.type == "cuda":
        avoid_wrong_reductions()
    module.compile(dynamic=False)


def avoid_wrong_reductions() -> bool:
    """Disable Inductor's mix-order reductions in torch releases where they may compute wrong gradients.

    The environment variable TORCHINDUCTOR_MIX_ORDER_REDUCTION=1 keeps them enabled.

    Returns:
        Whether mix-order reductions are disabled.
    """
    import torch._inductor.config as inductor

    first, fixed = WRONG_REDUCTIONS
    if first <= torch_release() < fixed and REDUCTIONS not in os.environ:
        inductor.triton.mix_order_reduction = False
    return not inductor.triton.mix_order_reduction


def torch_release() -> tuple[int, int]:
    """Return the installed torch release, such as (2, 13)."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def release_memory(device: torch.device) -> None:
    """Release the cached memory of a GPU, so that allocations of other sizes fit; no-op on a CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def total_memory(device: torch.device) -> int | None:
    """Return the total memory of a GPU in bytes; None for other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def dtype_name(dtype: torch.dtype) -> str:
    """Return the short name of a dtype: fp32, bf16 or fp16."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # AVX-512 BF16 is slower than fp32 on Intel (measured: 0.09 and 0.145 TFLOP/s per core), but not on AMD
        cpu = _cpu()
        flags = cpu.get("flags", "").split()
        return "amx_bf16" in flags or ("avx512_bf16" in flags and cpu.get("vendor_id") == "AuthenticAMD")
    return False  # MPS uses fp32, because bf16 parity with the CPU is not verified


def _cpu() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo; an empty dict on other systems."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        lines = [line.split(":", 1) for line in f if ":" in line]
        return {key.strip(): value.strip() for key, value in reversed(lines)}
    return {}


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which torch computes matmuls in ``dtype`` (mixed precision); no-op for fp32 and fp64."""
    if dtype in (torch.float32, torch.float64):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def describe_device(device: torch.device) -> str:
    """Return the name of a device for display: the GPU, or the processor and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = _cpu().get("model name") or platform.processor() or platform.machine()
    return f"{name}, {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else name


def compute_deterministically() -> None:
    """Use deterministic kernels only. Must be called before the first use of the GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def keep_freed_memory() -> None:
    """Keep freed memory in the process for reuse instead of returning it to the system. Requires glibc, else a no-op.

    By default the system maps and zeroes the pages of every large tensor. This takes 6 % of a step of GPT-2 124M on a
    CPU, and a larger share on faster CPUs.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
