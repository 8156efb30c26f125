"""What is done when all is over, however it ends: cleaning up, and ``--then "sudo shutdown now"``.

A signal that ends a process at once would leave behind what is half written, so it becomes an exception first. The
command of ``--then`` is run by the process itself, last of all. Where it cannot any more (it was killed, the
interpreter crashed), a shell does that waits for the end of its standard input, which comes with that of the process.
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

from restomod.utils.output import complain

FLAG = "--then"

# Ctrl-C and Ctrl-\, the end of a terminal, what schedulers send (Slurm: --signal=USR1@60), limits of time, no power
_NAMES = "INT TERM HUP QUIT USR1 USR2 XCPU ALRM VTALRM PWR"
STOPPING = [
    getattr(signal, f"SIG{name}")
    for name in _NAMES.split()
    if hasattr(signal, f"SIG{name}")  # Windows lacks most
]


class _Terminated(BaseException):
    """A signal has come; a BaseException, so that nothing takes it for an error of its own."""


def clean_up(signum: int, frame: FrameType | None) -> None:
    """Handle a signal that ends the process: leave everything in order first."""
    raise _Terminated(signum)


def split_then(arguments: list[str]) -> tuple[list[str], str | None]:
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


def run_then(work: Callable[[], int], command: str | None) -> int:
    """Do ``work``, and run ``command``, if there is one, once it has ended, in whatever way.

    Of the processes of a torchrun the first runs it; where torchrun will start a failed one again, only after the last
    time. A signal that ends this process does so after ``work`` is left and the command has run. Those that are
    ignored, as nohup has it, stay so. A process that waits for others in the middle of a run answers no handler, so
    without a command all signals keep their usual effect there.

    Returns:
        What ``work`` does.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    ours = command is not None and os.environ.get("RANK", "0") == "0"
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    started_again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) < restarts
    watcher = _Watcher(command) if command is not None and ours and not started_again else None
    taken: list[int] = []
    if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
        taken = [s for s in STOPPING if alone and signal.getsignal(s) is signal.SIG_DFL]
        taken += [signal.SIGTERM] if ours and signal.SIGTERM not in taken else []
    before = {s: signal.signal(s, clean_up) for s in taken}
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
        complain(f"restomod: {FLAG}: {command!r} has ended with exit code {code}")


def _environment() -> dict[str, str]:
    """The user's own: `restomod.__main__` sets PYTHONSAFEPATH, which is not meant for the user's programs."""
    ours = {} if sys.flags.safe_path else {"PYTHONSAFEPATH"}
    return {name: value for name, value in os.environ.items() if name not in ours}


class _Watcher:
    """A shell that runs a command once this process is gone, unless it is dismissed before."""

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
        """Send it home."""
        if self._shell is not None:
            with contextlib.suppress(OSError):  # it is gone already
                self._shell.communicate(b"dismissed\n", timeout=10)
