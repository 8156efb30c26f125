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
NOT_NEEDED = {"tokie": "text is tokenized by tiktoken instead, 4 times slower"}


class NoDevice(UserError):
    """The device under check is missing."""


@dataclass(frozen=True)
class Machine:
    """The machine under check, and the run planned for it."""

    device_name: Device
    precision: Precision
    preset: str
    config: RunConfig
    """The preset's."""
    out: Path
    """Folder for runs."""

    @property
    def device(self) -> torch.device:
        """The device; raises `NoDevice` where it is missing."""
        try:
            return choose_device(self.device_name)
        except UserError as e:
            raise NoDevice(str(e)) from None

    @property
    def dtype(self) -> torch.dtype:
        return choose_dtype(self.precision, self.device)

    @functools.cached_property
    def rates(self) -> Rates:
        """Matmul speeds; measured once."""
        return matmul_rates(self.device)


def versions(machine: Machine) -> CheckResult:
    """Check that all packages are of releases that restomod requires."""
    name = "versions"
    try:
        asked = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or []]
    except importlib.metadata.PackageNotFoundError:
        return CheckResult(
            name, "skip", f"{PACKAGE} runs from its source and is not installed: nothing says what it needs"
        )
    wrong: list[tuple[Requirement, str]] = []
    slower: list[tuple[Requirement, str]] = []
    here = f"Python {platform.python_version()}, torch {torch.__version__}"
    asked = [one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in asked:
        try:
            version = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        if version == "missing" or not one.specifier.contains(version, prereleases=True):
            (slower if one.name in NOT_NEEDED else wrong).append((one, version))
    said = "; ".join(f"{one.name} is {version}" for one, version in [*wrong, *slower])
    install = "pip install " + " ".join(f"'{one.name}{one.specifier}'" for one, _ in [*wrong, *slower])
    if wrong:
        return CheckResult(name, "fail", f"{said}; {install}")
    if slower:
        return CheckResult(name, "warn", f"{said}: {NOT_NEEDED[slower[0][0].name]}; {install}")
    oldest, newest = TESTED_TORCH
    if not oldest <= torch_release() <= newest:
        tested = f"{oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}"
        return CheckResult(
            name, "warn", f"{here}: restomod is tested with torch {tested}; run `make test` with this one"
        )
    return CheckResult(name, "pass", f"{here}, and all {len(asked)} packages are of releases that restomod asks for")


def device(machine: Machine) -> CheckResult:
    """Check that the device exists, and that no GPU stays unused."""
    chosen = machine.device
    found = f"{chosen.type}: {describe_device(chosen)}"
    if chosen.type == "cpu" and machine.device_name == "auto" and shutil.which("nvidia-smi"):
        if torch.version.cuda is None:
            why = "this torch is built without CUDA; install the one that pytorch.org names for this machine"
        else:
            why = f"torch, built for CUDA {torch.version.cuda}, cannot use it: see nvidia-smi, update the driver"
        return CheckResult("device", "warn", f"{found}; but there is an NVIDIA driver, and {why}")
    return CheckResult("device", "pass", found)


def disk(machine: Machine) -> CheckResult:
    """Check for disk space for a run's checkpoints: those that are kept, and the one being written."""
    folder = machine.out.absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        return CheckResult("disk", "fail", f"{there} cannot be written to; train with --out in another folder")
    free = shutil.disk_usage(there).free
    model, optim = machine.config.model, machine.config.optim
    each = FP32 * parameter_count(model) + optimizer_bytes(model, optim)[0]
    kept = machine.config.keep_checkpoints + machine.config.keep_best  # the best may be older than those
    needed = each * (kept + 1)
    what = f"{machine.preset} needs {gigabytes(needed)} ({kept} checkpoints of {gigabytes(each)} and one being written)"
    found = f"{gigabytes(free)} free in {there}"
    if free < needed:
        return CheckResult("disk", "fail", f"{found}, and {what}; train with --out on another disk")
    return CheckResult("disk", "pass", f"{found}; {what}")


def memory(machine: Machine) -> CheckResult:
    """Check for memory for a preset's weights, gradients, optimizer state and one micro-batch."""
    name, free = "memory", available_bytes(machine.device)
    if free is None:
        return CheckResult(name, "skip", "this system does not tell how much memory is available")
    micro_batch = choose_micro_batch(machine.config, machine.device)
    number, kind = machine.dtype.itemsize, machine.device.type
    total = total_memory(machine.device)
    needed, least = (estimate_memory(machine.config, n, number, kind, 1, total).total for n in (micro_batch, 1))
    asked = f"{machine.preset} needs about {gigabytes(needed)} with micro-batches of {micro_batch}"
    found = f"{gigabytes(free)} available; {asked}"
    if free < least:
        return CheckResult(
            name, "fail", f"{found}, {gigabytes(least)} with 1; train a smaller preset, or close other programs"
        )
    if free < needed:
        return CheckResult(name, "warn", f"{found}, {gigabytes(least)} with 1; lower --micro-batch")
    return CheckResult(name, "pass", found)


def threads(machine: Machine) -> CheckResult:
    """Check that torch uses as many threads as this process has processors."""
    name, used, there = "threads", torch.get_num_threads(), usable_processors()
    variable = os.environ.get("OMP_NUM_THREADS")
    found = f"torch uses {used} threads, and this process has {there:g} processors"
    if used > max(1, there):
        return CheckResult(name, "warn", f"{found}: they take turns; export OMP_NUM_THREADS={max(1, int(there))}")
    if variable is not None and used < min(int(there), os.cpu_count() or 1):
        fix = f"export OMP_NUM_THREADS={int(there)}, unless other processes train here too"
        return CheckResult(name, "warn", f"{found}: OMP_NUM_THREADS is {variable}; {fix}")
    return CheckResult(name, "pass", found)


def usable_processors() -> float:
    """Processors available to this process, by its affinity and its container's limit."""
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
