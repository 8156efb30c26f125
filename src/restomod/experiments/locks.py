"""Exclusive locks between processes. The kernel holds them and lets go when the last process that has one ends.

Nothing has to time out, then: what a killed worker held is free at once. Processes of several machines lock each other
out where the shared file system passes `flock` on: NFSv4, Lustre (mounted with flock), GPFS, CephFS.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from restomod.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class FileLock:
    """An exclusive lock on the file at ``path``, which is made if it is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd: int | None = None
        """The open file while it is locked. A process that inherits it holds the lock too."""

    def acquire(self, wait: bool = True) -> bool:
        """Take the lock. Returns whether it has been got; with ``wait`` it always is.

        Raises:
            UserError: this system has no such locks.
        """
        if fcntl is None:
            raise UserError("a sweep needs file locks (flock) as Linux and macOS have them; on Windows use WSL")
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(fd)
            return False
        except BaseException:
            os.close(fd)
            raise
        self.fd = fd
        return True

    def release(self) -> None:
        """Let go of it, as far as this process is concerned."""
        if self.fd is not None:
            fd, self.fd = self.fd, None
            os.close(fd)

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
