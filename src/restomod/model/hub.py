"""Models from the Hugging Face hub, whole and as published.

The hub's own client does the talking and keeps the cache (`HF_HOME`, shared with `transformers`). It does not compare
what it received with the hash it was promised, and gives up on some broken connections; both are seen to here.
"""

from __future__ import annotations

import hashlib
import re
import time
from pathlib import Path
from typing import Any

from restomod.errors import UserError
from restomod.files import sha256_file
from restomod.model.storage import weights_files

OPENAI = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")

ATTEMPTS = 4
SECONDS_BETWEEN_ATTEMPTS = 2.0


def hub_name(name: str) -> str | None:
    """The hub's ``owner/name`` for ``name``, which may be one of OpenAI's four; None if it cannot be one."""
    return OPENAI.get(name) or (name if REPOSITORY.fullmatch(name) else None)


def download_model(repository: str) -> Path:
    """The folder of a model of the hub, downloaded where it is not in the cache already.

    All files are of one commit, and each has the hash that the hub gives for it. Without a connection the newest
    cached commit is used.

    Raises:
        UserError: the hub has no such model, cannot be reached, or keeps sending something else.
    """
    commit = _newest_commit(repository)
    config = _file(repository, "config.json", commit)
    if config is None:
        raise UserError(f"{repository} on the hub has no config.json: it is not a model for `transformers`")
    if weights_files(lambda name: _file(repository, name, commit)) is None:
        raise UserError(f"{repository} on the hub has no weights: no model.safetensors and no pytorch_model.bin")
    return config.parent


def _newest_commit(repository: str) -> str:
    """The commit that `main` stands at; that of the cache if the hub cannot be reached."""
    import huggingface_hub as hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        commit = hub.get_hf_file_metadata(hub.hf_hub_url(repository, "config.json")).commit_hash
        if commit:
            return commit
        reason: Exception | str = "its answer names no commit"
    except RemoteEntryNotFoundError:
        raise UserError(f"{repository} on the hub has no config.json: it is not a model for `transformers`") from None
    except GatedRepoError:
        raise UserError(f"{repository} on the hub is gated: accept its terms there, then `hf auth login`") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{repository}: no such folder here, and no such public model on the Hugging Face hub; "
            f"OpenAI's are {', '.join(OPENAI)}"
        ) from None
    except Exception as e:  # no common base: httpx's errors in one version, httpx2's in another, OSError
        reason = e
    cached = hub.try_to_load_from_cache(repository, "config.json")
    if isinstance(cached, str):
        return Path(cached).parent.name
    raise UserError(
        f"{repository}: the Hugging Face hub cannot be reached ({_one_line(reason)}), and the model is not in its "
        f"cache; connect once, or give the folder of a downloaded model"
    )


def _file(repository: str, name: str, commit: str) -> Path | None:
    """One file of a commit, verified; None if the commit has none of that name."""
    import huggingface_hub as hub
    from huggingface_hub.errors import RemoteEntryNotFoundError

    reason: Exception | str = ""
    for attempt in range(ATTEMPTS):
        cached = hub.try_to_load_from_cache(repository, name, revision=commit)
        if cached is not None and not isinstance(cached, str):
            return None  # remembered to be absent
        try:
            path = Path(cached or hub.hf_hub_download(repository, name, revision=commit))
        except RemoteEntryNotFoundError:
            return None
        except Exception as e:  # a connection may break in the terms of httpx, httpx2, xet or the operating system
            reason = e
            if attempt + 1 < ATTEMPTS:
                time.sleep(SECONDS_BETWEEN_ATTEMPTS)
            continue
        if _as_published(path):
            return path
        reason = "what came is not what the hub promised: its SHA differs"
        for spoiled in (path.resolve(), path):
            spoiled.unlink(missing_ok=True)
    raise UserError(
        f"cannot download {name} of {repository}: {_one_line(reason)} ({ATTEMPTS} attempts); "
        f"run the same command again when the connection is better"
    )


def _as_published(path: Path) -> bool:
    """Whether a cached file has the content that the hub announced: the cache names it by its hash."""
    blob = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):  # large files
        return sha256_file(blob) == blob.name
    if re.fullmatch(r"[0-9a-f]{40}", blob.name):  # small ones are git's
        content = blob.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == blob.name
    return True  # a file system without links keeps no hash


def _one_line(reason: Any) -> str:
    return (str(reason).strip() or type(reason).__name__).splitlines()[0][:200]
