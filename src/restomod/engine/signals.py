"""Signals that stop a run after the present step: Ctrl-C, schedulers, the death of the parent process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from restomod.utils.on_exit import STOP_SIGNALS, raise_terminated

PR_SET_PDEATHSIG = 1  # Linux's prctl.h
CONNECTING = 5.0  # seconds
ONE_REQUEST = 1.0  # seconds; a parent's death is told once for each of its threads, Slurm tells a job and its step


def stop_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent dies; on Linux only."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it has died meanwhile, and nothing will be sent
        os.kill(os.getpid(), signal.SIGTERM)


def stop_with_torchrun() -> None:
    """End with torchrun, in a process that it has started. To be called before anything that takes time.

    torchrun ends its processes itself, unless it is killed. If that has happened already, this process has another
    parent; but torchrun's store exists before its processes, and is gone with it.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    stop_with_parent()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            socket.create_connection(address, timeout=CONNECTING).close()
        except ConnectionRefusedError:
            os.kill(os.getpid(), signal.SIGTERM)
        except (OSError, KeyError, ValueError):  # joining the others will tell what is wrong
            pass


class StopSignal:
    """Turn the first of `STOP_SIGNALS` into a request to stop after this step; a later one acts as usual.

    Args:
        on_request: called with the first one.
    """

    def __init__(self, on_request: Callable[[], None] = lambda: None) -> None:
        self.requested = False
        self._on_request = on_request
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            always = signal.SIGINT, signal.SIGTERM
            # of the others only those that would end the process: nohup ignores SIGHUP, others have handlers
            taken = [
                s for s in STOP_SIGNALS if s in always or signal.getsignal(s) in (signal.SIG_DFL, raise_terminated)
            ]
            self._before = {s: signal.signal(s, self._request) for s in taken}
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
                os.write(2, b"\nstopping after this step (send the signal again to stop at once)\n")
            self._on_request()
        elif time.monotonic() > self._since + ONE_REQUEST:
            self._restore()
            if signal.getsignal(signum) is raise_terminated:
                signal.signal(signum, signal.SIG_DFL)  # now means now
            signal.raise_signal(signum)
