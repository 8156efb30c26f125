from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path
from typing import NoReturn

import pytest

from restomod.utils.errors import UserError
from restomod.utils.files import (
    fsync_path,
    move_folder,
    open_to_append,
    require_inside,
    sha256_file,
    short_name,
    write_text_atomically,
)
from restomod.utils.output_files import Output, write_outputs
from tests.filesystems import refuse_renaming_folders


def test_sha256_of_the_standards_example(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path / "abc") == expected


def test_text_replaces_a_file_in_utf8_without_leftovers(tmp_path: Path) -> None:
    for old in (False, True):
        if old:
            (tmp_path / "a.txt").write_text("a much longer old text")
        write_text_atomically(tmp_path / "a.txt", "é\n")
        assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\n"
        assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left") as e:
        write_text_atomically(tmp_path / "a.txt", "new")
    assert e.value.filename == str(tmp_path / "a.txt")  # the message must name the file
    assert (tmp_path / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_file_is_synced_before_the_rename_and_its_folder_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(fd: int) -> None:
        fsync(fd)
        path = os.readlink(f"/proc/self/fd/{fd}")
        calls.append(("fsync", path, Path(path).read_text() if os.path.isfile(path) else "folder"))

    def recording_replace(a: Path, b: Path) -> None:
        replace(a, b)
        calls.append(("replace", str(a), str(b)))

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc to see which file is synced")
    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    write_text_atomically(tmp_path / "a.txt", "new")
    temporary = calls[0][1]
    assert Path(temporary).parent == tmp_path
    assert calls == [
        ("fsync", temporary, "new"),
        ("replace", temporary, str(tmp_path / "a.txt")),
        ("fsync", str(tmp_path), "folder"),
    ]


def test_several_processes_may_write_one_file(tmp_path: Path) -> None:
    texts = [letter * 300_000 for letter in "abcd"]
    problems: list[BaseException] = []

    def write(text: str) -> None:
        try:
            for _ in range(10):
                write_text_atomically(tmp_path / "a.txt", text)
                assert (tmp_path / "a.txt").read_text() in texts
        except BaseException as e:
            problems.append(e)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_that_cannot_sync_folders_is_written_to(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, failing = os.fsync, [code]

    def of_files(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(failing[0], os.strerror(failing[0]))
        sync(fd)

    monkeypatch.setattr(os, "fsync", of_files)
    write_text_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    failing[0] = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        fsync_path(tmp_path)


def test_fsync_closes_what_it_opens(tmp_path: Path) -> None:
    os.close(free := os.dup(0))
    fsync_path(tmp_path)
    os.close(again := os.dup(0))
    assert again == free


# --- folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renames", [True, False])
def test_a_folder_is_moved_as_a_whole_and_never_into_another(
    renames: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "a").write_text("a")
    (source / "LAST").write_text("last")
    if not renames:
        refuse_renaming_folders(monkeypatch)
    target.mkdir()
    with pytest.raises(FileExistsError):
        move_folder(source, target, "LAST")
    target.rmdir()
    move_folder(source, target, "LAST")
    assert not source.exists()
    assert sorted(str(p.relative_to(target)) for p in target.rglob("*")) == ["LAST", "inner", "inner/a"]


def test_the_completion_marker_of_a_folder_is_moved_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").mkdir()
    for name in ("a", "LAST", "z"):
        (tmp_path / "source" / name).write_text(name)
    refuse_renaming_folders(monkeypatch)
    moved: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    move_folder(tmp_path / "source", tmp_path / "target", "LAST")
    assert moved == ["a", "z", "LAST"]


def test_links_out_of_a_folder_are_refused_and_links_within_it_are_not(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "secret").write_text("x")
    (run / "a").write_text("x")
    (run / "within").symlink_to("a")
    (tmp_path / "other-name").symlink_to(run)
    require_inside(run, run / "a", run / "within", run / "missing")
    require_inside(tmp_path / "other-name", tmp_path / "other-name" / "a")
    for name, target in (("file", "../secret"), ("folder", "../runs"), ("broken", "../none"), ("near", "../run-2")):
        (run / name).symlink_to(target)
        with pytest.raises(UserError, match=name):
            require_inside(run, run / "a", run / name)
    (run / "checkpoints").symlink_to("..")
    with pytest.raises(UserError, match="link out of"):
        require_inside(run, run / "checkpoints" / "secret")


# --- links and permissions -----------------------------------------------------------------------------------


def test_a_path_not_typed_by_the_user_is_not_written_through_a_link(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "secret").write_text("mine")
    (run / "a").symlink_to("../secret")
    (run / "broken").symlink_to("../new")
    (run / "folder").symlink_to("..")
    for path in (run / "a", run / "broken", run / "folder" / "secret"):
        with pytest.raises(UserError, match="link out of"):
            write_text_atomically(path, "x", inside=run)
    write_text_atomically(run / "b", "x", inside=run)
    assert sorted(os.listdir(tmp_path)) == ["run", "secret"]
    assert (tmp_path / "secret").read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "broken link", "pipe", "device"])
def test_appending_refuses_links_and_pipes(kind: str, tmp_path: Path) -> None:
    path, theirs = tmp_path / "metrics.jsonl", tmp_path / "theirs"
    theirs.write_text("mine")
    if kind == "pipe":
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    elif kind == "device":
        path.symlink_to("/dev/null")
    else:
        path.symlink_to("theirs" if kind == "link" else "nowhere")
    with pytest.raises(OSError) as caught:  # noqa: PT011 - what the system says differs
        open_to_append(path)
    assert caught.value.filename == str(path)
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "theirs"]
    assert theirs.read_text() == "mine"
    if kind == "pipe":
        assert os.read(reader, 10) == b""
        os.close(reader)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may give files away")
def test_the_owner_of_a_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    os.chown(path, 1234, 4321)
    path.chmod(0o640)
    write_text_atomically(path, "new")
    status = path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1234, 4321, 0o640)


def test_long_names_are_shortened_and_stay_different() -> None:
    assert short_name("a b") == "a b"
    long = [short_name("é" * 200 + end) for end in "ab"]
    assert long[0] != long[1]
    assert all(len(name.encode()) <= 200 for name in long)


def test_no_line_follows_a_file_written_to_an_open_descriptor(tmp_path: Path) -> None:
    said: list[str] = []
    with open(tmp_path / "page", "wb") as f:
        paths = [Path(f"/dev/fd/{f.fileno()}"), tmp_path / "other"]
        write_outputs([Output(path, lambda path: write_text_atomically(path, "text")) for path in paths], said.append)
    assert (tmp_path / "page").read_text() == "text"
    assert said == [f"written: {tmp_path / 'other'}"]
