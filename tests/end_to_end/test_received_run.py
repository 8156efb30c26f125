"""A received run folder: links in it do not cause writes outside of it."""

from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path

import pytest

from restomod.analysis.report.error_analysis import analyse_errors
from restomod.config.run import RunConfig
from restomod.data.prepare.text_cache import prepare_text
from restomod.runs.folder import RunFolder, reopen_run
from restomod.runs.reader import open_run
from restomod.runs.run_lock import RunLock
from restomod.runs.trackers import Trackers
from restomod.train.loop import train
from restomod.utils.console import Display
from restomod.utils.errors import UserError
from tests.runs.made_runs import make_run
from tests.trainee import make_trainee, save_checkpoint

SECRET = "a line of ~/.bashrc\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "theirs").mkdir()
    return make_run(tmp_path / "run")


@pytest.fixture(autouse=True)
def nothing_outside_is_touched(run: Path, tmp_path: Path) -> object:
    yield
    assert (tmp_path / "secret").read_text() == SECRET
    assert os.listdir(tmp_path / "theirs") == []
    assert not (tmp_path / "new").exists()


def put_link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("target", ["../secret", "../new"])
def test_the_lock(target: str, run: Path) -> None:
    put_link(run / ".lock", target)
    with pytest.raises(UserError, match=r"\.lock is a link"):
        RunLock(run).take(resume=True)


@pytest.mark.parametrize("name", ["environment.json", "config.json", "metrics.jsonl", "samples.jsonl"])
def test_what_a_resumption_writes(name: str, run: Path) -> None:
    config = open_run(str(run)).config
    content = (run / name).read_text()
    put_link(run / name, "../elsewhere")
    (run.parent / "elsewhere").write_text(content)
    with pytest.raises(UserError, match=f"{name} is a link out of"):
        reopen_run(run, config, {}, 20)
    assert (run.parent / "elsewhere").read_text() == content


@pytest.mark.parametrize("target", ["../secret", "../new"])
def test_what_a_run_appends(target: str, run: Path) -> None:
    mine = RunFolder(run, open_run(str(run)).config)
    put_link(run / "metrics.jsonl", target)  # created later, because a run with such a link is not opened
    mine.log("train", 1, loss=1.0)
    assert isinstance(mine.write_records(), OSError)


@pytest.mark.parametrize(("name", "target"), [("track.json", "../new"), ("tensorboard", "../theirs")])
def test_trackers(name: str, target: str, run: Path) -> None:
    said: list[str] = []
    config = dataclasses.replace(open_run(str(run)).config, track=("tensorboard",))
    put_link(run / name, target)
    with Trackers(run, config, said.append):
        pass
    assert "trackers are disabled" in said[0]


@pytest.mark.parametrize("link", [".step_000004.tmp", ".step_000004.old.tmp", ".restomod.0123456789abcdef.tmp"])
def test_a_checkpoint_is_saved_past_links(link: str, tmp_path: Path) -> None:
    trainee = make_trainee()
    trainee.train(0, 4)
    (tmp_path / "run" / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "run" / "config.json").unlink()
    put_link(tmp_path / "run" / "checkpoints" / link, "../../theirs")
    folder = save_checkpoint(tmp_path / "run", 4, trainee.model, trainee.optimizer)
    assert folder.is_dir()
    assert not folder.is_symlink()


def test_no_checkpoint_is_saved_out_of_the_run(tmp_path: Path) -> None:
    put_link(tmp_path / "run" / "checkpoints", "../theirs")
    trainee = make_trainee()
    with pytest.raises(UserError, match="checkpoints is a link out of"):
        save_checkpoint(tmp_path / "run", 0, trainee.model, trainee.optimizer)


def test_all_of_a_run_has_the_umasks_permissions_and_an_error_analysis_stays_in_it(
    tiny: RunConfig, tmp_path: Path
) -> None:
    prepare_text(tiny.data)
    before = os.umask(0o027)
    try:
        assert train(tiny, tmp_path / "mine", display=Display(muted=True)) == 0
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "mine", *(tmp_path / "mine").rglob("*")]}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o640}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o750}
    assert any(path.name == "model.safetensors" for path in modes)
    assert any(path.name == "optimizer.safetensors" for path in modes)

    said: list[str] = []
    opened = open_run(str(tmp_path / "mine"))
    put_link(tmp_path / "mine" / "error_analysis.json", "../new")
    analyse_errors(opened, 100, say=said.append)
    assert "link out of" in said[-1]
