"""The work on a unit: hash its documents, assign them to splits, write its shards and its record.

A record is written after its shards, so a unit is finished exactly if it has one. What is written is a pure function
of the files and the settings.
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
SLURM = "slurm.json"  # there: jobs of Slurm have been submitted for the folder
ANEW = "choose another folder with --out, or delete this one and run the same command again"
DESTINATIONS = (*SPLITS, "duplicates")  # of a document; `assign_splits` writes their numbers
BATCH_CHARACTERS = 4_000_000  # of text encoded at once: fast, and little memory
COPY_TOKENS = 1_000_000  # read at once of tokens that are in a file


def record_path(out: Path, unit: int) -> Path:
    return out / WORK / f"unit_{unit:05d}.json"


def failure_path(out: Path, unit: int) -> Path:
    """File in which a job of Slurm leaves the error of a unit."""
    return out / WORK / f"failed_{unit:05d}.json"


def quiet_datatrove() -> None:
    """Keep datatrove's log off the terminal; errors are reported as ours."""
    from loguru import logger

    logger.disable("datatrove")


class UnitStep:
    """A step of a datatrove pipeline: rank r works on unit ``todo[r]``."""

    def __init__(self, config: PrepareConfig, units: list[Unit], out: Path, todo: Sequence[int] = ()) -> None:
        self.config, self.units, self.out, self.todo = config, units, out, todo

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        quiet_datatrove()  # in a worker, before its first message

    def __call__(self, data: Any, rank: int, world_size: int) -> Iterable[AnyDocument]:
        self.work(self.todo[rank])
        return []

    def work(self, unit: int) -> None:
        raise NotImplementedError

    def downloads(self, unit: int) -> Path | None:
        """Folder for a unit's downloads, deleted when it is finished; None: the hub client's cache, to keep them."""
        return None if self.config.keep_downloads else self.out / WORK / f"downloads_{unit:05d}"


class HashUnit(UnitStep):
    """Write the hashes of a unit's documents, by which duplicates are found."""

    def work(self, unit: int) -> None:
        if hashes_path(self.out, unit).exists():
            return
        documents = unit_documents(self.units[unit], self.config, self.downloads(unit))
        hashes = hash_documents(documents, self.config.split_seed)
        write_array(hashes_path(self.out, unit), hashes, self.out)


def hash_documents(documents: Iterable[AnyDocument], seed: int) -> np.ndarray:
    """The `split_hash` of every document, shape (n,), uint64."""
    return np.fromiter((split_hash(document.parts(), seed) for document in documents), dtype=np.uint64)


def hashes_path(out: Path, unit: int) -> Path:
    return out / WORK / f"hashes_{unit:05d}.npy"


def _assigned_path(out: Path, unit: int) -> Path:
    return out / WORK / f"assigned_{unit:05d}.npy"


def _load(path: Path, dtype: type[np.generic]) -> np.ndarray:
    """Map the values that an earlier step has written, shape (n,). Raises UserError where they are damaged."""
    return open_npy(path, dtype, "delete this file and run the same command again")


