"""Token shards in llm.c's `.bin` layout: writing them, and opening folders of them as a `Dataset`, alone or mixed.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros) and then the
tokens as little-endian uint16: the layout in which pre-tokenized FineWeb is published. `manifest.json` is written
last; it names every shard with its token count and SHA-256, and the tokenizer that made them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from restomod.data.manifest import MANIFEST, MANIFEST_FORMAT, PREPARE_AGAIN, READ, merge_counts, read_manifest
from restomod.data.tokenizer import Tokenizer
from restomod.utils.errors import UserError, one_line
from restomod.utils.files import require_regular, sha256_file
from restomod.utils.temporary import Temporary
from restomod.utils.verified import changed_file

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
SHARD_TOKENS = 100_000_000
SPLITS = ("train", "val")
MAPPED_AT_ONCE = 128  # of a stream; each map holds a file descriptor, of which a process has 1,024 by default

Verify = Literal["sizes", "changed", "all"]


def write_shard(path: Path, tokens: np.ndarray) -> dict[str, Any]:
    """Write ``tokens`` (n,) to ``path`` and return its manifest entry: file, tokens, sha256."""
    shard = _OpenShard(path)
    shard.append(tokens)
    return shard.close()


def shard_header(tokens: int) -> bytes:
    """The bytes of the header of a shard with ``tokens`` tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()


class _OpenShard:
    """A shard that is being written; it gets its name when it is complete and synced to disk."""

    def __init__(self, path: Path) -> None:
        self.path, self.tokens = path, 0
        self._temporary = Temporary(path.parent)
        assert self._temporary.fd is not None
        self._file = open(self._temporary.fd, "wb", closefd=False)  # noqa: SIM115 - `close` and `discard` close it
        self._file.write(bytes(HEADER_BYTES))

    def append(self, tokens: np.ndarray) -> None:
        self._file.write(tokens.astype("<u2", copy=False).tobytes())
        self.tokens += len(tokens)

    def close(self) -> dict[str, Any]:
        self._file.seek(0)
        self._file.write(shard_header(self.tokens))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        sha256 = sha256_file(self._temporary.path)
        self._temporary.move(self.path)
        return {"file": self.path.name, "tokens": self.tokens, "sha256": sha256}

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # on a full disk: closing writes what is still in memory
            self._file.close()
        self._temporary.remove()


