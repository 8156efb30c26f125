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
    """Report which attention backend torch chooses for each use, of those that `restomod.model.attention` allows."""
    chosen = {use: NAMES[chosen_backend(machine.device, machine.dtype, use)] for use in BACKENDS}
    found = ", ".join(f"{backend} for {use}" for use, backend in chosen.items())
    slow = [use for use, backend in chosen.items() if backend == "math" and use in ("training", "scoring")]
    if machine.device.type == "cuda" and slow:
        return CheckResult(
            "attention", "warn", f"{found}: math is slow and needs memory for all pairs of tokens; update torch"
        )
    return CheckResult("attention", "pass", found)


def chosen_backend(device: torch.device, dtype: torch.dtype, use: Use) -> SDPBackend:
    """The backend that torch chooses for inputs of GPT-2's shape."""
    trains, single = use in ("training", "masked training"), use == "decoding"
    shape = (1, HEADS, TOKENS, HEAD_SIZE)
    k = torch.zeros(shape, device=device, dtype=dtype, requires_grad=trains)
    q = k[:, :, :1] if single else k
    mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool, device=device) if use == "masked training" else None
    causal = mask is None and not single
    with sdpa_kernel(BACKENDS[use] if device.type == "cuda" else list(NAMES)):
        return SDPBackend(torch._fused_sdp_choice(q, k, k, attn_mask=mask, is_causal=causal))


def cudnn(machine: Machine) -> CheckResult:
    """Check which cuDNN is loaded, and from where; one found through LD_LIBRARY_PATH may be too old for this torch."""
    version = torch.backends.cudnn.version() if machine.device.type == "cuda" else None
    if version is None:
        return CheckResult("cudnn", "skip", "is used on CUDA devices only")
    name = f"{version // 10_000}.{version // 100 % 100}.{version % 100}"
    paths = loaded_libraries("libcudnn")
    found = f"{name}, from {paths[0].parent if paths else 'an unknown folder'}"
    bundled = Path(torch.__file__).parents[1] / "nvidia"  # where pip puts it
    if paths and (bundled / "cudnn").exists() and bundled not in paths[0].parents:
        return CheckResult(
            "cudnn", "warn", f"{found}, not the one installed with torch in {bundled}: unset LD_LIBRARY_PATH"
        )
    return CheckResult("cudnn", "pass", found)


def loaded_libraries(name: str) -> list[Path]:
    """Loaded shared libraries whose file name starts with ``name`` (Linux only)."""
    try:
        lines = MAPS.read_text().splitlines()
    except OSError:
        return []
    paths = (Path(line.split(maxsplit=5)[-1]) for line in lines if "/" in line)
    return list(dict.fromkeys(path for path in paths if re.match(rf"{name}[._]", path.name)))


@dataclass(frozen=True)
class Fault:
    """A fault of certain releases of torch on certain cards."""

    first: tuple[int, int]
    """Release of torch in which it appeared."""
    fixed: tuple[int, int]
    """Release that has the fix."""
    affects: Callable[[tuple[int, int]], bool]
    """Whether it affects a card, by its compute capability."""
    what: str
    avoided: Callable[[], bool]
    """Whether restomod avoids it here."""
    advice: str
    """What to do where it does not."""


FAULTS = (
    Fault(
        *WRONG_REDUCTIONS,
        lambda capability: True,
        "compiled models may get wrong gradients from Inductor's mix-order reductions",
        avoid_wrong_reductions,
        f"unset {REDUCTIONS}",
    ),
    Fault(
        (2, 11),
        (2, 15),
        lambda capability: capability[0] == 9,
        "cuDNN's attention gives NaN gradients with a mask for some lengths",
        lambda: SDPBackend.CUDNN_ATTENTION not in BACKENDS["masked training"],
        "leave --document-mask out",
    ),
)


def known_faults(machine: Machine) -> CheckResult:
    """Check that torch has kernels for this GPU, and that known faults of this release are avoided."""
    name = "known faults"
    if machine.device.type != "cuda":
        return CheckResult(name, "skip", "are listed for CUDA devices only")
    capability = torch.cuda.get_device_capability(machine.device)
    kernels = torch.cuda.get_arch_list()
    if not is_supported(capability, kernels):
        return CheckResult(
            name,
            "fail",
            f"this torch has no kernels for a card of compute capability {capability[0]}.{capability[1]}, only for "
            f"{', '.join(kernels)}; install a build of torch for another CUDA release (pytorch.org)",
        )
    return check_faults(capability, torch_release())


def is_supported(capability: tuple[int, int], kernels: list[str]) -> bool:
    """Whether a build of torch runs on a card: by machine code for its major capability, or by PTX of an older one.

    ``kernels`` are those of `torch.cuda.get_arch_list()`, such as sm_80, sm_90a, compute_90.
    """
    for kernel in kernels:
        kind, digits = re.fullmatch(r"(sm|compute)_(\d+)[a-z]?", kernel).groups()  # type: ignore[union-attr]
        major, minor = divmod(int(digits), 10)
        if (kind == "compute" and (major, minor) <= capability) or (major == capability[0] and minor <= capability[1]):
            return True
    return False


def check_faults(capability: tuple[int, int], release: tuple[int, int]) -> CheckResult:
    """Warn of faults of a torch release on a GPU that restomod does not avoid."""
    there = [fault for fault in FAULTS if fault.first <= release < fault.fixed and fault.affects(capability)]
    left = [f"{fault.what}: {fault.advice}" for fault in there if not fault.avoided()]
    if left:
        return CheckResult("known faults", "warn", "; ".join(left))
    avoided = [fault.what for fault in there]
    said = f"avoided: {'; '.join(avoided)}" if avoided else f"none of torch {release[0]}.{release[1]} on this card"
    return CheckResult("known faults", "pass", said)
