"""Folders of token shards as others publish them: files without a manifest, read in place."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from restomod.data.dataset import SPLITS, Dataset, ShardFile, TokenStream, open_shard
from restomod.data.manifest import MANIFEST, MANIFEST_FORMAT
from restomod.utils.errors import UserError


def split_of(name: str) -> str | None:
    """The split that a published shard's name says it belongs to, as in `fineweb_train_000001.bin`."""
    words = Path(name).stem.split("_")
    return next((split for split in SPLITS if split in words), None)


def open_published(folder: Path) -> Dataset:
    """Open shards that others have published, in place: llm.c's `*_train_*.bin`, build-nanogpt's `*_train_*.npy`.

    Their fingerprint is made of names, sizes and beginnings, as they bring no hashes.

    Raises:
        UserError: there are none, or one is damaged.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".npy"))
    paths = {split: [path for path in files if split_of(path.name) == split] for split in SPLITS}
    if not paths["train"]:
        raise UserError(
            f"{folder} holds no token shards: no {MANIFEST}, and no files such as fineweb_train_000001.bin "
            f"or edufineweb_train_000001.npy"
        )
    digest = hashlib.sha256()
    splits: dict[str, dict[str, Any]] = {}
    streams: dict[str, TokenStream] = {}
    for split, found in paths.items():
        shards = []
        for path in found:
            tokens = open_shard(path, "get it again")
            shards.append(ShardFile(folder, path.name, len(tokens)))
            entry = {"file": path.name, "tokens": len(tokens)}
            digest.update(f"{entry} {tokens[:4096].tobytes().hex()}".encode())
        streams[split] = TokenStream(shards)
        entries = [{"file": shard.name, "tokens": len(shard)} for shard in shards]
        splits[split] = {"tokens": len(streams[split]), "shards": entries}
    manifest = {
        "format": MANIFEST_FORMAT,
        "name": folder.name,
        "fingerprint": digest.hexdigest(),
        "tokenizer": {"name": "gpt2"},
        "documents": None,
        "tokens": sum(split["tokens"] for split in splits.values()),
        "splits": splits,
    }
    return Dataset(folder, manifest, streams["train"], streams["val"])
