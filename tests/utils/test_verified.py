from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest

from restomod.utils import verified
from restomod.utils.verified import VERIFIED, changed_file


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(verified, "SETTLED_SECONDS", 0.05)
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    time.sleep(0.1)
    return tmp_path


HASHES = {name: hashlib.sha256(name.encode() * 1000).hexdigest() for name in ("a", "b", "c")}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read."""
    names: list[str] = []
    before = verified.sha256_file

    def watched(path: Path) -> str:
        names.append(path.name)
        return before(path)

    monkeypatch.setattr(verified, "sha256_file", watched)
    return names


def test_verified_files_are_not_read_again(folder: Path, read: list[str]) -> None:
    assert changed_file(folder, HASHES) is None
    assert sorted(read) == ["a", "b", "c"]
    assert changed_file(folder, HASHES) is None
    assert len(read) == 3
    (folder / "b").touch()
    assert changed_file(folder, HASHES) is None
    assert read[3:] == ["b"]


def test_all_files_are_read_without_remember(folder: Path, read: list[str]) -> None:
    for _ in range(2):
        assert changed_file(folder, HASHES, remember=False) is None
    assert len(read) == 6


def test_a_changed_file_is_found_even_if_its_time_is_reset(folder: Path) -> None:
    assert changed_file(folder, HASHES) is None
    before = (folder / "b").stat()
    content = bytearray((folder / "b").read_bytes())
    content[500] ^= 1
    (folder / "b").write_bytes(content)
    os.utime(folder / "b", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert changed_file(folder, HASHES) == "b"
    assert changed_file(folder, HASHES) == "b"  # it is not recorded as verified


def test_a_changed_hash_in_the_manifest_is_found(folder: Path) -> None:
    assert changed_file(folder, HASHES) is None
    assert changed_file(folder, HASHES | {"c": "0" * 64}) == "c"


def test_a_copied_folder_is_read_again(folder: Path, tmp_path_factory: pytest.TempPathFactory, read: list[str]) -> None:
    changed_file(folder, HASHES)
    copy = tmp_path_factory.mktemp("copy") / "of"
    shutil.copytree(folder, copy)
    assert (copy / VERIFIED).exists()
    changed_file(copy, HASHES)
    assert len(read) == 6


def test_a_recently_changed_file_is_not_recorded(
    folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "SETTLED_SECONDS", 60.0)
    for _ in range(2):
        changed_file(folder, HASHES)
    assert len(read) == 6


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": [1, 2, 3, "x"]}'])
def test_a_damaged_record_is_ignored(folder: Path, read: list[str], content: str) -> None:
    (folder / VERIFIED).write_text(content)
    assert changed_file(folder, HASHES) is None
    assert len(read) == 3


def test_a_read_only_folder_is_read_every_time(folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(verified, "write_json_atomically", refuse)
    for _ in range(2):
        assert changed_file(folder, HASHES) is None
    assert len(read) == 6
