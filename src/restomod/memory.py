"""How much memory this process has needed."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_resident_bytes() -> int | None:
    """The most memory that this process has held so far; None where the system does not tell.

    Linux's `ru_maxrss` is no less than what the parent held when it started this process, so it is not asked there.
    """
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
        if found:
            return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
