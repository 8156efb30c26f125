"""JSON files that are damaged, malicious, or of the wrong type."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, NotRequired

import pytest
from pydantic import Field
from typing_extensions import TypedDict

from restomod.utils.errors import UserError
from restomod.utils.files import write_json_atomically
from restomod.utils.json_files import parse_json, read_json


class Point(TypedDict):
    """Record type of these tests."""

    step: Annotated[int, Field(ge=0)]
    loss: float | None
    names: NotRequired[list[str]]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe{\x00}\x00",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" + b"9" * 400 + b"]",
        b"[" + b"9" * 5000 + b"]",
        b"[9223372036854775808]",
        b"[-9223372036854775809]",
    ],
)
def test_invalid_json_and_exceeded_limits_are_value_errors(content: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # json's own messages differ between Pythons
        parse_json(content)


def test_values_within_the_limits_equal_those_of_json() -> None:
    text = b'\xef\xbb\xbf{"a": [9223372036854775807, -9223372036854775808, 0.12345678901234567, "' + b"1" * 50 + b'"]}'
    assert parse_json(text) == {"a": [2**63 - 1, -(2**63), 0.12345678901234567, "1" * 50]}


def test_json_round_trips_and_ends_with_a_newline(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "b": {"c": "é"}}
    write_json_atomically(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json", "thing") == value
    assert (tmp_path / "a.json").read_text().endswith("}\n")


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe", b"{'a': 1}", "folder", "missing"])
def test_unreadable_json_is_refused_by_name(content: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    with pytest.raises(UserError, match=rf"{path}.*manifest"):
        read_json(path, "manifest")


def test_unknown_keys_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "point.json"
    path.write_text('{"step": 3, "loss": 1, "names": ["x"], "auths": {"token": "secret"}}')
    assert read_json(path, "point", Point) == {"step": 3, "loss": 1.0, "names": ["x"]}
    path.write_text('{"step": 0, "loss": null}')
    assert read_json(path, "point", Point) == {"step": 0, "loss": None}


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("[]", "point"),
        ("5", "point"),
        ("{}", "step"),
        ('{"step": -1, "loss": 1.0}', "step"),
        ('{"step": true, "loss": 1.0}', "step"),
        ('{"step": 1.0, "loss": 1.0}', "step"),
        ('{"step": "1", "loss": 1.0}', "step"),
        ('{"step": 1, "loss": "1.0"}', "loss"),
        ('{"step": 1, "loss": 1.0, "names": ["a", 2]}', "names.1"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(tmp_path: Path, value: str, names: str) -> None:
    path = tmp_path / "point.json"
    path.write_text(value)
    with pytest.raises(UserError) as refused:
        read_json(path, "point", Point)
    assert str(path) in str(refused.value)
    assert names in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_too_large_or_endless_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    path.write_text('"' + "a" * 1000 + '"')
    assert read_json(path, "text", max_bytes=1002) == "a" * 1000
    with pytest.raises(UserError, match="too large"):
        read_json(path, "text", max_bytes=1001)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe"):
        read_json(tmp_path / "pipe", "text")
    device: Any = Path("/dev/zero")
    with pytest.raises(UserError, match="device"):
        read_json(device, "text")
