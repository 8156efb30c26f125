"""Writing files so that a crash at any moment leaves the old one or the new one, never half of one."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from restomod.errors import UserError


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


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


def write_text_atomically(path: Path, text: str) -> None:
    """Write ``text`` beside ``path``, sync it, and rename it into place."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    fsync_path(path.parent)


def write_json_atomically(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON with a final newline, atomically."""
    write_text_atomically(path, json.dumps(value, indent=2) + "\n")


def refuse_unwritable(file: Path) -> None:
    """Raise UserError where a file could not be written, before long work for it begins."""
    if file.is_dir():
        raise UserError(f"{file} is a folder; name a file")
    if not file.parent.is_dir():
        raise UserError(f"{file}: there is no folder {file.parent}; make it first")
    if file.exists() and not file.is_file():  # a file is written beside it and takes its place
        raise UserError(f"{file} is no regular file; name one that may be replaced")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"{file} cannot be written; name another file")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing, unreadable or not JSON; the message calls it ``what``.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: there is no {what} here") from None
    except OSError as e:
        raise UserError(f"{path}: cannot read the {what}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:  # JSONDecodeError, UnicodeDecodeError; absurd nesting
        raise UserError(f"{path} is damaged: the {what} is not valid JSON ({e})") from None
