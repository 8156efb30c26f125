"""One training run in a process of its own, which can crash without taking the sweep down."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

from restomod.engine.signals import stop_with_parent
from restomod.utils.files import open_to_append

TRAIN = (sys.executable, "-m", "restomod", "train")
LINES_KEPT = 40
ERROR = "restomod: error: "


class TrainingProcess:
    """`restomod train` with ``arguments``; what it prints goes into the file ``log``.

    Args:
        arguments: those of the verb `train`.
        log: appended to.
        lock: an open file whose lock the process shares, so that it is held for as long as the process lives.
    """

    def __init__(self, arguments: list[str], log: Path, lock: int) -> None:
        self._log = log
        self._last: deque[str] = deque(maxlen=LINES_KEPT)
        self._process = subprocess.Popen(
            [*TRAIN, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C in the terminal is passed on once, by the sweep
            preexec_fn=stop_with_parent,  # a killed sweep: finish the step, save, end
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._last.append(line.rstrip())
            with contextlib.suppress(OSError), open_to_append(self._log) as f:  # the disk may be full
                f.write(line.encode())

    def wait(self, seconds: float) -> int | None:
        """The exit code, negative for a signal; None if it still runs after so many seconds."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(5)
        return code

    def stop(self) -> None:
        """Ask it to finish its step, save a checkpoint and end."""
        self._process.terminate()

    def end(self) -> None:
        """End it now, if it still runs."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
            self._process.kill()
            self._process.wait()

    def reason(self, code: int) -> str:
        """Why it failed, in one line."""
        lines = [line for line in self._last if line.strip()]
        said = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
        if said:
            return said[-1]
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            return f"killed by {name}" + (", as the system does where memory runs out" if name == "SIGKILL" else "")
        return f"exit code {code}" + (f": {lines[-1].strip()}" if lines else "")
