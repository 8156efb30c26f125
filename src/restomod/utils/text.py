"""Text for people: times in words, and untrusted text without control characters or markup."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

CONTROLS = (
    *range(0x80, 0xA0),  # C1
    *(0x180E, 0x200B, 0x2028, 0x2029, *range(0x202A, 0x202F)),  # invisible; line separators; order of writing
    *range(0x2060, 0x2070),  # invisible operators; order of writing
    *range(0xD800, 0xE000),  # halves of surrogate pairs
    *(0xFEFF, 0xFFF9, 0xFFFA, 0xFFFB, *range(0xE0000, 0xE0080)),  # invisible: byte-order mark, annotations, tags
)
PICTURES = {c: 0x2400 + c for c in range(32) if c not in (9, 10)} | {127: 0x2421}  # of ASCII's
VISIBLE = PICTURES | dict.fromkeys(CONTROLS, 0xFFFD)
MARKDOWN_MEANING = re.compile(r"[\\`*_\[\]{}|~#$:@]")  # within a line; < > & become entities


def visible(text: str) -> str:
    """Replace control characters except line feed and tab by pictures, so that ``text`` cannot steer a terminal.

    What has no picture becomes U+FFFD: controls that change the order of writing (U+202E, ...), invisible characters
    and line separators, and halves of surrogate pairs, which stand for bytes of a command line that are not UTF-8.
    Kept, because words need them: joiners (Persian, Indic scripts, emoji), left-to-right and right-to-left marks.
    """
    return text if text.isprintable() else text.translate(VISIBLE)


def markdown_cell(text: str) -> str:
    """Text that Markdown shows as it is, on one line and within a cell of a table."""
    escaped = MARKDOWN_MEANING.sub(r"\\\g<0>", html.escape(visible(text), quote=False).replace("&", "\0"))
    escaped = re.sub(r"(?m)^ +| {2,}| $|\t", lambda m: "&nbsp;" * len(m[0].expandtabs(4)), escaped)
    return escaped.replace("\0", "&").replace("\n", "<br>")


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3 min 20 s, 5 h 07 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s % 3600 // 60:02d} min"


def counted(n: int, noun: str) -> str:
    """A number of things: 1 file, 2,000 files."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def short_count(n: float) -> str:
    """A count in few digits: 460,800, 2.5M, 10B, 1.2T, and 5.1e+18 beyond."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if size <= n < 1000 * size:
            return f"{n / size:.4g}{unit}"
    return f"{n:,.0f}" if n < 1e6 else f"{n:.3g}"


def gigabytes(n: float) -> str:
    """Bytes as gigabytes of 10^9: 0.50 GB."""
    return f"{n / 1e9:,.2f} GB"


def split_items(text: str, commas: list[int], names: Callable[[str], bool]) -> list[str]:
    """Split a list at some of its ``commas`` (positions, in order).

    Each item is the longest for which ``names`` is true, so that names of files may contain commas; else the shortest.
    """
    ends, items, start = [*commas, len(text)], [], 0
    while start <= len(text):
        left = [end for end in ends if end >= start]
        end = next((end for end in reversed(left) if names(text[start:end])), left[0])
        items.append(text[start:end])
        start = end + 1
    return items
