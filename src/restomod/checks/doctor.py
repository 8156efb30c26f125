"""The command `doctor`: all checks of this machine, quick ones first. An exception in a check is a fail."""

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
    """Check this machine for the run of ``config``, named ``preset``, in the folder ``out``; yield results as found."""
    machine = Machine(device_name, precision, preset, config, out)
    libraries = versions, device, known_faults, cudnn, attention
    for check in (*libraries, threads, disk, memory, parity, matmuls, bf16, bandwidth):
        yield run_check(check, machine)
    with ThreadPoolExecutor(1) as background:  # these compute in processes of their own while the compiler compiles
        later = background.submit(run_check, processes, machine)
        yield run_check(compiler, machine)
        yield later.result()


def run_check(check: Check, machine: Machine) -> CheckResult:
    """Run one check; an exception in it is a fail, and without a device it is skipped."""
    name = check.__name__.replace("_", " ")
    try:
        return check(machine)
    except Exception as e:
        if isinstance(e, NoDevice) and check is not device:
            return CheckResult(name, "skip", "there is no device to try it on")
        kind = "" if isinstance(e, UserError) else f"{type(e).__name__}: "
        return CheckResult(name, "fail", f"{kind}{one_line(e)}")


def parity(machine: Machine) -> CheckResult:
    """See `device_parity`."""
    return device_parity(machine.device, machine.dtype)


def matmuls(machine: Machine) -> CheckResult:
    """Measure the speed of matmuls; for information."""
    best = {name: max(of.items(), key=lambda pair: pair[1]) for name, of in machine.rates.by_size.items()}
    found = ", ".join(f"{name} {rate / 1e12:,.2f} TFLOP/s (at {size})" for name, (size, rate) in best.items())
    return CheckResult("matmuls", "pass", found)


def bf16(machine: Machine) -> CheckResult:
    """Check that matmuls in bf16 are faster than in fp32; they are not where hardware support is missing."""
    size, fast, plain = machine.rates.compared("bf16", "fp32")
    found = f"{fast / plain:.2f} times as fast as fp32 at {size}"
    if dtype_name(machine.dtype) == "fp32":
        why = "the compute dtype is fp32 here"
        if fast > plain and machine.precision == "auto":
            return CheckResult("bf16", "pass", f"{found}; {why} by default, and --precision bf16 can be tried")
        return CheckResult("bf16", "pass", f"{found}; {why}")
    if fast < plain:
        return CheckResult("bf16", "warn", f"{found}, so it only costs precision; train with --precision fp32")
    return CheckResult("bf16", "pass", found)


def bandwidth(machine: Machine) -> CheckResult:
    """Measure the memory bandwidth; for information."""
    return CheckResult("bandwidth", "pass", f"{memory_bandwidth(machine.device) / 1e9:,.1f} GB/s, copying")
