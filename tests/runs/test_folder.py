"""Run folders are created once, and reopened only with the same settings and data."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from restomod.config.run import ModelConfig, OptimConfig, RunConfig, SamplingConfig
from restomod.config.serialize import read_config
from restomod.data.dataset import Dataset, TokenStream
from restomod.runs import folder as run_module
from restomod.runs.config_diff import FIXED
from restomod.runs.folder import RunFolder, check_resumable, create_run, environment, reopen_run
from restomod.runs.metrics import SampleRecord, read_jsonl
from restomod.utils import files as files_module
from restomod.utils.errors import UserError
from restomod.utils.files import write_json_atomically
from tests.filesystems import refuse, refuse_renaming_folders

CONFIG = RunConfig(
    steps=100,
    batch_tokens=256,
    sequence_length=16,
    model=ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=16),
    optim=OptimConfig(lr=1e-3, betas=(0.8, 0.9)),
    sampling=SamplingConfig(prompts=("a", "")),
)


def dataset(fingerprint: str = "0123456789abcdef") -> Dataset:
    tokens = TokenStream([np.arange(100, dtype=np.uint16)])
    return Dataset(Path("cache/data"), {"fingerprint": fingerprint, "name": "text"}, tokens, TokenStream([]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A new run folder."""
    return create_run(tmp_path / "runs" / "a", CONFIG, dataset(), {"start": 1}).folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- making one ----------------------------------------------------------------------------------------------


def test_a_new_run_has_its_configuration_data_and_environment(folder: Path) -> None:
    assert read_config(folder) == CONFIG
    assert json.loads((folder / "data.json").read_text()) == {"fingerprint": "0123456789abcdef", "name": "text"}
    assert json.loads((folder / "environment.json").read_text()) == [{"start": 1}]
    assert set(content(folder)) == {"config.json", "data.json", "environment.json"}


def test_an_existing_run_is_not_overwritten(folder: Path) -> None:
    before = content(folder)
    with pytest.raises(UserError, match=r"already exists.*--resume.*--out"):
        create_run(folder, CONFIG, dataset(), {})
    assert content(folder) == before


def test_a_run_killed_during_its_creation_can_be_created_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def killed(path: Path, value: Any) -> None:
        written.append(path.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        write_json_atomically(path, value)

    monkeypatch.setattr(run_module, "write_json_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        create_run(tmp_path / "runs" / "a", CONFIG, dataset(), {"start": 1})
    monkeypatch.undo()
    assert not (tmp_path / "runs" / "a").exists()
    folder = create_run(tmp_path / "runs" / "a", CONFIG, dataset(), {"start": 2}).folder
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["a"]
    assert json.loads((folder / "environment.json").read_text()) == [{"start": 2}]


def test_any_existing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"already exists; choose another folder with --out"):
        create_run(tmp_path, CONFIG, dataset(), {})


def test_a_folder_that_cannot_be_created_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create the run folder"):
        create_run(tmp_path / "file" / "run", CONFIG, dataset(), {})


def test_the_environment_has_versions_and_device() -> None:
    here = environment("a processor", "fp32")
    assert {"restomod", "git_revision", "python", "torch", "platform", "threads", "command", "started"} < here.keys()
    assert (here["device"], here["precision"]) == ("a processor", "fp32")
    json.dumps(here)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV, errno.ENOTSUP])
def test_a_file_system_that_cannot_rename_folders_gets_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    refuse_renaming_folders(monkeypatch, code)
    folder = create_run(tmp_path / "runs" / "a", CONFIG, dataset(), {"start": 1}).folder
    assert read_config(folder) == CONFIG
    assert [path.name for path in folder.parent.iterdir()] == ["a"]
    with pytest.raises(UserError, match="already exists"):
        create_run(folder, CONFIG, dataset(), {})


def test_a_failed_rename_is_reported_and_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_renaming_folders(monkeypatch, errno.EPERM)
    monkeypatch.setattr(files_module.os, "replace", refuse(errno.EROFS))
    monkeypatch.setattr(run_module, "write_json_atomically", lambda path, value: path.write_text(json.dumps(value)))
    with pytest.raises(UserError, match=r"cannot create the run folder .*Read-only file system"):
        create_run(tmp_path / "runs" / "a", CONFIG, dataset(), {"start": 1})
    assert list((tmp_path / "runs").iterdir()) == []


# --- reopening one -------------------------------------------------------------------------------------------

MUST_STAY = {
    "seed": 1,
    "init": "gpt2",
    "batch_tokens": 512,
    "sequence_length": 8,
    "model": dataclasses.replace(CONFIG.model, n_layer=3),
    "optim": dataclasses.replace(CONFIG.optim, lr=2e-3),
    "document_mask": True,
}


def test_every_fixed_setting_is_tested() -> None:
    assert MUST_STAY.keys() == set(FIXED)


@pytest.mark.parametrize(("name", "value"), MUST_STAY.items())
def test_fixed_settings_cannot_change(name: str, value: Any, folder: Path) -> None:
    with pytest.raises(UserError, match=f"cannot change on resume: {name}"):
        check_resumable(folder, dataclasses.replace(CONFIG, **{name: value}), dataset())


