"""Atomic writing of files, also through links and to devices and pipes; and reading within limits.

A crash at any moment leaves the old file or the new one, never half of one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from restomod.utils.errors import UserError
from restomod.utils.locks import POLL, SAFE_OPEN
from restomod.utils.output import print_error
from restomod.utils.temporary import Temporary

FIFO_TIMEOUT = 10.0  # seconds to wait for a named pipe's reader


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def short_name(name: str) -> str:
    """At most 200 bytes of a name, for file systems that allow 255; a hash replaces the end of a longer one."""
    if len(os.fsencode(name)) <= 200:
        return name
    start = os.fsencode(name)[:180].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"


NOT_REGULAR = {
    stat.S_ISFIFO: "a named pipe (FIFO)",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def require_regular(path: Path) -> None:
    """Raise UserError for a device, a FIFO or a socket, which may block or never end when read. Nothing is opened.

    A missing file and a folder pass: opening them says what is wrong.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    what = next((name for is_kind, name in NOT_REGULAR.items() if is_kind(mode)), None)
    if what is not None:
        raise UserError(f"{path} is {what}, not a regular file; write its content to a file and name that")


def read_limited(path: Path, what: str, max_bytes: int) -> bytes:
    """Return the content of a regular file; ``what`` names the content in messages.

    Raises:
        UserError: it has more than ``max_bytes``, or is no regular file.
        OSError: it cannot be read.
    """
    require_regular(path)
    with open(path, "rb") as f:
        content = f.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UserError(f"{path} is too large: the {what} may have at most {max_bytes:,} bytes")
    return content


def require_inside(folder: Path, *paths: Path) -> None:
    """Refuse symbolic links that lead out of a folder: a received folder must not expose or overwrite other files.

    Args:
        folder: may be a link itself.
        paths: in the folder; they need not exist.

    Raises:
        UserError: a path is outside of the folder, after following links.
    """
    within = os.path.realpath(folder)
    for path in paths:
        there = os.path.realpath(path)
        if not os.path.join(there, "").startswith(os.path.join(within, "")):
            raise UserError(
                f"{path} is a link out of {folder}, to {there}; put the file itself there, or delete the link"
            )


# what opening a folder, or syncing it, says where that does not exist; EIO and ENOSPC are failures
NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR}


def fsync_path(path: Path) -> None:
    """Ask the operating system to put a file, or a folder's list of names, on the disk.

    File systems that cannot do so for folders (network shares, Windows) write the names by themselves.
    """
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as e:
        if e.errno not in NO_FOLDER_SYNC or not path.is_dir():
            raise


def move_folder(source: Path, target: Path, last: str) -> None:
    """Give a folder its name in one step; where the file system cannot rename folders, move its files one by one.

    Both are on the same file system. The file ``last``, which marks the folder as complete, is moved last.

    Raises:
        OSError: ``target`` exists, or neither way works; nothing is left at ``target`` then.
    """
    if target.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    try:
        source.rename(target)
    except OSError:
        if not source.is_dir() or target.exists():
            raise
        try:
            files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
            for file in sorted(files, key=lambda file: (str(file) == last, file)):
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(source / file, target / file)
            fsync_path(target)
        except OSError:
            shutil.rmtree(target, ignore_errors=True)
            raise
        shutil.rmtree(source, ignore_errors=True)


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
    """Return the number of an open file of this process if a path is /dev/stdout, /dev/fd/N, or a link to one.

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


def _open_special_file(target: Destination) -> int:
    """Open a device, a named pipe or an open file of this process for writing, without truncating it."""
    if target.descriptor is not None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()  # what has been printed comes first
        return os.dup(target.descriptor)  # shares the position in the file; opening /dev/stdout would start at 0
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
                print_error(f"waiting for a reader of the named pipe {target.path}")
            time.sleep(POLL)
        else:
            os.set_blocking(fd, True)
            return fd


def write_text_atomically(path: Path, text: str, inside: Path | None = None) -> None:
    """As `write_bytes_atomically`, in UTF-8."""
    write_bytes_atomically(path, text.encode(), inside)


def write_json_atomically(path: Path, value: Any, inside: Path | None = None) -> None:
    """As `write_bytes_atomically`, indented JSON with a final newline."""
    write_text_atomically(path, json.dumps(value, indent=2) + "\n", inside)


def write_bytes_atomically(path: Path, content: bytes, inside: Path | None = None) -> None:
    """Write a whole file.

    Links are followed. A regular or new file is written under a temporary name in the same folder, synced, and renamed
    into place, so a crash leaves the old file or the new one, and nothing else. Permissions of an existing file are
    kept. A device, a named pipe (FIFO) and an open file of this process (/dev/stdout, /dev/fd/N) are written to and
    stay what they are.

    Args:
        path: the file.
        content: its new content.
        inside: a folder that links must not leave, for paths that the user has not typed: folders are passed around.

    Raises:
        UserError: nothing can be written there; see `resolve_destination`.
        OSError: the disk is full, or refuses. It names ``path``.
    """
    if inside is not None:
        require_inside(inside, path)
    try:
        target = resolve_destination(path)
        if target.is_regular:
            _replace(target, content)
        else:
            _write_special_file(target, content)
    except OSError as e:
        if e.errno is not None:
            e.filename, e.filename2 = str(path), None  # and not the temporary one
        raise


def _replace(target: Destination, content: bytes) -> None:
    with Temporary(target.real.parent) as temporary:
        assert temporary.fd is not None
        if target.status is not None:
            _keep_permissions(temporary.fd, target.status)
        with open(temporary.fd, "wb", closefd=False) as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        temporary.move(target.real)
    fsync_path(target.real.parent)


def _keep_permissions(fd: int, status: os.stat_result) -> None:
    """Give an open file the owner, where that is allowed, and the permissions of another one."""
    if not hasattr(os, "fchown"):  # Windows
        return
    now = os.fstat(fd)
    for owner, group in ((status.st_uid, status.st_gid), (-1, status.st_gid)):
        if (now.st_uid, now.st_gid) != (status.st_uid, status.st_gid):
            with contextlib.suppress(OSError):
                os.fchown(fd, owner, group)
                break
    os.fchmod(fd, stat.S_IMODE(status.st_mode))


def _write_special_file(target: Destination, content: bytes) -> None:
    fd = _open_special_file(target)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(fd, left) :]
    except BrokenPipeError:
        if target.descriptor is not None:
            raise
        raise UserError(f"{target.path}: its reader has left before all was written") from None
    finally:
        os.close(fd)


def open_to_append(path: Path) -> BinaryIO:
    """Open or create a file to append to, unbuffered; raises OSError if it is a link or not a regular file."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link; put the file itself there", str(path))
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | SAFE_OPEN, 0o666)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(fd, "ab", buffering=0)
