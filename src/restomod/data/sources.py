"""Where text comes from: each source is a stream of documents in an order that does not change between runs."""

from __future__ import annotations

import platform
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from restomod.config.run import DataConfig
from restomod.data.documents import AnyDocument, Document
from restomod.data.readers import read_documents
from restomod.data.reading import Reading
from restomod.data.text_files import files_of
from restomod.utils.errors import UserError, one_line

BUILT_IN = ("python-stdlib", "tinyshakespeare")  # sources that need no files of the user's
TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
GENERATED = {"encodings", "pydoc_data"}  # character tables and the manual as a dictionary: a quarter of all tokens


def source_name(config: DataConfig) -> str:
    """A short name for the data, fit for a folder's name."""
    if config.source == "python-stdlib":
        return f"python-stdlib-{platform.python_version()}"
    return config.source


def documents(config: DataConfig, reading: Reading | None = None) -> Iterator[AnyDocument]:
    """Yield the documents of ``config``'s source, empty ones left out, sorted by path.

    Args:
        config: which text, and how to read it.
        reading: where to count what was read, of text of the user's own.

    Raises:
        UserError: the text is missing, empty, not UTF-8, or cannot be downloaded.
    """
    if config.source == "python-stdlib":
        yield from _python_stdlib()
    elif config.source == "tinyshakespeare":
        yield from read_documents(Path(config.path) if config.path else _download_tinyshakespeare(Path(config.cache)))
    elif not config.path:
        raise UserError("no text to read: add --data.path FILE_OR_FOLDER")
    else:
        yield from _text(Path(config.path), config, reading or Reading())


def _text(path: Path, config: DataConfig, reading: Reading) -> Iterator[AnyDocument]:
    if (path / "manifest.json").exists():
        raise UserError(f"{path} holds prepared tokens, not text: add --data.source tokens")
    for file in files_of(path, config.glob, reading.left_out):
        yield from read_documents(file, config.text_column, separator=config.separator, reading=reading)


def _python_stdlib() -> Iterator[Document]:
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


def _download_tinyshakespeare(folder: Path) -> Path:
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
