"""Formatting of text: durations, counts, shell arguments, untrusted text without control characters or markup."""

from __future__ import annotations

import html
import os
import re
import shlex
import subprocess
from collections.abc import Callable

CONTROLS = (
    *range(0x80, 0xA0),  # C1
    *(0x180E, 0x200B, 0x2028, 0x2029, *range(0x202A, 0x202F)),  # invisible, line separators, text direction
    *range(0x2060, 0x2070),  # invisible operators, text direction
    *range(0xD800, 0xE000),  # halves of surrogate pairs
    *(0xFEFF, 0xFFF9, 0xFFFA, 0xFFFB, *range(0xE0000, 0xE0080)),  # invisible: byte-order mark, annotations, tags
)
PICTURES = {c: 0x2400 + c for c in range(32) if c not in (9, 10)} | {127: 0x2421}  # symbols for ASCII controls
VISIBLE = PICTURES | dict.fromkeys(CONTROLS, 0xFFFD)
MARKDOWN_MEANING = re.compile(r"[\\`*_\[\]{}|~#$:@]")  # special within a line; < > & become entities


def visible(text: str) -> str:
    """Replace control characters except line feed and tab by visible symbols, so that text cannot control a terminal.

    ASCII controls become Unicode control pictures. U+FFFD replaces bidirectional controls (U+202E, ...), invisible
    characters, line separators, and lone surrogates, which represent undecodable bytes of a command line. Joiners
    (Persian, Indic scripts, emoji) and left-to-right and right-to-left marks are kept, because words need them.
    """
    return text if text.isprintable() else text.translate(VISIBLE)


def markdown_cell(text: str) -> str:
    """Escape text for a cell of a Markdown table, so that it is shown literally and on one line."""
    escaped = MARKDOWN_MEANING.sub(r"\\\g<0>", html.escape(visible(text), quote=False).replace("&", "\0"))
    escaped = re.sub(r"(?m)^ +| {2,}| $|\t", lambda m: "&nbsp;" * len(m[0].expandtabs(4)), escaped)
    return escaped.replace("\0", "&").replace("\n", "<br>")


def duration(seconds: float) -> str:
    """Format seconds: 42 s, 3 min 20 s, 5 h 07 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s % 3600 // 60:02d} min"


def counted(n: int, noun: str) -> str:
    """Format a count with its noun: 1 file, 2,000 files."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def short_count(n: float) -> str:
    """Format a count with few digits: 460,800, 2.5M, 10B, 1.2T, 5.1e+18."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if size <= n < 1000 * size:
            return f"{n / size:.4g}{unit}"
    return f"{n:,.0f}" if n < 1e6 else f"{n:.3g}"


def gigabytes(n: float) -> str:
    """Format bytes as gigabytes (10^9 bytes): 0.50 GB."""
    return f"{n / 1e9:,.2f} GB"


def shell_quoted(argument: str) -> str:
    """Quote an argument of a command for the platform's shell (cmd.exe on Windows, otherwise a POSIX shell)."""
    return subprocess.list2cmdline([argument]) if os.name == "nt" else shlex.quote(argument)


def split_items(text: str, commas: list[int], names: Callable[[str], bool]) -> list[str]:
    """Split a comma-separated list whose items may contain commas, such as file names.

    Each item is the longest for which ``names`` returns True, otherwise the shortest.

    Args:
        text: list of items.
        commas: positions of commas where the list may be split, in ascending order.
        names: function that returns whether a text is a valid item, such as an existing file.
    """
    ends, items, start = [*commas, len(text)], [], 0
    while start <= len(text):
        left = [end for end in ends if end >= start]
        end = next((end for end in reversed(left) if names(text[start:end])), left[0])
        items.append(text[start:end])
        start = end + 1
    return items