def open_shard(path: Path, remedy: str = PREPARE_AGAIN) -> np.ndarray:
    """Map a shard's tokens, shape (n,), uint16, without reading them: llm.c's `.bin`, or `.npy`.

    Raises:
        UserError: the file is missing, is no such shard, or its size does not fit its header; ends with ``remedy``.
    """
    require_regular(path)
    if path.suffix == ".npy":
        return open_npy(path, np.uint16, remedy)
    try:
        with open(path, "rb") as f:
            start = f.read(HEADER_BYTES)
            size = f.seek(0, 2)
    except OSError as e:
        raise UserError(f"{path}: cannot read this token shard ({e.strerror}); {remedy}") from None
    header = np.frombuffer(start[: len(start) // 4 * 4], dtype="<i4")
    if len(header) < 256 or header[0] != MAGIC or header[1] != VERSION:
        raise UserError(f"{path} is not a token shard: its header lacks the magic number {MAGIC}; {remedy}")
    n = int(header[2])
    if size != HEADER_BYTES + 2 * n:
        raise UserError(
            f"{path} is damaged: its header says {n:,} tokens ({HEADER_BYTES + 2 * n:,} bytes), "
            f"but the file has {size:,} bytes; {remedy}"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(n,))


class ShardWriter:
    """Cut a stream of token arrays into shards `PREFIX_000000.bin`, `PREFIX_000001.bin`, … in a folder."""

    def __init__(self, folder: Path, prefix: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.prefix, self.shard_tokens = folder, prefix, shard_tokens
        self.shards: list[dict[str, Any]] = []
        self.tokens = 0
        self._open: _OpenShard | None = None

    def add(self, tokens: np.ndarray) -> None:
        """Append ``tokens`` (n,) to the stream; they go to the disk at once."""
        self.tokens += len(tokens)
        while len(tokens):
            if self._open is None:
                self._open = _OpenShard(self.folder / f"{self.prefix}_{len(self.shards):06d}.bin")
            room = self.shard_tokens - self._open.tokens
            self._open.append(tokens[:room])
            tokens = tokens[room:]
            if self._open.tokens == self.shard_tokens:
                self._finish(self._open)

    def close(self) -> list[dict[str, Any]]:
        """Finish the last shard and return the manifest entries of all."""
        if self._open is not None:
            self._finish(self._open)
        return self.shards

    def discard(self) -> None:
        """Drop the shard that is being written, after an error."""
        if self._open is not None:
            self._open.discard()
            self._open = None

    def _finish(self, shard: _OpenShard) -> None:
        self.shards.append(shard.close())
        self._open = None


@dataclass(frozen=True, slots=True, eq=False)
class ShardFile:
    """A shard on the disk that is mapped only while it is read."""

    folder: Path
    name: str
    tokens: int
    """Number of tokens that the manifest says."""

    def __len__(self) -> int:
        return self.tokens

    def map(self, random_reads: bool = False) -> np.ndarray:
        """Map its tokens, shape (n,), uint16, without reading them.

        Raises:
            UserError: it is missing, damaged, or has not ``tokens`` tokens.
        """
        path = self.folder / self.name
        tokens = open_shard(path)
        if len(tokens) != self.tokens:
            raise UserError(f"{path} is damaged: it has {len(tokens):,} tokens, not {self.tokens:,}; {PREPARE_AGAIN}")
        if random_reads:
            _expect_random_reads(tokens)
        return tokens

    def check(self) -> None:
        """Check the file's size (microseconds), and the header only where the size is wrong.

        Raises:
            UserError: as `map` does; a bad header in a file of the right size is left for `map` to find.
        """
        with contextlib.suppress(OSError):  # `map` says what is wrong with it
            if os.stat(f"{self.folder}/{self.name}").st_size == HEADER_BYTES + 2 * self.tokens:
                return
        self.map()


def _expect_random_reads(tokens: np.ndarray) -> None:
    mapped = getattr(tokens, "_mmap", None)  # numpy's memmap has no public way to it
    if mapped is not None and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)


class TokenStream:
    """The shards of one split as a single array of tokens, read where asked.

    However many shards on the disk there are, the `MAPPED_AT_ONCE` that were read last are mapped.
    """

    def __init__(self, shards: Sequence[np.ndarray | ShardFile]) -> None:
        self._shards = list(shards)
        self._starts = np.cumsum([0] + [len(s) for s in shards])  # (n_shards + 1,)
        self._random_reads = False
        self._map = functools.lru_cache(MAPPED_AT_ONCE)(ShardFile.map)

    def expect_random_reads(self) -> None:
        """Turn off read-ahead, which on some systems reads megabytes for the two kilobytes of a window."""
        self._random_reads = True
        for shard in self._shards:
            if not isinstance(shard, ShardFile):
                _expect_random_reads(shard)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length), shape (length,), uint16; a read may cross from shard to shard."""
        if not 0 <= start <= start + length <= len(self):
            raise IndexError(f"tokens [{start}, {start + length}) of a stream of {len(self)}")
        parts = []
        i = int(np.searchsorted(self._starts, start, side="right")) - 1
        while length > 0:
            offset = start - int(self._starts[i])
            shard = self._shards[i]
            tokens = self._map(shard, self._random_reads) if isinstance(shard, ShardFile) else shard
            part = tokens[offset : offset + length]
            parts.append(part)
            start, length, i = start + len(part), length - len(part), i + 1
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint16)


@dataclass(frozen=True)
class Dataset:
    """A prepared folder: its manifest, and its splits as streams of tokens."""

    folder: Path
    manifest: dict[str, Any]
    train: TokenStream
    val: TokenStream

    parts: tuple[Part, ...] = ()
    """The sources of a mix; empty where it is not a mix."""

    @property
    def fingerprint(self) -> str:
        """Hash of the text, the tokenizer and the split: equal fingerprints mean equal tokens."""
        return str(self.manifest["fingerprint"])

    @property
    def sources(self) -> tuple[Part, ...]:
        """The sources with their shares; a dataset that is not a mix is its own only source."""
        return self.parts or (Part(str(self.manifest["name"]), self, Fraction(1)),)


@dataclass(frozen=True)
class Part:
    """A source of a mix."""

    name: str
    dataset: Dataset
    share: Fraction
    """Fraction of the sequences of a run; the shares of all sources add up to 1."""


def open_dataset(folder: Path, tokenizer_sha256: str, verify: Verify = "changed") -> Dataset:
    """Open a folder with a manifest, and check every shard against it.

    Args:
        folder: the folder.
        tokenizer_sha256: the vocabulary that the tokens must have.
        verify: compare only sizes, or the SHA-256 of every shard, or only of those that the file system says have
            changed since they were last compared.

    Raises:
        UserError: the manifest is missing, damaged or made with another tokenizer; a shard is missing or altered.
    """
    manifest = read_manifest(folder)
    made_with = manifest["tokenizer"]["sha256"]
    if made_with != tokenizer_sha256:
        raise UserError(f"{folder} was tokenized with another vocabulary (SHA-256 {made_with[:12]}…); {PREPARE_AGAIN}")
    entries = {split: manifest["splits"][split]["shards"] for split in SPLITS}
    hashes = {entry["file"]: entry["sha256"] for split in SPLITS for entry in entries[split]}
    if len(hashes) < sum(map(len, entries.values())):
        raise UserError(f"{folder / MANIFEST} is damaged: it names a shard twice; {PREPARE_AGAIN}")
    shards = [[ShardFile(folder, entry["file"], entry["tokens"]) for entry in entries[split]] for split in SPLITS]
    for shard in itertools.chain(*shards):
        shard.check()
    train, val = map(TokenStream, shards)
    if verify != "sizes":
        changed = changed_file(folder, hashes, remember=verify == "changed")
        if changed:
            raise UserError(f"{folder / changed} is damaged: its SHA-256 is not the one in {MANIFEST}; {PREPARE_AGAIN}")
    return Dataset(folder, manifest, train, val)


def open_npy(path: Path, dtype: type[np.generic], remedy: str) -> np.ndarray:
    """Map a file of NumPy that holds one row of numbers, shape (n,), without reading them.

    Raises:
        UserError: it is missing or damaged, or holds something else; the message ends with ``remedy``.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as e:  # of many kinds: its header is Python's source
        raise UserError(f"{path} is damaged: {one_line(e)}; {remedy}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise UserError(f"{path} is an archive of arrays (.npz), not one row of numbers; {remedy}")
    if array.dtype != dtype or array.ndim != 1:
        raise UserError(f"{path} holds {array.dtype} of shape {array.shape}, not a row of {dtype.__name__}; {remedy}")
    return array


def open_tokens(folder: Path, verify: Verify = "changed") -> Dataset:
    """Open a folder of token shards with a manifest (`open_dataset`), or as others publish them (`open_published`).

    Raises:
        UserError: there are no shards, or they are damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of token shards; `restomod prepare SOURCE --out {folder}` makes one")
    if (folder / MANIFEST).exists():
        return open_dataset(folder, Tokenizer.sha256, verify)
    return open_published(folder)


def split_of(name: str) -> str | None:
    """The split in the name of a published shard, such as `fineweb_train_000001.bin`; None: there is none."""
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
        entries: list[dict[str, Any]] = []
        for path in found:
            tokens = open_shard(path, "get it again")
            entries.append({"file": path.name, "tokens": len(tokens)})
            digest.update(f"{entries[-1]} {tokens[:4096].tobytes().hex()}".encode())
        streams[split] = TokenStream([ShardFile(folder, entry["file"], entry["tokens"]) for entry in entries])
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


def mix(datasets: list[tuple[Dataset, Fraction]]) -> Dataset:
    """Mix datasets: every step takes from each its share of sequences; the shares add up to 1.

    Returns:
        A dataset whose `sources` are these, and whose splits and manifest are those of all together.
    """
    manifests = [dataset.manifest for dataset, _ in datasets]
    digest = hashlib.sha256("".join(f"{share} {dataset.fingerprint}\n" for dataset, share in datasets).encode())
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
    train = TokenStream([shard for dataset, _ in datasets for shard in dataset.train._shards])
    val = TokenStream([shard for dataset, _ in datasets for shard in dataset.val._shards])
    names = [dataset.folder.name for dataset, _ in datasets]
    if len(set(names)) < len(names):
        names = [str(dataset.folder) for dataset, _ in datasets]
    parts = tuple(Part(name, dataset, share) for name, (dataset, share) in zip(names, datasets, strict=True))
    return Dataset(datasets[0][0].folder, manifest, train, val, parts)
