"""Text to a verified folder of token shards; done once, then found again by the text's fingerprint."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from restomod.config import DataConfig
from restomod.data.bulk import BulkEncoder
from restomod.data.shards import (
    MANIFEST,
    MANIFEST_FORMAT,
    SHARD_TOKENS,
    Dataset,
    ShardWriter,
    open_dataset,
)
from restomod.data.sources import Document, documents, source_name
from restomod.data.tokenizer import Tokenizer
from restomod.errors import UserError
from restomod.files import fsync_path, write_json_atomically

BATCH_CHARACTERS = 4_000_000  # of text encoded at once: fast, and little memory


def prepare(config: DataConfig, tokenizer: Tokenizer, shard_tokens: int = SHARD_TOKENS) -> Dataset:
    """Return the dataset of ``config``, tokenizing its text unless an equal one lies in the cache.

    Every document is preceded by ``<|endoftext|>``, as in published FineWeb shards. A source that is one single
    document has nothing to delimit: it is written bare, and validation is its tail. The folder appears under its
    name only when it is whole.

    Raises:
        UserError: from the source, or because a cached folder is damaged.
    """
    hashes = [_split_hash(document.text, config.split_seed) for document in documents(config)]
    fingerprint = _fingerprint(config, tokenizer, hashes)
    folder = Path(config.cache) / f"{source_name(config)}-{fingerprint[:12]}"
    if not (folder / MANIFEST).exists():
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process of the same id
        temporary.mkdir(parents=True)
        try:
            _write(config, tokenizer, temporary, hashes, fingerprint, shard_tokens)
            if not (folder / MANIFEST).exists():  # else another process has finished the same meanwhile
                shutil.rmtree(folder, ignore_errors=True)  # a folder without a manifest is nobody's
                os.rename(temporary, folder)
                fsync_path(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return open_dataset(folder, tokenizer.sha256)


def _split_hash(text: str, seed: int) -> int:
    """A 64-bit hash of one document: the same text always lands in the same split, whatever else is there."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(8, "little", signed=True))
    return int.from_bytes(digest.digest(), "little")


def _held_out(hashes: list[int], val_fraction: float) -> set[int]:
    """The document hashes that go to validation: at least one where a fraction is asked, never all."""
    if val_fraction == 0 or len(set(hashes)) < 2:
        return set()
    ordered = sorted(set(hashes))
    below = [h for h in ordered if h < val_fraction * 2**64]
    return set(below[: len(ordered) - 1] or ordered[:1])


def _fingerprint(config: DataConfig, tokenizer: Tokenizer, hashes: list[int]) -> str:
    digest = hashlib.sha256(f"{tokenizer.sha256} {config.split_seed} {config.val_fraction}".encode())
    for h in hashes:
        digest.update(h.to_bytes(8, "little"))
    return digest.hexdigest()


def _batches(documents: Iterator[tuple[Document, int]]) -> Iterator[list[tuple[Document, int]]]:
    """Documents and their hashes in groups of about `BATCH_CHARACTERS`."""
    batch: list[tuple[Document, int]] = []
    size = 0
    for document, h in documents:
        batch.append((document, h))
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(
    config: DataConfig,
    tokenizer: Tokenizer,
    folder: Path,
    hashes: list[int],
    fingerprint: str,
    shard_tokens: int,
) -> None:
    """Tokenize every document into ``folder`` and write the manifest last."""
    held_out = _held_out(hashes, config.val_fraction)
    writers = {split: ShardWriter(folder, split, shard_tokens) for split in ("train", "val")}
    counts = {split: {"documents": 0, "text_bytes": 0} for split in writers}
    separator = np.array([tokenizer.end_of_text], dtype=np.uint16)
    encoder = BulkEncoder(tokenizer)
    for batch in _batches(zip(documents(config), hashes, strict=True)):
        for document, expected in batch:
            if _split_hash(document.text, config.split_seed) != expected:
                raise UserError(f"{document.name} changed while it was being prepared; run the same command again")
        for (_, expected), tokens in zip(batch, encoder.encode([d.text for d, _ in batch]), strict=True):
            if len(hashes) == 1:
                cut = len(tokens) - int(config.val_fraction * len(tokens))
                parts = {"train": tokens[:cut], "val": tokens[cut:]}
            else:
                split = "val" if expected in held_out else "train"
                parts = {split: np.concatenate([separator, tokens])}
            for split, part in parts.items():
                writers[split].add(part)
                counts[split]["documents"] += 1 if len(part) else 0
                counts[split]["text_bytes"] += tokenizer.byte_length(part)
    write_json_atomically(
        folder / MANIFEST,
        {
            "format": MANIFEST_FORMAT,
            "name": source_name(config),
            "fingerprint": fingerprint,
            "tokenizer": {
                "name": tokenizer.name,
                "vocab_size": tokenizer.vocab_size,
                "sha256": tokenizer.sha256,
            },
            "documents": len(hashes),
            "tokens": sum(writer.tokens for writer in writers.values()),
            "splits": {
                split: {"tokens": writer.tokens, **counts[split], "shards": writer.close()}
                for split, writer in writers.items()
            },
        },
    )
