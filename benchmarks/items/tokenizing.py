"""Speed of tokenization, in memory on one core compared with tiktoken, and from files with one worker and with all."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.contenders import Command, Contender, Measured, Round, Worker
from benchmarks.harness import BenchPlan, compare
from benchmarks.records import Comparison, Item, Metric
from benchmarks.texts import texts, write_json_lines
from restomod.data.bulk_encoder import BulkEncoder
from restomod.data.dataset import write_shard
from restomod.data.prepare.worker import document_batches
from restomod.data.readers import Document, read_documents
from restomod.data.tokenizer import END_OF_TEXT, gpt2_tokenizer
from restomod.utils.process_memory import peak_resident_bytes


def measure(plan: BenchPlan) -> Item:
    """Write the text to a file, and measure contenders that read it, untimed, at the start."""
    found, what = texts(plan, plan.pick(40.0, 0.3))
    megabytes = sum(len(text.encode()) for text in found) / 1e6
    file = plan.scratch / "text.jsonl"
    write_json_lines(found, file)
    note = f"{len(found):,} documents, {megabytes:.1f} MB: {what}"
    return Item("Text to token shards", [in_memory(plan, file), from_file(plan, file, megabytes)], notes=[note])


def in_memory(plan: BenchPlan, file: Path) -> Comparison:
    """Compare the encoding of texts in memory to a shard on disk, on one core."""
    metrics = [Metric("MB/s", "", "higher"), Metric("tokens/s", "", "higher"), Metric("peak memory", "GB", "lower")]
    ways: dict[str, Iterable[str]] = {"restomod": ["bulk"], "tiktoken": ["tiktoken"]}
    contenders: list[Contender] = [
        Worker(name, rounds, (*way, file, plan.scratch / f"{name}.bin")) for name, way in ways.items()
    ]
    case = "one core, text in memory to a shard on disk"
    return compare(plan, case, contenders, metrics, plan.pick(5, 2), agree=lambda ours, theirs: float(ours == theirs))


def rounds(way: str, file: Path, shard: Path) -> Round:
    """Return a round that encodes all texts of a file to one shard and returns its SHA-256, for a `Worker`."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    documents = list(read_documents(file))
    strings = [document.text for document in documents if isinstance(document, Document)]
    size = sum(len(text.encode()) for text in strings)
    tokenizer, separator = gpt2_tokenizer(), np.array([END_OF_TEXT], dtype=np.uint16)
    bulk = BulkEncoder(tokenizer)

    def encoded() -> Iterable[np.ndarray]:
        if way == "tiktoken":
            return (tokenizer.encode(text) for text in strings)
        batches = document_batches(documents)
        return (
            tokens for batch in batches for tokens in bulk.encode([d.text for d in batch if isinstance(d, Document)])
        )

    def one_round() -> Measured:
        start = time.perf_counter()
        tokens = np.concatenate([part for document in encoded() for part in (separator, document)])
        shard_of = write_shard(shard, tokens)
        seconds = time.perf_counter() - start
        values = {"MB/s": size / 1e6 / seconds, "tokens/s": len(tokens) / seconds}
        digest = hashlib.sha256(shard.read_bytes()).hexdigest()
        assert digest == shard_of["sha256"], "wrong SHA-256 of the shard"
        return Measured(values | {"peak memory": (peak_resident_bytes() or 0) / 1e9}, digest)

    return one_round


def from_file(plan: BenchPlan, file: Path, megabytes: float) -> Comparison:
    """Compare `restomod prepare`, from start-up to verified shards, with one worker per processor and with one."""
    metrics = [Metric("MB/s", "", "higher"), Metric("peak memory", "GB, largest process", "lower")]
    out, all_workers = plan.scratch / "shards", os.cpu_count() or 1
    clear = functools.partial(shutil.rmtree, out, ignore_errors=True)
    contenders: list[Contender] = []
    for workers in dict.fromkeys((all_workers, 1)):
        words = [sys.executable, "-m", "restomod", "prepare", str(file), "--out", str(out), "--workers", str(workers)]
        name = f"restomod prepare --workers {workers}"
        contenders.append(Command(name, words, lambda seconds: {"MB/s": megabytes / seconds}, clear))
    case = "JSON lines file to verified shards, including start-up"
    return compare(plan, case, contenders, metrics, plan.pick(3, 1), warmup=0)
