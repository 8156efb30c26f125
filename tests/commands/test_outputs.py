"""Every output flag with every kind of destination: only regular files are replaced, and no file is lost."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from restomod.checks.device_parity import random_model
from restomod.cli import main
from restomod.model.hf_io import save_model
from restomod.utils.temporary import NAME
from tests.evals.plainly import SMALL
from tests.runs.made_runs import make_run

FLAGS = {  # output flag -> command line before it, first bytes of the file
    "report --out": (("report", "runs/a"), b"<!doctype html>"),
    "report --markdown": (("report", "runs/a"), b"# a"),
    "compare --json": (("compare", "runs/a", "runs/b"), b"{"),
    "compare --markdown": (("compare", "runs/a", "runs/b"), b""),
    "compare --plot": (("compare", "runs/a", "runs/b"), b"\x89PNG"),
    "verdict --json": (("verdict", "runs/a", "--no-weights"), b"{"),
    "plan --json": (("plan", "quickstart"), b"{"),
    "eval --json": (("eval", "model", "--task", "questions.jsonl", "--device", "cpu"), b"{"),
    "bench --json": (
        (
            *("bench", "step", "quickstart", "--model.n-layer", "1", "--model.n-head", "1", "--model.n-embd", "8"),
            *("--sequence-length", "8", "--batch-tokens", "8", "--micro-batch", "1", "--device", "cpu"),
            *("--precision", "fp32", "--warmup", "0", "--timed", "1"),
        ),
        b"{",
    ),
    "compare-samples --out": (
        ("compare-samples", "model", "model", "--prompt", "a", "--max-tokens", "1", "--device", "cpu"),
        b"# model",
    ),
}
FLAGS["bench --trace"] = FLAGS["bench --json"]


@pytest.fixture(params=FLAGS)
def flag(request: pytest.FixtureRequest) -> str:
    return request.param


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Answer]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, a model and a task, which all tests read."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("a", "b"):
        make_run(folder / "runs" / name)
    (folder / "model").mkdir()
    save_model(random_model(SMALL), folder / "model")
    question = {"query": "One", "choices": ["two", "three"], "gold": 0}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")
    return folder


@pytest.fixture
def command(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Run a command with an output flag; afterwards, check that no temporary file remains."""
    monkeypatch.chdir(made)

    def run(flag: str, path: Path | str) -> Answer:
        before, _ = FLAGS[flag]
        code = main([*before, f"--{flag.partition('--')[2]}", str(path)])
        shown = capsys.readouterr()
        return Answer(0 if (before[0], code) == ("verdict", 1) else code, shown.out, shown.err)  # 1: unhealthy

    yield run
    assert not [path for folder in (made, tmp_path) for path in folder.rglob("*") if NAME.fullmatch(path.name)]


def begins_well(flag: str, content: bytes) -> bool:
    return len(content) > 20 and content.lstrip().startswith(FLAGS[flag][1])


def file_for(flag: str, folder: Path, stem: str = "x") -> Path:
    suffix = {"--plot": ".png", "--out": ".html" if flag.startswith("report") else ".md"}
    return folder / f"{stem}{suffix.get(flag.split()[1], '.json')}"


def node(path: Path, minor: int) -> Path:
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
        with open(path, "wb"):
            pass
    except OSError:
        pytest.skip("device nodes cannot be made here")
    return path


def refused(answer: Answer, *words: str) -> None:
    """Check exit code 2 and a message of one line with these words."""
    assert answer.code == 2
    assert answer.err.startswith("restomod: error: ")
    assert answer.err.count("\n") == 1
    for word in words:
        assert word in answer.err


def computed(answer: Answer, flag: str) -> bool:
    """Return whether the result was printed; `report` prints no result."""
    return flag.startswith("report") or answer.out.count("\n") > 1


