"""Exclusive locks between processes, which the kernel releases when the last process that holds one ends.

So no timeout is needed: a killed worker's lock is free at once. Locks work between machines where the shared file
system supports `flock`: NFSv4, Lustre (mounted with flock), GPFS, CephFS.
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
SAFE_FLAGS = "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"  # no system has all of them
SAFE_OPEN: int = sum(getattr(os, name, 0) for name in SAFE_FLAGS)
"""For `os.open`: neither follow a link nor wait for the other end of a named pipe."""
TELL_AFTER = 5.0  # seconds of waiting before it is told


class FileLock:
    """An exclusive lock on the file at ``path``, which is made if it is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd: int | None = None
        """The open file while it is locked. A process that inherits it holds the lock too."""
        self.enforced = True
        """False where the file system has no locks: then nobody is kept out."""

    def acquire(self, wait: bool = True) -> bool:
        """Take the lock. Returns whether it has been got; with ``wait`` it always is.

        Raises:
            OSError: the file cannot be made or opened for writing.
            UserError: it is a link, a named pipe or a device.
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
            os.close(fd)  # the one that held it has removed or renamed the file

    def _open(self) -> int:
        """Open the file, which holders of locks write to: never through a link that somebody has put there."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | SAFE_OPEN, 0o666)
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return fd
            os.close(fd)
        except OSError:
            if not self.path.is_symlink():
                raise
        raise UserError(f"{self.path} is a link, a named pipe or a device where a lock file belongs; delete it")

    def release(self, remove: bool = False) -> None:
        """Release this process's lock; ``remove`` its file too, unless another process has inherited the lock."""
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
    """Hold the lock at ``path`` and remove its file at the end. ``tell`` is called once if waiting takes long."""
    lock, began, told = FileLock(path), time.monotonic(), False
    while not lock.acquire(wait=False):  # not one long wait, during which no signal would be answered
        if not told and time.monotonic() > began + TELL_AFTER:
            told = True
            tell()
        time.sleep(POLL)
    try:
        yield lock
    finally:
        lock.release(remove=True)


def flock(fd: int, wait: bool) -> bool:
    """Lock an open file. Returns whether this system and file system have such locks.

    Raises:
        BlockingIOError: another process has the lock, and this one is not to wait.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:  # ENOSYS, ENOTSUP, ENOLCK or EINVAL, from a file system without locks
        return False
    return True


def is_at(fd: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False
