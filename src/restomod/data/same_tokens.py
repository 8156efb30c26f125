"""Comparison of a dataset's tokens with a run's manifest, independent of shard boundaries.

`data.json` of a run contains the SHA-256 of every shard in llm.c's layout. The tokens of another folder are hashed at
the same boundaries, so its shard boundaries and file format can differ.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Required

from typing_extensions import TypedDict

from restomod.data.dataset import SPLITS, Dataset, TokenStream, shard_header
from restomod.data.manifest import MAX_BYTES, Count
from restomod.utils.json_files import read_json
from restomod.utils.text import duration

PIECE = 1 << 20  # tokens per read
REPORT_SECONDS = 5.0

Shards = list[dict[str, Any]]


class RunShard(TypedDict, total=False):
    """Shard in a run's `data.json`."""

    file: str
    tokens: Required[Count]
    sha256: str


class RunSplit(TypedDict, total=False):
    """Split in a run's `data.json`."""

    tokens: Count
    shards: list[RunShard]


class RunSource(TypedDict):
    """Source of a mix in a run's `data.json`."""

    folder: str
    share: str


class RunData(TypedDict, total=False):
    """Validated keys of a run's `data.json`; other keys are kept. The shards of a mix are in several folders."""

    name: str
    fingerprint: str
    tokens: Count
    splits: dict[str, RunSplit]
    mix: list[RunSource]


def read_run_data(run: Path) -> dict[str, Any]:
    """Read a run's `data.json`, the manifest of its tokens.

    Returns:
        Manifest with all keys; empty if the file does not exist.

    Raises:
        UserError: the file is damaged.
    """
    path = run / "data.json"
    if not path.exists():
        return {}
    return dict(read_json(path, "manifest of the run's data", RunData, MAX_BYTES))


def with_hashes(dataset: Dataset, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Return the manifest of a dataset with the ``sha256`` of every shard.

    Published shards have no stored hashes. They are read and hashed at the start of every new run, because nothing is
    written into their folder.

    Args:
        dataset: dataset with or without hashes.
        say: function that receives a line about the progress every few seconds.
    """
    splits = {
        split: values | {"shards": _with_hashes(values["shards"], getattr(dataset, split), say)}
        for split, values in dataset.manifest.get("splits", {}).items()
    }
    return dataset.manifest | ({"splits": splits} if splits else {})


def _with_hashes(shards: Shards, stream: TokenStream, say: Callable[[str], None]) -> Shards:
    lacking = [at for shard, at in zip(shards, _positions(shards), strict=True) if "sha256" not in shard]
    found: list[str] = []
    began = told = time.monotonic()
    for sha256 in _hashes(stream, lacking):
        found.append(sha256)
        now = time.monotonic()
        if now > told + REPORT_SECONDS and len(found) < len(lacking):
            told = now
            left = duration((now - began) / len(found) * (len(lacking) - len(found)))
            say(f"hashing tokens: {len(found):,} of {len(lacking):,} shards, about {left} left")
    hashes = iter(found)
    return [shard if "sha256" in shard else shard | {"sha256": next(hashes)} for shard in shards]


def _positions(shards: Shards) -> list[tuple[int, int]]:
    """Return the first position and the length of each shard in its split, in tokens."""
    lengths = [int(shard["tokens"]) for shard in shards]
    return list(zip(itertools.accumulate([0, *lengths[:-1]]), lengths, strict=True)) if lengths else []


def token_difference(manifest: dict[str, Any], dataset: Dataset) -> str | None:
    """Compare the tokens of a dataset with a run's manifest.

    Args:
        manifest: manifest of the run, from `with_hashes`.
        dataset: dataset to compare.

    Returns:
        Description of the first difference; None if all tokens are equal.
    """
    try:
        before = _parts(manifest)
        now = [(str(part.share), part.dataset) for part in dataset.sources]
        if [share for share, _ in before] != [share for share, _ in now]:
            return "the mix has other sources or shares"
        for (_, splits), (_, source) in zip(before, now, strict=True):
            for split in SPLITS:
                difference = _stream_difference(splits[split], getattr(source, split))
                if difference is not None:
                    of = f" of {source.folder}" if len(now) > 1 else ""
                    return f"in the {split} split{of}, {difference}"
    except (KeyError, TypeError, AttributeError, ValueError):
        return "the tokens cannot be compared: the run's data.json lists no shards (damaged, or of an old version)"
    return None


def _parts(manifest: dict[str, Any]) -> list[tuple[str, dict[str, Shards]]]:
    """Return the sources of a manifest: the share of each source and its shards by split."""
    shards = {split: manifest["splits"][split]["shards"] for split in SPLITS}
    if "mix" not in manifest:
        return [("1", shards)]
    return [
        (
            part["share"],
            {split: [s for s in shards[split] if Path(s["file"]).parent == Path(part["folder"])] for split in SPLITS},
        )
        for part in manifest["mix"]
    ]


def _stream_difference(shards: Shards, stream: TokenStream) -> str | None:
    positions = _positions(shards)
    total = sum(n for _, n in positions)
    if total != len(stream):
        return f"the number of tokens is {len(stream):,}, not {total:,}"
    if any("sha256" not in shard for shard in shards):
        return "the tokens cannot be compared: the run has no hashes of them"
    hashes = _hashes(stream, positions)
    for shard, (start, n), found in zip(shards, positions, hashes, strict=True):
        if found != shard["sha256"]:
            return f"tokens {start:,} to {start + n:,} differ"
    return None


def _hashes(stream: TokenStream, positions: list[tuple[int, int]]) -> Iterator[str]:
    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
        yield from pool.map(lambda position: _sha256(stream, *position), positions)


def _sha256(stream: TokenStream, start: int, n: int) -> str:
    """Compute the SHA-256 of a `.bin` shard with ``n`` tokens of a stream."""
    digest = hashlib.sha256(shard_header(n))
    for at in range(start, start + n, PIECE):
        digest.update(stream.read(at, min(PIECE, start + n - at)).astype("<u2", copy=False).tobytes())
    return digest.hexdigest()
