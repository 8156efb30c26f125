"""Received runs: links out of the folder, special files, values out of range."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from restomod.cli import main
from restomod.model.hf_format import family_of
from restomod.model.hf_io import read_model_config
from restomod.runs.checkpoint import COMPLETE, newest_usable, require_shape, verify_checkpoint
from restomod.runs.open_model import find_model
from restomod.utils.errors import UserError
from restomod.utils.files import sha256_file
from restomod.utils.run_files import CHECKPOINTS, EVALUATIONS, RUN_FILES
from tests.runs.made_runs import add_error_analysis, add_task, make_run
from tests.trainee import make_trainee, save_checkpoint

SECRET = '{"auths": {"hub": {"auth": "s3cr3t"}}}\n'
IN_CHECKPOINT = ("config.json", "model.safetensors", COMPLETE, "training_state/state.json", "vocab.json")
READERS: tuple[tuple[str, ...], ...] = (
    ("report", "run", "--out", "page.html", "--markdown", "page.md"),
    ("compare", "run", "other"),
    ("verdict", "run"),
    ("train", "--resume", "run"),
)


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def hangs(*_: object) -> None:
        raise AssertionError("it hangs")

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(20)
    yield
    signal.alarm(0)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text(SECRET)
    make_run(tmp_path / "other")
    folder = make_run(tmp_path / "run")
    add_task(folder)
    add_error_analysis(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    trainee = make_trainee()
    trainee.train(0, 2)
    make_run(folder)
    save_checkpoint(folder, 2, trainee.model, trainee.optimizer)
    return folder


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return next((tmp_path / "run" / CHECKPOINTS).iterdir())


def replace(path: Path, target: str) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def refused(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail, and return its error line."""
    assert main([*arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", [*RUN_FILES, CHECKPOINTS, EVALUATIONS, "evals/mine.json", "checkpoints/step_000001"])
def test_links_out_of_a_run_are_refused_by_every_reader(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / name).parent.mkdir(exist_ok=True)
    replace(run / name, os.path.abspath("secret"))
    for arguments in READERS:
        line = refused(arguments, capsys)
        assert str(Path("run", name)) in line
        assert "s3cr3t" not in line
    assert not Path("page.html").exists()


@pytest.mark.parametrize("name", IN_CHECKPOINT)
@pytest.mark.parametrize("in_run", [True, False])
def test_links_out_of_a_checkpoint_are_refused(name: str, in_run: bool, checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoint if in_run else checkpoint.rename(tmp_path / "alone")
    (folder / name).rename(tmp_path / "moved")
    (folder / name).symlink_to(tmp_path / "moved")
    with pytest.raises(UserError, match="link out of"):
        find_model(str(folder))


def test_a_record_of_files_outside_the_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    values = json.loads((checkpoint / COMPLETE).read_text())
    values["files"]["../../../secret"] = {"bytes": len(SECRET), "sha256": sha256_file(tmp_path / "secret")}
    (checkpoint / COMPLETE).write_text(json.dumps(values))
    with pytest.raises(UserError, match="secret"):
        verify_checkpoint(checkpoint)


def test_links_within_a_run_and_a_link_to_a_run_are_read(run: Path) -> None:
    (run / "metrics.jsonl").rename(run / "records.jsonl")
    (run / "metrics.jsonl").symlink_to("records.jsonl")
    Path("link").symlink_to("run")
    assert main(["verdict", "link"]) in (0, 1)
    assert main(["report", "link", "--out", "page.html"]) == 0
    assert "hellaswag" in Path("page.html").read_text()


def test_a_checkpoint_in_the_cache_of_the_hub_is_read(checkpoint: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    for path in [path for path in checkpoint.rglob("*") if path.is_file()]:
        link, blob = snapshot / path.relative_to(checkpoint), blobs / sha256_file(path)
        path.rename(blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert find_model(str(snapshot)) == snapshot


@pytest.mark.parametrize("kind", ["fifo", "folder", "huge"])
@pytest.mark.parametrize("name", ["config.json", "data.json", "metrics.jsonl", *("environment.json", "samples.jsonl")])
def test_special_files_in_a_run_neither_hang_nor_fail(
    name: str, kind: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / name).unlink()
    if kind == "fifo":
        os.mkfifo(run / name)
    elif kind == "folder":
        (run / name).mkdir()
    else:
        with open(run / name, "wb") as f:
            f.truncate(2**40)
    needed = name not in ("environment.json", "samples.jsonl")
    for arguments in READERS if name == "config.json" else READERS[:-1]:  # resuming needs data too
        code = main([*arguments])
        lines = capsys.readouterr().err.splitlines()
        assert (code == 2, len(lines)) == (True, 1) if needed else (code in (0, 1) and len(lines) <= 1)
        assert all(name in line for line in lines)


@pytest.mark.parametrize("name", ["environment.json", "error_analysis.json", "evals/mine.json", "data.json"])
@pytest.mark.parametrize("value", [[1], 5, "x", {"auths": {"hub": "s3cr3t"}}, [{"processes": 0, "device": []}], [[{}]]])
def test_the_page_omits_damaged_optional_files(
    name: str, value: object, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(json.dumps(value))
    for arguments in READERS[:-1]:
        assert main([*arguments]) in ((0, 1, 2) if name == "data.json" else (0, 1))
        assert "Traceback" not in capsys.readouterr().err
    if Path("page.html").exists():
        assert "s3cr3t" not in Path("page.html").read_text() + Path("page.md").read_text()


def changed(value: Any, at: list[str | int], new: Any) -> Any:
    *path, last = at
    inner = value
    for key in path:
        inner = inner[key]
    inner[last] = new
    return value


@pytest.mark.parametrize(
    ("at", "new"),
    [
        (["kinds"], []),
        (["kinds", 0, "name"], 5),
        (["kinds", 0, "share"], 1e400),
        (["kinds", 0], {"nmae": "digits"}),
        (["positions", "x"], [1.0, 2.0, 3.0]),
        (["positions", "y", 0], float("nan")),
        (["best", 0, "tokens"], [["a"]]),
        (["worst", 0, "loss"], None),
        (["step"], -1),
        (["loss"], 10**400),
        (["format"], "restomod-error-analysis-9"),
    ],
)
def test_an_inconsistent_error_analysis_is_omitted_with_a_warning(
    at: list[str | int], new: Any, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "error_analysis.json"
    path.write_text(json.dumps(changed(json.loads(path.read_text()), at, new)))
    assert main(["report", "run", "--out", "page.html", "--markdown", "page.md"]) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert "error_analysis.json" in warning
    assert "the run has no checkpoint yet" in Path("page.md").read_text()


STEPS, OFFSETS = (-1, True, 2**53 + 1, 2.0), (-1, None)
STATES: list[Any] = [{}, [], None, {"run": []}, {"format": 5}, *({"step": step} for step in STEPS)]


@pytest.mark.parametrize("state", [*STATES, *({"data_offset": offset} for offset in OFFSETS)])
def test_a_training_state_out_of_range_is_refused_by_name(state: Any, checkpoint: Path) -> None:
    path = checkpoint / "training_state" / "state.json"
    if state:
        state = json.loads(path.read_text()) | state
    path.write_text(json.dumps(state))
    record_anew(checkpoint)
    with pytest.raises(UserError, match=r"state\.json"):
        find_model(str(checkpoint.parent.parent))
    with pytest.raises(UserError, match=r"state\.json"):
        newest_usable(checkpoint.parent.parent)


def record_anew(folder: Path) -> None:
    """Update the record of a checkpoint after a change, as an attacker would."""
    values = json.loads((folder / COMPLETE).read_text())
    for name, entry in values["files"].items():
        entry |= {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
    (folder / COMPLETE).write_text(json.dumps(values))


@pytest.mark.parametrize(
    "files",
    [5, [], {"model.safetensors": None}, {"model.safetensors": {"bytes": -1, "sha256": ""}}, {"a": {"bytes": 1e400}}],
)
def test_an_inconsistent_checkpoint_record_is_refused_by_name(files: Any, checkpoint: Path) -> None:
    (checkpoint / COMPLETE).write_text(json.dumps({"format": "restomod-checkpoint-1", "files": files}))
    with pytest.raises(UserError, match=COMPLETE):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "training_state/optimizer.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\0" * 7 + b"\x10{}", b"\x02" + b"\0" * 7 + b"[]"])
def test_damaged_tensors_with_a_valid_record_are_refused_by_name(name: str, content: bytes, checkpoint: Path) -> None:
    (checkpoint / name).write_bytes(content)
    record_anew(checkpoint)
    with pytest.raises(UserError, match=name.rpartition("/")[2]):
        newest_usable(checkpoint.parent.parent)


@pytest.mark.parametrize("changes", [{"n_layer": 4096}, {"n_embd": 2**20}, {"vocab_size": 2**26}, {"n_inner": 2**20}])
def test_a_model_is_compared_with_its_tensors_before_allocation(changes: dict[str, int], checkpoint: Path) -> None:
    saved = read_model_config(checkpoint)
    require_shape(checkpoint, saved)
    hostile = dataclasses.replace(saved, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"config\.json"):
        require_shape(checkpoint, hostile)
    (checkpoint / "config.json").write_text(json.dumps(family_of(hostile).to_json(hostile)))
    with pytest.raises(UserError, match=r"model\.safetensors"):
        require_shape(checkpoint, hostile)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KB; 4096 meta layers take 106,000
