"""Reading of run folders in any state."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from restomod.cli import main
from restomod.config.presets import preset
from restomod.model.flops import flops_per_token, parameter_count
from restomod.runs import reader
from restomod.runs.reader import newest_checkpoint, open_run
from restomod.utils.errors import UserError
from tests.runs.made_runs import SMALL, train, val, write_run


def test_steps_are_sorted_and_unique_with_their_last_record(tmp_path: Path) -> None:
    records = [train(0, 9.0), train(1, 8.0), train(2, 7.0), {"kind": "rollback", "step": 1}, train(1, 6.0), val(1, 5.0)]
    run = open_run(write_run(tmp_path / "a", SMALL, records))
    assert [(r["step"], r["loss"]) for r in run.train] == [(0, 9.0), (1, 6.0), (2, 7.0)]
    assert [(r["step"], r["loss"]) for r in run.val] == [(1, 5.0)]
    assert run.updates == 3


@pytest.mark.parametrize("command", [["verdict", "--no-weights"], ["compare"], ["report"]])
def test_damaged_lines_are_reported(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a", SMALL, [train(0, 9.0), train(1, 8.0), val(2, 8.0)])
    log = folder / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    for content, told in ((lines, False), ([lines[0], b"\xff{\n", *lines[1:]], True)):
        log.write_bytes(b"".join(content))
        assert main([command[0], str(folder), *command[1:]]) in (0, 1)
        assert (f"{log}: 1 of {len(lines) + 1} lines cannot be read" in capsys.readouterr().err) == told


def test_tokens_and_flops_of_gpt2_124m(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "a", preset("gpt2-124m")))
    assert run.tokens_at(19_073) == 19_073 * 524_288
    # 6 * (85,056,000 in the blocks and the last norm + 768 * 50257 of the head) + 12 * 12 * 768 * 1024 of attention
    assert run.flops_at(1) == 524_288 * (6 * (85_056_000 + 768 * 50_257) + 12 * 12 * 768 * 1024)


def test_a_new_run_has_no_records(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    (folder / "metrics.jsonl").unlink()
    run = open_run(folder)
    assert (run.train, run.val, run.samples, run.evaluations, run.environments, run.updates) == ([], [], [], [], [], 0)


def test_the_newest_checkpoint_has_the_last_step(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for name in ("step_9", "step_10", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == "step_10"
    (tmp_path / "unreadable").mkdir()
    (tmp_path / "unreadable" / "checkpoints").touch()
    assert newest_checkpoint(tmp_path / "unreadable") is None


def test_an_incomplete_last_line_is_skipped(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", SMALL, [train(0, 9.0)])
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"kind": "train", "step": 1, "lo')
    assert [r["step"] for r in open_run(folder).train] == [0]


def test_the_name_of_a_run_does_not_depend_on_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_run(tmp_path / "a"))
    assert open_run(".").name == "a"


def test_evaluations_samples_and_environments_are_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", SMALL, [], environments=[{"device": "x"}, {"device": "y"}])
    (folder / "samples.jsonl").write_text(json.dumps({"step": 3, "prompt": "p", "text": "t"}) + "\n")
    (folder / "evals").mkdir()
    (folder / "evals" / "b.json").write_text('{"task": "b"}')
    (folder / "evals" / "a.json").write_text('{"task": "a"}')
    (folder / "evals" / "list.json").write_text("[]")
    run = open_run(folder)
    assert [e["device"] for e in run.environments] == ["x", "y"]
    assert run.samples == [{"step": 3, "prompt": "p", "text": "t"}]
    assert [e["task"] for e in run.evaluations] == ["a", "b"]


def test_parameters_and_flops_are_recorded_or_computed(tmp_path: Path) -> None:
    recorded = open_run(write_run(tmp_path / "a", SMALL, environments=[{"parameters": 5, "flops_per_token": 7}, {}]))
    assert (recorded.parameters, recorded.flops_at(2)) == (5, 2 * SMALL.batch_tokens * 7)
    computed = open_run(write_run(tmp_path / "b", SMALL, environments=[{}]))
    assert computed.parameters == parameter_count(SMALL.model)
    assert computed.flops_per_token == flops_per_token(SMALL.model, SMALL.sequence_length)


def test_the_number_of_evaluations_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, said = write_run(tmp_path / "a"), list[str]()
    (folder / "evals").mkdir()
    for name in "abcd":
        (folder / "evals" / f"{name}.json").write_text(json.dumps({"task": name}))
    monkeypatch.setattr(reader, "MAX_EVALUATIONS", 3)
    assert [e["task"] for e in open_run(folder, said.append).evaluations] == ["b", "c", "d"]
    assert len(said) == 1
    assert "the last 3 of 4 evaluations" in said[0]


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such run"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is not a run: it has no config.json"):
        open_run(tmp_path)
    folder = write_run(tmp_path / "a")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is damaged"):
        open_run(folder)


@pytest.mark.parametrize("command", [["compare"], ["verdict", "--no-weights"]])
def test_reading_and_judging_a_run_needs_no_torch(command: list[str], tmp_path: Path) -> None:
    recorded = {"parameters": 5, "flops_per_token": 7}
    write_run(tmp_path / "a", SMALL, [train(0, 9.0), val(0, 9.0)], environments=[recorded])
    code = (
        f"import sys; from restomod.cli import main; main({[*command, 'a']!r}); "
        f"assert not set(sys.modules) & {{'torch', 'matplotlib'}}, 'torch or matplotlib was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [["report"], ["compare"], ["verdict"], ["watch"], ["train", "--resume"]])
@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("r/checkpoints/step_000040", "r/checkpoints/step_000040 is a folder inside a run; name the run instead: r"),
        ("r/checkpoints", "r/checkpoints is a folder inside a run; name the run instead: r"),
        ("model", "model is a model folder, not a run"),
        ("untyped", "untyped is a model folder, not a run"),
        ("r/config.json", "r/config.json is a file; name the folder of a run"),
    ],
)
def test_parts_of_runs_and_models_are_refused_with_the_name_of_the_run(
    command: list[str],
    folder: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tmp_path / "r")
    model = {"model_type": "gpt2", "architectures": []}
    for name in ("r/checkpoints/step_000040", "model", "untyped"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(model))
    (tmp_path / "untyped" / "config.json").write_text('{"architectures": ["X"], "n_embd": 8}')
    monkeypatch.chdir(tmp_path)
    assert main([*command, folder]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_run_is_named_like_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "r")
    (tmp_path / "r" / "checkpoints").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name, run in ((tmp_path / "r/checkpoints", tmp_path / "r"), (Path("../r/checkpoints"), "../r")):
        with pytest.raises(UserError, match=rf": {run}$"):
            open_run(name)
