"""Type checks of a manifest: a damaged one is refused, and its key named."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

READ = "read"  # key of the counts of `restomod.data.reading`; older manifests lack it


def check_types(manifest: dict[str, Any], splits: Iterable[str]) -> None:
    """Check the types of a manifest's values.

    Raises:
        KeyError, TypeError, AttributeError: one is missing or of another type; the first two carry its key.
    """
    parts = [manifest["splits"][split] for split in splits]
    read = manifest.get(READ, {})
    expected: list[tuple[dict[str, Any], tuple[str, ...], type | tuple[type, ...]]] = [
        (manifest, ("name", "fingerprint"), str),
        (manifest, ("tokens",), int),
        (manifest, ("documents",), (int, type(None))),  # not known of published shards
        *((part, ("tokens",), int) for part in parts),
        *((part, _of(part, "documents", "text_bytes"), int) for part in parts),
        *((entry, ("tokens",), int) for part in parts for entry in part["shards"]),
        (manifest, _of(manifest, "duplicates"), int),
        (manifest, _of(manifest, "plan", READ), dict),
        (read, _of(read, "end_of_text_literals", "separators"), int),
        *(
            (counts, tuple(counts), int)
            for counts in (read.get("left_out", {}), read.get("bytes", {}), *read.get("files", {}).values())
        ),
    ]
    for part, keys, kind in expected:
        for key in keys:
            if not isinstance(part[key], kind) or isinstance(part[key], bool):
                raise TypeError(key)


def _of(part: dict[str, Any], *keys: str) -> tuple[str, ...]:
    return tuple(key for key in keys if key in part)
