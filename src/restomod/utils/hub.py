"""Downloads from the Hugging Face hub, verified against the hashes that the hub announces.

The hub's own client downloads and keeps the cache (`HF_HOME`, shared with `transformers` and `datasets`). It does not
verify hashes and gives up on some broken connections; this module does the former and retries the latter.
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

OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)

ATTEMPTS = 4
SECONDS_BETWEEN_ATTEMPTS = 2.0

# what the client says on standard error of what it then gets over, or what then ends in one line of ours
WARNINGS = r"(Not enough free disk space|`huggingface_hub` cache-system uses symlinks)"
REMARKS = r"Error while downloading|HTTP Error \d+ thrown|'.*' thrown while requesting|Retrying in"

Kind = Literal["model", "dataset"]


def hub_file(
    repository: str,
    name: str,
    commit: str,
    kind: Kind = "model",
    cached_only: bool = False,
    cache: Path | None = None,
) -> Path | None:
    """Return one file of a commit, verified; None if the commit has no file ``name``.

    Args:
        repository: ``owner/name``.
        name: path in the repository.
        commit: 40 hexadecimal digits.
        kind: kind of repository.
        cached_only: do not ask the hub; None then also means that the file is not in the cache.
        cache: folder to download into; None: the client's own.

    Raises:
        UserError: the hub cannot be reached, keeps sending something else, or the disk is full.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    where: dict[str, Any] = {"repo_type": kind, "revision": commit, "cache_dir": cache}
    reason: BaseException | str = ""
    for attempt in range(ATTEMPTS):
        cached = hub.try_to_load_from_cache(repository, name, **where)
        if cached is not None and not isinstance(cached, str):  # remembered to be absent
            if kind == "model":
                return None
            cached = None  # a dataset's file was listed, so it must come some time
        if cached is None and cached_only:
            return None
        try:
            with quiet_client():
                path = Path(cached or hub.hf_hub_download(repository, name, **where))
        except RemoteEntryNotFoundError:
            return None
        except LocalEntryNotFoundError as e:  # the hub does not answer; the client has waited for it already
            reason = e.__cause__ or e
            break
        except Exception as e:  # a connection may break in the terms of httpx, httpx2, xet or the operating system
            if isinstance(e, OSError) and e.errno in OF_THE_DISK:
                raise UserError(f"{e.filename or 'the cache of the hub'}: cannot save {name} ({e.strerror})") from None
            reason = e
            if attempt + 1 < ATTEMPTS:
                time.sleep(SECONDS_BETWEEN_ATTEMPTS)
            continue
        if as_published(path):
            return path
        reason = "what came is not what the hub promised: its SHA differs"
        remove_download(path)
    raise UserError(
        f"cannot download {name} of {repository}: {one_line(reason)}; "
        f"run the same command again when the connection is better"
    )


@contextlib.contextmanager
def quiet_client() -> Iterator[None]:
    """Silence the hub client's messages about retries and free disk space."""

    def worth_saying(record: logging.LogRecord) -> bool:
        return re.match(REMARKS, record.getMessage()) is None

    handlers = list(logging.getLogger("huggingface_hub").handlers)
    for handler in handlers:
        handler.addFilter(worth_saying)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=WARNINGS, category=UserWarning)
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(worth_saying)


def as_published(path: Path) -> bool:
    """Whether a cached file has the content that the hub announced: the cache names it by its hash."""
    blob = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):  # large files
        return sha256_file(blob) == blob.name
    if re.fullmatch(r"[0-9a-f]{40}", blob.name):  # small ones are git's
        content = blob.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == blob.name
    return True  # a file system without links keeps no hash


def remove_download(path: Path) -> None:
    """Remove a file from the cache, and the content that it links to."""
    for part in (path.resolve(), path):
        part.unlink(missing_ok=True)
