"""Text for people, and foreign text."""

from __future__ import annotations

import pytest

from restomod.utils.text import duration, visible


def test_control_characters_become_visible() -> None:
    assert visible("a\x1b[31m\tb\r\n\x00\x7f\x9b é \u202eb\u2066\udcff") == "a␛[31m\tb␍\n␀␡� é �b��"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 00 min"),
        (18420, "5 h 07 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
