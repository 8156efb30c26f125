"""SHA-256 verification of files, with a cache of files that were verified before.

`.verified.json` in a folder records inode, size and change time (ctime) of each verified file. A file with the same
inode, size and change time is not read again. Silent corruption of the disk is detected by `restomod data --verify`
(tokens) and by resuming (checkpoints).
"""

from __future__ import annotations

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from restomod.utils.errors import UserError
from restomod.utils.files import sha256_file, write_json_atomically
from restomod.utils.json_files import read_json

VERIFIED = ".verified.json"
SETTLED_SECONDS = 2.0  # resolution of file times; a later change of a newer file could be missed

Seen = list[int | str]


def changed_file(folder: Path, hashes: dict[str, str], remember: bool = True) -> str | None:
    """Return the name of the first file with another SHA-256 than expected; None if all files are unchanged.

    Args:
        folder: folder of the files.
        hashes: expected SHA-256 by file name.
        remember: whether to skip files that were verified before and to record newly verified ones.
    """
    before = _read(folder) if remember else {}
    now = {name: _seen(f"{folder}/{name}", sha256) for name, sha256 in hashes.items()}
    unsure = [name for name in hashes if before.get(name) != now[name]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the GIL
        for name, sha256 in zip(unsure, pool.map(lambda name: sha256_file(folder / name), unsure), strict=True):
            if sha256 != hashes[name]:
                pool.shutdown(wait=False, cancel_futures=True)
                return name
    if not remember:
        return None
    settled = (time.time() - SETTLED_SECONDS) * 1e9
    right = {name: seen for name, seen in now.items() if int(seen[2]) < settled}
    if right != before:
        with contextlib.suppress(OSError, UserError):  # a read-only folder is verified every time
            write_json_atomically(folder / VERIFIED, right, folder)
    return None


def _seen(path: str | Path, sha256: str) -> Seen:
    status = os.stat(path)  # called for thousands of shards; Path.stat takes three times as long
    return [status.st_ino, status.st_size, status.st_ctime_ns, sha256]


def _read(folder: Path) -> dict[str, Seen]:
    with contextlib.suppress(UserError):  # missing or damaged: verify all files
        found: dict[str, Seen] = read_json(folder / VERIFIED, "record of verified files", dict[str, list[int | str]])
        return found
    return {}
