"""Text for people: times in words, and foreign text that can steer neither a terminal nor a page."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

CONTROLS = (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))
PICTURES = {c: 0x2400 + c for c in range(32) if c not in (9, 10)} | {127: 0x2421}  # of ASCII's
VISIBLE = PICTURES | dict.fromkeys(CONTROLS, 0xFFFD)
MARKDOWN_MEANING = re.compile(r"[\\`*_\[\]{}|~#$:@]")  # within a line; < > & become entities


def visible(text: str) -> str:
    """``text`` with a picture for each control character but line feed and tab: it can steer no terminal.

    What has no picture becomes U+FFFD: the controls that reverse the direction of writing, and halves of surrogate
    pairs, which stand for bytes of a command line that are not UTF-8 and cannot be written into a file.
    """
    return text.translate(VISIBLE)


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


def split_items(text: str, commas: list[int], names: Callable[[str], bool]) -> list[str]:
    """The items of a list.

    Args:
        text: the list.
        commas: the places of the commas that may end an item, in order.
        names: whether an item names what exists. The longest that does is taken, so that names may hold commas; where
            none does, the shortest.
    """
    ends, items, start = [*commas, len(text)], [], 0
    while start <= len(text):
        left = [end for end in ends if end >= start]
        end = next((end for end in reversed(left) if names(text[start:end])), left[0])
        items.append(text[start:end])
        start = end + 1
    return items
