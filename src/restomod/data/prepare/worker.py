"""Steps of a unit of work: hash its documents, assign them to splits, write its shards and its record.

The record of a unit is written after its shards, so its existence means that the unit is finished. The output is a
pure function of the files and settings.
"""

from __future__ import annotations

import io
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from restomod.config.prepare import PrepareConfig
from restomod.data.bulk_encoder import BulkEncoder
from restomod.data.dataset import SPLITS, ShardWriter, open_npy, open_shard, split_of
from restomod.data.documents import PIECE_CHARACTERS, AnyDocument, Document, SplitHash, pieces, split_hash
from restomod.data.hub_datasets import fetch
from restomod.data.manifest import READ
from restomod.data.prepare.units import PRETOKENIZED, Unit, unit_documents
from restomod.data.read_counts import ReadCounts
from restomod.data.tokenizer import END_OF_TEXT, Tokenizer, gpt2_tokenizer, require_in_vocabulary
from restomod.utils.errors import UserError
from restomod.utils.files import fsync_path, sha256_file, write_bytes_atomically, write_json_atomically
from restomod.utils.temporary import Temporary

WORK = ".prepare"
SLURM = "slurm.json"  # exists if Slurm jobs have been submitted for the folder
START_AGAIN = "choose another folder with --out, or delete this one and run the same command again"
DESTINATIONS = (*SPLITS, "duplicates")  # destinations of documents; `assign_splits` writes the indices
BATCH_CHARACTERS = 4_000_000  # characters per call of the encoder
COPY_TOKENS = 1_000_000  # tokens per read when a file is copied


def record_path(out: Path, unit: int) -> Path:
    """Return the path of a unit's record, which exists if the unit is finished."""
    return out / WORK / f"unit_{unit:05d}.json"


def failure_path(out: Path, unit: int) -> Path:
    """Return the path of the file into which a Slurm job writes the error of a unit."""
    return out / WORK / f"failed_{unit:05d}.json"


def quiet_datatrove() -> None:
    """Disable datatrove's log on the terminal."""
    from loguru import logger

    logger.disable("datatrove")


class UnitStep:
    """Step of a datatrove pipeline in which rank r processes unit ``todo[r]``."""

    def __init__(self, config: PrepareConfig, units: list[Unit], out: Path, todo: Sequence[int] = ()) -> None:
        self.config, self.units, self.out, self.todo = config, units, out, todo

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        quiet_datatrove()  # also in worker processes

    def __call__(self, data: Any, rank: int, world_size: int) -> Iterable[AnyDocument]:
        """Process the unit of a rank; datatrove calls this function."""
        self.work(self.todo[rank])
        return []

    def work(self, unit: int) -> None:
        """Process a unit."""
        raise NotImplementedError

    def downloads(self, unit: int) -> Path | None:
        """Return the temporary folder for a unit's downloads; None for the hub client's cache (--keep-downloads)."""
        return None if self.config.keep_downloads else self.out / WORK / f"downloads_{unit:05d}"


class HashUnit(UnitStep):
    """Step that writes the hashes of a unit's documents."""

    def work(self, unit: int) -> None:
        """Write the hashes of a unit's documents unless they exist."""
        if hashes_path(self.out, unit).exists():
            return
        documents = unit_documents(self.units[unit], self.config, self.downloads(unit))
        hashes = hash_documents(documents, self.config.split_seed)
        write_array(hashes_path(self.out, unit), hashes, self.out)


def hash_documents(documents: Iterable[AnyDocument], seed: int) -> np.ndarray:
    """Compute the `split_hash` of every document, shape (n,), uint64."""
    return np.fromiter((split_hash(document.parts(), seed) for document in documents), dtype=np.uint64)


def hashes_path(out: Path, unit: int) -> Path:
    """Return the path of the hashes of a unit's documents."""
    return out / WORK / f"hashes_{unit:05d}.npy"


def _assigned_path(out: Path, unit: int) -> Path:
    return out / WORK / f"assigned_{unit:05d}.npy"


def _load(path: Path, dtype: type[np.generic]) -> np.ndarray:
    """Memory-map an array of an earlier step, shape (n,). Raises UserError if the file is damaged."""
    return open_npy(path, dtype, "delete this file and run the same command again")


def assign_splits(out: Path, units: int, config: PrepareConfig) -> None:
    """Assign every document to a split or to the duplicates, from the hashes of all documents.

    If ``val_fraction`` is above 0, the validation split receives at least one text, but never all texts. With
    ``dedup``, the first document of each text in the order of the units is kept.

    Args:
        out: output folder; the indices in `DESTINATIONS` are written as one array per unit.
        units: number of units.
        config: settings of the preparation.

    Raises:
        UserError: an array of hashes is missing or damaged.
    """
    hashes = [_load(hashes_path(out, unit), np.uint64) for unit in range(units)]
    together = np.concatenate(hashes)
    texts, first = np.unique(together, return_index=True)
    limit = val_limit(config) if len(texts) > 1 else 0
    if limit:
        limit = int(texts[np.clip(np.searchsorted(texts, np.uint64(limit)), 1, len(texts) - 1)])
    assigned = (together < np.uint64(limit)).astype(np.uint8)
    if config.dedup:
        later = np.ones(len(together), dtype=bool)
        later[first] = False
        assigned[later] = DESTINATIONS.index("duplicates")
    for unit, part in enumerate(np.split(assigned, np.cumsum([len(h) for h in hashes])[:-1])):
        write_array(_assigned_path(out, unit), part, out)


