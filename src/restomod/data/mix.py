"""Several folders of tokens as one dataset, each with its share of every step."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from typing import Any

from restomod.data.dataset import SPLITS, Dataset, Part, TokenStream
from restomod.data.manifest import MANIFEST_FORMAT, READ
from restomod.data.reading import merge_counts


def mix(datasets: list[tuple[Dataset, Fraction]]) -> Dataset:
    """Put datasets together.

    Args:
        datasets: with their shares of a run's sequences, which add up to 1.

    Returns:
        A dataset whose `sources` are these, and whose splits and manifest are those of all together.
    """
    manifests = [dataset.manifest for dataset, _ in datasets]
    digest = hashlib.sha256()
    for dataset, share in datasets:
        digest.update(f"{share} {dataset.fingerprint}\n".encode())
    counts = [manifest["documents"] for manifest in manifests]
    manifest: dict[str, Any] = {
        "format": MANIFEST_FORMAT,
        "name": " + ".join(f"{float(share):.3g} {dataset.manifest['name']}" for dataset, share in datasets),
        "fingerprint": digest.hexdigest(),
        "tokenizer": manifests[0]["tokenizer"],
        "documents": sum(counts) if None not in counts else None,
        "tokens": sum(manifest["tokens"] for manifest in manifests),
        READ: merge_counts([manifest.get(READ) or {} for manifest in manifests]),
        "splits": {
            split: {
                "tokens": sum(manifest["splits"][split]["tokens"] for manifest in manifests),
                "shards": [
                    shard | {"file": str(dataset.folder / shard["file"])}
                    for dataset, _ in datasets
                    for shard in dataset.manifest["splits"][split]["shards"]
                ],
            }
            for split in SPLITS
        },
        "mix": [
            {"folder": str(dataset.folder), "share": str(share), "fingerprint": dataset.fingerprint}
            for dataset, share in datasets
        ],
    }
    train, val = (TokenStream.joined([getattr(dataset, split) for dataset, _ in datasets]) for split in SPLITS)
    names = [dataset.folder.name for dataset, _ in datasets]
    if len(set(names)) < len(names):
        names = [str(dataset.folder) for dataset, _ in datasets]
    parts = tuple(Part(name, dataset, share) for name, (dataset, share) in zip(names, datasets, strict=True))
    return Dataset(datasets[0][0].folder, manifest, train, val, parts)
