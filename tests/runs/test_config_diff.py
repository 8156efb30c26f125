"""Differences between settings, and settings without effect on results."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from restomod.analysis.compare.tables import why_not_published
from restomod.config.run import DataConfig, RunConfig
from restomod.runs.config_diff import NO_EFFECT_ON_RESULT, differing, flatten_config, settings, trains_on_fineweb_edu
from restomod.runs.reader import open_run
from tests.end_to_end.test_resume_changed import CHANGED
from tests.runs.made_runs import SMALL, write_run
from tests.runs.test_folder import CONFIG as ANY

OF_TOKENS = {"fingerprint": "0123456789ab", "name": "text"}


def test_only_differences_are_listed() -> None:
    other = dataclasses.replace(SMALL, seed=7, optim=dataclasses.replace(SMALL.optim, lr=1e-3, betas=(0.9, 0.99)))
    assert differing([flatten_config(SMALL), flatten_config(other), flatten_config(SMALL)], without=("seed",)) == {
        "optim.lr": [2e-3, 1e-3, 2e-3],
        "optim.betas": [[0.9, 0.95], [0.9, 0.99], [0.9, 0.95]],
    }


@pytest.mark.parametrize("name", [n for n in NO_EFFECT_ON_RESULT if "." not in n])
def test_settings_without_effect_are_ignored(name: str) -> None:
    assert name in {field.name for field in dataclasses.fields(RunConfig)}
    changed = CHANGED | {"eval_tasks": {"eval_tasks": ("hellaswag",)}, "sanity_checks": {"sanity_checks": False}}
    other = dataclasses.replace(ANY, **changed[name])
    assert other != ANY
    assert differing([flatten_config(ANY), flatten_config(other)]) == {}


def test_data_is_identified_by_its_tokens_not_its_path(tmp_path: Path) -> None:
    moved = dataclasses.replace(SMALL, data=DataConfig(source="text", path="elsewhere"))
    a = open_run(write_run(tmp_path / "a", SMALL, data=OF_TOKENS))
    b = open_run(write_run(tmp_path / "b", moved, data=OF_TOKENS))
    c = open_run(write_run(tmp_path / "c", SMALL, data=OF_TOKENS | {"fingerprint": "ffff"}))
    assert differing([settings(a), settings(b)]) == {}
    assert differing([settings(a), settings(c)]) == {"data": ["text (01234567)", "text (ffff)"]}


def test_the_precision_chosen_by_auto_is_a_difference(tmp_path: Path) -> None:
    a = open_run(write_run(tmp_path / "a", environments=[{"precision": "fp32"}]))
    b = open_run(write_run(tmp_path / "b", environments=[{"precision": "fp32"}, {"precision": "bf16"}]))
    assert differing([settings(a), settings(b)]) == {"precision": ["fp32", "bf16"]}


@pytest.mark.parametrize(
    ("name", "path", "is_it"),
    [
        ("fineweb-edu", "t", True),
        ("finewebedu10B-gpt2", "t", True),
        ("edu_fineweb10B", "data/edu_fineweb10B", True),
        ("fineweb", "t", False),
        ("books", "education", False),
        ("text", "fineweb-edu/notes.txt", False),
        ("fineweb-edu+notes.txt", "fineweb-edu+notes", False),
    ],
)
def test_fineweb_edu_is_recognised_by_the_name_of_its_tokens(name: str, path: str, is_it: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, data=DataConfig(source="tokens", path=path))
    plan = {"units": [{"source": name, "files": [path]}]}
    run = open_run(write_run(tmp_path / "a", config, data={"name": name, "plan": plan}))
    assert trains_on_fineweb_edu(run) is is_it
    assert ("FineWeb-Edu" in str(why_not_published([run]))) is not is_it
