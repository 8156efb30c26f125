from __future__ import annotations

import hashlib
import io
import platform
import socket
import sysconfig
import threading
import tokenize
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import get_args

import pytest

from restomod.config.run import DataConfig, Source
from restomod.data import sources
from restomod.data.documents import Document
from restomod.data.prepare.text_cache import prepare_text
from restomod.data.sources import BUILT_IN, DOCUMENTS, download_tinyshakespeare, python_stdlib, source_name
from restomod.utils.errors import UserError


def write(folder: Path, **files: str | bytes) -> Path:
    """Fill ``folder`` with files; in their names, ``__`` stands for a dot and ``___`` for a slash."""
    for name, content in files.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


# --- python-stdlib ------------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def test_the_library_of_this_python_is_read_in_order_and_alone() -> None:
    names = [document.name for document in python_stdlib()]
    assert names == sorted(names, key=lambda name: Path(name).parts)
    assert {"ast.py", "string.py", str(Path("json", "decoder.py"))} <= set(names)
    parts = {part for name in names for part in Path(name).parts}
    assert parts.isdisjoint({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


def words(source: str) -> list[str]:
    """Return the significant tokens of Python source, except strings, which can contain indentation."""
    layout = {tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.NEWLINE, tokenize.STRING}
    return [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in layout]


def test_the_librarys_text_is_that_of_its_files_but_for_indentation() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    some = [document for document in python_stdlib() if document.name[0] in "acs"]
    assert len(some) > 50
    for document in some:
        with tokenize.open(root / document.name) as f:
            original = f.read()
        assert words(document.text) == words(original), document.name
        assert [line.strip() for line in document.text.split("\n")] == [line.strip() for line in original.split("\n")]


def test_the_library_is_indented_by_one_space_a_level(library: Path) -> None:
    write(library, a__py="if a:\n    if b:\n        c = [1,\n             2]  # a    b\n")
    assert [document.text for document in python_stdlib()] == ["if a:\n if b:\n  c = [1,\n    2]  # a    b\n"]


def test_tests_and_installed_packages_are_skipped(library: Path) -> None:
    left_out = [
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "__pycache__",
        "encodings",
        "pydoc_data",
    ]
    for folder in ("", "json", *left_out, *(f"json/{name}" for name in left_out)):
        (library / folder).mkdir(exist_ok=True)
        (library / folder / "a.py").write_text("a = 1\n")
    write(library, testing__py="b = 2\n", empty__py="", notes__txt="no Python")
    assert [document.name for document in python_stdlib()] == ["a.py", "json/a.py", "testing.py"]


def test_a_declared_encoding_is_respected(library: Path) -> None:
    write(library, old__py="# -*- coding: latin-1 -*-\ns = 'é'\n".encode("latin-1"), new__py="s = 'é'\n")
    texts = {document.name: document.text for document in python_stdlib()}
    assert texts == {"old.py": "# -*- coding: latin-1 -*-\ns = 'é'\n", "new.py": "s = 'é'\n"}


def test_a_library_without_source_is_refused(library: Path) -> None:
    with pytest.raises(UserError, match=rf"{library} has no \.py files"):
        list(python_stdlib())


def test_the_library_is_named_with_pythons_version() -> None:
    assert source_name(DataConfig(source="python-stdlib")) == f"python-stdlib-{platform.python_version()}"


def test_every_source_has_a_reader() -> None:
    assert sorted(get_args(Source)) == sorted((*BUILT_IN, "text", "tokens"))


def test_a_new_source_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{a} + {b} = {a + b}\n" for a in range(20) for b in range(20)]
    monkeypatch.setitem(DOCUMENTS, "sums", lambda: (Document(f"sum-{i}", text) for i, text in enumerate(texts)))
    dataset = prepare_text(DataConfig(source="sums", cache=str(tmp_path)))  # type: ignore[arg-type]
    assert dataset.manifest["name"] == "sums"
    assert dataset.manifest["documents"] == len(texts)
    assert len(dataset.train) > 10 * len(dataset.val) > 0


# --- tinyshakespeare ----------------------------------------------------------------------------------------

PLAY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 99


class Library(HTTPServer):
    """Local server that returns one file for every path and counts the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Desk)
        self.status, self.content, self.announced, self.visits = 200, PLAY, len(PLAY), 0


class Desk(BaseHTTPRequestHandler):
    server: Library

    def do_GET(self) -> None:
        self.server.visits += 1
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(self.server.announced))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    with Library() as server:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(sources, "TINYSHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
        monkeypatch.setattr(sources, "TINYSHAKESPEARE_SHA256", hashlib.sha256(PLAY).hexdigest())
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def refusal(folder: Path) -> str:
    """Return the error message of the download, which is one line; no file remains in ``folder``."""
    with pytest.raises(UserError) as caught:
        download_tinyshakespeare(folder)
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []
    return str(caught.value)


def test_tinyshakespeare_is_downloaded_once(server: Library, tmp_path: Path) -> None:
    for _ in range(2):
        assert download_tinyshakespeare(tmp_path / "cache").read_bytes() == PLAY
    assert server.visits == 1
    assert [path.read_bytes() for path in (tmp_path / "cache").iterdir()] == [PLAY]


def test_a_bad_download_is_refused_and_not_kept_and_can_be_tried_again(server: Library, tmp_path: Path) -> None:
    server.content = PLAY.replace(b"speak", b"quack")
    assert "hash" in refusal(tmp_path)
    server.content = PLAY[:100]  # truncated
    assert refusal(tmp_path).startswith(f"cannot download {sources.TINYSHAKESPEARE_URL}: ")
    server.content, server.status = PLAY, 404
    said = refusal(tmp_path)
    assert said.startswith(f"cannot download {sources.TINYSHAKESPEARE_URL}: 404")
    assert "--data.path FILE" in said
    server.status = 200
    assert download_tinyshakespeare(tmp_path).read_bytes() == PLAY


def test_a_server_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # a port without a server
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/input.txt"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(sources, "TINYSHAKESPEARE_URL", url)
        assert refusal(tmp_path).startswith(f"cannot download {url}: ")
