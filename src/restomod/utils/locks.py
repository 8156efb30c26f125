"""Exclusive file locks between processes, released by the kernel when the last process that holds one ends.

The lock of a killed process is free immediately, so locks need no timeout. Locks work between machines if the shared
file system supports `flock`: NFSv4, Lustre (mounted with flock), GPFS, CephFS.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from restomod.utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

POLL = 0.1  # seconds between attempts to get a lock
SAFE_FLAGS = "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"  # no platform has all of them
SAFE_OPEN: int = sum(getattr(os, name, 0) for name in SAFE_FLAGS)
"""Flags of `os.open` that do not follow links and do not block on named pipes."""
TELL_AFTER = 5.0  # seconds of waiting before the callback


class FileLock:
    """Exclusive lock on a file, which is created if it is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd: int | None = None
        """Descriptor of the locked file, otherwise None. A process that inherits it also holds the lock."""
        self.enforced = True
        """False if the file system has no locks; other processes are not excluded then."""

    def acquire(self, wait: bool = True) -> bool:
        """Acquire the lock.

        Args:
            wait: whether to wait for a lock that another process holds.

        Returns:
            Whether the lock was acquired; always True with ``wait``.

        Raises:
            OSError: the file cannot be created or opened for writing.
            UserError: the file is a link, a named pipe or a device.
        """
        while True:
            fd = self._open()
            try:
                self.enforced = flock(fd, wait)
                current = is_at(fd, self.path)
            except BlockingIOError:
                os.close(fd)
                return False
            except BaseException:
                os.close(fd)
                raise
            if current:
                self.fd = fd
                return True
            os.close(fd)  # the previous holder has removed or renamed the file

    def _open(self) -> int:
        """Open the lock file for writing, without following a link."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | SAFE_OPEN, 0o666)
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return fd
            os.close(fd)
        except OSError:
            if not self.path.is_symlink():
                raise
        raise UserError(f"{self.path} is a link, a named pipe or a device, not a lock file; delete it")

    def release(self, remove: bool = False) -> None:
        """Release the lock.

        Args:
            remove: whether to delete the file too, unless another process has replaced it.
        """
        if self.fd is not None:
            fd, self.fd = self.fd, None
            with contextlib.suppress(OSError):
                if remove and is_at(fd, self.path):
                    self.path.unlink()
            os.close(fd)

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@contextlib.contextmanager
def locked(path: Path, tell: Callable[[], None]) -> Iterator[FileLock]:
    """Hold a lock within a `with` block and delete its file at the end.

    Args:
        path: lock file.
        tell: callback, called once if waiting takes more than `TELL_AFTER` seconds.
    """
    lock, began, told = FileLock(path), time.monotonic(), False
    while not lock.acquire(wait=False):  # polling, so that signals are handled
        if not told and time.monotonic() > began + TELL_AFTER:
            told = True
            tell()
        time.sleep(POLL)
    try:
        yield lock
    finally:
        lock.release(remove=True)


def flock(fd: int, wait: bool) -> bool:
    """Lock an open file exclusively.

    Args:
        fd: file descriptor.
        wait: whether to wait for a lock that another process holds.

    Returns:
        Whether platform and file system support locks.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is False.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:  # ENOSYS, ENOTSUP, ENOLCK or EINVAL: file system without locks
        return False
    return True


def is_at(fd: int, path: Path) -> bool:
    """Return whether an open file is still the file at a path."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False
