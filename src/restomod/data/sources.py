"""Built-in texts: the source of Python's standard library, and TinyShakespeare; downloads with a known SHA-256."""

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
GENERATED = {"encodings", "pydoc_data"}  # character tables and the manual as a dictionary: a quarter of all tokens


def source_name(config: DataConfig) -> str:
    """Short name of the data, usable as a folder's name."""
    if config.source == "python-stdlib":
        return f"python-stdlib-{platform.python_version()}"
    return config.source


def python_stdlib() -> Iterator[Document]:
    """Yield the modules of the running Python's standard library, sorted by path, without tests and generated tables.

    Raises:
        UserError: this Python has no source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if (NOT_THE_LIBRARY | GENERATED).isdisjoint(path.relative_to(root).parts) and path.stat().st_size
    ]
    if not files:
        raise UserError(
            f"{root} holds no .py files: this Python came without its library's source; "
            f"take text of your own (of `train`: --data.source text --data.path FILE_OR_FOLDER)"
        )
    for path in files:
        with tokenize.open(path) as f:  # a few files declare another encoding than UTF-8
            yield Document(str(path.relative_to(root)), _indented_by_one(f.read()))


def _indented_by_one(text: str) -> str:
    """Python source indented by one space a level instead of four.

    GPT-2's encoding spends a token on nearly every space, so that two tokens in five of the library as written are
    single spaces. One space a level costs next to nothing: a token may begin with one.
    """
    return re.sub(r"^(?: {4})+", lambda spaces: " " * (len(spaces[0]) // 4), text, flags=re.MULTILINE)


DOCUMENTS: dict[str, Callable[[], Iterator[Document]]] = {"python-stdlib": python_stdlib}
"""Built-in sources by name: functions that yield the same documents in the same order at every call.

A new source is a function, an entry here, and a name in `restomod.config.run.Source`.
"""
BUILT_IN = (*DOCUMENTS, "tinyshakespeare")  # sources that need no files from the user


def download_tinyshakespeare(folder: Path) -> Path:
    """Download TinyShakespeare into ``folder`` unless it is there; return its path. Raises as `download`."""
    instead = "fetch it by other means and name that file (of `train`: --data.path FILE)"
    return download(TINYSHAKESPEARE_URL, TINYSHAKESPEARE_SHA256, "tinyshakespeare.txt", folder, instead)


def download(url: str, sha256: str, name: str, folder: Path, instead: str) -> Path:
    """Fetch a file once into ``folder``: to a temporary name, checked against its SHA-256, then renamed to ``name``.

    Raises:
        UserError: it cannot be had, or is another; the message ends with what to do ``instead``.
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