def test_other_data_is_refused_by_its_fingerprint(folder: Path) -> None:
    with pytest.raises(UserError, match=r"fingerprint fedcba987654, not 0123456789ab"):
        check_resumable(folder, CONFIG, dataset("fedcba9876543210"))


def test_checking_whether_a_run_can_resume_changes_no_file(folder: Path) -> None:
    before = content(folder)
    check_resumable(folder, dataclasses.replace(CONFIG, steps=200), dataset())
    assert content(folder) == before


@pytest.mark.parametrize("name", ["data.json", "environment.json"])
@pytest.mark.parametrize("content", ["", "garbage", "null"])
def test_a_run_with_a_damaged_record_is_refused(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        check_resumable(folder, CONFIG, dataset())


def test_every_environment_is_recorded(folder: Path) -> None:
    reopen_run(folder, CONFIG, {"start": 2}, 0)
    reopen_run(folder, CONFIG, {"start": 3}, 0)
    starts = json.loads((folder / "environment.json").read_text())
    assert starts == [{"start": 1}, {"start": 2}, {"start": 3}]


# --- its configuration ---------------------------------------------------------------------------------------


def test_a_folder_that_is_not_a_run_is_refused_with_a_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run.*restomod train PRESET"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stesp": 3}, "unknown key stesp; did you mean 'steps'"),
        ({"steps": "many"}, "steps should be int, not 'many'"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"model": {"n_layers": 3}}, "unknown key model.n_layers; did you mean 'n_layer'"),
        ({"optim": {"betas": [0.9]}}, "optim.betas should have 2 values, not 1"),
        ({"sampling": []}, "sampling should be an object"),
        *(({"version": version}, "version is") for version in (1, 3, "2", None, -1)),
    ],
)
def test_a_configuration_with_a_mistake_is_refused_by_file_and_key(
    change: dict[str, Any], message: str, folder: Path
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError) as caught:
        read_config(folder)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("text", ["", '{"steps": 3', "[]", "3"])
def test_a_damaged_configuration_is_named(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(folder)


def paths(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all fields of a JSON object."""
    return [f"{prefix}{key}" for key in values] + [
        path for key, value in values.items() if isinstance(value, dict) for path in paths(value, f"{prefix}{key}.")
    ]


def without(values: dict[str, Any], path: str) -> dict[str, Any]:
    """A JSON object without one of its fields."""
    head, _, rest = path.partition(".")
    if not rest:
        return {key: value for key, value in values.items() if key != head}
    return values | {head: without(values[head], rest)}


def test_a_file_of_this_version_that_lacks_any_field_is_refused_by_name(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    tried = [name for name in paths(values) if name != "version"]
    assert len(tried) > 60
    for name in tried:
        path.write_text(json.dumps(without(values, name)))
        with pytest.raises(UserError, match=rf"config\.json: missing (.*, )?{re.escape(name)}\b"):
            read_config(folder)


# --- its records ---------------------------------------------------------------------------------------------


def test_a_logged_record_is_returned_and_written(folder: Path) -> None:
    before = time.time()
    record = RunFolder(folder, CONFIG).log("train", 3, loss=1.5)
    assert before - 0.001 <= record["time"] <= time.time() + 0.001, "when it was known, in seconds since 1970"
    assert record == {"kind": "train", "step": 3, "loss": 1.5, "time": record["time"]}
    assert read_jsonl(folder / "metrics.jsonl") == [record]


def test_rewinding_deletes_exactly_the_records_after_the_checkpoint(folder: Path) -> None:
    # order of the loop: validation, samples and checkpoint of the weights, then the update
    run = RunFolder(folder, CONFIG)
    for step in range(6):
        run.log("val", step, loss=1.0)
        run.log_sample(step, "prompt", "text")
        run.log("train", step, loss=2.0)
    run.rewind(3)
    metrics = read_jsonl(folder / "metrics.jsonl")
    assert [r["step"] for r in metrics if r["kind"] == "val"] == [0, 1, 2, 3]
    assert [r["step"] for r in metrics if r["kind"] == "train"] == [0, 1, 2]
    assert [r["step"] for r in read_jsonl(folder / "samples.jsonl", SampleRecord)] == [0, 1, 2, 3]


def test_rewinding_a_run_without_records_creates_no_files(folder: Path) -> None:
    before = content(folder)
    RunFolder(folder, CONFIG).rewind(0)
    assert content(folder) == before


def test_without_a_checkpoint_all_records_are_deleted(folder: Path) -> None:
    run = RunFolder(folder, CONFIG)
    run.log("val", 0, loss=1.0)
    run.log("train", 0, loss=2.0)
    run.log_sample(1, "prompt", "text")
    run.rewind(0)
    assert read_jsonl(folder / "metrics.jsonl") == []
    assert read_jsonl(folder / "samples.jsonl") == []


def test_reopening_rewinds_to_the_checkpoint(folder: Path) -> None:
    run = RunFolder(folder, CONFIG)
    for step in range(4):
        run.log("train", step, loss=2.0)
    reopen_run(folder, CONFIG, {}, 2)
    assert [r["step"] for r in read_jsonl(folder / "metrics.jsonl")] == [0, 1]
