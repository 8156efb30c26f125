"""Formatting of numbers, and untrusted text."""

from __future__ import annotations

from restomod.utils.text import duration, gigabytes, short_count, visible


def test_control_characters_become_visible() -> None:
    assert visible("a\x1b[31m\tb\r\n\x00\x7f\x9b é \u202eb\u2066\udcff") == "a␛[31m\tb␍\n␀␡� é �b��"


def test_durations_have_units() -> None:
    shown = [duration(seconds) for seconds in (0, 0.4, 59.4, 59.6, 200, 3599.6, 18420, 360_000)]
    assert shown == ["0 s", "0 s", "59 s", "1 min 00 s", "3 min 20 s", "1 h 00 min", "5 h 07 min", "100 h 00 min"]


def test_counts_have_few_digits() -> None:
    shown = [short_count(n) for n in (0, 460_800, 2.5e6, 9.999e9, 1.2e13, 5.1e18)]
    assert shown == ["0", "460,800", "2.5M", "9.999B", "12T", "5.1e+18"]


def test_a_gigabyte_is_ten_to_the_ninth() -> None:
    assert (gigabytes(10**9), gigabytes(2**30), gigabytes(4_999_999)) == ("1.00 GB", "1.07 GB", "0.00 GB")
