"""Built-in text sources (Python's standard library, TinyShakespeare), and downloads with a known SHA-256."""

from __future__ import annotations

import platform
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

from restomod.config.run import DataConfig
from restomod.data.documents import Document
from restomod.utils.errors import UserError, one_line

TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
GENERATED = {"encodings", "pydoc_data"}  # character tables and the manual: a quarter of all tokens


def source_name(config: DataConfig) -> str:
    """Return a short name of the data that is a valid folder name."""
    if config.source == "python-stdlib":
        return f"python-stdlib-{platform.python_version()}"
    return config.source


def python_stdlib() -> Iterator[Document]:
    """Yield the modules of the current Python's standard library, sorted by path, without tests and generated tables.

    Raises:
        UserError: the Python installation has no source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if (NOT_THE_LIBRARY | GENERATED).isdisjoint(path.relative_to(root).parts) and path.stat().st_size
    ]
    if not files:
        raise UserError(
            f"{root} has no .py files: this Python installation has no library source; "
            f"use another source (train: --data.source text --data.path FILE_OR_FOLDER)"
        )
    for path in files:
        with tokenize.open(path) as f:  # a few files declare another encoding than UTF-8
            yield Document(str(path.relative_to(root)), _indented_by_one(f.read()))


def _indented_by_one(text: str) -> str:
    """Reduce the indentation of Python source from four spaces per level to one.

    GPT-2's encoding needs a token for almost every space of an indentation, which is two fifths of all tokens of the
    library. One space per level is almost free, because a token can begin with a space.
    """
    return re.sub(r"^(?: {4})+", lambda spaces: " " * (len(spaces[0]) // 4), text, flags=re.MULTILINE)


DOCUMENTS: dict[str, Callable[[], Iterator[Document]]] = {"python-stdlib": python_stdlib}
"""Built-in sources by name: functions that yield the same documents in the same order at every call.

A new source is a function, an entry here, and a name in `restomod.config.run.Source`.
"""
BUILT_IN = (*DOCUMENTS, "tinyshakespeare")  # sources that need no files from the user


def download_tinyshakespeare(folder: Path) -> Path:
    """Download TinyShakespeare into ``folder`` unless it exists, and return its path.

    Raises:
        UserError: the download fails, or the file has another SHA-256.
    """
    instead = "download it in another way and give the path of the file (train: --data.path FILE)"
    return download(TINYSHAKESPEARE_URL, TINYSHAKESPEARE_SHA256, "tinyshakespeare.txt", folder, instead)


def download(url: str, sha256: str, name: str, folder: Path, instead: str) -> Path:
    """Download a file unless it exists; check its SHA-256 before it gets its final name.

    Args:
        url: address of the file.
        sha256: expected SHA-256 in hexadecimal.
        name: file name in ``folder``.
        folder: folder for the file.
        instead: end of the error message: what the user can do instead.

    Returns:
        Path of the file.

    Raises:
        UserError: the download fails, or the file has another SHA-256.
    """
    import logging

    import pooch
    import requests

    pooch.get_logger().setLevel(logging.WARNING)
    try:
        return Path(pooch.retrieve(url, f"sha256:{sha256}", name, folder))
    except (requests.RequestException, OSError, ValueError) as e:
        reason = "no connection" if isinstance(e, requests.ConnectionError) else one_line(e)
        raise UserError(f"cannot download {url}: {reason}; {instead}") from None
