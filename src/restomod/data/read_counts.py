"""Counts of read files by format and skipped files by reason, for the manifest and the console."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from restomod.data.documents import AnyDocument, Document, LongDocument
from restomod.data.file_format import FileFormat, ending
from restomod.data.manifest import READ
from restomod.data.tokenizer import END_OF_TEXT_LITERAL
from restomod.utils.text import counted

AS_TEXT = "plain text (JSON without the text field)"
ADVICE = (
    "if it separates documents, split plain text files with --separator '<|endoftext|>'; in JSON, CSV or Parquet, "
    "store each document as a record"
)
POSSIBLE_LOSSES = ("broken link", "unreadable folder")


class ReadCounts:
    """Counts of read and skipped files, literal ``<|endoftext|>``, and separators."""

    def __init__(self) -> None:
        self.files: dict[str, collections.Counter[str]] = {}
        """Number of files by format and ending."""
        self.bytes: collections.Counter[str] = collections.Counter()
        """Size of the files on disk in bytes, by format."""
        self.skipped: collections.Counter[str] = collections.Counter()
        """Number of skipped files and folders, by reason."""
        self.separators: int | None = None
        """Occurrences of --separator in plain text; None without --separator."""
        self._literals = 0
        self._long_literals: dict[str, int] = {}

    def count_file(self, path: Path, found: FileFormat) -> None:
        """Count a file by its format."""
        kind = AS_TEXT if found.as_text else found.kind
        self.files.setdefault(kind, collections.Counter())[ending(path)] += 1
        self.bytes[kind] += path.stat().st_size

    def count(self, document: AnyDocument) -> AnyDocument:
        """Count literal ``<|endoftext|>`` in a document; in a long document, each time its text is read.

        Args:
            document: document to count.

        Returns:
            The document to read in its place.
        """
        if isinstance(document, Document):
            self._literals += document.text.count(END_OF_TEXT_LITERAL)
            return document
        return LongDocument(document.name, functools.partial(self._counted, document.name, document.parts))

    def _counted(self, name: str, parts: Callable[[], Iterator[str]]) -> Iterator[str]:
        found, end = 0, ""
        for part in parts():
            joined = end + part
            found += joined.count(END_OF_TEXT_LITERAL)
            end = joined[1 - len(END_OF_TEXT_LITERAL) :]  # a literal can span two parts
            yield part
        self._long_literals[name] = found  # assignment, because a document can be read several times

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values, without zeros."""
        literals = self._literals + sum(self._long_literals.values())
        values = {
            "files": {kind: dict(sorted(endings.items())) for kind, endings in sorted(self.files.items())},
            "bytes": dict(sorted(self.bytes.items())),
            "left_out": dict(sorted(self.skipped.items())),
            "end_of_text_literals": literals,
        }
        separators = {} if self.separators is None else {"separators": self.separators}
        return {key: value for key, value in values.items() if value} | separators


def summary_rows(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the counts of a manifest as (heading, text) rows, warnings last; empty for published shards."""
    read = manifest.get(READ) or {}
    files, sizes, skipped = read.get("files", {}), read.get("bytes", {}), read.get("left_out", {})
    rows = []
    if files:
        rows.append(("read", ", ".join(_of_kind(kind, endings, sizes.get(kind, 0)) for kind, endings in files.items())))
    if skipped:
        n = sum(skipped.values())
        rows.append(("skipped", f"{counted(n, 'file')} or {'folder' if n == 1 else 'folders'}: {_counts(skipped)}"))
    if literals := read.get("end_of_text_literals", 0):
        rows.append(("warning", f"the text contains a literal <|endoftext|> {counted(literals, 'time')}; {ADVICE}"))
    if read.get("separators") == 0:
        rows.append(("warning", "--separator does not occur in any plain text file, so no file was split"))
    if list(files) == [AS_TEXT]:
        rows.append(
            (
                "warning",
                "the JSON was read as plain text; to read the text of a field, set --text-column "
                "(train: --data.text-column)",
            )
        )
    if lost := {what: skipped[what] for what in POSSIBLE_LOSSES if what in skipped}:
        rows.append(("warning", f"files may be missing: {_counts(lost)}"))
    return rows


def summary_lines(manifest: dict[str, Any]) -> list[str]:
    """Return the counts of a manifest as lines, warnings last; see `summary_rows`."""
    return [f"{heading}: {text}" for heading, text in summary_rows(manifest)]


def _of_kind(kind: str, endings: dict[str, int], size: int) -> str:
    of = next(iter(endings)) if len(endings) == 1 else _counts(endings)
    return f"{counted(sum(endings.values()), 'file')} as {kind} ({of}, {size:,} bytes)"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{what} {n:,}" for what, n in counts.items())
