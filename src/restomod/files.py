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


def fsync_path(path: Path) -> None:
    """Ask the operating system to put a file, or a folder's list of names, on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def require_folder(path: Path) -> None:
    """Refuse a file that cannot be written because its folder is not there, before any work is done for it.

    Raises:
        UserError: there is no such folder, or ``path`` is a folder itself.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it, or choose another file")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")


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
        except BaseException:
            lock.release(remove=True)
            raise
    fsync_path(path.parent)


def write_json_atomically(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON with a final newline, atomically."""
    write_text_atomically(path, json.dumps(value, indent=2) + "\n")


# a folder that holds one of the first holds state of a run, a checkpoint, a sweep or prepared data in the others
STATE = (
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
            raise UserError(f"{flag} {path} is no ordinary file; name another one")  # /dev/null, /dev/stdout
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(f"{flag} {path} cannot be written; name another file")
        for other, before in taken.items():
            if _same_file(path, before):
                raise UserError(f"{other} and {flag} are the same file, {path}; name two")
        beside = set(os.listdir(path.parent))
        if any(beside & signs and path.name in files & beside for signs, files in STATE):
            raise UserError(f"{flag} {path} is a file that restomod needs in {path.parent}; name another one")
        taken[flag] = path


def _same_file(a: Path, b: Path) -> bool:
    """Whether two paths are one file, which need not exist yet."""
    return os.path.realpath(a) == os.path.realpath(b) or (a.exists() and b.exists() and a.samefile(b))


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing, no regular file, unreadable or not JSON; the message calls it ``what``.
    """
    require_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: there is no {what} here") from None
    except OSError as e:
        raise UserError(f"{path}: cannot read the {what}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:  # JSONDecodeError, UnicodeDecodeError; absurd nesting
        raise UserError(f"{path} is damaged: the {what} is not valid JSON ({e})") from None
