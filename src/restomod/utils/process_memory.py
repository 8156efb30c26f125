"""Memory of processes and devices: peak, current and available bytes."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CGROUP = Path("/sys/fs/cgroup")


def status_bytes(field: str, process: int | str = "self") -> int | None:
    """Return a field of /proc/PROCESS/status on Linux, such as VmRSS, in bytes; None if unknown."""
    with contextlib.suppress(OSError):
        found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
        return int(found[1]) * 1024 if found else None
    return None


def peak_resident_bytes() -> int | None:
    """Return the peak resident memory of this process in bytes; None if unknown.

    On Linux, `ru_maxrss` is not used, because it includes the parent's memory at the time of the fork.
    """
    peak = status_bytes("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_bytes(device: torch.device) -> int | None:
    """Return the available memory of a device in bytes, within the container's limit; None if unknown."""
    if device.type != "cpu":
        import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    free = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # "max" means no limit
        limit = int((CGROUP / "memory.max").read_text())
        free.append(limit - int((CGROUP / "memory.current").read_text()))
    return min(free) if free else None
