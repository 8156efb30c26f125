"""Atomic writing of files, also through links and to devices and pipes, and reading with size limits.

After a crash, a file has either its old or its new content.
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

FIFO_TIMEOUT = 10.0  # seconds to wait for the reader of a named pipe


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def short_name(name: str) -> str:
    """Shorten a file name to at most 200 bytes (file systems allow 255); a hash replaces the end of a longer name."""
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
    """Raise UserError for a device, a named pipe or a socket, where reading may block or never end.

    Nothing is opened. Missing files and folders pass, because opening them raises a clear error.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    what = next((name for is_kind, name in NOT_REGULAR.items() if is_kind(mode)), None)
    if what is not None:
        raise UserError(f"{path} is {what}, not a regular file; copy its content to a file and name that file")


def read_limited(path: Path, what: str, max_bytes: int) -> bytes:
    """Return the content of a regular file.

    Args:
        path: file to read.
        what: name of the content in messages.
        max_bytes: maximum size.

    Raises:
        UserError: the file is larger, or not a regular file.
        OSError: the file cannot be read.
    """
    require_regular(path)
    with open(path, "rb") as f:
        content = f.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UserError(f"{path} is too large: the {what} may have at most {max_bytes:,} bytes")
    return content


def require_inside(folder: Path, *paths: Path) -> None:
    """Check that no symbolic link leads out of a folder.

    A folder received from others must not expose or overwrite other files.

    Args:
        folder: folder, which may itself be a link.
        paths: paths in the folder, which need not exist.

    Raises:
        UserError: a path leads out of the folder.
    """
    within = os.path.realpath(folder)
    for path in paths:
        there = os.path.realpath(path)
        if not os.path.join(there, "").startswith(os.path.join(within, "")):
            raise UserError(
                f"{path} is a link out of {folder}, to {there}; replace the link by a copy of the file, or delete it"
            )


# errors of platforms that cannot open or sync a folder; EIO and ENOSPC are real failures
NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR}


def fsync_path(path: Path) -> None:
    """Flush a file, or the directory entries of a folder, to the disk.

    Network shares and Windows cannot flush folders; their errors are ignored.
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
    """Rename a folder atomically; if the file system cannot rename folders, move its files.

    Args:
        source: complete folder.
        target: new path on the same file system.
        last: file that marks a folder as complete; it is moved last.

    Raises:
        OSError: ``target`` exists, or the folder cannot be moved. A partial ``target`` is removed.
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
    """Destination of a write: a regular file, a device, a named pipe, or an open file of this process."""

    path: Path
    """Path as given."""
    real: Path
    """Path with all links resolved."""
    status: os.stat_result | None
    """Status of the existing file; None if no file exists."""
    descriptor: int | None = None
    """File descriptor of this process that the path names, such as /dev/stdout; otherwise None."""

    @property
    def is_regular(self) -> bool:
        """Whether the destination is a regular or new file, which is replaced atomically."""
        return self.descriptor is None and (self.status is None or stat.S_ISREG(self.status.st_mode))


def resolve_destination(path: Path) -> Destination:
    """Resolve the destination of a write and check its permissions, without changing anything.

    Raises:
        UserError: the path is a folder, a block device or a socket, or its folder is missing.
        OSError: the file or its folder is read-only, its name is too long, or a link leads to itself.
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
        raise UserError(f"{path}: there is no folder {there}; create it first")
    if status is not None and (stat.S_ISBLK(status.st_mode) or stat.S_ISSOCK(status.st_mode)):
        raise UserError(f"{path} is a disk or a socket, not a file; name another file")
    found = Destination(path, real, status)
    for each in [real] * (status is not None) + [real.parent] * found.is_regular:
        # os.access allows root to write read-only files, so the mode is checked too
        if not os.access(each, os.W_OK) or not each.stat().st_mode & 0o222:
            raise PermissionError(errno.EACCES, "it is read-only" if each == real else "its folder is read-only")
    return found


def _descriptor(path: Path) -> int | None:
    """Return the file descriptor that a path names: /dev/stdout, /dev/fd/N, or a link to one; otherwise None.

    /proc/self/fd/N is a link to the open file. Following it would open the file a second time or replace it.
    """
    mine = {os.path.realpath(name) for name in ("/dev/fd", "/proc/self/fd", "/proc/thread-self/fd")}
    at = os.path.abspath(path)
    for _ in range(40):  # the kernel's limit of links
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
    """Open a device, a named pipe or a file descriptor of this process for writing, without truncating it."""
    if target.descriptor is not None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()  # printed text precedes the content
        return os.dup(target.descriptor)  # shares the file position; opening /dev/stdout would start at 0
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
                    f"{target.path}: no process opened this named pipe for reading within {FIFO_TIMEOUT:.0f} s; "
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
    """Write text in UTF-8 (see `write_bytes_atomically`)."""
    write_bytes_atomically(path, text.encode(), inside)


def write_json_atomically(path: Path, value: Any, inside: Path | None = None) -> None:
    """Write a value as indented JSON with a final newline (see `write_bytes_atomically`)."""
    write_text_atomically(path, json.dumps(value, indent=2) + "\n", inside)


def write_bytes_atomically(path: Path, content: bytes, inside: Path | None = None) -> None:
    """Replace the content of a file.

    Links are followed. A regular or new file is written under a temporary name in the same folder, synced, and renamed,
    so that after a crash the file has either its old or its new content. The permissions of an existing file are kept.
    A device, a named pipe or an open file of this process (/dev/stdout, /dev/fd/N) is written to and not replaced.

    Args:
        path: file to write.
        content: new content.
        inside: folder that links must not leave, for paths not typed by the user; None: no check.

    Raises:
        UserError: the destination cannot be written; see `resolve_destination`.
        OSError: the disk is full or fails. The error names ``path``.
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
            e.filename, e.filename2 = str(path), None  # instead of the temporary path
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
    """Copy the owner (if permitted) and the permissions of another file to an open file."""
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
        raise UserError(f"{target.path}: the reader closed the pipe before all data was written") from None
    finally:
        os.close(fd)


def open_to_append(path: Path) -> BinaryIO:
    """Open or create a file for unbuffered appending; raise OSError for a link or a file that is not regular."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link; replace it by a regular file", str(path))
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | SAFE_OPEN, 0o666)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(fd, "ab", buffering=0)