def test_a_new_file_may_have_a_long_name_and_has_the_umasks_permissions(
    flag: str, command: Command, tmp_path: Path
) -> None:
    path, before = file_for(flag, tmp_path), os.umask(0o027)
    path = path.with_name(path.name.rjust(255, "y"))
    try:
        answer = command(flag, path)
    finally:
        os.umask(before)
    assert answer.code == 0
    assert f"written: {path}" in answer.out
    assert begins_well(flag, path.read_bytes())
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_device_is_written_to_and_not_replaced(flag: str, command: Command, tmp_path: Path) -> None:
    device = node(tmp_path / "null", 3)
    assert command(flag, device).code == 0
    assert stat.S_ISCHR(os.lstat(device).st_mode)
    assert os.listdir(tmp_path) == ["null"]


def test_a_full_device_is_named_after_the_result_is_printed(flag: str, command: Command, tmp_path: Path) -> None:
    device = node(tmp_path / "full", 7)
    answer = command(flag, device)
    refused(answer, str(device), "No space left on device")
    assert computed(answer, flag)
    assert stat.S_ISCHR(os.lstat(device).st_mode)


def test_a_full_disk_names_the_file_and_keeps_the_old_one(
    flag: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file_for(flag, tmp_path)
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("restomod.utils.files.os.fsync", full)
    answer = command(flag, path)
    refused(answer, str(path), "No space left on device")
    assert computed(answer, flag)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]


