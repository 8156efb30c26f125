"""Independent units of work, into which sources are cut, and the plan of a folder.

The plan is a pure function of the settings and of the names and sizes of the files. The shards of a unit are a pure
function of its files. Therefore the output does not depend on the number of workers or on interruptions.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restomod.config.prepare import PrepareConfig
from restomod.config.run import DataConfig
from restomod.data.dataset import split_of
from restomod.data.documents import AnyDocument
from restomod.data.file_format import ending
from restomod.data.find_files import find_files
from restomod.data.hub_datasets import SCHEME, dataset_files, fetch, repository_files
from restomod.data.read_counts import ReadCounts
from restomod.data.readers import Span, can_be_cut, read_documents
from restomod.data.sources import BUILT_IN, DOCUMENTS, download_tinyshakespeare
from restomod.data.tokenizer import Tokenizer
from restomod.utils.errors import UserError, did_you_mean
from restomod.utils.text import counted

UNIT_BYTES = 64_000_000  # small files are grouped until they reach this size; a larger file is one unit or several
SPAN_BYTES = 64_000_000  # maximum size of the spans of a large file
HUB = "hf:"
PRETOKENIZED = "pretokenized:"
SHARD_ENDINGS = (".bin", ".npy")
DATASETS = {  # short name -> (repository on the hub, default configuration)
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT"),
}


@dataclass(frozen=True)
class Unit:
    """Unit of work: files or a built-in source that one task converts into shards."""

    files: tuple[str, ...]
    bytes: int
    """Size of the files on disk, before decompression."""
    source: str | None = None
    """Name of a built-in source or a dataset on the hub; None for local files."""
    span: Span | None = None
    """Part of the only file, of size ``bytes``; None: complete files."""


def plan_units(
    sources: tuple[str, ...],
    config: PrepareConfig,
    begun: dict[str, Any] | None = None,
    counts: ReadCounts | None = None,
) -> list[Unit]:
    """Cut the sources into units, in order.

    A large local file of uncompressed JSON lines or Parquet becomes several units. Any other large file is one unit.
    A file on the hub is one unit too, because each worker has to download the complete file.

    Args:
        sources: files, folders, built-in sources or datasets on the hub.
        config: settings of the preparation.
        begun: earlier plan; if its settings are equal, datasets on the hub keep its commits.
        counts: counts of skipped files, which are updated.

    Raises:
        UserError: a source does not exist or has no text.
    """
    pinned = begun["datasets"] if begun and begun.get("settings") == dataclasses.asdict(config) else {}
    units: list[Unit] = []
    for source in sources:
        if source in BUILT_IN and not Path(source).exists():
            units.append(Unit((), 0, source))
            continue
        if _on_hub(source):
            repository = DATASETS.get(source, (source.removeprefix(HUB).removeprefix(PRETOKENIZED),))[0]
            before = pinned.get(source, [])
            if not all(address.startswith(f"{SCHEME}{repository}@") for address, _ in before):
                before = []  # a plan from another machine must not choose the repository
            found = before or _dataset(source, config)
            units += [Unit((address,), size, source) for address, size in found]
            continue
        path = Path(source)
        if not source or not path.exists():
            known = [*BUILT_IN, *DATASETS]
            raise UserError(f"{source or repr(source)}: no such file, folder or source{did_you_mean(source, known)}")
        group: list[str] = []
        size = 0
        for file in find_files(path.absolute(), config.glob, counts.skipped if counts else None):
            file_size = file.stat().st_size
            cut = file_size > SPAN_BYTES and can_be_cut(file, config.text_column)
            if group and (cut or size >= UNIT_BYTES):
                units.append(Unit(tuple(group), size))
                group, size = [], 0
            if cut:
                units += _spans(file, file_size)
            else:
                group.append(str(file))
                size += file_size
        if group:
            units.append(Unit(tuple(group), size))
    return units


def _spans(file: Path, size: int) -> Iterator[Unit]:
    """Yield units of about equal size that cover a large file."""
    n = -(-size // SPAN_BYTES)
    for i in range(n):
        span = Span(i * size // n, (i + 1) * size // n, of=size)
        yield Unit((str(file),), span.stop - span.start, span=span)


def _on_hub(source: str) -> bool:
    return source.startswith((HUB, PRETOKENIZED)) or source in DATASETS


def ignored_by_sources(sources: tuple[str, ...]) -> dict[str, str]:
    """Return the flags of `prepare` that have no effect on these sources: flag -> reason."""
    hub = [source for source in sources if _on_hub(source)]
    local = [source for source in sources if source not in hub and (source not in BUILT_IN or Path(source).exists())]
    folders = [source for source in local if Path(source).is_dir() or not Path(source).exists()]
    datasets = [source for source in hub if not source.startswith(PRETOKENIZED)]
    rules = (
        (not hub, "without a source on the hub", ("--hub-revision", "--keep-downloads")),
        (not datasets, "without a dataset on the hub", ("--hub-config", "--hub-split")),
        (not folders, "without a folder of text", ("--glob",)),
        (not (local or datasets), "on these sources, whose format is fixed", ("--text-column", "--separator")),
    )
    return {flag: why for ignored, why, flags in rules if ignored for flag in flags}


def _dataset(source: str, config: PrepareConfig) -> list[list[Any]]:
    """Return the files of a dataset on the hub as [address, bytes]."""
    if source.startswith(PRETOKENIZED):
        if config.dedup:
            raise UserError(f"{source}: published shards cannot be deduplicated; remove --dedup")
        shards = repository_files(source.removeprefix(PRETOKENIZED), config.hub_revision, SHARD_ENDINGS)
        shards = [file for file in shards if split_of(file.path)]
        if not shards:
            raise UserError(f"{source}: no token shards on the hub, such as fineweb_train_000001.bin")
        return [[str(file), file.bytes] for file in shards]
    repository, default = DATASETS.get(source, (source.removeprefix(HUB), None))
    files = dataset_files(repository, config.hub_config or default, config.hub_split, config.hub_revision)
    return [[str(file), file.bytes] for file in files]


def describe_files(units: list[Unit]) -> str:
    """Return a text with the number of files by ending and the names of built-in sources."""
    files = [file for unit in units for file in unit.files if not unit.span or unit.span.start == 0]
    endings = collections.Counter(ending(Path(file)) for file in files)
    kinds = [counted(n, f"{of} file") for of, n in sorted(endings.items())]
    return ", ".join([*kinds, *(unit.source for unit in units if unit.source in BUILT_IN)])


def describe(sources: tuple[str, ...], config: PrepareConfig, units: list[Unit]) -> dict[str, Any]:
    """Return the plan of a folder as JSON values; equal plans of unchanged files result in equal shards."""
    names = [Path(os.path.abspath(source)).name for source in sources]
    return {
        "name": "+".join(names) if len(names) <= 3 else f"{names[0]}+{len(names) - 1} more",
        "settings": dataclasses.asdict(config),
        "datasets": {
            source: [[unit.files[0], unit.bytes] for unit in units if unit.source == source]
            for source in sources
            if _on_hub(source)
        },
        "units": [
            {key: value for key, value in dataclasses.asdict(unit).items() if (key, value) != ("span", None)}
            | {"files": list(unit.files)}
            for unit in units
        ],
        "tokenizer": Tokenizer.sha256,
        **({"python": platform.python_version()} if any(u.source == "python-stdlib" for u in units) else {}),
    }


def unit_documents(
    unit: Unit, config: PrepareConfig, downloads: Path | None, counts: ReadCounts | None = None
) -> Iterator[AnyDocument]:
    """Yield the documents of a unit, in order.

    Args:
        unit: unit of work.
        config: settings of the preparation.
        downloads: folder for files from the hub; None: cache of the hub client.
        counts: counts of the files and documents, which are updated.

    Raises:
        UserError: a file cannot be downloaded or read.
    """
    counts = counts or ReadCounts()
    if unit.source in DOCUMENTS:
        yield from map(counts.count, DOCUMENTS[unit.source]())
    files = unit.files
    if unit.source == "tinyshakespeare":
        files = (str(download_tinyshakespeare(Path(DataConfig.cache))),)
    for file in files:
        path = fetch(file, downloads) if file.startswith(SCHEME) else Path(file)
        yield from map(counts.count, read_documents(path, config.text_column, unit.span, config.separator, counts))