def val_limit(config: PrepareConfig) -> int:
    """Return the hash limit of the validation split; documents with a smaller hash belong to it."""
    return math.ceil(config.val_fraction * 2**64)


def write_array(path: Path, values: np.ndarray, out: Path) -> None:
    """Write one value per document of a unit atomically as .npy.

    Args:
        path: output file.
        values: hashes (uint64) or indices in `DESTINATIONS` (uint8), shape (n,).
        out: output folder of the preparation.
    """
    content = io.BytesIO()
    np.save(content, values)
    write_bytes_atomically(path, content.getvalue(), out)


class PrepareUnit(UnitStep):
    """Step that tokenizes a unit's documents and writes its shards and record."""

    remedy = START_AGAIN
    """End of the error message for a document that has changed since it was hashed."""

    def work(self, unit: int) -> None:
        """Write the shards and the record of a unit unless it is finished.

        Raises:
            UserError: a file cannot be downloaded, read or written, or a document has changed.
        """
        if record_path(self.out, unit).exists():
            return
        source = self.units[unit].source
        if source and source.startswith(PRETOKENIZED):
            address = self.units[unit].files[0]
            splits = fetch_shard(address, self.out, self.downloads(unit), gpt2_tokenizer())
            return self._finish(unit, splits, sum(part["documents"] for part in splits.values()), duplicates=0)
        writers = {s: ShardWriter(self.out, f"{s}_{unit:05d}", self.config.shard_tokens) for s in SPLITS}
        try:
            counts, read = self._write(unit, writers)
            splits = {s: {"tokens": w.tokens, **counts[s], "shards": w.close()} for s, w in writers.items()}
        except BaseException as e:
            for writer in writers.values():
                writer.discard()
            if isinstance(e, OSError):
                raise UserError(
                    f"{self.out}: cannot write ({e.strerror or e}); fix it or free disk space, and run the same "
                    f"command again; finished units are kept"
                ) from None
            raise
        self._finish(unit, splits, counts["all"]["documents"], counts["duplicates"]["documents"], read)

    def _finish(
        self, unit: int, splits: dict[str, Any], documents: int, duplicates: int, read: dict[str, Any] | None = None
    ) -> None:
        """Write the record of a unit after its shards, and delete its downloads."""
        fsync_path(self.out)  # the record must not reach the disk before the names of the shards
        record = {"splits": splits, "documents": documents, "duplicates": duplicates}
        if read:
            record[READ] = read
        write_json_atomically(record_path(self.out, unit), record, self.out)
        if downloads := self.downloads(unit):
            shutil.rmtree(downloads, ignore_errors=True)

    def document_done(self) -> None:
        """Run after each document; subclasses show progress here."""

    def _write(self, unit: int, writers: dict[str, ShardWriter]) -> tuple[dict[str, dict[str, int]], dict[str, Any]]:
        """Write the documents; return counts of documents and text bytes by destination, and `ReadCounts.to_dict`."""
        read = ReadCounts()
        config, tokenizer = self.config, gpt2_tokenizer()
        encoder, separator = BulkEncoder(tokenizer), np.array([tokenizer.end_of_text], dtype=np.uint16)
        counts = {name: {"documents": 0, "text_bytes": 0} for name in (*DESTINATIONS, "all")}
        documents = unit_documents(self.units[unit], config, self.downloads(unit), read)
        hashes = assigned = None
        if config.dedup or hashes_path(self.out, unit).exists():
            hashes = _load(hashes_path(self.out, unit), np.uint64).tolist()
            assigned = _load(_assigned_path(self.out, unit), np.uint8).tolist()
        if len(self.units) == 1:
            head = list(islice(documents, 2))
            if len(head) == 1:  # no separator; its last part is the validation split
                for _, parts in encoded(head, encoder, config.split_seed, hashes, self.remedy):
                    counts |= write_by_position(parts, config.val_fraction, writers, tokenizer)
                counts["all"]["documents"] = 1  # each split contains a part of it
                self.document_done()
                return counts, read.to_dict()
            documents = chain(head, documents)
        limit = val_limit(config)
        for place, (h, parts) in enumerate(encoded(documents, encoder, config.split_seed, hashes, self.remedy)):
            split = DESTINATIONS[assigned[place] if assigned is not None else h < limit]
            if split != "duplicates":
                writers[split].add(separator)
            for part in parts:
                if split != "duplicates":
                    writers[split].add(part)
                counts[split]["text_bytes"] += tokenizer.byte_length(part)
            counts[split]["documents"] += 1
            counts["all"]["documents"] += split != "duplicates"
            self.document_done()
        return counts, read.to_dict()


