"""Description of a folder of token shards, printed by the command `data`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from restomod.config.prepare import PrepareConfig
from restomod.data.dataset import Dataset, TokenStream, open_tokens
from restomod.data.manifest import MANIFEST
from restomod.data.read_counts import summary_lines
from restomod.data.sources import BUILT_IN
from restomod.data.tokenizer import END_OF_TEXT, END_OF_TEXT_LITERAL, Tokenizer, gpt2_tokenizer, require_in_vocabulary
from restomod.utils.text import counted

SAMPLE_TOKENS = 20_000_000  # training tokens of the statistics; more tokens change them little
READ_TOKENS = 1_000_000
MOST_COMMON = 20
WINDOW_TOKENS = 64
BAR = 40


def overview(folder: Path, verify: bool) -> Iterator[str]:
    """Yield lines that describe a folder: splits, origin, document lengths, most common tokens, decoded windows.

    Args:
        folder: folder of token shards.
        verify: compare the SHA-256 of every shard with the manifest, which reads every byte.

    Raises:
        UserError: the folder has no token shards, or a shard is damaged.
    """
    tokenizer = gpt2_tokenizer()
    dataset = open_tokens(folder, "all" if verify else "sizes")
    manifest = dataset.manifest
    vocabulary = manifest["tokenizer"]["name"]
    yield f"{folder}: {manifest['name']}, {manifest['tokens']:,} tokens, vocabulary {vocabulary}"
    for name, stream in (("train", dataset.train), ("val", dataset.val)):
        yield _split_line(dataset, name, stream)
    yield from _origin(manifest)
    if manifest.get("duplicates"):
        yield f"duplicates: {counted(manifest['duplicates'], 'document')} dropped"
    yield from summary_lines(manifest)
    if len(dataset.train):
        yield from _statistics(folder, dataset.train, tokenizer)
        yield from _windows(dataset.train, tokenizer)
    if not (folder / MANIFEST).exists():
        yield "verified: sizes of all shards (published shards have no SHA-256 to compare)"
    else:
        yield (
            "verified: SHA-256 of all shards"
            if verify
            else "verified: sizes of all shards; add --verify to compare their SHA-256"
        )


def _split_line(dataset: Dataset, name: str, stream: TokenStream) -> str:
    split = dataset.manifest["splits"][name]
    documents, text_bytes = split.get("documents"), split.get("text_bytes")
    parts = [counted(len(stream), "token"), counted(len(split["shards"]), "shard")]
    if documents is not None:
        parts.append(counted(documents, "document"))
    if text_bytes and len(stream):
        parts.append(f"{text_bytes:,} bytes of text, {text_bytes / len(stream):.2f} per token")
    return f"{name:<6}{', '.join(parts)}"


def _origin(manifest: dict[str, Any]) -> Iterator[str]:
    """Yield a line with the sources and settings of a prepared folder; nothing for published shards."""
    plan = manifest.get("plan")
    if not plan:
        return
    files = list(dict.fromkeys(file for unit in plan["units"] for file in unit["files"]))
    defaults = dataclasses.asdict(PrepareConfig())
    changed = {key: value for key, value in plan["settings"].items() if value != defaults.get(key)}
    flags = [
        f"--{k.replace('_', '-')}" + ("" if v is True else f" {quote(str(v))}") for k, v in sorted(changed.items())
    ]
    named = [*plan["datasets"], *sorted({u["source"] for u in plan["units"] if u["source"] in BUILT_IN})]
    origin = ", ".join([*named, *files[: not named]]) + (" …" if len(files) > 1 and not named else "")
    in_files = f" ({counted(len(files), 'file')})" if files else ""
    yield f"source: {origin}{in_files}" + (f", settings: {' '.join(flags)}" if flags else "")


def _statistics(folder: Path, stream: TokenStream, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield document lengths and most common tokens of the first `SAMPLE_TOKENS` of a split."""
    n, literals = min(len(stream), SAMPLE_TOKENS), 0
    counts, ends = np.zeros(tokenizer.vocab_size, dtype=np.int64), []
    for start in range(0, n, READ_TOKENS):
        tokens = stream.read(start, min(READ_TOKENS, n - start))
        require_in_vocabulary(tokens, folder)
        counts += np.bincount(tokens, minlength=tokenizer.vocab_size)
        literals += _literals(stream, start, min(start + READ_TOKENS, n), tokenizer)
        ends.append(start + np.flatnonzero(tokens == END_OF_TEXT))
    of = "" if n == len(stream) else f" in the first {n:,} tokens"
    lengths = np.diff(np.concatenate([*ends, [n]])) - 1
    lengths = lengths[lengths > 0]
    yield f"separators{of}: {counts[END_OF_TEXT]:,} tokens {END_OF_TEXT}, {literals:,} literal {END_OF_TEXT_LITERAL}"
    if len(lengths):
        low, middle, high = np.percentile(lengths, [5, 50, 95])
        yield (
            f"document length{of}: 5th percentile {low:,.0f} tokens, median {middle:,.0f}, 95th percentile {high:,.0f}"
        )
        yield from _histogram(lengths)
    yield f"most common tokens{of}:"
    for token in np.argsort(counts)[::-1][:MOST_COMMON]:
        if counts[token]:
            yield f"  {counts[token] / n:6.2%}  {token:>5}  {tokenizer.decode([int(token)])!r}"


def _literals(stream: TokenStream, start: int, stop: int, tokenizer: Tokenizer) -> int:
    """Count literal ``<|endoftext|>`` that begin at tokens [start, stop) of a stream."""
    word = tokenizer.encode("endoftext").tolist()  # GPT-2's pattern separates it from < | and >
    low = max(0, start - 4)
    tokens = stream.read(low, min(stop + len(word) + 4, len(stream)) - low).tolist()
    found = 0
    for i in range(start - low, stop - low):
        if tokens[i] == word[0] and tokens[i : i + len(word)] == word:
            before, after = tokens[max(0, i - 4) : i], tokens[i + len(word) : i + len(word) + 4]
            found += tokenizer.decode(before).endswith("<|") and tokenizer.decode(after).startswith("|>")
    return found


def _histogram(lengths: np.ndarray) -> Iterator[str]:
    """Yield the lines of a histogram with one bar per power of two."""
    powers = np.floor(np.log2(lengths)).astype(int)
    counts = np.bincount(powers)
    for power in range(int(powers.min()), len(counts)):
        bar = "█" * round(BAR * counts[power] / counts.max())
        yield f"  {2**power:>9,} to {2 ** (power + 1) - 1:>9,}  {counts[power]:>9,}  {bar}"


def _windows(stream: TokenStream, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield three decoded windows: from the beginning, the middle and the end of a split."""
    length = min(WINDOW_TOKENS, len(stream))
    for start in dict.fromkeys([0, (len(stream) - length) // 2, len(stream) - length]):
        yield f"tokens {start:,} to {start + length - 1:,}:"
        yield f"  {tokenizer.decode(stream.read(start, length).tolist())!r}"
