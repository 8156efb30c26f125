"""Implementation of `doctor`: all checks of a machine, quick ones first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from restomod.checks.device_parity import device_parity
from restomod.checks.gpu import attention, cudnn, known_faults
from restomod.checks.machine import Machine, NoDevice, device, disk, memory, threads, versions
from restomod.checks.speed import memory_bandwidth
from restomod.checks.tools import compiler, processes
from restomod.config.run import Device, Precision, RunConfig
from restomod.engine.device import dtype_name
from restomod.utils.console import CheckResult
from restomod.utils.errors import UserError, one_line

Check = Callable[[Machine], CheckResult]


def check_machine(
    device_name: Device, precision: Precision, config: RunConfig, preset: str, out: Path
) -> Iterator[CheckResult]:
    """Check this machine, and yield each result when it is known.

    Args:
        device_name: device to check.
        precision: compute dtype to check.
        config: configuration of the planned run.
        preset: name of this configuration.
        out: parent folder of runs.
    """
    machine = Machine(device_name, precision, preset, config, out)
    libraries = versions, device, known_faults, cudnn, attention
    for check in (*libraries, threads, disk, memory, parity, matmuls, bf16, bandwidth):
        yield run_check(check, machine)
    with ThreadPoolExecutor(1) as background:  # separate processes, which can run while torch.compile compiles
        later = background.submit(run_check, processes, machine)
        yield run_check(compiler, machine)
        yield later.result()


def run_check(check: Check, machine: Machine) -> CheckResult:
    """Run one check; an exception is a fail. A missing device is a fail of `device` and a skip of the others."""
    name = check.__name__.replace("_", " ")
    try:
        return check(machine)
    except Exception as e:
        if isinstance(e, NoDevice) and check is not device:
            return CheckResult(name, "skip", "no device")
        kind = "" if isinstance(e, UserError) else f"{type(e).__name__}: "
        return CheckResult(name, "fail", f"{kind}{one_line(e)}")


def parity(machine: Machine) -> CheckResult:
    """Check loss and gradients on the device against a reference; see `device_parity`."""
    return device_parity(machine.device, machine.dtype)


def matmuls(machine: Machine) -> CheckResult:
    """Measure the FLOP/s of matmuls; always a pass."""
    best = {name: max(rates.items(), key=lambda pair: pair[1]) for name, rates in machine.rates.by_size.items()}
    found = ", ".join(f"{name} {rate / 1e12:,.2f} TFLOP/s (size {size})" for name, (size, rate) in best.items())
    return CheckResult("matmuls", "pass", found)


def bf16(machine: Machine) -> CheckResult:
    """Check that matmuls in bf16 are faster than in fp32, which requires hardware support."""
    size, fast, plain = machine.rates.compared("bf16", "fp32")
    found = f"matmuls {fast / plain:.2f} × the speed of fp32 (size {size})"
    if dtype_name(machine.dtype) == "fp32":
        why = "compute dtype is fp32"
        if fast > plain and machine.precision == "auto":
            return CheckResult("bf16", "pass", f"{found}; {why} by default, --precision bf16 may be faster")
        return CheckResult("bf16", "pass", f"{found}; {why}")
    if fast < plain:
        return CheckResult("bf16", "warn", f"{found}; train with --precision fp32, which is faster and more precise")
    return CheckResult("bf16", "pass", found)


def bandwidth(machine: Machine) -> CheckResult:
    """Measure the memory bandwidth; always a pass."""
    return CheckResult("bandwidth", "pass", f"memory copy {memory_bandwidth(machine.device) / 1e9:,.1f} GB/s")
