"""Cleanup on signals, and the shell command of ``--then``, which runs when the process ends, however it ends.

A signal that ends a process at once would leave half-written files behind, so it becomes an exception first. The
process itself runs the command of ``--then`` last of all. If it cannot (it was killed, the interpreter crashed), a
shell runs it that waits for the end of its standard input, which comes with the end of the process.
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

from restomod.utils.output import print_error

FLAG = "--then"

# Ctrl-C and Ctrl-\, the end of a terminal, what schedulers send (Slurm: --signal=USR1@60), limits of time, no power
_NAMES = "INT TERM HUP QUIT USR1 USR2 XCPU ALRM VTALRM PWR"
STOP_SIGNALS = [
    getattr(signal, f"SIG{name}")
    for name in _NAMES.split()
    if hasattr(signal, f"SIG{name}")  # Windows lacks most
]


class _Terminated(BaseException):
    """A signal has arrived. A BaseException, so that no handler of errors catches it."""


def raise_terminated(signum: int, frame: FrameType | None) -> None:
    """Signal handler: raise an exception, so that `finally` blocks and context managers clean up."""
    raise _Terminated(signum)


def split_then(arguments: list[str]) -> tuple[list[str], str | None]:
    """Split off ``--then COMMAND``, before other arguments are parsed and may turn out to be wrong.

    Returns:
        The other arguments, and the last command given. A flag without a command stays, so that parsing refuses it.
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


def run_then(work: Callable[[], int], command: str | None) -> int:
    """Run ``work``, and then ``command``, if there is one, however ``work`` has ended.

    Under torchrun, rank 0 runs the command; if torchrun will restart a failed process, only after the last restart. A
    signal that ends this process does so after ``work`` has been left and the command has run. Ignored signals (nohup)
    stay ignored. A process that waits for others in a collective operation runs no handler, so with several processes
    and without a command all signals keep their default effect.

    Returns:
        The exit code of ``work``.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    ours = command is not None and os.environ.get("RANK", "0") == "0"
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    started_again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) < restarts
    watcher = _Watcher(command) if command is not None and ours and not started_again else None
    taken: list[int] = []
    if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
        taken = [s for s in STOP_SIGNALS if alone and signal.getsignal(s) is signal.SIG_DFL]
        taken += [signal.SIGTERM] if ours and signal.SIGTERM not in taken else []
    before = {s: signal.signal(s, raise_terminated) for s in taken}
    code = ended_by = None
    try:
        code = work()
    except _Terminated as e:
        ended_by = int(e.args[0])
    finally:
        if command is not None and ours:
            before |= {signal.SIGINT: signal.getsignal(signal.SIGINT)} if before else {}
            for s in before:
                signal.signal(s, lambda *_: None)  # not SIG_IGN, which the command would inherit
            if code == 0 or not started_again:
                if watcher is not None:
                    watcher.dismiss()
                _run(command)
        for s, handler in before.items():
            signal.signal(s, handler)
    if ended_by is not None:
        signal.signal(ended_by, signal.SIG_DFL)
        os.kill(os.getpid(), ended_by)
        return 128 + ended_by
    assert code is not None
    return code


def _run(command: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # its reader may have left
        sys.stdout.flush()
    code = subprocess.run(command, shell=True, env=_environment()).returncode
    if code != 0:
        print_error(f"restomod: {FLAG}: {command!r} has ended with exit code {code}")


def _environment() -> dict[str, str]:
    """Return the user's environment: without PYTHONSAFEPATH, which `restomod.__main__` has set for itself."""
    ours = {} if sys.flags.safe_path else {"PYTHONSAFEPATH"}
    return {name: value for name, value in os.environ.items() if name not in ours}


class _Watcher:
    """A shell that runs a command when this process ends, unless it is dismissed before."""

    def __init__(self, command: str) -> None:
        self._shell: subprocess.Popen[bytes] | None = None
        if os.name == "posix":
            script = 'read -r dismissed || exec /bin/sh -c "$1"'
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", script, "sh", command],
                stdin=subprocess.PIPE,
                env=_environment(),
                start_new_session=True,  # Ctrl-C, or the end of the terminal, is not meant for it
            )

    def dismiss(self) -> None:
        """End the shell without running the command."""
        if self._shell is not None:
            with contextlib.suppress(OSError):  # it is gone already
                self._shell.communicate(b"dismissed\n", timeout=10)
