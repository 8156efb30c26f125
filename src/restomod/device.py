"""Where to compute and how precisely: the one place that decides."""

from __future__ import annotations

import contextlib
import platform
from typing import Any

import torch

from restomod.config import Device, Precision
from restomod.errors import UserError


def choose_device(name: Device) -> torch.device:
    """The device called ``name``; "auto" takes CUDA, else MPS, else the CPU.

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
    """The type in which matrix products are computed; "auto" is bf16 where the hardware itself computes it."""
    if precision == "fp32":
        return torch.float32
    if precision == "bf16" or _has_bf16(device):
        return torch.bfloat16
    return torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The short name of a type: fp32, bf16."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        flags = _cpu_flags()
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False  # MPS: fp32 until parity with the CPU has been shown there


def _cpu_flags() -> set[str]:
    """The CPU's feature flags as Linux lists them; empty where it does not."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        return set(next((line for line in f if line.startswith("flags")), "").split())
    return set()


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Compute matrix products in ``dtype``; in fp32 this does nothing."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def describe_device(device: torch.device) -> str:
    """The device's name for people: the GPU's, or the processor's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        models = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
