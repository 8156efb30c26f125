"""SHA-256 verification of files, without reading again those that have not changed since they were verified.

`.verified.json` in a folder records each file's inode, size and time of change (of contents or attributes) when its
SHA-256 was found right. A file for which the file system still says the same is not read again; silent corruption of
the disk is found by `restomod data --verify` (tokens) and by resuming (checkpoints).
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
SETTLED_SECONDS = 2.0  # file times tick in steps: a file changed more recently may change again unseen

Seen = list[int | str]


def changed_file(folder: Path, hashes: dict[str, str], remember: bool = True) -> str | None:
    """Return the first file of ``folder`` whose SHA-256 is not that of ``hashes``, or None.

    With ``remember``, skip files that were verified before and have not changed since, and record those verified now.
    """
    before = _read(folder) if remember else {}
    now = {name: _seen(f"{folder}/{name}", sha256) for name, sha256 in hashes.items()}
    unsure = [name for name in hashes if before.get(name) != now[name]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases Python's lock
        for name, sha256 in zip(unsure, pool.map(lambda name: sha256_file(folder / name), unsure), strict=True):
            if sha256 != hashes[name]:
                pool.shutdown(wait=False, cancel_futures=True)
                return name
    if not remember:
        return None
    settled = (time.time() - SETTLED_SECONDS) * 1e9
    right = {name: seen for name, seen in now.items() if int(seen[2]) < settled}
    if right != before:
        with contextlib.suppress(OSError, UserError):  # a folder that cannot be written is read again each time
            write_json_atomically(folder / VERIFIED, right, folder)
    return None


def _seen(path: str | Path, sha256: str) -> Seen:
    status = os.stat(path)  # of each of many shards at every start; Path's own takes three times as long
    return [status.st_ino, status.st_size, status.st_ctime_ns, sha256]


def _read(folder: Path) -> dict[str, Seen]:
    with contextlib.suppress(UserError):  # absent or damaged: nothing is known
        found: dict[str, Seen] = read_json(folder / VERIFIED, "record of verified files", dict[str, list[int | str]])
        return found
    return {}
