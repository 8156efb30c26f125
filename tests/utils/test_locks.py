"""Locks between processes and within one process."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from restomod.utils import locks
from restomod.utils.errors import UserError
from restomod.utils.locks import FileLock, locked


def test_a_lock_is_exclusive(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.acquire(wait=False)
    assert not second.acquire(wait=False)
    first.release()
    assert second.acquire(wait=False)
    second.release(remove=True)
    assert os.listdir(tmp_path) == []


def hold(path: Path, held: multiprocessing.synchronize.Event) -> None:
    FileLock(path).acquire()
    held.set()
    signal.pause()


def test_a_killed_process_releases_its_lock(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    held = fork.Event()
    process = fork.Process(target=hold, args=(tmp_path / "lock", held))
    process.start()
    assert held.wait(10)
    assert not FileLock(tmp_path / "lock").acquire(wait=False)
    process.kill()
    process.join()
    assert FileLock(tmp_path / "lock").acquire(wait=False)


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.rename(path.with_name("other"))])
def test_a_lock_on_a_removed_file_is_not_acquired(tmp_path: Path, change: Callable[[Path], None]) -> None:
    """A process that opened the file before its removal would otherwise lock a file that no other process uses."""
    path = tmp_path / "lock"
    opened, flock = [], locks.flock

    def late(fd: int, wait: bool) -> bool:
        opened.append(fd)
        if len(opened) == 1:
            change(path)
        return flock(fd, wait)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locks, "flock", late)
        mine = FileLock(path)
        assert mine.acquire(wait=False)
    assert len(opened) == 2
    assert not FileLock(path).acquire(wait=False)
    mine.release()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL])
def test_a_file_system_without_locks_excludes_no_process(tmp_path: Path, code: int) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locks.fcntl, "flock", refuse)
        for lock in (FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")):
            assert lock.acquire(wait=False)
            assert not lock.enforced


def test_long_waiting_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, told = FileLock(tmp_path / "lock"), []
    monkeypatch.setattr(locks, "TELL_AFTER", 0.0)
    other.acquire()

    def tell() -> None:
        told.append("waiting")
        other.release()

    with locked(tmp_path / "lock", tell):
        assert not FileLock(tmp_path / "lock").acquire(wait=False)
    assert told == ["waiting"]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["link", "broken link", "pipe"])
def test_a_lock_file_is_never_opened_through_a_link(kind: str, tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("mine")
    path = tmp_path / "lock"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("theirs" if kind == "link" else "nowhere")
    with pytest.raises(UserError, match=r"lock is a link, a named pipe or a device"):
        FileLock(path).acquire(wait=False)
    assert (tmp_path / "theirs").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()
