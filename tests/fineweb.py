"""Files in the format of FineWeb-Edu on the hub."""

from __future__ import annotations

import io
import random

import pyarrow
import pyarrow.parquet

from tests.hub import DATASETS

REPO = "HuggingFaceFW/fineweb-edu"
KEY = DATASETS + REPO
WORDS = ["the", "a", "cat", "dog", "house", "tree", "runs", "sleeps", "eats", "sees", "green", "old"]


def parquet(seed: int, documents: int, longest: int) -> bytes:
    """Write a file in FineWeb-Edu's schema, with documents of less than ``longest`` words."""
    chance = random.Random(seed)
    texts = [" ".join(chance.choices(WORDS, k=chance.randrange(5, longest))) for _ in range(documents)]
    columns = {
        "text": texts,
        "id": [f"<urn:uuid:{seed}-{i}>" for i in range(documents)],
        "dump": ["CC-MAIN-2013-20"] * documents,
        "url": ["http://example.org"] * documents,
        "file_path": ["s3://commoncrawl/x.warc.gz"] * documents,
        "language": ["en"] * documents,
        "language_score": [0.9] * documents,
        "token_count": [len(text) for text in texts],
        "score": [3.2] * documents,
        "int_score": [3] * documents,
    }
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()
