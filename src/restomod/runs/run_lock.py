"""The lock of a run: one job trains it at a time, and takes the lock before it changes anything in the folder.

RUN/.lock           held while the run is trained; says by whom
.NAME.lock          beside a folder that is still to be made, until it is

The lock is the kernel's (`restomod.utils.locks`), so nothing has to be cleaned up after a kill. The file names
the holder, and is a heartbeat for machines whose file system does not share locks: the holder rewrites it every few
seconds, and a record that keeps changing belongs to a running process.
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

PATIENCE = 30.0  # seconds to wait for a job that holds the run: it may be about to receive its signal
SAVING = 600.0  # seconds to wait for one that has received a signal, and saves
BEAT = 5.0  # seconds between two writes of the holder
SILENT = 3 * BEAT  # seconds without a change after which another machine no longer holds the lock
RECORD = 300  # characters, padded: a reader never sees the end of an older record


class Holder(TypedDict, total=False):
    """Contents of a lock file."""

    host: str
    pid: int
    started: str
    stopping: bool
    beat: int


class RunLock:
    """The lock of one run, which the main process takes for all ranks. ``print_line`` is told why it waits."""

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
        """Lock an existing run once a job that is ending has ended, or a new run's name. Raises UserError: taken."""
        if resume:
            self._acquire(self.folder / ".lock", PATIENCE)
            return
        parent = self.folder.resolve().parent
        self._created = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        parent.mkdir(parents=True, exist_ok=True)
        self._acquire(parent / f".{short_name(self.folder.resolve().name)}.lock", 0.0)

    def move_into_folder(self) -> None:
        """Switch to the lock inside a new run's folder, once that exists."""
        before = self._lock
        self._acquire(self.folder / ".lock", 0.0)
        if before is not None and before is not self._lock:
            before.release(remove=True)

    def stopping(self) -> None:
        """Tell waiting jobs that this job is stopping. May be called from a signal handler."""
        self._record["stopping"] = True
        self._write()

    def release(self) -> None:
        """Release the lock."""
        self._over.set()
        if self._lock is not None:
            self._lock.release(remove=True)
        for folder in self._created:  # if no run was created in them
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
                    f"{self.folder} is already being trained by {_describe(holder)}; wait for it or stop it, then "
                    f"resume with `restomod train --resume {quote(str(self.folder))}`"
                )
            if not told:
                told = True
                self._print_line(f"{self.folder} is being trained by {_describe(holder)}; waiting until it ends")
            time.sleep(POLL)
        if not lock.enforced:
            self._print_line(f"the file system of {path} has no locks; make sure that no other job trains this run")
        first, self._lock = self._lock is None, lock
        self._write()
        if first:
            threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def _held_elsewhere(self, lock: FileLock, holder: dict[str, Any]) -> bool:
        """Whether another machine holds a lock that could be taken here, as the file system does not share locks."""
        if not holder or (holder.get("host") == self._record["host"] and lock.enforced):
            return False
        self._print_line(
            f"{self.folder} was last trained by {_describe(holder)}; checking for {SILENT:.0f} s whether it still is"
        )
        end = time.monotonic() + SILENT
        while time.monotonic() < end:
            time.sleep(POLL)
            now = _read(lock.path)
            if now and now != holder:
                return True
            if not lock.path.exists():
                return False  # it has ended
        return False

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            self._record["beat"] += 1
            self._write()

    def _write(self) -> None:
        """Write the holder into the lock file."""
        fd = self._lock.fd if self._lock is not None else None
        if fd is not None:
            with contextlib.suppress(OSError):  # a full disk: the lock holds without it
                os.pwrite(fd, f"{json.dumps(self._record):<{RECORD}}\n".encode(), 0)
                os.fsync(fd)  # on a shared file system, for others to see


def _read(path: Path) -> dict[str, Any]:
    """The holder of a lock; empty if the file does not say."""
    with contextlib.suppress(UserError):
        return dict(read_json(path, "record of who trains the run", Holder, max_bytes=16 * RECORD))
    return {}


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    stopping = ", which has been asked to stop" if holder.get("stopping") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}, started {holder.get('started')}{stopping}"
