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

import pytest

from restomod.config.run import DataConfig
from restomod.data import sources
from restomod.data.sources import documents, source_name
from restomod.utils.errors import UserError


def write(folder: Path, **files: str | bytes) -> Path:
    """Fill ``folder`` with files; in their names, ``__`` stands for a dot and ``___`` for a slash."""
    for name, content in files.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def refusal(config: DataConfig) -> str:
    """The one line with which ``config``'s source is refused."""
    with pytest.raises(UserError) as caught:
        list(documents(config))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- python-stdlib ------------------------------------------------------------------------------------------

STDLIB = DataConfig(source="python-stdlib")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def test_the_library_of_this_python_is_read_in_order_and_alone() -> None:
    names = [document.name for document in documents(STDLIB)]
    assert names == sorted(names, key=lambda name: Path(name).parts)
    assert {"ast.py", "string.py", str(Path("json", "decoder.py"))} <= set(names)
    parts = {part for name in names for part in Path(name).parts}
    assert parts.isdisjoint({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


def words(source: str) -> list[str]:
    """The tokens of Python source that mean something, but for strings, which may span lines and hold indentation."""
    layout = {tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.NEWLINE, tokenize.STRING}
    return [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in layout]


def test_the_librarys_text_is_that_of_its_files_but_for_indentation() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    some = [document for document in documents(STDLIB) if document.name[0] in "acs"]
    assert len(some) > 50
    for document in some:
        with tokenize.open(root / document.name) as f:
            original = f.read()
        assert words(document.text) == words(original), document.name
        assert [line.strip() for line in document.text.split("\n")] == [line.strip() for line in original.split("\n")]


def test_the_library_is_indented_by_one_space_a_level(library: Path) -> None:
    write(library, a__py="if a:\n    if b:\n        c = [1,\n             2]  # a    b\n")
    assert [document.text for document in documents(STDLIB)] == ["if a:\n if b:\n  c = [1,\n    2]  # a    b\n"]


def test_what_is_not_the_librarys_own_source_is_left_out(library: Path) -> None:
    left_out = (
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "__pycache__",
        "encodings",
        "pydoc_data",
    )
    for folder in ("", "json", *left_out, *(f"json/{name}" for name in left_out)):
        (library / folder).mkdir(exist_ok=True)
        (library / folder / "a.py").write_text("a = 1\n")
    write(library, testing__py="b = 2\n", empty__py="", notes__txt="no Python")
    assert [document.name for document in documents(STDLIB)] == ["a.py", "json/a.py", "testing.py"]


def test_a_declared_encoding_is_respected(library: Path) -> None:
    write(library, old__py="# -*- coding: latin-1 -*-\ns = 'é'\n".encode("latin-1"), new__py="s = 'é'\n")
    texts = {document.name: document.text for document in documents(STDLIB)}
    assert texts == {"old.py": "# -*- coding: latin-1 -*-\ns = 'é'\n", "new.py": "s = 'é'\n"}


def test_a_library_without_source_is_refused(library: Path) -> None:
    assert refusal(STDLIB).startswith(f"{library} holds no .py files")


def test_the_library_is_named_with_pythons_version() -> None:
    assert source_name(STDLIB) == f"python-stdlib-{platform.python_version()}"


# --- text ---------------------------------------------------------------------------------------------------


def text(path: Path, glob: str = "**/*") -> DataConfig:
    return DataConfig(source="text", path=str(path), glob=glob)


def names(config: DataConfig, root: Path) -> list[str]:
    return [str(Path(document.name).relative_to(root)) for document in documents(config)]


def test_a_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    write(tmp_path, a__txt="one\r\ntwo\rthree\né")
    (document,) = documents(text(tmp_path / "a.txt"))
    assert (document.name, document.text) == (str(tmp_path / "a.txt"), "one\r\ntwo\rthree\né")


def test_the_files_of_a_folder_come_sorted_by_path(tmp_path: Path) -> None:
    write(tmp_path, b="b", a___z="z", c="c", a___b___c="c", B="B")
    assert names(text(tmp_path), tmp_path) == ["B", "a/b/c", "a/z", "b", "c"]
    assert [document.text for document in documents(text(tmp_path))] == ["B", "c", "z", "b", "c"]


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, **{"a": "a", ".hidden": "no", ".git/config": "no", "b/.hidden": "no", "b/.c/d": "no", "b/e": "e"})
    assert names(text(tmp_path), tmp_path) == ["a", "b/e"]


def test_a_folder_below_a_hidden_one_can_be_read(tmp_path: Path) -> None:
    write(tmp_path / ".cache", a="a")
    assert names(text(tmp_path / ".cache"), tmp_path / ".cache") == ["a"]


@pytest.mark.parametrize(
    ("glob", "expected"), [("**/*.txt", ["a.txt", "b/c.txt"]), ("*.txt", ["a.txt"]), ("b/*", ["b/c.txt", "b/d.md"])]
)
def test_a_glob_chooses_files(tmp_path: Path, glob: str, expected: list[str]) -> None:
    write(tmp_path, a__txt="a", b___c__txt="c", b___d__md="d", e__md="e")
    assert names(text(tmp_path, glob), tmp_path) == expected


def test_an_empty_file_in_a_folder_is_skipped(tmp_path: Path) -> None:
    write(tmp_path, a="a", b="", c="c")
    assert names(text(tmp_path), tmp_path) == ["a", "c"]


def test_a_missing_path_is_refused() -> None:
    assert refusal(DataConfig(source="text", path="")) == refusal(DataConfig(source="text"))  # not the present folder
    assert refusal(DataConfig(source="text")) == "no text to read: add --data.path FILE_OR_FOLDER"


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert refusal(text(tmp_path / "a.txt")).startswith(f"{tmp_path / 'a.txt'}: no such file or folder")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, a__txt="")
    assert refusal(text(tmp_path / "a.txt")).startswith(f"{tmp_path / 'a.txt'} is empty")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert refusal(text(tmp_path)) == f"{tmp_path} holds no text: no file matches the glob '**/*'"


