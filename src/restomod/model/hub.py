"""Models from the Hugging Face hub by name."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from restomod.model.storage import weights_files
from restomod.utils.errors import UserError, one_line
from restomod.utils.hub import hub_file, quiet_client

OPENAI = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
VOCABULARIES = ("vocab.json", "tokenizer.json")
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def hub_name(name: str) -> str | None:
    """The hub's ``owner/name`` for ``name``, which may be one of OpenAI's four; None if it cannot be one."""
    return OPENAI.get(name) or (name if REPOSITORY.fullmatch(name) else None)


def download_model(repository: str) -> Path:
    """The folder of a model of the hub, downloaded where it is not in the cache already.

    All files are of one commit, and each has the hash that the hub gives for it. Without a connection the commit
    that was last downloaded whole is used.

    Raises:
        UserError: the hub has no such model, cannot be reached, or keeps sending something else.
    """
    commit, obstacle = _newest_commit(repository)
    if commit is not None:
        config = hub_file(repository, "config.json", commit, cached_only=bool(obstacle))
        files = weights_files(lambda name: hub_file(repository, name, commit, cached_only=bool(obstacle)))
        if config is not None and files is not None:
            # by which one knows whether GPT-2's tokens are the model's
            any(hub_file(repository, name, commit, cached_only=bool(obstacle)) for name in VOCABULARIES)
            if not obstacle:
                _remember(repository, commit)
            return config.parent
    if obstacle:
        raise UserError(
            f"{repository}: the Hugging Face hub cannot be reached ({obstacle}), and the model is not in its cache; "
            f"connect once, or give the folder of a downloaded model"
        )
    raise UserError(f"{repository} on the hub has no weights: no model.safetensors and no pytorch_model.bin")


def _remember(repository: str, commit: str) -> None:
    """Let the cache know that `main` is this commit: the client notes it only when it is asked for `main`."""
    import huggingface_hub as hub

    cached = hub.try_to_load_from_cache(repository, "config.json")
    if not isinstance(cached, str) or Path(cached).parent.name != commit:
        with contextlib.suppress(Exception), quiet_client():  # all that is lost is going on without a connection
            hub.hf_hub_download(repository, "config.json")


def _newest_commit(repository: str) -> tuple[str | None, str]:
    """The commit that `main` stands at, and ""; if the hub cannot be reached, the cache's commit, and why."""
    import huggingface_hub as hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        with quiet_client():
            commit = hub.get_hf_file_metadata(hub.hf_hub_url(repository, "config.json")).commit_hash
        if commit:
            return commit, ""
        obstacle = "its answer names no commit"
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
        obstacle = one_line(e)
    cached = hub.try_to_load_from_cache(repository, "config.json")
    return (Path(cached).parent.name if isinstance(cached, str) else None), obstacle
