"""Token shards in llm.c's `.bin` layout, and folders of shards as a `Dataset` or a mix of datasets.

A shard has a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros), followed by the
tokens as little-endian uint16. Published pre-tokenized FineWeb has the same layout. `manifest.json` is written last.
It contains the name, token count and SHA-256 of every shard, and identifies the tokenizer.
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
MAX_MAPPED_SHARDS = 128  # shards per stream; each map needs a file descriptor, and the default limit is 1,024

Verify = Literal["sizes", "changed", "all"]


def write_shard(path: Path, tokens: np.ndarray) -> dict[str, Any]:
    """Write ``tokens`` (n,) to ``path`` and return its manifest entry: file, tokens, sha256."""
    shard = _OpenShard(path)
    shard.append(tokens)
    return shard.close()


def shard_header(tokens: int) -> bytes:
    """Return the header of a shard with ``tokens`` tokens, as bytes."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()


class _OpenShard:
    """Shard that is being written to a temporary file; `close` syncs it to disk and renames it."""

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
        with contextlib.suppress(OSError):  # closing flushes the buffer, which fails on a full disk
            self._file.close()
        self._temporary.remove()


def open_shard(path: Path, remedy: str = PREPARE_AGAIN) -> np.ndarray:
    """Memory-map the tokens of a shard, shape (n,), uint16.

    Args:
        path: `.bin` file in llm.c's layout, or `.npy` file.
        remedy: end of the error messages: how to fix a damaged shard.

    Raises:
        UserError: the file is missing, is not a token shard, or its size does not match its header.
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
        raise UserError(f"{path} is not a token shard: no magic number {MAGIC} in its header; {remedy}")
    n = int(header[2])
    if size != HEADER_BYTES + 2 * n:
        raise UserError(
            f"{path} is damaged: expected {HEADER_BYTES + 2 * n:,} bytes for the {n:,} tokens in its header, "
            f"found {size:,} bytes; {remedy}"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(n,))


class ShardWriter:
    """Writer that cuts a stream of tokens into shards `PREFIX_000000.bin`, `PREFIX_000001.bin`, … in a folder."""

    def __init__(self, folder: Path, prefix: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.prefix, self.shard_tokens = folder, prefix, shard_tokens
        self.shards: list[dict[str, Any]] = []
        self.tokens = 0
        self._open: _OpenShard | None = None

    def add(self, tokens: np.ndarray) -> None:
        """Append ``tokens`` (n,) to the stream."""
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
        """Finish the last shard and return the manifest entries of all shards."""
        if self._open is not None:
            self._finish(self._open)
        return self.shards

    def discard(self) -> None:
        """Delete the unfinished shard after an error."""
        if self._open is not None:
            self._open.discard()
            self._open = None

    def _finish(self, shard: _OpenShard) -> None:
        self.shards.append(shard.close())
        self._open = None


@dataclass(frozen=True, slots=True, eq=False)
class ShardFile:
    """Shard on disk that is memory-mapped only when it is read."""

    folder: Path
    name: str
    tokens: int
    """Number of tokens according to the manifest."""

    def __len__(self) -> int:
        return self.tokens

    def map(self, random_reads: bool = False) -> np.ndarray:
        """Memory-map the tokens of the shard, shape (n,), uint16.

        Args:
            random_reads: turn off the read-ahead of the operating system.

        Raises:
            UserError: the file is missing or damaged, or its token count is not ``tokens``.
        """
        path = self.folder / self.name
        tokens = open_shard(path)
        if len(tokens) != self.tokens:
            raise UserError(f"{path} is damaged: {len(tokens):,} tokens, expected {self.tokens:,}; {PREPARE_AGAIN}")
        if random_reads:
            _expect_random_reads(tokens)
        return tokens

    def check(self) -> None:
        """Check the size of the file, which takes microseconds; the header is read only if the size is wrong.

        Raises:
            UserError: the file is missing, damaged, or has the wrong size.
        """
        with contextlib.suppress(OSError):  # `map` raises a specific error
            if os.stat(f"{self.folder}/{self.name}").st_size == HEADER_BYTES + 2 * self.tokens:
                return
        self.map()


def _expect_random_reads(tokens: np.ndarray) -> None:
    mapped = getattr(tokens, "_mmap", None)  # numpy's memmap has no public attribute for it
    if mapped is not None and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)


class TokenStream:
    """Shards of one split as a single array of tokens with random access.

    At most `MAX_MAPPED_SHARDS` shards are memory-mapped; the least recently read one is unmapped first.
    """

    def __init__(self, shards: Sequence[np.ndarray | ShardFile]) -> None:
        self._shards = list(shards)
        self._starts = np.cumsum([0] + [len(s) for s in shards])  # (n_shards + 1,)
        self._random_reads = False
        self._map = functools.lru_cache(MAX_MAPPED_SHARDS)(ShardFile.map)

    def expect_random_reads(self) -> None:
        """Turn off read-ahead, which can read megabytes for a window of two kilobytes."""
        self._random_reads = True
        for shard in self._shards:
            if not isinstance(shard, ShardFile):
                _expect_random_reads(shard)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """Read tokens [start, start + length) over shard boundaries, shape (length,), uint16."""
        if not 0 <= start <= start + length <= len(self):
            raise IndexError(f"tokens [{start}, {start + length}) of a stream of {len(self)} tokens")
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
    """Folder of token shards: its manifest and its splits as token streams."""

    folder: Path
    manifest: dict[str, Any]
    train: TokenStream
    val: TokenStream

    parts: tuple[Part, ...] = ()
    """Sources of a mix; empty for a single dataset."""

    @property
    def fingerprint(self) -> str:
        """Hash of the shards of each split and of the tokenizer; equal fingerprints mean equal tokens.

        Published shards without a manifest are not hashed completely; see `open_published`.
        """
        return str(self.manifest["fingerprint"])

    @property
    def sources(self) -> tuple[Part, ...]:
        """Sources and their shares; a single dataset is its only source, with share 1."""
        return self.parts or (Part(str(self.manifest["name"]), self, Fraction(1)),)


@dataclass(frozen=True)
class Part:
    """Source of a mix."""

    name: str
    dataset: Dataset
    share: Fraction
    """Fraction of the run's sequences; the sum over all sources is 1."""


