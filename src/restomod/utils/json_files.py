"""JSON files, which may be damaged or malicious: read within limits of size and depth, and checked against types."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

from restomod.utils.errors import UserError, shortened
from restomod.utils.files import read_limited
from restomod.utils.text import visible

MAX_BYTES = 32 * 2**20  # of a file: its objects may take 30 times as much
MAX_DEPTH = 100  # of lists and objects within each other
LONG_INTEGER = re.compile(rb"\d{19}")


def parse_json(content: bytes) -> Any:
    """The value of a JSON text in UTF-8, with or without a byte-order mark.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or holds an integer of more than 64 bits.
    """
    # a hook for integers takes time, so there is one only where it may be needed
    parse_int = _integer if LONG_INTEGER.search(content) else None
    try:
        value = json.loads(content.decode("utf-8-sig"), parse_int=parse_int)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if content.count(b"[") + content.count(b"{") > MAX_DEPTH:
        _require_shallow(value)
    return value


def _require_shallow(value: Any) -> None:
    """Raise ValueError where lists and objects are nested so deeply that walking through them may fail."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"the number {shortened(digits)} is too large")
    return int(digits)


def read_json(path: Path, what: str, kind: Any = Any, max_bytes: int = MAX_BYTES) -> Any:
    """Read a JSON file whose value has the type ``kind`` (see `checked`); ``what`` names the content in messages.

    Raises:
        UserError: the file is missing, no regular file, unreadable, too large, not JSON, or of another type.
    """
    try:
        value = parse_json(read_limited(path, what, max_bytes))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: there is no {what} here") from None
    except OSError as e:
        raise UserError(f"{path}: cannot read the {what}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"{path} is damaged: the {what} is not valid JSON ({e})") from None
    return checked(value, kind, f"{path} is damaged: the {what}")


def checked(value: Any, kind: Any, where: str) -> Any:
    """Return a JSON value if it has the type ``kind``, without the keys that ``kind`` does not know.

    Args:
        value: the value.
        kind: a type that pydantic checks strictly: a `TypedDict`, ``Annotated[int, Field(ge=0)]``, ...
        where: the file and its content, for messages.

    Raises:
        UserError: the value has another type; the first difference is named.
    """
    if kind is Any:
        return value
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(value, strict=True)
    except ValidationError as e:
        first = e.errors(include_url=False, include_context=False)[0]
        place = shortened(visible(".".join(map(str, first["loc"])))) or "the value"
        if first["type"] == "missing":
            raise UserError(f"{where} lacks {place}") from None
        wrong = first["msg"].removeprefix("Input ").removeprefix("Value error, ")  # "should be a valid integer"
        raise UserError(f"{where}: {place} {wrong}, not {shortened(repr(first['input']))}") from None


def file_name(name: str) -> str:
    """For pydantic: refuse what does not name a file of the same folder."""
    if "\0" in name or Path(name).name != name or name in ("", ".."):
        raise ValueError("should be the name of a file in the same folder")
    name.encode()  # which raises a ValueError, where half of a surrogate pair is in it
    return name


def as_tuple(value: Any) -> Any:
    """For pydantic, before a type ``tuple[...]``: JSON has lists only."""
    return tuple(value) if isinstance(value, list) else value


def parse_line(line: bytes, kind: Any) -> Any | None:
    """The JSON value of a line, checked as in `checked`; None if it is of another type.

    Half a surrogate pair is an error; a number beyond the range of a double becomes infinite.
    """
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(line, strict=True)  # three times as fast as `json` without any check
    except ValidationError:
        return None


@functools.cache
def _adapter(kind: Any) -> Any:
    """Pydantic's check of a type; making one takes milliseconds."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
