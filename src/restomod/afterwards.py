"""A command that runs when all is over, however it ends: ``--then "sudo shutdown now"``.

The process runs it itself, last of all. Where it cannot any more (it was killed, the interpreter crashed), a shell does
that waits for the end of its standard input, which comes with that of the process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from types import FrameType

FLAG = "--then"


class _Terminated(BaseException):
    """SIGTERM has come; a BaseException, so that nothing takes it for an error of its own."""


def take_command(arguments: list[str]) -> tuple[list[str], str | None]:
    """Split ``--then COMMAND`` off, before anything else in the arguments can turn out to be wrong.

    Returns:
        The other arguments, and the last command given. A flag without one stays, to be complained of.
    """
    rest: list[str] = []
    command = None
    parts = iter(arguments)
    for argument in parts:
        if argument.startswith(f"{FLAG}="):
            command = argument.partition("=")[2]
        elif argument == FLAG:
            following = next(parts, None)
            if following is None:
                rest.append(argument)
            else:
                command = following
        else:
            rest.append(argument)
    return rest, command


def and_then(work: Callable[[], int], command: str | None) -> int:
    """Do ``work``, and run ``command`` once it has ended, in whatever way.

    Of the processes of a torchrun the first runs it; where torchrun will start a failed one again, only after the last
    time. SIGTERM ends this process as it would without a command, but for the command.

    Returns:
        What ``work`` does.
    """
    if command is None or os.environ.get("RANK", "0") != "0":
        return work()
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    started_again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) < restarts
    watcher = None if started_again else _Watcher(command)
    in_main_thread = threading.current_thread() is threading.main_thread()  # Python delivers signals to no other
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)} if in_main_thread else {}
    if in_main_thread:
        signal.signal(signal.SIGTERM, _terminate)
    code: int | None = None
    terminated = False
    try:
        code = work()
    except _Terminated:
        terminated = True
    finally:
        for s in before:
            signal.signal(s, lambda *_: None)  # not SIG_IGN, which the command would inherit
        if code == 0 or not started_again:
            if watcher is not None:
                watcher.dismiss()
            _run(command)
        for s, handler in before.items():
            signal.signal(s, handler)
    if terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    return 128 + signal.SIGTERM if code is None else code


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise _Terminated


def _run(command: str) -> None:
    with contextlib.suppress(OSError):  # its reader may have left
        sys.stdout.flush()
    code = subprocess.run(command, shell=True).returncode
    if code != 0:
        print(f"restomod: {FLAG}: {command!r} has ended with exit code {code}", file=sys.stderr)


class _Watcher:
    """A shell that runs a command once this process is gone, unless it is dismissed before."""

    def __init__(self, command: str) -> None:
        self._shell: subprocess.Popen[bytes] | None = None
        if os.name == "posix":
            script = 'read -r dismissed || exec /bin/sh -c "$1"'
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", script, "sh", command],
                stdin=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C, or the end of the terminal, is not meant for it
            )

    def dismiss(self) -> None:
        """Send it home."""
        if self._shell is not None:
            with contextlib.suppress(OSError):  # it is gone already
                self._shell.communicate(b"dismissed\n", timeout=10)
