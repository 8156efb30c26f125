"""Where writing to a path leads: links, devices, named pipes, open files of this process."""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from restomod.utils.errors import UserError
from restomod.utils.locks import POLL, SAFE_OPEN
from restomod.utils.output import complain

FIFO_TIMEOUT = 10.0  # seconds to wait for a named pipe's reader


@dataclass(frozen=True)
class Destination:
    """The target of writing to a path."""

    path: Path
    """As it was given."""
    real: Path
    """All links followed."""
    status: os.stat_result | None
    """Of what is there; None: nothing is."""
    descriptor: int | None = None
    """The open file of this process that the path stands for."""

    @property
    def is_regular(self) -> bool:
        """Whether it is a regular file or a new one, which are replaced as a whole."""
        return self.descriptor is None and (self.status is None or stat.S_ISREG(self.status.st_mode))


def resolve_destination(path: Path) -> Destination:
    """Resolve where writing to a path leads and check that it is permitted; nothing is changed.

    Raises:
        UserError: it is a folder, a disk or a socket, or its folder is missing.
        OSError: it or its folder is read-only, its name is too long, or a link leads to itself.
    """
    descriptor = _descriptor(path)
    real = Path(os.path.realpath(path))
    try:
        status = os.stat(path)
    except FileNotFoundError:
        status = None
    if descriptor is not None:
        if status is None:
            raise UserError(f"{path}: this process has no open file {descriptor}; name another file")
        return Destination(path, real, status, descriptor)
    if status is not None and stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path} is a folder; name a file in it")
    if not real.parent.is_dir():
        there = real.parent if path.is_symlink() else path.parent
        raise UserError(f"{path}: there is no folder {there}; make it first")
    if status is not None and (stat.S_ISBLK(status.st_mode) or stat.S_ISSOCK(status.st_mode)):
        raise UserError(f"{path} is a disk or a socket, not a file; name another file")
    found = Destination(path, real, status)
    for each in [real] * (status is not None) + [real.parent] * found.is_regular:
        # root may write everything, but what has been made read-only was not meant to be written
        if not os.access(each, os.W_OK) or not each.stat().st_mode & 0o222:
            raise PermissionError(errno.EACCES, "it is read-only" if each == real else "its folder is read-only")
    return found


def _descriptor(path: Path) -> int | None:
    """The number of an open file of this process, where a path is /dev/stdout, /dev/fd/N, or a link to one of these.

    The system gives /proc/self/fd/N as a link to the open file: followed, it would be opened anew, or replaced.
    """
    mine = {os.path.realpath(name) for name in ("/dev/fd", "/proc/self/fd", "/proc/thread-self/fd")}
    at = os.path.abspath(path)
    for _ in range(40):  # links, as the kernel follows them
        folder, name = os.path.split(at)
        folder = os.path.realpath(folder)
        if folder in mine and name.isdecimal():
            return int(name)
        at = os.path.join(folder, name)
        if not os.path.islink(at):
            return None
        at = os.path.join(folder, os.readlink(at))
    return None


def open_special_file(target: Destination) -> int:
    """Open a device, a named pipe or an open file of this process for writing, without truncating it.

    Raises:
        UserError: nothing reads a named pipe.
        OSError: the system refuses.
    """
    if target.descriptor is not None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()  # what has been printed comes first
        return os.dup(target.descriptor)  # which goes on where the other has come to; /dev/stdout begins at 0
    assert target.status is not None
    if not stat.S_ISFIFO(target.status.st_mode):
        return os.open(target.real, os.O_WRONLY | getattr(os, "O_NOCTTY", 0))
    until, told = time.monotonic() + FIFO_TIMEOUT, False
    while True:
        try:
            fd = os.open(target.real, os.O_WRONLY | SAFE_OPEN)
        except OSError as e:
            if e.errno != errno.ENXIO:
                raise
            if time.monotonic() > until:
                raise UserError(
                    f"{target.path}: nothing has opened this named pipe for reading within {FIFO_TIMEOUT:.0f} s; "
                    f"start its reader first"
                ) from None
            if not told:
                told = True
                complain(f"waiting for a reader of the named pipe {target.path}")
            time.sleep(POLL)
        else:
            os.set_blocking(fd, True)
            return fd
