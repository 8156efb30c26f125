"""What a worker does with a unit: hash its documents to find duplicates, and write its shards and its record.

A record is written after its shards, so that it alone says whether a unit is finished. What is written is a pure
function of the unit's files and the settings.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from restomod.config.prepare import PrepareConfig
from restomod.data.bulk import BulkEncoder
from restomod.data.dataset import SPLITS, ShardWriter, open_npy
from restomod.data.documents import AnyDocument, split_hash
from restomod.data.manifest import READ
from restomod.data.prepare.units import PRETOKENIZED, Unit, unit_documents
from restomod.data.pretokenized import fetch_shard
from restomod.data.reading import Reading
from restomod.data.tokenize import encoded, write_by_position
from restomod.data.tokenizer import gpt2_tokenizer
from restomod.utils.errors import UserError
from restomod.utils.files import fsync_path, write_bytes_atomically, write_json_atomically

WORK = ".prepare"
SLURM = "slurm.json"  # there: jobs of Slurm have been submitted for the folder
ANEW = "choose another folder with --out, or delete this one and run the same command again"


def record_path(out: Path, unit: int) -> Path:
    return out / WORK / f"unit_{unit:05d}.json"


def failure_path(out: Path, unit: int) -> Path:
    """Where a job of Slurm leaves why it could not prepare a unit."""
    return out / WORK / f"failed_{unit:05d}.json"


def quiet_datatrove() -> None:
    """Keep datatrove's log off the terminal; errors are reported as ours."""
    from loguru import logger

    logger.disable("datatrove")


class UnitStep:
    """A step of a datatrove pipeline: called as (data, rank, world_size), it works on unit ``rank``."""

    def __init__(self, config: PrepareConfig, units: list[Unit], out: Path) -> None:
        self.config, self.units, self.out = config, units, out

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        quiet_datatrove()  # in a worker, before its first message

    def __call__(self, data: Any, rank: int, world_size: int) -> Iterable[AnyDocument]:
        self.work(rank)
        return []

    def work(self, unit: int) -> None:
        raise NotImplementedError

    def downloads(self, unit: int) -> Path | None:
        """Where a unit's downloads go: into a folder of its own, or to stay into the hub client's cache."""
        return None if self.config.keep_downloads else _downloads(self.out, unit)


class HashUnit(UnitStep):
    """Write the hashes of a unit's documents, from which duplicates are told."""

    def work(self, unit: int) -> None:
        path = hashes_path(self.out, unit)
        if path.exists():
            return
        documents = unit_documents(self.units[unit], self.config, self.downloads(unit))
        hashes = [split_hash(document.parts(), self.config.split_seed) for document in documents]
        _write_array(path, np.array(hashes, dtype=np.uint64), self.out)


def hashes_path(out: Path, unit: int) -> Path:
    return out / WORK / f"hashes_{unit:05d}.npy"


def _downloads(out: Path, unit: int) -> Path:
    return out / WORK / f"downloads_{unit:05d}"


def _keep(out: Path, unit: int) -> Path:
    return out / WORK / f"keep_{unit:05d}.npy"


def _load(path: Path, dtype: type[np.generic]) -> np.ndarray:
    """What a step before has written for each document of a unit, (n,).

    Raises:
        UserError: it is damaged.
    """
    values = open_npy(path, dtype, "delete this file and run the same command again")
    return np.asarray(values)


def choose_first_occurrences(out: Path, units: int) -> None:
    """Write for every unit which of its documents are the first of their text, in the order of the units."""
    hashes = [_load(hashes_path(out, unit), np.uint64) for unit in range(units)]
    first = np.zeros(sum(map(len, hashes)), dtype=bool)
    first[np.unique(np.concatenate(hashes), return_index=True)[1]] = True
    for unit, keep in enumerate(np.split(first, np.cumsum([len(h) for h in hashes])[:-1])):
        _write_array(_keep(out, unit), keep, out)


def _write_array(path: Path, values: np.ndarray, out: Path) -> None:
    content = io.BytesIO()
    np.save(content, values)
    write_bytes_atomically(path, content.getvalue(), out)


class PrepareUnit(UnitStep):
    """Tokenize a unit's documents into its shards, and write its record."""

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
            splits = {
                split: {"tokens": writer.tokens, **counts[split], "shards": writer.close()}
                for split, writer in writers.items()
            }
        except BaseException as e:
            for writer in writers.values():
                writer.discard()
            if isinstance(e, OSError):
                raise UserError(
                    f"{self.out}: cannot write ({e.strerror or e}); what is finished stays: "
                    f"mend it and run the same command again"
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
        shutil.rmtree(_downloads(self.out, unit), ignore_errors=True)

    def _write(self, unit: int, writers: dict[str, ShardWriter]) -> tuple[dict[str, dict[str, int]], dict[str, Any]]:
        """Write the documents.

        Returns:
            The numbers of documents and bytes of text of each split, of duplicates and of all; what was read as what.
        """
        reading = Reading()
        config, tokenizer = self.config, gpt2_tokenizer()
        encoder, separator = BulkEncoder(tokenizer), np.array([tokenizer.end_of_text], dtype=np.uint16)
        counts = {name: {"documents": 0, "text_bytes": 0} for name in (*SPLITS, "duplicates", "all")}
        documents: Iterator[AnyDocument]
        documents = map(reading.count, unit_documents(self.units[unit], config, self.downloads(unit), reading))
        hashes = _load(hashes_path(self.out, unit), np.uint64).tolist() if config.dedup else None
        if len(self.units) == 1:
            head = list(islice(documents, 2))
            if len(head) == 1:  # nothing to delimit: written bare, and validation is its tail
                for _, parts in encoded(head, encoder, config.split_seed, hashes, ANEW):
                    counts |= write_by_position(parts, config.val_fraction, writers, tokenizer)
                counts["all"]["documents"] = 1  # a part of it in each split
                return counts, reading.to_dict()
            documents = chain(head, documents)
        keep = _load(_keep(self.out, unit), np.bool_).tolist() if config.dedup else None
        held_out = config.val_fraction * 2**64
        for place, (h, parts) in enumerate(encoded(documents, encoder, config.split_seed, hashes, ANEW)):
            split = "val" if h < held_out else "train"
            if keep is not None and not keep[place]:
                split = "duplicates"
            else:
                writers[split].add(separator)
            for part in parts:
                if split != "duplicates":
                    writers[split].add(part)
                counts[split]["text_bytes"] += tokenizer.byte_length(part)
            counts[split]["documents"] += 1
            counts["all"]["documents"] += split != "duplicates"
        return counts, reading.to_dict()