def assign_splits(out: Path, units: int, config: PrepareConfig) -> None:
    """Write for every unit the place in `DESTINATIONS` of each of its documents, given the hashes of all documents.

    Validation gets at least one text if ``val_fraction`` is above 0, and never all. With ``dedup`` only the first
    document of each text is kept, in the order of the units.
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
    """The hash below which documents go to validation."""
    return math.ceil(config.val_fraction * 2**64)


def write_array(path: Path, values: np.ndarray, out: Path) -> None:
    """Save a value per document of a unit, shape (n,), as .npy, atomically: hashes (uint64) or destinations (uint8)."""
    content = io.BytesIO()
    np.save(content, values)
    write_bytes_atomically(path, content.getvalue(), out)


class PrepareUnit(UnitStep):
    """Tokenize a unit's documents into its shards, and write its record."""

    remedy = ANEW
    """What to do about a document that has changed since it was hashed, for messages."""

    def work(self, unit: int) -> None:
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
                    f"{self.out}: cannot write ({e.strerror or e}); finished units are kept: "
                    f"free space or fix it, and run the same command again"
                ) from None
            raise
        self._finish(unit, splits, counts["all"]["documents"], counts["duplicates"]["documents"], read)

    def _finish(
        self, unit: int, splits: dict[str, Any], documents: int, duplicates: int, read: dict[str, Any] | None = None
    ) -> None:
        """Write the record of a unit whose shards are written, and drop what it downloaded."""
        fsync_path(self.out)  # the shards' names are on the disk before a record speaks of them
        record = {"splits": splits, "documents": documents, "duplicates": duplicates}
        if read:
            record[READ] = read
        write_json_atomically(record_path(self.out, unit), record, self.out)
        if downloads := self.downloads(unit):
            shutil.rmtree(downloads, ignore_errors=True)

    def document_done(self) -> None:
        """Called after each document, for subclasses that show progress."""

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
            if len(head) == 1:  # nothing to delimit: written without a separator, and validation is its tail
                for _, parts in encoded(head, encoder, config.split_seed, hashes, self.remedy):
                    counts |= write_by_position(parts, config.val_fraction, writers, tokenizer)
                counts["all"]["documents"] = 1  # a part of it in each split
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
    remedy: str = "run the same command again",
) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """Yield the `split_hash` and the tokens of each document; the tokens in parts, to be taken before the next one.

    Short documents are encoded many at once, a long one piece by piece.

    Raises:
        UserError: a document's hash is not the ``known`` one, or it has changed while it was encoded; ends with
            ``remedy``.
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
                raise UserError(f"{document.name} has changed since it was first read; {remedy}")
            parts = _encoded_pieces(document, encoder, seed, h, remedy) if alone else iter([next(tokens)])
            del document
            yield h, parts
    if next(hashes, None) is not None:
        raise UserError(f"documents have disappeared since they were first read; {remedy}")


def _encoded_pieces(
    document: AnyDocument, encoder: BulkEncoder, seed: int, expected: int, remedy: str
) -> Iterator[np.ndarray]:
    """Yield the tokens of a document piece by piece. Raises UserError at the end if the text has another hash."""
    hashed = SplitHash(seed)
    for piece in pieces(document.name, map(hashed.pass_on, document.parts())):
        yield encoder.encode([piece])[0]
    if hashed.value() != expected:
        raise UserError(f"{document.name} has changed since it was first read; {remedy}")


def write_by_position(
    parts: Iterable[np.ndarray], val_fraction: float, writers: dict[str, ShardWriter], tokenizer: Tokenizer
) -> dict[str, dict[str, int]]:
    """Write the tokens of a single document without a separator, the last part for validation; return counts."""
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


# --- shards that others have published ----------------------------------------------------------------------


def fetch_shard(address: str, out: Path, downloads: Path | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """Download one published shard into ``out`` under its own name, check it, and return its record by split.

    Raises:
        UserError: it cannot be downloaded, is damaged, or holds tokens that are not GPT-2's.
    """
    path = fetch(address, downloads)
    name = path.name
    tokens = open_shard(path, "get it again")
    documents = text_bytes = 0
    for start in range(0, len(tokens), COPY_TOKENS):
        part = np.asarray(tokens[start : start + COPY_TOKENS])
        require_in_vocabulary(part, name)
        documents += int(np.count_nonzero(part == END_OF_TEXT))
        text_bytes += tokenizer.byte_length(part)
    blob, count = path.resolve(), len(tokens)
    del tokens  # unmap it
    if downloads is None:
        with Temporary(out) as temporary:
            shutil.copyfile(blob, temporary.path)
            temporary.move(out / name)
    else:
        os.replace(blob, out / name)  # a download that is not to stay lies within ``out``
    fsync_path(out / name)
    shard = {"file": name, "tokens": count, "sha256": sha256_file(out / name)}
    empty: dict[str, Any] = {"tokens": 0, "documents": 0, "text_bytes": 0, "shards": []}
    full = {"tokens": count, "documents": documents, "text_bytes": text_bytes, "shards": [shard]}
    return {split: full if split == split_of(name) else empty for split in SPLITS}
