"""Ctrl-C and the signals of schedulers: the step is finished and saved before the run ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

PR_SET_PDEATHSIG = 1  # Linux's prctl.h
ONE_REQUEST = 1.0  # seconds; a parent's death is told once for each of its threads, Slurm tells a job and its step


def stop_with_parent() -> None:
    """Have the system send this process SIGTERM when the one that started it dies, however it does; on Linux only."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it has died meanwhile, and nothing will be sent
        os.kill(os.getpid(), signal.SIGTERM)


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a request to stop after the present step; a later one acts as usual."""

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            self._before = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
            # not print: the signal may have interrupted one; and nobody may read it any more
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step (once more: stop at once)\n")
        elif time.monotonic() > self._since + ONE_REQUEST:
            self._restore()
            signal.raise_signal(signum)
