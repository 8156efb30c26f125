"""Token shards that others have published on the hub, downloaded, checked and counted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from restomod.data.dataset import SPLITS, open_shard
from restomod.data.hub_datasets import fetch, parse_address
from restomod.data.published import split_of
from restomod.data.tokenizer import END_OF_TEXT, Tokenizer
from restomod.utils.errors import UserError
from restomod.utils.files import fsync_path, sha256_file
from restomod.utils.temporary import Temporary

SUFFIXES = (".bin", ".npy")
READ_TOKENS = 1_000_000


def fetch_shard(address: str, out: Path, downloads: Path | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """Bring one published shard into ``out`` under its own name; return its record by split.

    Raises:
        UserError: it cannot be downloaded, is damaged, or holds tokens that are not GPT-2's.
    """
    name = Path(parse_address(address)[2]).name
    path = fetch(address, downloads)
    tokens = open_shard(path, "get it again")
    documents = text_bytes = 0
    for start in range(0, len(tokens), READ_TOKENS):
        part = np.asarray(tokens[start : start + READ_TOKENS])
        if part.max() >= tokenizer.vocab_size:
            raise UserError(
                f"{name} holds token {part.max()}, and GPT-2's vocabulary ends at {tokenizer.vocab_size - 1}"
            )
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
