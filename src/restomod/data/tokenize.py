"""Text to a verified folder of token shards; done once, then found again by the text's fingerprint."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from restomod.config.run import DataConfig
from restomod.data.bulk import BulkEncoder
from restomod.data.dataset import (
    SHARD_TOKENS,
    SPLITS,
    Dataset,
    ShardWriter,
    Verify,
    open_dataset,
)
from restomod.data.documents import PIECE_CHARACTERS, AnyDocument, Document, SplitHash, pieces, split_hash
from restomod.data.manifest import MANIFEST, MANIFEST_FORMAT, READ
from restomod.data.mix import mix
from restomod.data.published import open_published
from restomod.data.reading import Reading
from restomod.data.sources import documents, source_name
from restomod.data.tokenizer import Tokenizer, gpt2_tokenizer
from restomod.utils.errors import UserError
from restomod.utils.files import fsync_path, move_folder, write_json_atomically
from restomod.utils.locks import locked
from restomod.utils.temporary import Temporary, remove_leftovers

BATCH_CHARACTERS = 4_000_000  # of text encoded at once: fast, and little memory
COPY_TOKENS = 1_000_000  # at once, from one file to another
TELL_EVERY = 5.0  # seconds between lines about how far the tokens are


def prepare_text(config: DataConfig, tokenizer: Tokenizer, shard_tokens: int = SHARD_TOKENS) -> Dataset:
    """Return the dataset of ``config``, tokenizing its text unless an equal one lies in the cache.

    Every document is preceded by ``<|endoftext|>``, as in published FineWeb shards. A source that is one single
    document has nothing to delimit: it is written bare, and validation is its tail. The folder appears under its
    name only when it is whole. Where several processes ask for the same at once, one works and the others wait for it.

    Raises:
        UserError: from the source, or because a cached folder is damaged.
    """
    if config.mix is not None:
        return mix([(open_tokens(Path(folder)), share) for folder, share in config.mixed()])
    if config.source == "tokens":
        if not config.path:
            raise UserError("no tokens to read: add --data.path FOLDER (`restomod prepare` makes one)")
        return open_tokens(Path(config.path))
    reading = Reading()
    read = map(reading.count, documents(config, reading))
    hashes = [split_hash(document.parts(), config.split_seed) for document in read]
    fingerprint, files = _fingerprint(config, tokenizer, hashes), reading.to_dict()
    folder = Path(config.cache) / f"{source_name(config)}-{fingerprint[:12]}"
    remove_leftovers(folder.parent)
    if not (folder / MANIFEST).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(_lock_of(folder), lambda: _say(f"another process is preparing {folder}; waiting for it")):
            if not (folder / MANIFEST).exists():  # else another process has finished the same meanwhile
                _make(folder, lambda at: _write(config, tokenizer, at, hashes, fingerprint, shard_tokens, files))
    dataset = open_dataset(folder, tokenizer.sha256)
    # perhaps of equal text in files of other names: told as they are now
    return dataclasses.replace(dataset, manifest=dataset.manifest | _told(files))


def _told(read: dict[str, Any]) -> dict[str, Any]:
    """The manifest's entry; none for a source whose files are not the user's."""
    return {READ: read} if read else {}


def _make(folder: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` fill a folder, which gets its name once it is whole."""
    with Temporary(folder.parent, "folder") as temporary:
        write(temporary.path)
        if not (folder / MANIFEST).exists():
            shutil.rmtree(folder, ignore_errors=True)  # a folder without a manifest is nobody's
            move_folder(temporary.path, folder, MANIFEST)
            fsync_path(folder.parent)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


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


def _held_out(hashes: list[int], val_fraction: float) -> set[int]:
    """The document hashes that go to validation: at least one where a fraction is asked, never all."""
    if val_fraction == 0 or len(set(hashes)) < 2:
        return set()
    ordered = sorted(set(hashes))
    below = [h for h in ordered if h < val_fraction * 2**64]
    return set(below[: len(ordered) - 1] or ordered[:1])


def _fingerprint(config: DataConfig, tokenizer: Tokenizer, hashes: list[int]) -> str:
    digest = hashlib.sha256(f"{tokenizer.sha256} {config.split_seed} {config.val_fraction}".encode())
    if config.separator is not None:
        digest.update(f" separator {config.separator}".encode())
    for h in hashes:
        digest.update(h.to_bytes(8, "little"))
    return digest.hexdigest()


