"""One job at a time trains a run, on any file system and machine."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from restomod.runs import run_lock
from restomod.runs.run_lock import RunLock
from restomod.utils import locks
from restomod.utils.errors import UserError


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (
        ("PATIENCE", 0.3),
        ("SAVING", 30.0),
        ("HEARTBEAT", 0.1),
        ("HEARTBEAT_TIMEOUT", 0.5),
        ("POLL", 0.02),
    ):
        monkeypatch.setattr(run_lock, name, seconds)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def state(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")] if path.name != ".lock"}


@pytest.fixture
def held(run: Path) -> Iterator[RunLock]:
    lock = RunLock(run)
    lock.take(resume=True)
    yield lock
    lock.release()


@pytest.mark.usefixtures("held")
def test_a_second_job_is_refused_with_the_holder_and_changes_nothing(run: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(run)
    before = state(run)
    for name in (run, link):
        with pytest.raises(UserError) as caught:
            RunLock(name).take(resume=True)
        assert f"process {os.getpid()} on {os.uname().nodename}" in str(caught.value)
    assert state(run) == before


def test_a_released_lock_leaves_no_files(run: Path, held: RunLock) -> None:
    held.release()
    assert os.listdir(run) == ["config.json"]
    again = RunLock(run)
    again.take(resume=True)
    again.release()


def test_a_job_waits_for_one_that_is_about_to_end(run: Path, held: RunLock) -> None:
    threading.Timer(0.15, held.release).start()
    said: list[str] = []
    second = RunLock(run, said.append)
    second.take(resume=True)
    second.release()
    assert len(said) == 1
    assert f"process {os.getpid()}" in said[0]


def test_a_job_that_is_stopping_has_time_to_save(run: Path, held: RunLock) -> None:
    held.stopping()
    threading.Timer(1.0, held.release).start()  # longer than PATIENCE
    began = time.monotonic()
    second = RunLock(run)
    second.take(resume=True)
    second.release()
    assert time.monotonic() - began >= 0.9


def test_two_jobs_cannot_start_the_same_new_run(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path / "runs/new"), RunLock(tmp_path / "runs/new")
    first.take(resume=False)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"process {os.getpid()}"):
        second.take(resume=False)
    assert time.monotonic() - began < 0.2
    second.release()
    (tmp_path / "runs/new").mkdir()
    first.move_into_folder()
    assert os.listdir(tmp_path / "runs") == ["new"]
    with pytest.raises(UserError, match=f"process {os.getpid()}"):
        RunLock(tmp_path / "runs/new").take(resume=True)
    first.release()
    assert os.listdir(tmp_path / "runs/new") == []


def test_without_a_new_run_no_files_are_left(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "a/b/run")
    lock.take(resume=False)
    lock.release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("locks_of_the_system", [True, False])
def test_the_heartbeat_of_another_machine_holds_the_run_without_shared_locks(
    run: Path, locks_of_the_system: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heartbeat changes, but the lock is not visible on this machine."""
    if not locks_of_the_system:
        monkeypatch.setattr(locks, "fcntl", None)
    over = threading.Event()
    (run / ".lock").touch()

    def elsewhere() -> None:
        beat = 0
        while not over.wait(0.05):
            beat += 1
            record = {"host": "another", "pid": 7, "started": "2026-01-01T00:00:00Z", "beat": beat}
            with open(run / ".lock", "r+") as f:
                f.write(f"{json.dumps(record):<200}\n")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    time.sleep(0.2)
    try:
        with pytest.raises(UserError, match="process 7 on another"):
            RunLock(run).take(resume=True)
    finally:
        over.set()
        thread.join()
    lock = RunLock(run)
    lock.take(resume=True)  # a killed holder's record does not change
    assert json.loads((run / ".lock").read_text())["host"] == os.uname().nodename
    lock.release()


def test_without_locks_a_job_trains_with_a_warning(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    said: list[str] = []
    lock = RunLock(run, said.append)
    lock.take(resume=True)
    assert len(said) == 1
    assert "does not support locks" in said[0]
    with pytest.raises(UserError, match=f"process {os.getpid()}"):  # found by its heartbeat
        RunLock(run).take(resume=True)
    lock.release()
