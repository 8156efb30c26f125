"""Finds and downloads the files of a dataset's configuration and split on the Hugging Face hub.

A dataset's card lists its configurations and the files of each (`configs` in the front matter of its README); where it
does not, the files are recognised by their folders and names. Only files that `restomod.data.readers` reads count.
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
IF_NAMED = (".json", *TABLES)  # text where a card says so (C4's .json.gz); elsewhere a description or a result
SCHEME = "hf://datasets/"


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset at one commit."""

    repository: str
    commit: str
    path: str
    bytes: int

    def __str__(self) -> str:
        return f"{SCHEME}{self.repository}@{self.commit}/{self.path}"


def parse_address(address: str) -> tuple[str, str, str]:
    """Repository, commit and path of a `HubFile` as text."""
    found = re.fullmatch(re.escape(SCHEME) + r"([^@]+)@([0-9a-f]{40})/(.+)", address)
    if found is None:
        raise ValueError(f"not a file of a dataset: {address!r}")
    return found[1], found[2], found[3]


def dataset_files(repository: str, config: str | None, split: str, revision: str) -> list[HubFile]:
    """The files of a dataset's split, sorted by path, all of one commit; ``config`` None is the default one.

    Raises:
        UserError: there is no such dataset, configuration or split, or the hub cannot be reached.
    """
    info = _info(repository, revision)
    configs = _configs(info.card_data)
    endings = (*READABLE, *IF_NAMED) if configs else READABLE
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
        there = ", ".join(sorted(sizes)[:5]) or "none that can be read"
        raise UserError(f"{repository} on the hub has no files for {config or 'the dataset'}, split {split}: {there}")
    return [HubFile(repository, info.sha, path, sizes[path]) for path in found]


def repository_files(repository: str, revision: str, suffixes: tuple[str, ...]) -> list[HubFile]:
    """All files of a dataset repository with one of ``suffixes``, sorted by path; raises as `dataset_files`."""
    info = _info(repository, revision)
    found = sorted((s.rfilename, s.size or 0) for s in info.siblings or [] if s.rfilename.endswith(suffixes))
    return [HubFile(repository, info.sha, path, size) for path, size in found]


def _info(repository: str, revision: str) -> Any:
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        return hub.HfApi().dataset_info(repository, revision=revision, files_metadata=True)
    except errors.GatedRepoError:
        raise UserError(f"{repository} on the hub is gated: accept its terms there, then `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repository} on the hub has no revision {revision!r}") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(f"{repository}: no such public dataset on the Hugging Face hub") from None
    except Exception as e:  # no common base: httpx's errors in one version, httpx2's in another, OSError
        raise UserError(f"{repository}: the Hugging Face hub cannot be reached ({one_line(e)})") from None


def _configs(card: Any) -> dict[str, dict[str, list[str]]]:
    """Configuration -> split -> patterns, from a dataset's card."""
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
    """Whether a card's pattern means ``path``: `*` stays within a folder, `**` does not; a folder means all in it."""
    pattern = pattern.removeprefix("./").rstrip("/")
    return path.startswith(pattern + "/") or matches(path.split("/"), pattern.split("/"))


def _matches_by_name(path: str, config: str | None, split: str) -> bool:
    words = re.split(r"[/._-]", path.lower())
    if config is not None and config.lower() not in path.lower().split("/"):
        return False
    others = {"train", "validation", "valid", "val", "test"} - {split}
    return split in words or (split == "train" and others.isdisjoint(words))


def fetch(address: str, cache: Path | None) -> Path:
    """Download a `HubFile`, verified, into ``cache`` (None: the hub client's own)."""
    repository, commit, name = parse_address(address)
    path = hub_file(repository, name, commit, kind="dataset", cache=cache)
    if path is None:
        raise UserError(f"{name} of {repository} is missing on the hub, although it is listed there; try again later")
    return path