def open_dataset(folder: Path, tokenizer_sha256: str, verify: Verify = "changed") -> Dataset:
    """Open a folder of token shards and check every shard against the manifest.

    Args:
        folder: folder with token shards and a manifest.
        tokenizer_sha256: SHA-256 of the expected vocabulary.
        verify: "sizes" compares file sizes; "all" also compares the SHA-256 of every shard; "changed" compares the
            SHA-256 of shards whose file status has changed since the last comparison.

    Raises:
        UserError: the manifest is missing, damaged or of another tokenizer; a shard is missing or damaged.
    """
    manifest = read_manifest(folder)
    made_with = manifest["tokenizer"]["sha256"]
    if made_with != tokenizer_sha256:
        raise UserError(f"{folder} was tokenized with another vocabulary (SHA-256 {made_with[:12]}…); {PREPARE_AGAIN}")
    entries = {split: manifest["splits"][split]["shards"] for split in SPLITS}
    hashes = {entry["file"]: entry["sha256"] for split in SPLITS for entry in entries[split]}
    if len(hashes) < sum(map(len, entries.values())):
        raise UserError(f"{folder / MANIFEST} is damaged: a shard is listed twice; {PREPARE_AGAIN}")
    shards = [[ShardFile(folder, entry["file"], entry["tokens"]) for entry in entries[split]] for split in SPLITS]
    for shard in itertools.chain(*shards):
        shard.check()
    train, val = map(TokenStream, shards)
    if verify != "sizes":
        changed = changed_file(folder, hashes, remember=verify == "changed")
        if changed:
            raise UserError(f"{folder / changed} is damaged: its SHA-256 differs from {MANIFEST}; {PREPARE_AGAIN}")
    return Dataset(folder, manifest, train, val)


def open_npy(path: Path, dtype: type[np.generic], remedy: str) -> np.ndarray:
    """Memory-map a `.npy` file that contains a one-dimensional array.

    Args:
        path: `.npy` file.
        dtype: expected dtype.
        remedy: end of the error messages: how to fix the file.

    Returns:
        Array of shape (n,).

    Raises:
        UserError: the file is missing or damaged, or has another dtype or number of dimensions.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as e:  # numpy evaluates the header as Python source, which raises many kinds of errors
        raise UserError(f"{path} is damaged: {one_line(e)}; {remedy}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise UserError(f"{path} is an archive of arrays (.npz), expected a one-dimensional array; {remedy}")
    if array.dtype != dtype or array.ndim != 1:
        raise UserError(
            f"{path} has dtype {array.dtype} and shape {array.shape}, expected {dtype.__name__} (n,); {remedy}"
        )
    return array


def open_tokens(folder: Path, verify: Verify = "changed") -> Dataset:
    """Open a folder of token shards: prepared ones (`open_dataset`) or published ones (`open_published`).

    Raises:
        UserError: the folder is missing or has no shards, or a shard is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of token shards; create it: restomod prepare SOURCE --out {folder}")
    if (folder / MANIFEST).exists():
        return open_dataset(folder, Tokenizer.sha256, verify)
    return open_published(folder)


def split_of(name: str) -> str | None:
    """Return the split in the file name of a published shard, such as `fineweb_train_000001.bin`; None without one."""
    words = Path(name).stem.split("_")
    return next((split for split in SPLITS if split in words), None)


def open_published(folder: Path) -> Dataset:
    """Open published shards in place: `*_train_*.bin` of llm.c or `*_train_*.npy` of build-nanogpt.

    Published shards have no hashes. Their fingerprint is a hash of file names, token counts and first tokens.

    Raises:
        UserError: the folder has no training shard, or a shard is damaged.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".npy"))
    paths = {split: [path for path in files if split_of(path.name) == split] for split in SPLITS}
    if not paths["train"]:
        raise UserError(
            f"{folder} has no token shards: neither {MANIFEST} nor files such as fineweb_train_000001.bin "
            f"or edufineweb_train_000001.npy; create them: restomod prepare SOURCE --out FOLDER"
        )
    digest = hashlib.sha256()
    splits: dict[str, dict[str, Any]] = {}
    streams: dict[str, TokenStream] = {}
    for split, found in paths.items():
        entries: list[dict[str, Any]] = []
        for path in found:
            tokens = open_shard(path, "download it again")
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
    """Combine datasets into a mix.

    Args:
        datasets: datasets and their shares of the run's sequences; the sum of the shares is 1.

    Returns:
        Dataset with these `sources`; its splits and manifest cover all of them.
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
