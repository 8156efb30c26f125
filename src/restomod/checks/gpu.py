"""Checks of GPU libraries for `doctor`: attention backends, cuDNN, known faults of torch releases."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from restomod.checks.machine import Machine
from restomod.engine.device import REDUCTIONS, WRONG_REDUCTIONS, avoid_wrong_reductions, torch_release
from restomod.model.attention import BACKENDS, Use
from restomod.utils.console import CheckResult

TOKENS, HEADS, HEAD_SIZE = 1024, 12, 64  # GPT-2 124M's
NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
    SDPBackend.MATH: "math",
}
MAPS = Path("/proc/self/maps")


def attention(machine: Machine) -> CheckResult:
    """Report the attention backend that torch chooses for each use; warn of the slow math backend on a GPU."""
    chosen = {use: NAMES[chosen_backend(machine.device, machine.dtype, use)] for use in BACKENDS}
    found = ", ".join(f"{backend} for {use}" for use, backend in chosen.items())
    slow = [use for use, backend in chosen.items() if backend == "math" and use in ("training", "scoring")]
    if machine.device.type == "cuda" and slow:
        return CheckResult(
            "attention", "warn", f"{found}: math is slow and stores the (T, T) score matrix; update torch"
        )
    return CheckResult("attention", "pass", found)


def chosen_backend(device: torch.device, dtype: torch.dtype, use: Use) -> SDPBackend:
    """Return the attention backend that torch chooses for inputs with the shape of GPT-2 124M."""
    trains, single = use in ("training", "masked training"), use == "decoding"
    shape = (1, HEADS, TOKENS, HEAD_SIZE)
    k = torch.zeros(shape, device=device, dtype=dtype, requires_grad=trains)
    q = k[:, :, :1] if single else k
    mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool, device=device) if use == "masked training" else None
    causal = mask is None and not single
    with sdpa_kernel(BACKENDS[use] if device.type == "cuda" else list(NAMES)):
        return SDPBackend(torch._fused_sdp_choice(q, k, k, attn_mask=mask, is_causal=causal))


def cudnn(machine: Machine) -> CheckResult:
    """Report the version and folder of cuDNN; warn of a copy from LD_LIBRARY_PATH, which may be too old for torch."""
    version = torch.backends.cudnn.version() if machine.device.type == "cuda" else None
    if version is None:
        return CheckResult("cudnn", "skip", "used on CUDA devices only")
    name = f"{version // 10_000}.{version // 100 % 100}.{version % 100}"
    paths = loaded_libraries("libcudnn")
    found = f"{name}, from {paths[0].parent if paths else 'an unknown folder'}"
    bundled = Path(torch.__file__).parents[1] / "nvidia"  # pip's folder
    if paths and (bundled / "cudnn").exists() and bundled not in paths[0].parents:
        return CheckResult("cudnn", "warn", f"{found}, instead of torch's own copy in {bundled}: unset LD_LIBRARY_PATH")
    return CheckResult("cudnn", "pass", found)


def loaded_libraries(name: str) -> list[Path]:
    """Return the paths of loaded shared libraries whose file names start with ``name`` (Linux only)."""
    try:
        lines = MAPS.read_text().splitlines()
    except OSError:
        return []
    paths = (Path(line.split(maxsplit=5)[-1]) for line in lines if "/" in line)
    return list(dict.fromkeys(path for path in paths if re.match(rf"{name}[._]", path.name)))


@dataclass(frozen=True)
class Fault:
    """Known bug of some torch releases on some GPUs."""

    first: tuple[int, int]
    """First affected release of torch."""
    fixed: tuple[int, int]
    """First release with the fix."""
    affects: Callable[[tuple[int, int]], bool]
    """Predicate: true for the compute capabilities of affected GPUs."""
    symptom: str
    """Description of the bug, for messages."""
    avoided: Callable[[], bool]
    """Predicate: true if restomod avoids the bug on this machine."""
    advice: str
    """Fix for a machine on which restomod does not avoid the bug."""


FAULTS = (
    Fault(
        *WRONG_REDUCTIONS,
        lambda capability: True,
        "Inductor's mix-order reductions may give wrong gradients",
        avoid_wrong_reductions,
        f"unset {REDUCTIONS}",
    ),
    Fault(
        (2, 11),
        (2, 15),
        lambda capability: capability[0] == 9,
        "cuDNN attention with a mask gives NaN gradients at some sequence lengths",
        lambda: SDPBackend.CUDNN_ATTENTION not in BACKENDS["masked training"],
        "train without --document-mask",
    ),
)


def known_faults(machine: Machine) -> CheckResult:
    """Check that torch has kernels for this GPU, and that known bugs of this release are avoided."""
    name = "known faults"
    if machine.device.type != "cuda":
        return CheckResult(name, "skip", "listed for CUDA devices only")
    capability = torch.cuda.get_device_capability(machine.device)
    kernels = torch.cuda.get_arch_list()
    if not is_supported(capability, kernels):
        return CheckResult(
            name,
            "fail",
            f"torch has no kernels for this GPU of compute capability {capability[0]}.{capability[1]}, only for "
            f"{', '.join(kernels)}; install a build of torch for another CUDA release (pytorch.org)",
        )
    return check_faults(capability, torch_release())


def is_supported(capability: tuple[int, int], kernels: list[str]) -> bool:
    """Return whether a build of torch runs on a GPU: with binaries of its major capability, or with older PTX.

    Args:
        capability: compute capability of the GPU, (major, minor).
        kernels: architectures from `torch.cuda.get_arch_list()`, such as sm_80 or compute_90.
    """
    for kernel in kernels:
        kind, digits = re.fullmatch(r"(sm|compute)_(\d+)[a-z]?", kernel).groups()  # type: ignore[union-attr]
        major, minor = divmod(int(digits), 10)
        if (kind == "compute" and (major, minor) <= capability) or (major == capability[0] and minor <= capability[1]):
            return True
    return False


def check_faults(capability: tuple[int, int], release: tuple[int, int]) -> CheckResult:
    """Warn of known bugs of a torch release on a GPU that restomod does not avoid."""
    present = [fault for fault in FAULTS if fault.first <= release < fault.fixed and fault.affects(capability)]
    active = [f"{fault.symptom}: {fault.advice}" for fault in present if not fault.avoided()]
    if active:
        return CheckResult("known faults", "warn", "; ".join(active))
    avoided = "; ".join(fault.symptom for fault in present)
    reason = f"avoided: {avoided}" if avoided else f"none in torch {release[0]}.{release[1]} on this GPU"
    return CheckResult("known faults", "pass", reason)
