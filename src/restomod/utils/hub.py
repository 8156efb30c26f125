"""Downloads from the Hugging Face hub, verified against the hub's hashes.

`huggingface_hub` downloads files and manages the cache (`HF_HOME`, shared with `transformers` and `datasets`). It does
not verify hashes and does not retry some broken connections; this module does both.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from restomod.utils.errors import UserError, one_line
from restomod.utils.files import sha256_file

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)

ATTEMPTS = 4
SECONDS_BETWEEN_ATTEMPTS = 2.0

# messages of the client about problems that it solves, or that this module reports itself
WARNINGS = r"(Not enough free disk space|`huggingface_hub` cache-system uses symlinks)"
RETRY_MESSAGES = r"Error while downloading|HTTP Error \d+ thrown|'.*' thrown while requesting|Retrying in"

Kind = Literal["model", "dataset"]


def hub_file(
    repository: str,
    name: str,
    commit: str,
    kind: Kind = "model",
    cached_only: bool = False,
    cache: Path | None = None,
) -> Path | None:
    """Return the path of a verified file of a commit in the cache, downloading it if necessary.

    Args:
        repository: ``owner/name``.
        name: path of the file in the repository.
        commit: commit hash, 40 hexadecimal digits.
        kind: type of repository.
        cached_only: whether to use the cache only, without a request to the hub.
        cache: cache folder; None: the default of `huggingface_hub`.

    Returns:
        Path in the cache. None if the commit has no such file, or with ``cached_only`` if it is not in the cache.

    Raises:
        UserError: the hub cannot be reached, the file's hash is wrong, or the disk is full.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    where: dict[str, Any] = {"repo_type": kind, "revision": commit, "cache_dir": cache}
    reason: BaseException | str = ""
    for attempt in range(ATTEMPTS):
        cached = hub.try_to_load_from_cache(repository, name, **where)
        if cached is not None and not isinstance(cached, str):  # the cache records that the file does not exist
            if kind == "model":
                return None
            cached = None  # the dataset's listing contains the file, so try again
        if cached is None and cached_only:
            return None
        try:
            with quiet_client():
                path = Path(cached or hub.hf_hub_download(repository, name, **where))
        except RemoteEntryNotFoundError:
            return None
        except LocalEntryNotFoundError as e:  # no answer of the hub; the client has already waited
            reason = e.__cause__ or e
            break
        except Exception as e:  # broken connections raise errors of httpx, httpx2, xet or the operating system
            if isinstance(e, OSError) and e.errno in DISK_ERRORS:
                raise UserError(f"{e.filename or 'the cache of the hub'}: cannot save {name} ({e.strerror})") from None
            reason = e
            if attempt + 1 < ATTEMPTS:
                time.sleep(SECONDS_BETWEEN_ATTEMPTS)
            continue
        if as_published(path):
            return path
        reason = "its SHA differs from the hub's"
        remove_download(path)
    raise UserError(f"cannot download {name} of {repository}: {one_line(reason)}; run the same command again later")


@contextlib.contextmanager
def quiet_client() -> Iterator[None]:
    """Suppress messages of the hub client about retries and free disk space."""

    def is_shown(record: logging.LogRecord) -> bool:
        return re.match(RETRY_MESSAGES, record.getMessage()) is None

    handlers = list(logging.getLogger("huggingface_hub").handlers)
    for handler in handlers:
        handler.addFilter(is_shown)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=WARNINGS, category=UserWarning)
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_shown)


def as_published(path: Path) -> bool:
    """Return whether the content of a cached file matches its hash, which is its name in the cache."""
    blob = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):  # large files: SHA-256
        return sha256_file(blob) == blob.name
    if re.fullmatch(r"[0-9a-f]{40}", blob.name):  # small files: git blob hash
        content = blob.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == blob.name
    return True  # without links, the cache has no hashes


def remove_download(path: Path) -> None:
    """Remove a file and its linked content from the cache."""
    for part in (path.resolve(), path):
        part.unlink(missing_ok=True)