def test_a_named_pipe_receives_the_complete_file(flag: str, command: Command, tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    assert command(flag, pipe).code == 0
    reader.join(5)
    assert begins_well(flag, got[0])
    assert stat.S_ISFIFO(os.lstat(pipe).st_mode)


def test_a_named_pipe_without_a_reader_is_an_error(
    flag: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("restomod.utils.files.FIFO_TIMEOUT", 0.15)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    answer = command(flag, pipe)
    waiting, _, error = answer.err.partition("\n")
    assert str(pipe) in waiting
    refused(Answer(answer.code, answer.out, error), str(pipe), "reader")
    assert computed(answer, flag)


def test_links_are_followed_and_permissions_kept(flag: str, command: Command, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    target, link = file_for(flag, tmp_path), file_for(flag, tmp_path / "links")
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    assert command(flag, link).code == 0
    assert begins_well(flag, target.read_bytes())
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert link.is_symlink()


def test_a_broken_link_creates_its_target_if_the_folder_exists(flag: str, command: Command, tmp_path: Path) -> None:
    target, link, lost = (file_for(flag, tmp_path, stem) for stem in ("target", "link", "lost"))
    link.symlink_to(target.name)
    assert command(flag, link).code == 0
    assert begins_well(flag, target.read_bytes())
    assert link.is_symlink()
    lost.symlink_to("nowhere/x.json")
    refused(command(flag, lost), f"--{flag.partition('--')[2]} {lost}", "nowhere")


def test_a_read_only_file_or_folder_is_rejected_before_the_computation(
    flag: str, command: Command, tmp_path: Path
) -> None:
    path = file_for(flag, tmp_path)
    path.write_text("old")
    path.chmod(0o444)
    (tmp_path / "folder").mkdir(mode=0o555)
    for there in (path, file_for(flag, tmp_path / "folder")):
        answer = command(flag, there)
        refused(answer, str(there), "read-only")
        assert answer.out == ""
    assert path.read_text() == "old"


@pytest.mark.parametrize("kind", ["missing folder", "folder", "a file as folder", "name too long", "link to itself"])
def test_an_impossible_path_is_rejected_before_the_computation(
    kind: str, flag: str, command: Command, tmp_path: Path
) -> None:
    path = file_for(flag, tmp_path, "y" * 300 if kind == "name too long" else "x")
    if kind == "missing folder":
        path = tmp_path / "no" / path.name
    elif kind == "folder":
        path.mkdir()
    elif kind == "a file as folder":
        (tmp_path / "file").write_text("")
        path = tmp_path / "file" / path.name
    elif kind == "link to itself":
        path.symlink_to(path.name)
    before = sorted(os.listdir(tmp_path))
    answer = command(flag, path)
    refused(answer, f"--{flag.partition('--')[2]} {path}")
    assert answer.out == ""
    assert sorted(os.listdir(tmp_path)) == before


def test_an_open_file_is_appended_to_and_not_replaced(flag: str, command: Command, tmp_path: Path) -> None:
    with open(tmp_path / "open", "w+b") as f:
        f.write(b"first line\n")
        f.flush()
        inode = os.fstat(f.fileno()).st_ino
        assert command(flag, f"/dev/fd/{f.fileno()}").code == 0
    assert (tmp_path / "open").stat().st_ino == inode
    said, _, content = (tmp_path / "open").read_bytes().partition(b"\n")
    assert said == b"first line"
    assert begins_well(flag, content)
    with open(tmp_path / "open", "rb") as f:
        refused(command(flag, f"/proc/self/fd/{f.fileno()}"), "Bad file descriptor")
    assert os.listdir(tmp_path) == ["open"]


def test_if_one_file_fails_the_others_are_written(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    full = node(tmp_path / "full", 7)
    json_file, markdown, page = tmp_path / "x.json", tmp_path / "x.md", tmp_path / "x.html"
    flags = ["--plot", str(full), "--json", str(json_file), "--markdown", str(markdown)]
    assert main(["compare", "runs/a", "runs/b", *flags]) == 2
    shown = capsys.readouterr()
    assert (f"written: {json_file}" in shown.out, f"written: {markdown}" in shown.out) == (True, True)
    assert shown.err.count("\n") == 1
    assert json.loads(json_file.read_text())
    assert markdown.stat().st_size > 100
    assert main(["report", "runs/a", "--out", str(full), "--markdown", str(page), "--png", str(tmp_path / "p")]) == 2
    assert page.stat().st_size > 100
    assert (tmp_path / "p" / "loss.png").stat().st_size > 1000


def test_plots_stay_in_their_folder_and_long_names_are_shortened(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / ("r" * 255))
    for name in ("u" * 300, "é" * 150):
        with open(run / "metrics.jsonl", "a") as f:
            f.write(json.dumps({"kind": "task", "step": 40, "task": name, "acc": 0.5, "examples": 4}) + "\n")
    assert main(["report", run.name, "--png", "p"]) == 0
    assert len([path for path in (tmp_path / "p").iterdir() if path.name[0] in "ué"]) == 2
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "p" / "loss.png").unlink()
    (tmp_path / "p" / "loss.png").symlink_to("../secret")
    assert main(["report", run.name, "--png", "p"]) == 2
    assert "loss.png is a link out of" in capsys.readouterr().err
    assert (tmp_path / "secret").read_text() == "mine"


@pytest.mark.parametrize("flag", ["--png", "--plots"])
def test_a_folder_for_plots_is_checked_before_the_computation(
    flag: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    before = ["report", "runs/a", "--out", str(tmp_path / "r.html")] if flag == "--png" else ["inspect", "model"]
    (tmp_path / "closed").mkdir(mode=0o555)
    (tmp_path / "file").write_text("")
    for there in ("closed", "closed/new", "file", "file/new", "y" * 300):
        assert main([*before, flag, str(tmp_path / there)]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert f"{flag} {tmp_path / there}" in shown.err
    assert sorted(os.listdir(tmp_path)) == ["closed", "file"]
    assert main([*before, flag, str(tmp_path / "new" / "deep")]) == 0
    assert list((tmp_path / "new" / "deep").glob("*.png"))


def test_the_default_page_is_not_written_through_a_link_out_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / ".bashrc").write_text("mine")
    (run / "report.html").symlink_to("../.bashrc")
    assert main(["report", str(run)]) == 2
    assert "is a link out of" in capsys.readouterr().err
    assert (tmp_path / ".bashrc").read_text() == "mine"
    assert main(["report", str(run), "--out", str(run / "report.html")]) == 0  # an explicit path is followed
    assert (tmp_path / ".bashrc").read_text() != "mine"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["train", "--help"], ["report", "x"], ["plan", "quickstart"], []]
)
def test_a_deleted_working_folder_is_a_one_line_error(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code = main(arguments)
    monkeypatch.chdir(tmp_path)
    refused(Answer(code, *capsys.readouterr()), "working directory")
