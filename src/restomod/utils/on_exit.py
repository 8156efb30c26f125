"""Cleanup on signals, and the shell command of ``--then``, which runs at the end of a process in all cases.

A signal that terminates the process immediately would leave partial files, so it is first converted to an exception.
The process runs the command of ``--then`` last. If it cannot, because it was killed or the interpreter crashed, a
watching shell runs the command: its standard input closes when the process ends.
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

# Ctrl-C, Ctrl-\, closed terminal, signals of schedulers (Slurm: --signal=USR1@60), time limits, power failure
_NAMES = "INT TERM HUP QUIT USR1 USR2 XCPU ALRM VTALRM PWR"
STOP_SIGNALS = [
    getattr(signal, f"SIG{name}")
    for name in _NAMES.split()
    if hasattr(signal, f"SIG{name}")  # Windows lacks most
]


class _Terminated(BaseException):
    """Termination by a signal, as a BaseException that `except Exception` does not catch."""


def raise_terminated(signum: int, frame: FrameType | None) -> None:
    """Raise an exception in response to a signal, so that `finally` blocks and context managers clean up."""
    raise _Terminated(signum)


def split_then(arguments: list[str]) -> tuple[list[str], str | None]:
    """Split ``--then COMMAND`` off the arguments, before the others are parsed and may be invalid.

    Returns:
        Other arguments, and the last command or None. A flag without a command is kept, so that parsing reports it.
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
    """Run ``work`` and then a shell command, whether ``work`` succeeds, fails or is interrupted.

    Under torchrun, rank 0 runs the command; if torchrun restarts failed ranks, only after the last restart. A signal
    terminates this process after ``work`` has cleaned up and the command has run. Ignored signals (nohup) stay ignored.
    A rank that waits in a collective operation cannot run signal handlers, so with several ranks and without a command
    all signals keep their default effect.

    Args:
        work: function that returns the exit code.
        command: shell command; None: no command.

    Returns:
        Exit code of ``work``.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    ours = command is not None and os.environ.get("RANK", "0") == "0"
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    started_again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) < restarts
    watcher = _start_watcher(command) if command is not None and ours and not started_again else None
    taken: list[int] = []
    if threading.current_thread() is threading.main_thread():  # Python runs signal handlers in the main thread only
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
                signal.signal(s, lambda *_: None)  # the command would inherit SIG_IGN
            if code == 0 or not started_again:
                if watcher is not None:
                    with contextlib.suppress(OSError):  # already terminated
                        watcher.communicate(b"dismissed\n", timeout=10)
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
    with contextlib.suppress(OSError, ValueError, AttributeError):  # the reader may have exited
        sys.stdout.flush()
    code = subprocess.run(command, shell=True, env=_environment()).returncode
    if code != 0:
        print_error(f"warning: {FLAG}: {command!r} failed with exit code {code}")


def _environment() -> dict[str, str]:
    """Return the environment without PYTHONSAFEPATH, which `restomod.__main__` sets for itself."""
    ours = {} if sys.flags.safe_path else {"PYTHONSAFEPATH"}
    return {name: value for name, value in os.environ.items() if name not in ours}


def _start_watcher(command: str) -> subprocess.Popen[bytes] | None:
    """Start a shell that runs a command when this process ends, unless it receives a line first."""
    if os.name != "posix":
        return None
    return subprocess.Popen(
        ["/bin/sh", "-c", 'read -r dismissed || exec /bin/sh -c "$1"', "sh", command],
        stdin=subprocess.PIPE,
        env=_environment(),
        start_new_session=True,  # protects it from Ctrl-C and a closed terminal
    )
