"""Temporary files and folders: newly created, locked, removed after their process has ended."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import stat
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Literal

import pytest

from restomod.utils import locks
from restomod.utils.files import write_text_atomically
from restomod.utils.temporary import NAME, STALE_AFTER, Temporary, remove_leftovers
from tests.filesystems import refuse

Kind = Literal["file", "folder"]
KINDS: tuple[Kind, ...] = ("file", "folder")


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_umasks_permissions_and_is_removed_with_its_context(kind: Kind, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with Temporary(tmp_path, kind) as made:
            assert NAME.fullmatch(made.path.name)
            assert stat.S_IMODE(made.path.stat().st_mode) == (0o640 if kind == "file" else 0o750)
    finally:
        os.umask(before)
    assert os.listdir(tmp_path) == []


def hold(folder: Path, held: Event) -> None:
    made = [Temporary(folder, kind) for kind in KINDS]
    (made[1].path / "half").write_text("of it")
    held.set()
    signal.pause()


def test_leftovers_of_killed_processes_only_are_removed(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    held = fork.Event()
    process = fork.Process(target=hold, args=(tmp_path, held))
    process.start()
    assert held.wait(10)
    (tmp_path / ".mine.tmp").write_text("not ours")
    write_text_atomically(tmp_path / "a", "x")
    assert len(os.listdir(tmp_path)) == 4
    process.kill()
    process.join()
    write_text_atomically(tmp_path / "a", "y")
    assert sorted(os.listdir(tmp_path)) == [".mine.tmp", "a"]


@pytest.mark.parametrize("kind", KINDS)
def test_without_locks_leftovers_are_removed_after_a_day(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks.fcntl, "flock", refuse(errno.ENOTSUP))
    young, old = Temporary(tmp_path, kind), Temporary(tmp_path, kind)
    long_ago = time.time() - STALE_AFTER - 60
    os.utime(old.path, (long_ago, long_ago))
    remove_leftovers(tmp_path)
    assert (young.path.exists(), old.path.exists()) == (True, False)
    for each in (young, old):
        each.remove()


def test_links_and_pipes_with_such_a_name_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a").write_text("mine")
    (tmp_path / "received").mkdir()
    for digit, target in enumerate(("../theirs", "../theirs/a", "nowhere")):
        (tmp_path / "received" / f".restomod.{str(digit) * 16}.tmp").symlink_to(target)
    os.mkfifo(tmp_path / "received" / f".restomod.{'9' * 16}.tmp")
    (tmp_path / "received" / f".restomod.{'a' * 16}.tmp").mkdir()
    (tmp_path / "received" / f".restomod.{'a' * 16}.tmp" / "link").symlink_to("../../theirs")
    write_text_atomically(tmp_path / "received" / "b", "x")
    assert (tmp_path / "theirs" / "a").read_text() == "mine"
    assert not (tmp_path / "received" / f".restomod.{'a' * 16}.tmp").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_removed_before_it_is_locked_is_created_again(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, taken = locks.flock, list[int]()

    def late(fd: int, wait: bool) -> bool:
        if not taken:
            taken.append(fd)
            remove_leftovers(tmp_path)
        return flock(fd, wait)

    monkeypatch.setattr("restomod.utils.temporary.flock", late)
    with Temporary(tmp_path, kind) as made:
        assert [path.name for path in tmp_path.iterdir()] == [made.path.name]


def test_a_moved_file_is_kept(tmp_path: Path) -> None:
    with Temporary(tmp_path) as made:
        assert made.fd is not None
        os.write(made.fd, b"x")
        made.move(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]