# --- documents to tokens -----------------------------------------------------------------------------------


def document_batches(documents: Iterable[AnyDocument]) -> Iterator[list[AnyDocument]]:
    """Yield documents in batches of about `BATCH_CHARACTERS`; a document that is encoded in pieces is a batch alone."""
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
        del document  # free the memory of a long document before the next one is read
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
    remedy: str = "run the same command again",
) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """Encode documents: short ones in batches, long ones in pieces.

    Args:
        documents: documents to encode.
        encoder: encoder of the tokens.
        seed: seed of the split hash.
        known: hashes of the documents from an earlier read, for comparison; None: they are computed.
        remedy: end of the error message for changed documents.

    Yields:
        The `split_hash` of each document and its tokens in parts, each (n,) uint16. The caller has to read all parts
        of a document before the next document.

    Raises:
        UserError: a document has changed since its first read, or documents have disappeared.
    """
    hashes = iter(known or [])
    for batch in document_batches(documents):
        alone = len(batch) == 1  # encoded in pieces, of which a short document has one
        tokens = iter([] if alone else encoder.encode([d.text for d in batch if isinstance(d, Document)]))
        batch.reverse()
        while batch:
            document = batch.pop()
            h = next(hashes, None) if known is not None else split_hash(document.parts(), seed)
            in_memory = known is not None and isinstance(document, Document)  # others are compared while encoding
            if h is None or (in_memory and h != split_hash(document.parts(), seed)):
                raise UserError(f"{document.name} has changed since it was first read; {remedy}")
            parts = _encoded_pieces(document, encoder, seed, h, remedy) if alone else iter([next(tokens)])
            del document
            yield h, parts
    if next(hashes, None) is not None:
        raise UserError(f"documents have disappeared since the first read; {remedy}")


def _encoded_pieces(
    document: AnyDocument, encoder: BulkEncoder, seed: int, expected: int, remedy: str
) -> Iterator[np.ndarray]:
    """Yield the tokens of a document in pieces. Raises UserError at the end if the hash of the text has changed."""
    hashed = SplitHash(seed)
    for piece in pieces(document.name, map(hashed.update, document.parts())):
        yield encoder.encode([piece])[0]
    if hashed.value() != expected:
        raise UserError(f"{document.name} has changed since it was first read; {remedy}")


def write_by_position(
    parts: Iterable[np.ndarray], val_fraction: float, writers: dict[str, ShardWriter], tokenizer: Tokenizer
) -> dict[str, dict[str, int]]:
    """Write a single document without a separator; its last part is the validation split.

    Args:
        parts: token ids of the document in parts, each (n,) uint16.
        val_fraction: fraction of the tokens for validation.
        writers: shard writer of each split.
        tokenizer: tokenizer that counts the bytes of the text.

    Returns:
        Counts of documents and text bytes by split.
    """
    counts = {split: {"documents": 0, "text_bytes": 0} for split in SPLITS}
    with tempfile.TemporaryFile(dir=writers["train"].folder) as held:  # the position of the cut depends on the total
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


# --- published shards ---------------------------------------------------------------------------------------


def fetch_shard(address: str, out: Path, downloads: Path | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """Download and check one published shard.

    Args:
        address: address of the shard on the hub.
        out: output folder; the shard keeps its name.
        downloads: temporary folder for the download; None: cache of the hub client.
        tokenizer: tokenizer that counts the bytes of the text.

    Returns:
        Record by split: tokens, documents, bytes of text and the manifest entry of the shard.

    Raises:
        UserError: the shard cannot be downloaded, is damaged, or contains tokens outside GPT-2's vocabulary.
    """
    path = fetch(address, downloads)
    name = path.name
    tokens = open_shard(path, "download it again")
    documents = text_bytes = 0
    for start in range(0, len(tokens), COPY_TOKENS):
        part = np.asarray(tokens[start : start + COPY_TOKENS])
        require_in_vocabulary(part, name)
        documents += int(np.count_nonzero(part == END_OF_TEXT))
        text_bytes += tokenizer.byte_length(part)
    blob, count = path.resolve(), len(tokens)
    del tokens  # unmap the file
    if downloads is None:
        with Temporary(out) as temporary:
            shutil.copyfile(blob, temporary.path)
            temporary.move(out / name)
    else:
        os.replace(blob, out / name)  # temporary downloads are in ``out``
    fsync_path(out / name)
    shard = {"file": name, "tokens": count, "sha256": sha256_file(out / name)}
    empty: dict[str, Any] = {"tokens": 0, "documents": 0, "text_bytes": 0, "shards": []}
    full = {"tokens": count, "documents": documents, "text_bytes": text_bytes, "shards": [shard]}
    return {split: full if split == split_of(name) else empty for split in SPLITS}
