"""Lock of a run, so that only one job at a time trains it and changes its folder.

RUN/.lock           lock of an existing run, held while it is trained
.NAME.lock          lock of a new run, next to its future folder

The kernel's file locks (`restomod.utils.locks`) are released when a process is killed. Some shared file systems do not
share locks between machines. Therefore the lock file is also a heartbeat: the holder rewrites its record every few
seconds, and a changing record proves that the holder is alive.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

from typing_extensions import TypedDict

from restomod.utils.errors import UserError
from restomod.utils.files import short_name
from restomod.utils.json_files import read_json
from restomod.utils.locks import POLL, FileLock

PATIENCE = 30.0  # seconds to wait for the holder, which may be about to stop
SAVING = 600.0  # seconds to wait for a holder that is stopping and saves
HEARTBEAT = 5.0  # seconds between two writes of the holder
HEARTBEAT_TIMEOUT = 3 * HEARTBEAT  # seconds without a write, after which a holder on another machine counts as ended
RECORD = 300  # characters; padding overwrites a longer older record


class Holder(TypedDict, total=False):
    """Contents of a lock file."""

    host: str
    pid: int
    started: str
    stopping: bool
    beat: int


class RunLock:
    """Lock of one run, taken by the main process for all ranks.

    Args:
        folder: run folder.
        print_line: function that prints the reason for waiting.
    """

    def __init__(self, folder: Path, print_line: Callable[[str], None] = lambda text: None) -> None:
        self.folder, self._print_line = folder, print_line
        self._lock: FileLock | None = None
        self._created: list[Path] = []  # parent folders of a new run
        self._record: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "stopping": False,
            "beat": 0,
        }
        self._over = threading.Event()

    def take(self, resume: bool) -> None:
        """Take the lock of an existing run (``resume``), after waiting for a job that is stopping, or of a new run.

        Raises:
            UserError: another job trains the run.
        """
        if resume:
            self._acquire(self.folder / ".lock", PATIENCE)
            return
        parent = self.folder.resolve().parent
        self._created = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        parent.mkdir(parents=True, exist_ok=True)
        self._acquire(parent / f".{short_name(self.folder.resolve().name)}.lock", 0.0)

    def move_into_folder(self) -> None:
        """Switch to the lock inside the folder of a new run, after the folder is created."""
        before = self._lock
        self._acquire(self.folder / ".lock", 0.0)
        if before is not None and before is not self._lock:
            before.release(remove=True)

    def stopping(self) -> None:
        """Announce to waiting jobs that this job is stopping; safe in a signal handler."""
        self._record["stopping"] = True
        self._write()

    def release(self) -> None:
        """Release the lock."""
        self._over.set()
        if self._lock is not None:
            self._lock.release(remove=True)
        for folder in self._created:  # only empty ones: no run was created
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _acquire(self, path: Path, patience: float) -> None:
        if self._lock is not None and self._lock.path == path:
            return
        lock, began, told = FileLock(path), time.monotonic(), False
        while True:
            free = lock.acquire(wait=False)
            holder = _read(path)
            if free and not self._held_elsewhere(lock, holder) and path.exists():
                break
            lock.release()
            limit = max(patience, SAVING) if patience and holder.get("stopping") else patience
            if time.monotonic() > began + limit:
                raise UserError(
                    f"{self.folder} is already being trained by {_describe(holder)}; wait for it, or stop it and "
                    f"resume with `restomod train --resume {quote(str(self.folder))}`"
                )
            if not told:
                told = True
                self._print_line(f"{self.folder} is being trained by {_describe(holder)}; waiting until it ends")
            time.sleep(POLL)
        if not lock.enforced:
            self._print_line(f"the file system of {path} does not support locks; do not train this run in other jobs")
        first, self._lock = self._lock is None, lock
        self._write()
        if first:
            threading.Thread(target=self._heartbeat, name="run lock", daemon=True).start()

    def _held_elsewhere(self, lock: FileLock, holder: dict[str, Any]) -> bool:
        """Return whether the lock, although free here, is held by a process whose locks this one does not see.

        This is possible for a holder on another machine, or on any machine if the file system has no locks.
        """
        if not holder or (holder.get("host") == self._record["host"] and lock.enforced):
            return False
        self._print_line(
            f"{self.folder} was last trained by {_describe(holder)}; "
            f"waiting {HEARTBEAT_TIMEOUT:.0f} s for a sign that it is still running"
        )
        end = time.monotonic() + HEARTBEAT_TIMEOUT
        while time.monotonic() < end:
            time.sleep(POLL)
            now = _read(lock.path)
            if now and now != holder:
                return True
            if not lock.path.exists():
                return False  # the holder has ended
        return False

    def _heartbeat(self) -> None:
        while not self._over.wait(HEARTBEAT):
            self._record["beat"] += 1
            self._write()

    def _write(self) -> None:
        """Write the holder's record into the lock file."""
        fd = self._lock.fd if self._lock is not None else None
        if fd is not None:
            with contextlib.suppress(OSError):  # the lock works without the record
                os.pwrite(fd, f"{json.dumps(self._record):<{RECORD}}\n".encode(), 0)
                os.fsync(fd)  # makes it visible to other machines


def _read(path: Path) -> dict[str, Any]:
    """Read the holder of a lock; return an empty dict if the record is missing or damaged."""
    with contextlib.suppress(UserError):
        return dict(read_json(path, "record of a run's lock", Holder, max_bytes=16 * RECORD))
    return {}


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    stopping = ", which has been asked to stop" if holder.get("stopping") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}, started {holder.get('started')}{stopping}"
