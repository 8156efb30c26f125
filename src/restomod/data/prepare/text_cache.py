"""Cache of prepared text for `train`, with folders named by a hash of the documents."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from restomod.config.prepare import PrepareConfig
from restomod.config.run import DataConfig
from restomod.data.dataset import SHARD_TOKENS, Dataset, mix, open_dataset, open_tokens
from restomod.data.manifest import MANIFEST, READ, merge_counts
from restomod.data.prepare.folder import Work, finish_folder
from restomod.data.prepare.units import Unit, describe, plan_units, unit_documents
from restomod.data.prepare.worker import WORK, PrepareUnit, assign_splits, hash_documents, hashes_path, write_array
from restomod.data.read_counts import ReadCounts
from restomod.data.sources import DOCUMENTS, download_tinyshakespeare, source_name
from restomod.data.tokenizer import Tokenizer
from restomod.utils.errors import UserError
from restomod.utils.files import fsync_path, move_folder
from restomod.utils.locks import locked
from restomod.utils.temporary import Temporary, remove_leftovers

REPORT_SECONDS = 5.0


def prepare_text(config: DataConfig, shard_tokens: int = SHARD_TOKENS) -> Dataset:
    """Open the dataset of a run; prepare its text in this process unless the cache contains it.

    The pipeline is that of `restomod prepare`, but all documents are hashed first, to detect changed text and to avoid
    empty splits. The folder is renamed to its final name when it is complete. If several processes request the same
    text, one of them prepares it and the others wait.

    Args:
        config: data settings of the run.
        shard_tokens: maximum number of tokens per shard.

    Raises:
        UserError: the text cannot be read, or a folder of tokens is damaged.
    """
    if config.mix is not None:
        return mix([(open_tokens(Path(folder)), share) for folder, share in config.mixed()])
    if config.source == "tokens":
        if not config.path:
            raise UserError("--data.source tokens needs --data.path FOLDER; create the folder with `restomod prepare`")
        return open_tokens(Path(config.path))
    settings = PrepareConfig(
        glob=config.glob,
        text_column=config.text_column,
        separator=config.separator,
        val_fraction=config.val_fraction,
        split_seed=config.split_seed,
        shard_tokens=shard_tokens,
    )
    skipped, read = ReadCounts(), ReadCounts()
    if config.source in DOCUMENTS:
        source, units = str(config.source), [Unit((), 0, config.source)]
    else:
        source = str(_path_of_text(config).absolute())
        units = plan_units((source,), settings, counts=skipped)
    hashes = [hash_documents(unit_documents(unit, settings, None, read), config.split_seed) for unit in units]
    name = source_name(config)
    description = describe((source,), settings, units) | {"name": name}
    folder = Path(config.cache) / f"{name}-{_key(settings, hashes)[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    if not (folder / MANIFEST).exists():
        with locked(
            folder.with_name(f".{folder.name}.lock"),
            lambda: _say(f"waiting for another process that is preparing {folder}"),
        ):
            if not (folder / MANIFEST).exists():  # another process may have finished it since
                with Temporary(folder.parent, "folder") as temporary:
                    _prepare(Work(temporary.path, settings, units, description, skipped), hashes)
                    if not (folder / MANIFEST).exists():
                        shutil.rmtree(folder, ignore_errors=True)  # incomplete without a manifest
                        move_folder(temporary.path, folder, MANIFEST)
                        fsync_path(folder.parent)
    dataset = open_dataset(folder, Tokenizer.sha256)
    # the cached folder may come from equal text in files with other names; report the current files
    counts = merge_counts([skipped.to_dict(), read.to_dict()])
    manifest = dataset.manifest | {"plan": description} | ({READ: counts} if counts else {})
    return dataclasses.replace(dataset, manifest=manifest)


def _path_of_text(config: DataConfig) -> Path:
    """Return the file or folder to read; download TinyShakespeare if it is missing."""
    if config.source == "tinyshakespeare" and not config.path:
        return download_tinyshakespeare(Path(config.cache))
    if not config.path:
        raise UserError("--data.source text needs --data.path FILE_OR_FOLDER")
    path = Path(config.path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if (path / MANIFEST).exists():
        raise UserError(f"{path} contains token shards, not text; add --data.source tokens")
    return path


def _key(settings: PrepareConfig, hashes: list[np.ndarray]) -> str:
    """Compute a hash of everything that determines the tokens and splits: documents, tokenizer and settings."""
    digest = hashlib.sha256(f"{Tokenizer.sha256} {settings.split_seed} {settings.val_fraction}".encode())
    for of_unit in hashes:
        digest.update(of_unit.astype("<u8").tobytes())
    if len(hashes) > 1 and sum(map(len, hashes)) == 1:  # with several units, a single document has a separator
        digest.update(b"units")
    return digest.hexdigest()


def _prepare(work: Work, hashes: list[np.ndarray]) -> None:
    """Prepare every unit in this process, and write the manifest."""
    (work.out / WORK).mkdir()
    for unit, of_unit in enumerate(hashes):
        write_array(hashes_path(work.out, unit), of_unit, work.out)
    assign_splits(work.out, len(work.units), work.config)
    step = _ReportingStep(work, sum(map(len, hashes)))
    for unit in range(len(work.units)):
        step.work(unit)
    finish_folder(work)


class _ReportingStep(PrepareUnit):
    """Preparation step that prints its progress every `REPORT_SECONDS`."""

    remedy = "run the same command again"

    def __init__(self, work: Work, total: int) -> None:
        super().__init__(work.config, work.units, work.out)
        self.name, self.total, self.done, self.reported = work.description["name"], total, 0, time.monotonic()

    def work(self, unit: int) -> None:
        super().work(unit)
        self._report()

    def document_done(self) -> None:
        self.done += 1
        if self.done % 16 == 0:
            self._report()

    def _report(self) -> None:
        if time.monotonic() >= self.reported + REPORT_SECONDS:
            self.reported = time.monotonic()
            _say(f"preparing {self.name}: {self.done:,} of {self.total:,} documents")


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
