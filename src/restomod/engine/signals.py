"""Signals that stop a run after the current step: Ctrl-C, a job scheduler, the end of the parent process."""

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
CONNECTING = 5.0  # seconds, time-out of a connection to torchrun's store
ONE_REQUEST = 1.0
"""Seconds within which repeated signals count as one: the end of a parent is signalled once for each of its threads,
and Slurm signals both a job and its step."""


def stop_with_parent() -> None:
    """Make the kernel send SIGTERM to this process when its parent ends. No-op on systems other than Linux."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # the parent ended before prctl, so the kernel sends no signal
        os.kill(os.getpid(), signal.SIGTERM)


def stop_with_torchrun() -> None:
    """Make a process that torchrun has started end with torchrun, even if torchrun is killed.

    This must be called early. If torchrun has been killed before the call, its store does not answer, and the process
    stops immediately.
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
        except (OSError, KeyError, ValueError):  # `join_processes` reports the problem
            pass


class StopSignal:
    """Context that turns the first of `STOP_SIGNALS` into a request to stop after this step.

    A second signal has its usual effect: it ends the process.

    Attributes:
        requested: whether a signal has arrived.

    Args:
        on_request: function to call at the first signal, in the signal handler.
    """

    def __init__(self, on_request: Callable[[], None] = lambda: None) -> None:
        self.requested = False
        self._on_request = on_request
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers only there
            always = signal.SIGINT, signal.SIGTERM
            # other signals only if they would end the process, because nohup ignores SIGHUP
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
            # os.write, because the signal may have interrupted a print; stderr may be closed
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step (send the signal again to stop immediately)\n")
            self._on_request()
        elif time.monotonic() > self._since + ONE_REQUEST:
            self._restore()
            if signal.getsignal(signum) is raise_terminated:
                signal.signal(signum, signal.SIG_DFL)  # end without clean-up
            signal.raise_signal(signum)
