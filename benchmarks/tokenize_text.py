"""Text in memory to a token shard on disk, on one core: ours beside tiktoken, in alternating rounds.

    taskset -c 0 python benchmarks/tokenize_text.py FILE.jsonl.xz [MEGABYTES]

FILE has one JSON object with a field `text` per line; `.xz` or plain.
"""

from __future__ import annotations

import json
import lzma
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from restomod.data.bulk import BulkEncoder
from restomod.data.prepare import document_batches
from restomod.data.readers import Document
from restomod.data.shards import write_shard
from restomod.data.tokenizer import gpt2_tokenizer
from restomod.memory import peak_resident_bytes

ROUNDS = 5


def read(path: Path, megabytes: float) -> list[str]:
    texts, size = [], 0
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"])
            size += len(texts[-1].encode())
            if size >= megabytes * 1e6:
                break
    return texts


def main() -> None:
    texts = read(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 40.0)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer, separator = gpt2_tokenizer(), np.array([50256], dtype=np.uint16)
    bulk = BulkEncoder(tokenizer)

    def tiktoken() -> list[np.ndarray]:
        return [tokenizer.encode(text) for text in texts]

    def ours() -> list[np.ndarray]:
        batches = document_batches(Document("", text) for text in texts)
        return [tokens for batch in batches for tokens in bulk.encode([document.text for document in batch])]

    ways: dict[str, Callable[[], list[np.ndarray]]] = {"tiktoken": tiktoken, "ours": ours}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    shards = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            for name, way in ways.items():
                start = time.perf_counter()
                tokens = np.concatenate([part for document in way() for part in (separator, document)])
                shards[name] = write_shard(Path(folder) / f"{name}.bin", tokens)
                seconds[name].append(time.perf_counter() - start)
    assert shards["ours"]["sha256"] == shards["tiktoken"]["sha256"], "the shards differ"
    n = shards["ours"]["tokens"]
    print(f"{len(texts):,} documents, {megabytes:.1f} MB, {n:,} tokens; both ways wrote the same shard")
    for name, times in seconds.items():
        middle = statistics.median(times)
        print(
            f"{name:<9} {megabytes / middle:6.1f} MB/s  {n / middle / 1e6:5.1f}M tokens/s  "
            f"{len(texts) / middle:7,.0f} documents/s  "
            f"({megabytes / max(times):.1f} to {megabytes / min(times):.1f} MB/s)"
        )
    ratio = statistics.median(t / o for t, o in zip(seconds["tiktoken"], seconds["ours"], strict=True))
    print(f"ratio     {ratio:.2f}   peak memory {(peak_resident_bytes() or 0) / 2**20:,.0f} MiB")


if __name__ == "__main__":
    main()
