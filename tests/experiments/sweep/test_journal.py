"""Tests of damaged journals of sweeps."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from restomod.experiments.sweep.study import Store, SweepPlan
from restomod.utils.errors import UserError

PLAN = SweepPlan("quickstart", (), "grid", ("optim.lr=1e-3,2e-3",), 2, 1, 1337, 0, "none", 0, 4, 4)
Change = Callable[[Any], Any]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Return the journal of a sweep with one finished trial and one that no process trains."""
    store = Store(tmp_path / "sweep", PLAN)
    for loss in (3.5, None):
        claim = store.claim()
        assert claim is not None
        store.begin_attempt(claim)
        if loss is not None:
            store.end_attempt(claim)
            store.report(claim, {2: 4.0})
            store.note(claim, step=4)
            store.finish(claim, "COMPLETE", loss)
        claim.run.release()
        claim.worker.release()
    return tmp_path / "sweep" / "journal.jsonl"


def line_of(lines: list[bytes], part: str) -> int:
    return next(i for i, line in enumerate(lines) if part.encode() in line)


def damage(journal: Path, part: str, change: Callable[[bytes], bytes]) -> int:
    """Change the first line that contains ``part`` and return its number, from 1."""
    lines = journal.read_bytes().splitlines(keepends=True)
    at = line_of(lines, part)
    lines[at] = change(lines[at])
    journal.write_bytes(b"".join(lines))
    return at + 1


def test_a_whole_journal_is_read_again(journal: Path) -> None:
    trials = Store(journal.parent, PLAN).trials()
    assert [(trial.state.name, trial.value, trial.params) for trial in trials] == [
        ("COMPLETE", 3.5, {"optim.lr": "1e-3"}),
        ("RUNNING", None, {"optim.lr": "2e-3"}),
    ]
    assert trials[0].intermediate_values == {2: 4.0}


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line.replace(b":", b"5", 1),
        lambda line: bytes(1000) + line,
        lambda line: b"[" * 100_000 + b"\n",
        lambda line: b"\xff\xfe" + line,
        lambda line: b"{}\n",
        lambda line: b"null\n",
        lambda line: line[:20] + line[:20] + b"\n",
        lambda line: line.replace(b'"op_code":', b'"op_code":' + b"9" * 400, 1),
        lambda line: b'{"op_code":1e400}\n',
        lambda line: json.dumps(json.loads(line) | {"x": "x" * 2**20}).encode() + b"\n",
    ],
)
@pytest.mark.parametrize("part", ['"op_code":0', '"op_code":4', '"op_code":8', '"op_code":6', '"op_code":7'])
def test_a_damaged_line_is_named(journal: Path, part: str, change: Callable[[bytes], bytes]) -> None:
    number = damage(journal, part, change)
    with pytest.raises(UserError, match=rf"journal\.jsonl, line {number} is damaged: ") as caught:
        Store(journal.parent, PLAN)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("create", "user_attrs", {"name": "../../x", "seed": 1}),
        ("create", "user_attrs", {"name": "/etc/x", "seed": 1}),
        ("create", "user_attrs", {"seed": 1}),
        ("create", "user_attrs", {"name": "x", "seed": -1}),
        ("create", "params", {"optim.lr": 7}),
        ("create", "params", {"optim.lr": -1}),
        ("create", "params", {}),
        ("create", "params", {"init": 0}),
        ("create", "distributions", {"optim.lr": "{"}),
        ("create", "distributions", {}),
        ("create", "state", 99),
        ("create", "datetime_start", "yesterday"),
        ("create", "study_id", 1),
        ("attempts", "user_attr", {"attempts": 5}),
        ("attempts", "user_attr", {"attempts": [[-1, None]]}),
        ("attempts", "user_attr", {"attempts": [[1, "x"]]}),
        ("attempts", "trial_id", 5),
        ("attempts", "trial_id", -1),
        ('"op_code":6', "values", [float("nan")]),
        ('"op_code":6', "values", [1.0, 2.0]),
        ('"op_code":6', "state", -1),
        ('"op_code":7', "step", -1),
        ('"op_code":7', "intermediate_value", "x"),
    ],
)
def test_an_invalid_value_is_rejected(journal: Path, part: str, key: str, value: Any) -> None:
    part = '"op_code":4' if part == "create" else part
    number = damage(journal, part, lambda line: json.dumps(json.loads(line) | {key: value}).encode() + b"\n")
    with pytest.raises(UserError, match=rf"journal\.jsonl, line {number} is damaged: "):
        Store(journal.parent, PLAN)


def test_a_missing_or_repeated_creation_of_a_trial_is_rejected(journal: Path) -> None:
    whole = journal.read_bytes()
    begin = whole.splitlines(keepends=True)[line_of(whole.splitlines(), '"op_code":4')]
    for content in (whole.replace(begin, b""), whole + begin, whole[whole.index(b"\n") + 1 :]):
        journal.write_bytes(content)
        with pytest.raises(UserError, match=r"line \d+ is damaged"):
            Store(journal.parent, PLAN)


def test_a_lost_trial_is_not_started_again(journal: Path) -> None:
    (journal.parent / "trials" / "000-optim.lr-1e-3").mkdir()
    journal.write_bytes(journal.read_bytes()[:50])
    with pytest.raises(UserError, match="no trial 000-optim"):
        Store(journal.parent, PLAN)


def test_an_incomplete_last_line_is_removed(journal: Path) -> None:
    journal.write_bytes(journal.read_bytes() + b'{"op_code":8,"wor')
    assert len(Store(journal.parent, PLAN).trials()) == 2


def test_random_damage_raises_no_other_error(journal: Path) -> None:
    whole = journal.read_bytes()
    for seed in range(100):
        generator, content = random.Random(seed), bytearray(whole)
        for _ in range(generator.choice((1, 3))):
            at = generator.randrange(len(content))
            content[at : at + generator.choice((0, 1, 9))] = generator.randbytes(generator.choice((0, 1, 9)))
        journal.write_bytes(content)
        with contextlib.suppress(UserError):
            Store(journal.parent, PLAN).trials()
