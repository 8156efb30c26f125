"""Texts and questions for benchmarks, from --data or, without it, from Python's standard library and random words."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness import BenchPlan
from restomod.config.run import DataConfig
from restomod.data.documents import AnyDocument, Document
from restomod.data.find_files import find_files
from restomod.data.readers import read_documents
from restomod.data.sources import python_stdlib

CORPUS, HELLASWAG, SHAKESPEARE = "corpus", "eval/hellaswag_val.jsonl", "tinyshakespeare/input.txt"
GLOB = "*train*.jsonl*"
ENGLISH = "English text from --data"
INSTEAD = "source of Python's standard library, as --data has no corpus/"
WORDS = (
    "the a man woman people dog ball water is are stands walks holds talks to from with into over camera shows how "
    "and then while another person begins hand hair face floor table small large white black red slowly again across "
    "in on of your should make sure that can use clean dry long time before after place put take keep remove until"
)


def texts(plan: BenchPlan, megabytes: float) -> tuple[list[str], str]:
    """Return documents of ``megabytes`` MB in total, and a description of them."""
    corpus = plan.file(CORPUS)
    source: Iterable[AnyDocument] = python_stdlib()
    if corpus is not None:
        source = (document for file in find_files(corpus, GLOB) for document in read_documents(file))
    found, size = [], 0
    for document in source:
        if not isinstance(document, Document):
            continue
        found.append(document.text)
        size += len(document.text.encode())
        if size >= megabytes * 1e6:
            break
    return found, ENGLISH if corpus is not None else INSTEAD


def write_json_lines(documents: list[str], file: Path) -> None:
    """Write documents as JSON lines."""
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")


def training_text(plan: BenchPlan) -> tuple[DataConfig, str]:
    """Return the data of a small training run, and a description of it."""
    corpus, cache = plan.file(CORPUS), str(plan.scratch / "tokens")
    if plan.smoke:
        found, what = texts(plan, 0.3)
        write_json_lines(found, small := plan.scratch / "small.jsonl")
        return DataConfig(source="text", path=str(small), cache=cache), what
    if corpus is None:
        return DataConfig(cache=cache), INSTEAD
    first = next(find_files(corpus, GLOB))
    return DataConfig(source="text", path=str(first), cache=cache), ENGLISH


def hellaswag(plan: BenchPlan, count: int) -> tuple[Path, str]:
    """Return a file of ``count`` HellaSwag examples, and a description of it.

    If --data has no HellaSwag, examples are random words of similar length: one fifth has contexts of 17 words and
    endings of 11 on average, the others 44 and 28; endings of one context have a standard deviation of 5.
    """
    official = plan.file(HELLASWAG)
    if official is not None:
        return official, f"HellaSwag's first {count:,} examples"
    chance = random.Random(0)

    def words(mean: float, spread: float) -> str:
        return " ".join(chance.choices(WORDS.split(), k=max(2, round(chance.gauss(mean, spread)))))

    path = plan.scratch / "like_hellaswag.jsonl"
    with open(path, "w", encoding="utf-8") as f:
        for number in range(count):
            context, ending = (17, 11) if number % 5 == 0 else (44, 28)
            length = max(3.0, chance.gauss(ending, ending / 4))
            record = {"ind": number, "activity_label": "none", "ctx": words(context, context / 4), "label": 0}
            f.write(json.dumps(record | {"endings": [words(length, 5) for _ in range(4)]}) + "\n")
    return path, f"{count:,} questions of random words with HellaSwag's lengths, as --data has no {HELLASWAG}"