def test_a_folder_of_empty_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path, a="", b="")
    assert refusal(text(tmp_path)) == f"{tmp_path} holds no text: its 2 files are all empty"


def test_a_glob_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    write(tmp_path, a__txt="a")
    assert refusal(text(tmp_path, "*.md")) == f"{tmp_path} holds no text: no file matches the glob '*.md'"


@pytest.mark.parametrize("glob", ["/*.txt", "", "**.txt/a", "a/**b"])
def test_a_glob_that_is_none_is_refused(tmp_path: Path, glob: str) -> None:
    write(tmp_path, a__md="a")
    assert f"the glob {glob!r}" in refusal(text(tmp_path, glob))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"abc\xff", "byte 0xff at offset 3"),
        (b"\xc3\xa9\xc3", "byte 0xc3 at offset 2"),  # half a character at the end
        ("naïve".encode("latin-1"), "byte 0xef at offset 2"),
        (b"a\xed\xa0\x80", "byte 0xed at offset 1"),  # a surrogate
    ],
)
def test_a_file_that_is_not_utf8_is_refused_with_the_offset_of_the_byte(
    tmp_path: Path, content: bytes, said: str
) -> None:
    write(tmp_path, a=b"fine", b=content)
    assert refusal(text(tmp_path)).startswith(f"{tmp_path / 'b'} is not UTF-8 text: {said}")


# --- tinyshakespeare ----------------------------------------------------------------------------------------

PLAY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 99


class Library(HTTPServer):
    """A server on this machine that serves one file under any name, and counts how often."""

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


def tinyshakespeare(cache: Path) -> DataConfig:
    return DataConfig(source="tinyshakespeare", cache=str(cache))


def test_tinyshakespeare_is_downloaded_once(server: Library, tmp_path: Path) -> None:
    for _ in range(2):
        (document,) = documents(tinyshakespeare(tmp_path / "cache"))
        assert document.text.encode() == PLAY
    assert server.visits == 1
    assert [path.read_bytes() for path in (tmp_path / "cache").iterdir()] == [PLAY]


def test_a_download_with_another_hash_is_refused_and_not_kept(server: Library, tmp_path: Path) -> None:
    server.content = PLAY.replace(b"speak", b"quack")
    assert "hash" in refusal(tinyshakespeare(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_breaks_off_is_refused_and_not_kept(server: Library, tmp_path: Path) -> None:
    server.content = PLAY[:100]
    assert refusal(tinyshakespeare(tmp_path)).startswith(f"cannot download {sources.TINYSHAKESPEARE_URL}: ")
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_is_gone_is_refused(server: Library, tmp_path: Path) -> None:
    server.status = 404
    said = refusal(tinyshakespeare(tmp_path))
    assert said.startswith(f"cannot download {sources.TINYSHAKESPEARE_URL}: 404")
    assert said.endswith("name that file (of `train`: --data.path FILE)")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # a port of ours on which nobody listens
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/input.txt"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(sources, "TINYSHAKESPEARE_URL", url)
        assert refusal(tinyshakespeare(tmp_path)).startswith(f"cannot download {url}: ")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_can_be_tried_again(server: Library, tmp_path: Path) -> None:
    server.content = PLAY[:-1] + b"?"
    refusal(tinyshakespeare(tmp_path))
    server.content = PLAY
    assert [document.text.encode() for document in documents(tinyshakespeare(tmp_path))] == [PLAY]


def test_a_file_of_ones_own_replaces_the_download(server: Library, tmp_path: Path) -> None:
    write(tmp_path, mine__txt="ROMEO: hm")
    config = DataConfig(source="tinyshakespeare", path=str(tmp_path / "mine.txt"), cache=str(tmp_path / "cache"))
    assert [document.text for document in documents(config)] == ["ROMEO: hm"]
    assert server.visits == 0


def test_the_published_files_hash_is_pinned() -> None:
    expected = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert expected == sources.TINYSHAKESPEARE_SHA256
