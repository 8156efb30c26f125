"""Search for and download of the files of a dataset on the Hugging Face hub, by configuration and split.

The card of a dataset (the front matter of its README) lists configurations and their files under `configs`. Without
this list, files are selected by their folders and names. Files that `restomod.data.readers` cannot read are ignored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restomod.data.file_format import JSON_LINES, PARQUET, TABLES
from restomod.data.find_files import matches
from restomod.data.streams import COMPRESSION_ENDINGS
from restomod.utils.errors import UserError, did_you_mean, one_line
from restomod.utils.hub import hub_file

READABLE = (PARQUET, ".txt", ".md", *JSON_LINES)
IF_LISTED = (".json", *TABLES)  # read if the card lists them (C4's .json.gz); usually they are metadata
SCHEME = "hf://datasets/"


@dataclass(frozen=True)
class HubFile:
    """File of a dataset on the hub at one commit; its string is the address hf://datasets/REPOSITORY@COMMIT/PATH."""

    repository: str
    commit: str
    path: str
    bytes: int

    def __str__(self) -> str:
        return f"{SCHEME}{self.repository}@{self.commit}/{self.path}"


def parse_address(address: str) -> tuple[str, str, str]:
    """Split the address of a `HubFile` into repository, commit and path.

    Raises:
        ValueError: the address is not that of a hub file.
    """
    found = re.fullmatch(re.escape(SCHEME) + r"([^@]+)@([0-9a-f]{40})/(.+)", address)
    if found is None:
        raise ValueError(f"not the address of a file on the hub: {address!r}")
    return found[1], found[2], found[3]


def dataset_files(repository: str, config: str | None, split: str, revision: str) -> list[HubFile]:
    """Return the files of a dataset's split on the hub, sorted by path, all of one commit.

    Args:
        repository: name of the dataset repository, OWNER/NAME.
        config: configuration of the dataset; None: the default one.
        split: split of the dataset, such as "train".
        revision: branch, tag or commit.

    Raises:
        UserError: the dataset, configuration or split does not exist, or the hub cannot be reached.
    """
    info = _info(repository, revision)
    configs = _configs(info.card_data)
    endings = (*READABLE, *IF_LISTED) if configs else READABLE
    sizes = {s.rfilename: s.size or 0 for s in info.siblings or [] if _readable(s.rfilename, endings)}
    if configs:
        chosen = _choose(repository, configs, config)
        patterns = chosen.get(split)
        if patterns is None:
            raise UserError(f"{repository} on the hub has no split {split!r}{did_you_mean(split, chosen)}")
        found = sorted(path for path in sizes if any(_matches(path, pattern) for pattern in patterns))
    else:
        found = sorted(path for path in sizes if _matches_by_name(path, config, split))
    if not found:
        there = ", ".join(sorted(sizes)[:5]) or "none"
        raise UserError(
            f"{repository} on the hub has no files for {config or 'the dataset'}, split {split}; "
            f"readable files: {there}"
        )
    return [HubFile(repository, info.sha, path, sizes[path]) for path in found]


def repository_files(repository: str, revision: str, suffixes: tuple[str, ...]) -> list[HubFile]:
    """Return all files of a dataset repository on the hub with one of ``suffixes``, sorted by path.

    Raises:
        UserError: the dataset does not exist, or the hub cannot be reached.
    """
    info = _info(repository, revision)
    found = sorted((s.rfilename, s.size or 0) for s in info.siblings or [] if s.rfilename.endswith(suffixes))
    return [HubFile(repository, info.sha, path, size) for path, size in found]


def _info(repository: str, revision: str) -> Any:
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        return hub.HfApi().dataset_info(repository, revision=revision, files_metadata=True)
    except errors.GatedRepoError:
        raise UserError(
            f"{repository} on the hub is gated: accept its terms on its page, then run `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repository} on the hub has no revision {revision!r}") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(f"{repository}: no such public dataset on the Hugging Face hub") from None
    except Exception as e:  # no common base class: errors of httpx or httpx2 by version, OSError
        raise UserError(f"{repository}: the Hugging Face hub cannot be reached ({one_line(e)})") from None


def _configs(card: Any) -> dict[str, dict[str, list[str]]]:
    """Read the configurations of a dataset's card: configuration -> split -> file patterns."""
    listed = (card.to_dict() if card is not None else {}).get("configs") or []
    configs: dict[str, dict[str, list[str]]] = {}
    for entry in listed:
        files = entry.get("data_files") or []
        if isinstance(files, str):
            files = [{"split": "train", "path": files}]
        splits: dict[str, list[str]] = {}
        for part in files:
            part = part if isinstance(part, dict) else {"split": "train", "path": part}
            paths = part["path"]
            splits.setdefault(part.get("split", "train"), []).extend([paths] if isinstance(paths, str) else paths)
        if splits:
            configs[entry["config_name"]] = splits
    return configs


def _choose(repository: str, configs: dict[str, dict[str, list[str]]], config: str | None) -> dict[str, list[str]]:
    if config is None:
        config = "default" if "default" in configs else next(iter(configs)) if len(configs) == 1 else None
    if config is None:
        names = ", ".join(configs)
        raise UserError(f"{repository} on the hub has several configurations; choose one with --hub-config: {names}")
    if config not in configs:
        raise UserError(f"{repository} on the hub has no configuration {config!r}{did_you_mean(config, configs)}")
    return configs[config]


def _readable(path: str, endings: tuple[str, ...]) -> bool:
    name = path.lower()
    for suffix in COMPRESSION_ENDINGS:
        name = name.removesuffix(suffix)
    return name.endswith(endings) and not name.rpartition("/")[2].startswith(("readme", "license", "."))


def _matches(path: str, pattern: str) -> bool:
    """Return whether a pattern of a card matches ``path``; a folder matches all files below it."""
    pattern = pattern.removeprefix("./").rstrip("/")
    return path.startswith(pattern + "/") or matches(path.split("/"), pattern.split("/"))


def _matches_by_name(path: str, config: str | None, split: str) -> bool:
    words = re.split(r"[/._-]", path.lower())
    if config is not None and config.lower() not in path.lower().split("/"):
        return False
    others = {"train", "validation", "valid", "val", "test"} - {split}
    return split in words or (split == "train" and others.isdisjoint(words))


def fetch(address: str, cache: Path | None) -> Path:
    """Download and verify a hub file.

    Args:
        address: address of a `HubFile`.
        cache: folder for the download; None: cache of the hub client.

    Returns:
        Path of the downloaded file.

    Raises:
        UserError: the file is missing on the hub or cannot be downloaded.
    """
    repository, commit, name = parse_address(address)
    path = hub_file(repository, name, commit, kind="dataset", cache=cache)
    if path is None:
        raise UserError(f"{name} of {repository} is missing on the hub, although the hub lists it; try again later")
    return path
