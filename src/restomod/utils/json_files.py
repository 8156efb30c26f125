"""Reading of JSON files that may be damaged or malicious, with limits of size and depth and with type checks."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

from restomod.utils.errors import UserError, shortened
from restomod.utils.files import read_limited
from restomod.utils.text import visible

MAX_BYTES = 32 * 2**20  # per file; its objects may use 30 times as much memory
MAX_DEPTH = 100  # nesting of lists and objects
LONG_INTEGER = re.compile(rb"\d{19}")


def parse_json(content: bytes) -> Any:
    """Parse JSON in UTF-8, with or without a byte-order mark.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or contains an integer of more than 64 bits.
    """
    # the hook for integers is slow, so it is used for texts with long integers only
    parse_int = _integer if LONG_INTEGER.search(content) else None
    try:
        value = json.loads(content.decode("utf-8-sig"), parse_int=parse_int)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if content.count(b"[") + content.count(b"{") > MAX_DEPTH:
        _require_shallow(value)
    return value


def _require_shallow(value: Any) -> None:
    """Raise ValueError if lists and objects are nested deeper than `MAX_DEPTH`; recursion over them could fail."""
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
    """Read a JSON file and check the type of its value.

    Args:
        path: JSON file.
        what: name of the content in messages.
        kind: expected type (see `checked`).
        max_bytes: maximum size.

    Raises:
        UserError: the file is missing, not regular, unreadable, too large, not JSON, or of another type.
    """
    try:
        value = parse_json(read_limited(path, what, max_bytes))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: no {what} found") from None
    except OSError as e:
        raise UserError(f"{path}: cannot read the {what}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"{path} is damaged: the {what} is not valid JSON ({e})") from None
    return checked(value, kind, f"{path} is damaged: the {what}")


def checked(value: Any, kind: Any, where: str) -> Any:
    """Check the type of a JSON value and drop unknown keys.

    Args:
        value: value to check.
        kind: type that pydantic checks strictly: a `TypedDict`, ``Annotated[int, Field(ge=0)]``, ...
        where: file and content, for messages.

    Returns:
        The value without keys that ``kind`` does not have.

    Raises:
        UserError: the value has another type; the message names the first difference.
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
    """Raise ValueError unless a text is the name of a file in the same folder (validator for pydantic)."""
    if "\0" in name or Path(name).name != name or name in ("", ".."):
        raise ValueError("should be the name of a file in the same folder")
    name.encode()  # raises ValueError for lone surrogates
    return name


def as_tuple(value: Any) -> Any:
    """Convert a list to a tuple (validator for pydantic; JSON has no tuples)."""
    return tuple(value) if isinstance(value, list) else value


def parse_line(line: bytes, kind: Any) -> Any | None:
    """Parse a line of JSON and check its type; return None if it is invalid or of another type.

    A lone surrogate is invalid. A number beyond the range of a double becomes infinite.
    """
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(line, strict=True)  # three times as fast as `json`, even with the check
    except ValidationError:
        return None


@functools.cache
def _adapter(kind: Any) -> Any:
    """Return pydantic's validator of a type, cached because building one takes milliseconds."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
