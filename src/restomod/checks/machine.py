"""Checks of a machine that need no computation: versions, device, disk, memory, threads."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement

from restomod.checks.speed import Rates, matmul_rates
from restomod.config.run import Device, Precision, RunConfig
from restomod.engine.device import (
    TESTED_TORCH,
    choose_device,
    choose_dtype,
    describe_device,
    torch_release,
    total_memory,
)
from restomod.engine.memory import FP32, estimate_memory, optimizer_bytes
from restomod.engine.micro_batch import choose_micro_batch
from restomod.model.flops import parameter_count
from restomod.utils.console import CheckResult
from restomod.utils.errors import UserError
from restomod.utils.process_memory import CGROUP, available_bytes
from restomod.utils.text import gigabytes

PACKAGE = "restomod"
OPTIONAL = {"tokie": "text is tokenized by tiktoken instead, 4 times slower"}


class NoDevice(UserError):
    """The requested device does not exist."""


@dataclass(frozen=True)
class Machine:
    """Machine to check, and the planned run."""

    device_name: Device
    """Requested device."""
    precision: Precision
    """Requested compute dtype."""
    preset: str
    """Name of the preset to run."""
    config: RunConfig
    """Configuration of the preset."""
    out: Path
    """Parent folder of runs."""

    @property
    def device(self) -> torch.device:
        """Device to check; raises `NoDevice` if it does not exist."""
        try:
            return choose_device(self.device_name)
        except UserError as e:
            raise NoDevice(str(e)) from None

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the planned run."""
        return choose_dtype(self.precision, self.device)

    @functools.cached_property
    def rates(self) -> Rates:
        """FLOP/s of matmuls, measured on first use."""
        return matmul_rates(self.device)


def versions(machine: Machine) -> CheckResult:
    """Check the releases of Python packages against the requirements of restomod."""
    name = "versions"
    try:
        required = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or []]
    except importlib.metadata.PackageNotFoundError:
        return CheckResult(name, "skip", f"{PACKAGE} is not installed, only its source: requirements are unknown")
    wrong: list[tuple[Requirement, str]] = []
    slower: list[tuple[Requirement, str]] = []
    found = f"Python {platform.python_version()}, torch {torch.__version__}"
    required = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in required:
        try:
            version = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        if version == "missing" or not one.specifier.contains(version, prereleases=True):
            (slower if one.name in OPTIONAL else wrong).append((one, version))
    problems = "; ".join(f"{one.name} is {version}" for one, version in [*wrong, *slower])
    install = "pip install " + " ".join(f"'{one.name}{one.specifier}'" for one, _ in [*wrong, *slower])
    if wrong:
        return CheckResult(name, "fail", f"{problems}; {install}")
    if slower:
        return CheckResult(name, "warn", f"{problems}: {OPTIONAL[slower[0][0].name]}; {install}")
    oldest, newest = TESTED_TORCH
    if not oldest <= torch_release() <= newest:
        tested = f"{oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}"
        return CheckResult(
            name, "warn", f"{found}: tested releases of torch are {tested}; run `make test` with this one"
        )
    return CheckResult(name, "pass", f"{found}; {len(required)} packages meet the requirements")


def device(machine: Machine) -> CheckResult:
    """Check that the device exists; warn if there is an unused NVIDIA GPU."""
    chosen = machine.device
    found = f"{chosen.type}: {describe_device(chosen)}"
    if chosen.type == "cpu" and machine.device_name == "auto" and shutil.which("nvidia-smi"):
        if torch.version.cuda is None:
            why = "torch is built without CUDA; install the build for this machine from pytorch.org"
        else:
            why = f"torch, built for CUDA {torch.version.cuda}, cannot use it: see nvidia-smi, update the driver"
        return CheckResult("device", "warn", f"{found}; an NVIDIA driver is installed, but {why}")
    return CheckResult("device", "pass", found)


def disk(machine: Machine) -> CheckResult:
    """Check that the disk has space for the checkpoints of a run, and for the one being written."""
    out = machine.out.absolute()
    folder = next(parent for parent in (out, *out.parents) if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return CheckResult("disk", "fail", f"{folder} is not writable; train with --out in another folder")
    free = shutil.disk_usage(folder).free
    model, optim = machine.config.model, machine.config.optim
    each = FP32 * parameter_count(model) + optimizer_bytes(model, optim)[0]
    kept = machine.config.keep_checkpoints + machine.config.keep_best  # the best may be older than the newest ones
    needed = each * (kept + 1)
    found = (
        f"{gigabytes(free)} free in {folder}; {machine.preset} needs {gigabytes(needed)} "
        f"({kept + 1} checkpoints of {gigabytes(each)}, one of them temporary)"
    )
    if free < needed:
        return CheckResult("disk", "fail", f"{found}; train with --out on another disk")
    return CheckResult("disk", "pass", found)


def memory(machine: Machine) -> CheckResult:
    """Check that memory suffices for the preset's weights, gradients, optimizer state and one micro-batch."""
    name, free = "memory", available_bytes(machine.device)
    if free is None:
        return CheckResult(name, "skip", "the available memory of this system is unknown")
    micro_batch = choose_micro_batch(machine.config, machine.device)
    number, kind = machine.dtype.itemsize, machine.device.type
    total = total_memory(machine.device)
    needed, least = (estimate_memory(machine.config, n, number, kind, 1, total).total for n in (micro_batch, 1))
    found = (
        f"{gigabytes(free)} available; {machine.preset} needs about {gigabytes(needed)} at micro-batch {micro_batch}"
    )
    if free < least:
        return CheckResult(
            name, "fail", f"{found}, {gigabytes(least)} at 1; train a smaller preset, or close other programs"
        )
    if free < needed:
        return CheckResult(name, "warn", f"{found}, {gigabytes(least)} at 1; lower --micro-batch")
    return CheckResult(name, "pass", found)


def threads(machine: Machine) -> CheckResult:
    """Warn if torch has more threads than available CPUs, or fewer because of OMP_NUM_THREADS."""
    name, used, available = "threads", torch.get_num_threads(), usable_processors()
    variable = os.environ.get("OMP_NUM_THREADS")
    found = f"torch uses {used} threads on {available:g} CPUs"
    if used > max(1, available):
        return CheckResult(name, "warn", f"{found}: too many; export OMP_NUM_THREADS={max(1, int(available))}")
    if variable is not None and used < min(int(available), os.cpu_count() or 1):
        fix = f"export OMP_NUM_THREADS={int(available)}, unless other training jobs share this machine"
        return CheckResult(name, "warn", f"{found}: OMP_NUM_THREADS is {variable}; {fix}")
    return CheckResult(name, "pass", found)


def usable_processors() -> float:
    """Return the number of CPUs available to this process: the lower of its affinity and its container's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [float(bound)]
    with contextlib.suppress(OSError, ValueError):  # cgroup v2: "max 100000" is no limit
        quota, period = (CGROUP / "cpu.max").read_text().split()
        quotas.append(int(quota) / int(period))
    with contextlib.suppress(OSError, ValueError):  # cgroup v1: -1 is no limit
        quota_us = int((CGROUP / "cpu" / "cpu.cfs_quota_us").read_text())
        if quota_us > 0:
            quotas.append(quota_us / int((CGROUP / "cpu" / "cpu.cfs_period_us").read_text()))
    return min(quotas)
