"""Fast GPT-2 encoding of many documents in one batch with tokie, identical to tiktoken.

The Rust library tokie is several times faster than tiktoken. It is known to differ from tiktoken in three cases:

- some characters: vertical tab, form feed, circled letters, and letters newer than tokie's Unicode tables;
- a contraction directly after white space other than space, line feed and carriage return;
- texts of 10,000 bytes or more, which tokie cuts at wrong positions for its threads.

Texts of the first two cases are encoded with tiktoken. Long texts are cut here at positions that do not change tokens.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from restomod.data.tokenizer import Tokenizer, vocabulary_file

TOKIE = "0.1.4"  # release that is tested against tiktoken
PIECE_BYTES = 9_000  # below the 10,000 bytes at which tokie cuts texts
SEPARATOR = b"\xff"  # never occurs in UTF-8
CONTRACTION = re.compile(r"'(?<=[^\S \n\r]')(?:[sdmt]|ll|ve|re)")
CUTTABLE_AFTER = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?)\"'-")


class BulkEncoder:
    """Encoder of documents: tokie where it is installed and agrees with tiktoken, otherwise tiktoken."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._fast = _tokie()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of every text, each (n,) uint16, equal to those of `Tokenizer.encode`."""
        fast: list[bytes] = []
        plans: list[list[int | str]] = []  # per text: numbers of pieces in `fast`, or texts for tiktoken
        for text in texts:
            pieces = _pieces(text) if self._fast is not None else []
            if pieces and tokie_agrees(text):
                plan: list[int | str] = [len(pieces)]
            else:
                plan = [1 if tokie_agrees(part) else part for part in map(bytes.decode, pieces)] or [text]
                pieces = [piece for piece, item in zip(pieces, plan, strict=False) if item == 1]
            fast += pieces
            plans.append(plan)
        ids, ends = self._encode_pieces(fast)
        done, encoded = 0, []
        for plan in plans:
            parts = []
            for item in plan:
                if isinstance(item, str):
                    parts.append(self.tokenizer.encode(item))
                else:
                    parts.append(ids[ends[done] : ends[done + item]])
                    done += item
            encoded.append(parts[0] if len(parts) == 1 else np.concatenate(parts))
        return encoded

    def _encode_pieces(self, pieces: list[bytes]) -> tuple[np.ndarray, list[int]]:
        """Encode pieces with tokie; return all ids, (n,) uint16, and the boundaries of the pieces, starting with 0."""
        if not pieces:
            return np.empty(0, dtype=np.uint16), [0]
        with _memory_file(SEPARATOR.join(pieces)) as path:
            ids, ends = self._fast.encode_files([path], separator=SEPARATOR, add_special_tokens=False)
        if len(ends) != len(pieces) + 1:
            raise AssertionError(f"tokie returned {len(ends) - 1} pieces instead of {len(pieces)}")
        return ids.astype(np.uint16), ends.tolist()


def tokie_agrees(text: str) -> bool:
    """Return whether tokie is known to encode every piece of ``text`` exactly like tiktoken."""
    if CONTRACTION.search(text):
        return False
    if text.isascii():
        return "\v" not in text and "\f" not in text
    try:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return not _doubtful()[codes].any()


def _pieces(text: str) -> list[bytes]:
    """Cut ``text`` into UTF-8 pieces whose concatenated tokens equal the tokens of the text.

    A cut is before a space that follows a letter, digit or punctuation mark, where GPT-2's pattern always ends a word.

    Returns:
        Pieces of at most `PIECE_BYTES`; empty if a piece has no possible cut, or if the text is empty or contains lone
        surrogates.
    """
    try:
        data = text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return []
    pieces, start = [], 0
    while len(data) - start > PIECE_BYTES:
        cut = data.rfind(b" ", start + 1, start + PIECE_BYTES)
        while cut > 0 and data[cut - 1] not in CUTTABLE_AFTER:
            cut = data.rfind(b" ", start + 1, cut)
        if cut < 0:
            return []
        pieces.append(data[start:cut])
        start = cut
    if start < len(data):
        pieces.append(data[start:])
    return pieces


@functools.cache
def _doubtful() -> np.ndarray:
    """Return a mask of code points, (0x110000,) bool, whose class in GPT-2's pattern depends on the Unicode version.

    Code points with the same class since Unicode 3.2 are certain. Symbols such as emoji are certain too, because
    unassigned code points have the same class.
    """
    doubtful = np.ones(0x110000, dtype=bool)
    for code in range(0x110000):
        now = unicodedata.category(chr(code))
        if now == "So" or (now != "Cn" and now == unicodedata.ucd_3_2_0.category(chr(code))):
            doubtful[code] = False
    doubtful[[0x0B, 0x0C]] = True
    doubtful[0x24B6:0x24EA] = doubtful[0x1F130:0x1F18A] = True  # circled letters: category symbol, but alphabetic
    return doubtful


def _tokie() -> Any:
    """Return tokie's GPT-2 tokenizer without special tokens; None if the tested release is not installed."""
    try:
        return _load_tokie() if importlib.metadata.version("tokie") == TOKIE else None
    except ImportError:  # includes PackageNotFoundError
        return None


@functools.cache
def _load_tokie() -> Any:
    """Build tokie's tokenizer once per process (about 0.3 s)."""
    import tokie

    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    merges = vocabulary_file("vocab.bpe").decode().split("\n")[1:-1]  # without the version and the empty last line
    description: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],  # a literal <|endoftext|> is ordinary text
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": json.loads(vocabulary_file("encoder.json")),
            "merges": merges,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(description))
        return tokie.Tokenizer.from_json(str(path))


@contextlib.contextmanager
def _memory_file(content: bytes) -> Iterator[str]:
    """Provide the path of a temporary file with ``content``, in memory where the system supports it."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("documents"), "wb") as f:
            f.write(content)
            f.flush()
            yield f"/proc/self/fd/{f.fileno()}"
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "documents"
            path.write_bytes(content)
            yield str(path)
