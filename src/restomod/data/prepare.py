"""Text to a verified folder of token shards; done once, then found again by the text's fingerprint."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from restomod.config import DataConfig
from restomod.data.bulk import BulkEncoder
from restomod.data.mix import mix
from restomod.data.shards import (
    MANIFEST,
    MANIFEST_FORMAT,
    SHARD_TOKENS,
    Dataset,
    ShardWriter,
    Verify,
    open_dataset,
    open_published,
)
from restomod.data.sources import Document, documents, source_name
from restomod.data.tokenizer import Tokenizer, gpt2_tokenizer
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
    if config.mix is not None:
        return mix([(open_tokens(Path(folder)), share) for folder, share in config.mixed()])
    if config.source == "tokens":
        if config.path is None:
            raise UserError("no tokens to read: add --data.path FOLDER (`restomod prepare` makes one)")
        return open_tokens(Path(config.path))
    hashes = [split_hash(document.text, config.split_seed) for document in documents(config)]
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


def open_tokens(folder: Path, verify: Verify = "changed") -> Dataset:
    """Open a folder of token shards: one with a manifest, or shards as others publish them.

    Args:
        folder: from `restomod prepare`, or holding `*train*.bin` and `*val*.bin` (llm.c) or `.npy` (build-nanogpt).
        verify: how much to compare with the manifest; see `open_dataset`.

    Raises:
        UserError: there are no shards, or they are damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of token shards; `restomod prepare SOURCE --out {folder}` makes one")
    if (folder / MANIFEST).exists():
        return open_dataset(folder, gpt2_tokenizer().sha256, verify)
    return open_published(folder)


def split_hash(text: str, seed: int) -> int:
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


def document_batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups of about `BATCH_CHARACTERS`."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
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
    known = iter(hashes)
    for batch in document_batches(documents(config)):
        for document, tokens in zip(batch, encoder.encode([document.text for document in batch]), strict=True):
            h = split_hash(document.text, config.split_seed)
            if h != next(known, None):
                raise UserError(f"{document.name} changed while it was being prepared; run the same command again")
            if len(hashes) == 1:
                cut = len(tokens) - int(config.val_fraction * len(tokens))
                parts = {"train": tokens[:cut], "val": tokens[cut:]}
            else:
                parts = {"val" if h in held_out else "train": np.concatenate([separator, tokens])}
            for split, part in parts.items():
                writers[split].add(part)
                counts[split]["documents"] += 1 if len(part) else 0
                counts[split]["text_bytes"] += tokenizer.byte_length(part)
    if next(known, None) is not None:
        raise UserError("documents disappeared while the text was being prepared; run the same command again")
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
