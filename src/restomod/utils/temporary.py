"""Temporary files and folders, renamed when complete, and removal of leftovers of killed processes.

A temporary file is created in its final folder as `.restomod.<16 hex digits>.tmp` and is never opened through a link.
Its process holds a lock (`flock`). Creating a temporary file removes leftovers in the same folder: files whose lock is
free or, on a file system without locks, files older than a day.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import time
from pathlib import Path
from typing import Literal

from restomod.utils.locks import SAFE_OPEN, flock, is_at

NAME = re.compile(r"\.restomod\.[0-9a-f]{16}\.tmp")
STALE_AFTER = 24 * 3600.0  # seconds, on a file system without locks


class Temporary:
    """New file or folder under a temporary name, removed at the end of a `with` block unless it was moved.

    Its permissions follow the user's umask.

    Args:
        folder: folder in which to create it.
        kind: "file" or "folder".

    Raises:
        OSError: it cannot be created.
    """

    path: Path
    fd: int | None
    """Descriptor of the open file. For a folder, it only holds the lock."""

    def __init__(self, folder: Path, kind: Literal["file", "folder"] = "file") -> None:
        remove_leftovers(folder)
        made = False
        while not made:  # another process may remove it as a leftover before it is locked
            self.path = folder / f".restomod.{secrets.token_hex(8)}.tmp"
            made = self._make(kind)

    def _make(self, kind: str) -> bool:
        self.fd, self._enforced = None, False
        if kind == "file":
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | SAFE_OPEN, 0o666)
        else:
            os.mkdir(self.path)
            with contextlib.suppress(PermissionError):  # Windows cannot open folders
                try:
                    self.fd = os.open(self.path, os.O_RDONLY | SAFE_OPEN)
                except FileNotFoundError:
                    return False
        if self.fd is None:
            return True
        try:
            self._enforced = flock(self.fd, wait=False)
            if is_at(self.fd, self.path):
                return True
        except BlockingIOError:
            pass
        self._close()
        return False

    def move(self, target: Path) -> None:
        """Rename the file to ``target``, replacing an existing file."""
        if not self._enforced:
            self._close()  # Windows cannot rename open files
        os.replace(self.path, target)
        self._close()

    def __enter__(self) -> Temporary:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the file or folder, unless it was moved."""
        _remove(self.path)
        self._close()

    def _close(self) -> None:
        if self.fd is not None:
            fd, self.fd = self.fd, None
            os.close(fd)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders without a living process; failures are ignored."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if NAME.fullmatch(name):
                with contextlib.suppress(OSError):
                    _remove_leftover(folder / name)


def _remove_leftover(path: Path) -> None:
    status = path.lstat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return  # not created by this module
    fd = os.open(path, (os.O_RDONLY if stat.S_ISDIR(status.st_mode) else os.O_RDWR) | SAFE_OPEN)
    try:
        enforced = flock(fd, wait=False)
        if is_at(fd, path) and (enforced or time.time() > status.st_mtime + STALE_AFTER):
            _remove(path)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
