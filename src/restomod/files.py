"""Writing files so that a crash at any moment leaves the old one or the new one, never half of one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from restomod.errors import UserError
from restomod.locks import FileLock


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


NOT_REGULAR = {
    stat.S_ISFIFO: "a named pipe (FIFO)",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def require_regular(path: Path) -> None:
    """Refuse what may block or never end when it is read: a device, a FIFO or a socket. Nothing is opened.

    A missing file and a folder pass: opening them says what is wrong.

    Raises:
        UserError: ``path`` is none of these, after following links.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    what = next((name for is_kind, name in NOT_REGULAR.items() if is_kind(mode)), None)
    if what is not None:
        raise UserError(f"{path} is {what}, not a regular file; write its content to a file and name that")


def require_inside(folder: Path, *paths: Path) -> None:
    """Refuse links that lead out of a folder: what is received may not name other files of whoever receives it.

    Args:
        folder: may be a link itself.
        paths: files and folders in it, which need not exist.

    Raises:
        UserError: one of them is elsewhere, after following links.
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

    Args:
        source: a folder on the same file system.
        target: where nothing is yet.
        last: the file of ``source`` that says that the folder is whole. It is moved last.

    Raises:
        OSError: there is something at ``target``, or neither way works; nothing is left at ``target`` then.
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


def write_text_atomically(path: Path, text: str) -> None:
    """Write ``text`` beside ``path``, sync it, and rename it into place. Nothing is left of it where that fails."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` beside ``path``, sync it, and rename it into place. Nothing is left of it where that fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    with FileLock(temporary) as lock:  # another process may be writing the same file
        assert lock.fd is not None
        try:
            with open(lock.fd, "wb", closefd=False) as f:
                f.truncate(0)  # what a killed process has left
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            if not lock.enforced:
                lock.release()  # Windows renames no open file
            os.replace(temporary, path)
        except BaseException as e:
            lock.release(remove=True)
            if isinstance(e, OSError) and e.errno is not None and e.filename is None:  # of a disk that is full
                e.filename = str(path)
            raise
    fsync_path(path.parent)


def write_json_atomically(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON with a final newline, atomically."""
    write_text_atomically(path, json.dumps(value, indent=2) + "\n")


# (signs, files): a folder with one of the signs is a run or checkpoint, a sweep, or prepared data, and needs its files
NEEDED = (
    (
        {"metrics.jsonl", "environment.json", "model.safetensors"},
        {"config.json", "environment.json", "data.json", "metrics.jsonl", "samples.jsonl", "model.safetensors"},
    ),
    ({"journal.jsonl"}, {"plan.json", "journal.jsonl", "sweep.json"}),
    ({"manifest.json"}, {"manifest.json"}),
)


def require_outputs(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None] | None = None) -> None:
    """Refuse files that cannot be written, or would destroy something, before any work is done for them.

    Args:
        outputs: by flag, the file to write; None: it is not asked for.
        inputs: by flag, files that are read.

    Raises:
        UserError: the folder is missing or read-only; the file is a folder, a device, one that is read, or part of
            a run, a checkpoint, a sweep or prepared data; or two outputs are one file.
    """
    taken = {flag: path for flag, path in (inputs or {}).items() if path is not None}
    for flag, path in outputs.items():
        if path is None:
            continue
        if path.is_dir():
            raise UserError(f"{flag} {path} is a folder; name a file in it")
        if not path.parent.is_dir():
            raise UserError(f"{flag} {path}: there is no folder {path.parent}; make it first")
        if (path.exists() and not path.is_file()) or (path.is_symlink() and os.readlink(path).startswith("/proc/")):
            raise UserError(f"{flag} {path} is not a regular file; name another file")  # /dev/null, /dev/stdout
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(f"{flag} {path} cannot be written; name another file")
        for other, before in taken.items():
            if _same_file(path, before):
                raise UserError(f"{other} and {flag} are the same file, {path}; name two different files")
        beside = set(os.listdir(path.parent))
        if any(beside & signs and path.name in files & beside for signs, files in NEEDED):
            raise UserError(
                f"{flag} {path} would overwrite a file that restomod needs in {path.parent}; name another file"
            )
        taken[flag] = path


def _same_file(a: Path, b: Path) -> bool:
    """Whether two paths are one file, which need not exist yet."""
    return os.path.realpath(a) == os.path.realpath(b) or (a.exists() and b.exists() and a.samefile(b))
