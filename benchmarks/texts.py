"""Texts and questions for measurements: from --data, or the standard library's source and random words."""

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
INSTEAD = "the source of Python's standard library, for want of --data with corpus/"
WORDS = (
    "the a man woman people dog ball water is are stands walks holds talks to from with into over camera shows how "
    "and then while another person begins hand hair face floor table small large white black red slowly again across "
    "in on of your should make sure that can use clean dry long time before after place put take keep remove until"
)


def texts(plan: BenchPlan, megabytes: float) -> tuple[list[str], str]:
    """Documents of about so much text in all, and what they are."""
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
    return found, "prose of --data" if corpus is not None else INSTEAD


def write_json_lines(documents: list[str], file: Path) -> None:
    """Documents as JSON lines."""
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")


def training_text(plan: BenchPlan) -> tuple[DataConfig, str]:
    """Text for a small training run, and what it is."""
    corpus, cache = plan.file(CORPUS), str(plan.scratch / "tokens")
    if plan.smoke:
        found, what = texts(plan, 0.3)
        write_json_lines(found, small := plan.scratch / "small.jsonl")
        return DataConfig(source="text", path=str(small), cache=cache), what
    if corpus is None:
        return DataConfig(cache=cache), INSTEAD
    first = next(find_files(corpus, GLOB))
    return DataConfig(source="text", path=str(first), cache=cache), "prose of --data"


def hellaswag(plan: BenchPlan, count: int) -> tuple[Path, str]:
    """Return a file of ``count`` examples, and what they are.

    Without HellaSwag itself they are random words, as many as it has: a fifth of its contexts have 17 words on average
    and endings of 11, the others 44 and 28; endings of one context differ by 5.
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
    return path, f"{count:,} questions of random words, as long as HellaSwag's, for want of --data with {HELLASWAG}"