def document_batches(documents: Iterable[AnyDocument]) -> Iterator[list[AnyDocument]]:
    """Documents in groups of about `BATCH_CHARACTERS`; one that is to be encoded in pieces comes by itself."""
    batch: list[AnyDocument] = []
    size = 0
    for document in documents:
        if not isinstance(document, Document) or len(document.text) > PIECE_CHARACTERS:
            if batch:
                yield batch
            batch, size = [document], BATCH_CHARACTERS
        else:
            batch.append(document)
            size += len(document.text)
        del document  # a long one is not to be held while the next is read
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoded(
    documents: Iterable[AnyDocument],
    encoder: BulkEncoder,
    seed: int,
    known: Sequence[int] | None = None,
    mend: str = "run the same command again",
) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """The `split_hash` and the tokens of each document; the tokens in parts, to be taken before the next document.

    Args:
        documents: read as they are asked for. Short ones are encoded many at once, a long one piece by piece.
        encoder: encodes them.
        seed: of the hash.
        known: the hashes that they are to have.
        mend: what to do if they have others.

    Raises:
        UserError: a document has changed since its hash became known, or while it was encoded.
    """
    hashes = iter(known or [])
    for batch in document_batches(documents):
        alone = len(batch) == 1  # to be encoded in pieces; a short one has only one
        tokens = iter([] if alone else encoder.encode([d.text for d in batch if isinstance(d, Document)]))
        batch.reverse()
        while batch:
            document = batch.pop()
            h = next(hashes, None) if known is not None else split_hash(document.parts(), seed)
            in_memory = known is not None and isinstance(document, Document)  # else compared once it is encoded
            if h is None or (in_memory and h != split_hash(document.parts(), seed)):
                raise UserError(f"{document.name} has changed since it was first read; {mend}")
            parts = _encoded_pieces(document, encoder, seed, h, mend) if alone else iter([next(tokens)])
            del document
            yield h, parts
    if next(hashes, None) is not None:
        raise UserError(f"documents have disappeared since they were first read; {mend}")


def _encoded_pieces(
    document: AnyDocument, encoder: BulkEncoder, seed: int, expected: int, mend: str
) -> Iterator[np.ndarray]:
    """The tokens of a document piece by piece; raises UserError if what was read has another hash in the end."""
    hashed = SplitHash(seed)
    for piece in pieces(document.name, map(hashed.pass_on, document.parts())):
        yield encoder.encode([piece])[0]
    if hashed.value() != expected:
        raise UserError(f"{document.name} has changed since it was first read; {mend}")


def write_by_position(
    parts: Iterable[np.ndarray], val_fraction: float, writers: dict[str, ShardWriter], tokenizer: Tokenizer
) -> dict[str, dict[str, int]]:
    """Write the tokens of the one document that there is, bare, its tail for validation; return counts by split."""
    counts = {split: {"documents": 0, "text_bytes": 0} for split in SPLITS}
    with tempfile.TemporaryFile(dir=writers["train"].folder) as held:  # where to cut is known at the end
        total = 0
        for part in parts:
            held.write(part.astype("<u2", copy=False).tobytes())
            total += len(part)
        held.seek(0)
        val = int(val_fraction * total)
        for split, left in (("train", total - val), ("val", val)):
            counts[split]["documents"] = int(left > 0)
            while left:
                tokens = np.frombuffer(held.read(2 * min(left, COPY_TOKENS)), dtype="<u2")
                writers[split].add(tokens)
                counts[split]["text_bytes"] += tokenizer.byte_length(tokens)
                left -= len(tokens)
    return counts


def _write(
    config: DataConfig,
    tokenizer: Tokenizer,
    folder: Path,
    hashes: list[int],
    fingerprint: str,
    shard_tokens: int,
    read: dict[str, Any],
) -> None:
    """Tokenize every document into ``folder`` and write the manifest last."""
    held_out = _held_out(hashes, config.val_fraction)
    writers = {split: ShardWriter(folder, split, shard_tokens) for split in SPLITS}
    counts = {split: {"documents": 0, "text_bytes": 0} for split in SPLITS}
    separator = np.array([tokenizer.end_of_text], dtype=np.uint16)
    told = time.monotonic()
    for i, (h, parts) in enumerate(encoded(documents(config), BulkEncoder(tokenizer), config.split_seed, hashes)):
        if time.monotonic() > told + TELL_EVERY:
            told = time.monotonic()
            _say(f"preparing {source_name(config)}: {i:,} of {len(hashes):,} documents are tokenized")
        if len(hashes) == 1:
            counts = write_by_position(parts, config.val_fraction, writers, tokenizer)
            continue
        split = "val" if h in held_out else "train"
        writers[split].add(separator)
        for part in parts:
            writers[split].add(part)
            counts[split]["text_bytes"] += tokenizer.byte_length(part)
        counts[split]["documents"] += 1
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
            **_told(read),
        },
    )
