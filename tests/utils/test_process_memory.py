from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from restomod.utils import process_memory
from restomod.utils.process_memory import peak_resident_bytes

TOUCHED = 500_000_000
LARGE_PARENT = f"""
import subprocess, sys
held = bytearray(b"x" * {TOUCHED})
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""
CHILD = "from restomod.utils.process_memory import peak_resident_bytes; print(peak_resident_bytes())"


def test_the_peak_excludes_memory_of_the_parent() -> None:
    printed = subprocess.run([sys.executable, "-c", LARGE_PARENT, CHILD], capture_output=True, check=True).stdout
    assert 2**20 < int(printed) < TOUCHED / 5


def test_the_peak_includes_released_memory() -> None:
    child = f"held = bytearray(b'x' * {TOUCHED}); del held; {CHILD}"
    printed = subprocess.run([sys.executable, "-c", child], capture_output=True, check=True).stdout
    assert TOUCHED < int(printed) < 3 * TOUCHED


def test_without_proc_getrusage_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_memory, "status_bytes", lambda field: None)
    unit = 1 if sys.platform == "darwin" else 1024
    assert peak_resident_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
