"""`restomod eval` on a run, a model folder and several ranks; tasks scored during training."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from restomod.checks.device_parity import random_model
from restomod.cli import main
from restomod.config.run import RunConfig
from restomod.config.serialize import read_config
from restomod.data.prepare.text_cache import prepare_text
from restomod.data.tokenizer import Tokenizer
from restomod.evals.scoring import ACCURACIES
from restomod.evals.suite import EvalRequest, evaluate_model, run_eval
from restomod.evals.tasks.registry import TASKS, VALIDATION, references
from restomod.evals.tasks.task import Example, Record, Reference, Task, get_index, get_text, question
from restomod.model.hf_io import save_model
from restomod.runs.metrics import read_jsonl
from restomod.train.loop import train
from restomod.utils.console import Display
from restomod.utils.errors import UserError
from tests.evals.plainly import SMALL, plain_score
from tests.processes import results

QUIET = Display(muted=True)


@pytest.fixture
def run(tiny: RunConfig, questions: Path, tmp_path: Path) -> Path:
    config = dataclasses.replace(tiny, eval_tasks=(str(questions),), eval_limit=3)
    assert train(config, tmp_path / "run", display=QUIET) == 0
    return tmp_path / "run"


def evaluate(
    name: str, *tasks: str, display: Display | None = None, json_file: Path | None = None, **settings: Any
) -> int:
    return run_eval(EvalRequest(name, tasks, device="cpu", precision="fp32", **settings), json_file, display)


def tasks(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_jsonl(run / "metrics.jsonl") if record["kind"] == "task"]


def accuracy(folder: Path, questions: Path, tokenizer: Tokenizer, n: int, window: int) -> tuple[float, list[int]]:
    """Return accuracy and choices of the first questions by summed log-probability, computed by `transformers`."""
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    records = [json.loads(line) for line in questions.read_text().splitlines()][:n]
    choices = []
    for record in records:
        context = tokenizer.encode(record["query"].rstrip()).tolist()
        space = " " * (len(record["query"]) - len(record["query"].rstrip()))
        endings = [tokenizer.encode(f"{space} {choice}").tolist() for choice in record["choices"]]
        scores = [plain_score(model, context[-(window + 1 - len(end)) :], end)[0] for end in endings]
        choices.append(scores.index(max(scores)))
    return sum(c == r["gold"] for c, r in zip(choices, records, strict=True)) / n, choices


def test_tasks_are_scored_at_every_validation(run: Path, questions: Path, tokenizer: Tokenizer) -> None:
    assert [(record["step"], record["task"], record["examples"]) for record in tasks(run)] == [
        (step, "questions", 3) for step in (0, 5, 10, 12)
    ]
    expected, _ = accuracy(run / "checkpoints" / "step_000012", questions, tokenizer, 3, window=32)
    last = tasks(run)[-1]
    assert last["acc"] == pytest.approx(expected)
    assert last["acc_stderr"] == pytest.approx(math.sqrt(expected * (1 - expected) / 2))
    assert set(ACCURACIES) < last.keys()


def test_a_resumed_run_scores_the_same_tasks(tiny: RunConfig, questions: Path, tmp_path: Path) -> None:
    asking = dataclasses.replace(tiny, eval_tasks=(f"hellaswag={tmp_path}/none", str(questions)))
    from restomod.utils.errors import UserError

    with pytest.raises(UserError, match="none: no such file"):
        train(asking, tmp_path / "run", display=QUIET)
    assert not (tmp_path / "run").exists()
    asking = dataclasses.replace(tiny, eval_tasks=(str(questions),), steps=10)
    train(asking, tmp_path / "run", display=QUIET)
    again = dataclasses.replace(read_config(tmp_path / "run"), steps=12)
    train(again, tmp_path / "run", resume=True, display=QUIET)
    assert [record["step"] for record in tasks(tmp_path / "run")] == [0, 5, 10, 12]


def test_a_runs_results_are_written_into_it(
    run: Path, questions: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(str(run), VALIDATION, str(questions)) == 0
    shown = capsys.readouterr().out
    assert sorted(path.name for path in (run / "evals").iterdir()) == [
        "step_000012-questions.json",
        "step_000012-validation.json",
        "step_000012-validation.png",
    ]
    result = json.loads((run / "evals" / "step_000012-questions.json").read_text())
    expected, choices = accuracy(run / "checkpoints" / "step_000012", questions, tokenizer, 5, window=32)
    assert result["metrics"]["acc"]["value"] == pytest.approx(expected)
    assert result["choices"]["acc"] == choices
    assert (result["examples"], result["truncated"], result["step"]) == (5, 1, 12)
    assert result["environment"]["precision"] == "fp32"
    assert "warning: questions: 1 of 5 examples are longer than the context length of 32 tokens" in shown
    validation = json.loads((run / "evals" / "step_000012-validation.json").read_text())
    last = [record for record in read_jsonl(run / "metrics.jsonl") if record["kind"] == "val"][-1]
    assert validation["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert f"{validation['loss']:.4f}" in shown
    assert "3.292" not in shown, "GPT-2's loss is one of FineWeb-Edu"
    assert validation["data"]["fingerprint"] == json.loads((run / "data.json").read_text())["fingerprint"]


def test_file_names_distinguish_checkpoints_and_limits(run: Path, questions: Path) -> None:
    evaluate(str(run), str(questions), limit=2, display=QUIET)
    evaluate(str(run / "checkpoints" / "step_000008"), str(questions), display=QUIET)
    found = sorted(path.name for path in (run / "evals").iterdir())
    assert found == ["step_000008-questions.json", "step_000012-questions-first2.json"]


def test_the_context_can_be_chosen(run: Path, tiny: RunConfig) -> None:
    evaluate(str(run), VALIDATION, context=5, display=QUIET)
    found = json.loads((run / "evals" / "step_000012-validation.json").read_text())
    model = GPT2LMHeadModel.from_pretrained(run / "checkpoints" / "step_000012").eval()
    stream = prepare_text(tiny.data).val
    text = stream.read(0, len(stream)).tolist()
    scores = [plain_score(model, text[at : at + 1], text[at + 1 : at + 6])[0] for at in range(0, len(text) - 1, 5)]
    assert found["tokens"] == len(text) - 1
    assert found["loss"] == pytest.approx(-sum(scores) / found["tokens"], rel=1e-5)
    assert len(found["by_position"]) == 5
    first = [plain_score(model, text[at : at + 1], text[at + 1 : at + 2])[0] for at in range(0, len(text) - 1, 5)]
    assert found["by_position"][0] == pytest.approx(-sum(first) / len(first), rel=1e-5)


def evaluate_quietly(run: str, tasks: list[str], file: Path) -> int:
    return evaluate(run, *tasks, json_file=file, display=QUIET)


def test_two_ranks_write_the_same_results(run: Path, questions: Path, tmp_path: Path) -> None:
    wanted = [VALIDATION, str(questions)]
    evaluate_quietly(str(run), wanted, tmp_path / "one.json")
    assert results(2, evaluate_quietly, str(run), wanted, tmp_path / "two.json") == [0, 0]
    one, two = (json.loads((tmp_path / name).read_text())["results"] for name in ("one.json", "two.json"))
    for result in (*one.values(), *two.values()):
        result.pop("seconds", None)
    assert one == two


def test_results_are_collected_before_output(
    run: Path, questions: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    results = evaluate_model(EvalRequest(str(run), (VALIDATION, str(questions)), limit=4, device="cpu"))
    assert capsys.readouterr() == ("", "")
    assert not (run / "evals").exists()
    expected, _ = accuracy(run / "checkpoints" / "step_000012", questions, tokenizer, 4, window=32)
    assert results["questions"].metrics["acc"].value == pytest.approx(expected)
    assert results[VALIDATION].values["loss"] == results[VALIDATION].metrics["loss"].value


# --- a new task ----------------------------------------------------------------------------------------------


@pytest.fixture
def truth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Register a new `Task` by name and return a file of its records."""

    def example(record: Record) -> Example:
        return question(get_text(record, "claim"), ("no", "yes"), get_index(record, "answer"))

    published = (Reference("oracle", "acc", 0.9876, "made up"),)
    task = Task("truth", "a claim, yes or no", example, "acc", size=3, chance=0.5, references=published)
    monkeypatch.setitem(TASKS, "truth", task)
    path = tmp_path / "claims.jsonl"
    path.write_text("".join(json.dumps({"claim": f"Claim {i}:", "answer": i % 2}) + "\n" for i in range(3)))
    return path


def test_a_new_task_works_in_training_eval_and_reports(
    truth: Path, tiny: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(dataclasses.replace(tiny, eval_tasks=(f"truth={truth}",)), run, display=QUIET) == 0
    assert [(record["task"], record["examples"]) for record in tasks(run)] == [("truth", 3)] * 4
    assert main(["eval", str(run), "--tasks", f"truth={truth}", "--device", "cpu"]) == 0
    assert "0.9876" in capsys.readouterr().out
    assert (
        main(["report", str(run), "--out", str(tmp_path / "page.html"), "--markdown", str(tmp_path / "page.md")]) == 0
    )
    page = (tmp_path / "page.md").read_text()
    assert "truth, acc" in page
    assert "0.9876" in page


def test_every_task_is_named_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--help"]) == 0
    shown = "".join(capsys.readouterr().out.replace("│", "").split())
    assert all(name in shown for name in (VALIDATION, *TASKS))


# --- results that cannot be kept -----------------------------------------------------------------------------


def test_results_that_cannot_be_written_are_printed(
    run: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "evals").write_text("not a folder")
    assert evaluate(str(run), VALIDATION, str(questions)) == 0
    out = capsys.readouterr().out
    assert out.index("perplexity") < out.index("warning: ")
    assert "acc_norm" in out
    assert out.count("step_000012-questions.json is not written: ") == 1
    assert "Traceback" not in out


def test_a_read_only_run_is_a_warning_before_the_work(
    run: Path, questions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != run)
    before = sorted(run.rglob("*"))
    assert evaluate(str(run), str(questions)) == 0
    out = capsys.readouterr().out
    assert out.index("not writable, so results are only printed") < out.index("acc_norm")
    assert sorted(run.rglob("*")) == before


def test_a_full_disk_loses_no_result(
    run: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("restomod.utils.files.os.fsync", full)
    file = tmp_path / "out.json"
    assert main(["eval", str(run), "--task", str(questions), "--tasks", "validation", "--json", str(file)]) == 2
    captured = capsys.readouterr()
    assert "perplexity" in captured.out
    assert "acc_norm" in captured.out
    assert captured.out.count("No space left on device") == 3  # for both results and the picture
    assert captured.err.count("\n") == 1
    assert f"{file} cannot be written (No space left on device)" in captured.err


def test_a_result_is_written_before_the_next_task(run: Path, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("restomod.evals.suite.score_task", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(str(run), VALIDATION, str(questions), display=QUIET)
    assert (run / "evals" / "step_000012-validation.json").exists()


def test_a_loss_on_other_data_does_not_replace_the_runs_loss(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Published losses are shown next to losses on FineWeb-Edu only."""
    (tmp_path / "other.txt").write_text("one two three four " * 3000)
    assert main(["prepare", str(tmp_path / "other.txt"), "--out", str(tmp_path / "tokens"), "--workers", "1"]) == 0
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    for name, is_it in (("other.txt", False), ("fineweb-edu", True), ("fineweb-edu+other.txt", False)):
        (tmp_path / "tokens" / "manifest.json").write_text(json.dumps(manifest | {"name": name}))
        capsys.readouterr()
        assert main(["eval", str(run), "--tasks", "validation", "--data", str(tmp_path / "tokens")]) == 0
        assert ("3.292" in capsys.readouterr().out) is is_it
    (found,) = (run / "evals").glob("*.json")
    assert found.name == f"step_000012-validation-of-{manifest['fingerprint'][:8]}.json"
    assert json.loads(found.read_text())["data"]["fingerprint"] == manifest["fingerprint"]


# --- the command line ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder without a run, in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model"
    path.mkdir()
    save_model(random_model(SMALL), path)
    return path


def test_a_model_folder_is_evaluated_and_not_changed(
    folder: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    assert main(["eval", "model", "--task", "questions.jsonl", "--json", "out.json", "--device", "cpu"]) == 0
    assert sorted(folder.rglob("*")) == before
    result = json.loads(Path("out.json").read_text())["results"]["questions"]
    assert (result["examples"], result["truncated"]) == (5, 0)
    shown = capsys.readouterr().out
    for name in ("acc", "acc_norm", "acc_token"):
        estimate = result["metrics"][name]
        assert f"{estimate['value']:.4f} ± {estimate['stderr']:.4f}" in shown


def test_a_model_whose_logits_are_not_finite_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model(SMALL)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1e38)
        model.transformer.wte.weight.mul_(1e38)
    save_model(model, folder)
    Path("other.txt").write_text("one two three four " * 3000)
    assert main(["prepare", "other.txt", "--out", "tokens", "--workers", "1"]) == 0
    command = ["eval", "model", "--tasks", "validation", "--data", "tokens", "--device", "cpu", "--json", "out.json"]
    assert main(command) == 2
    assert "validation: the model's output is not finite" in capsys.readouterr().err
    assert not Path("out.json").exists()


def swags(n: int) -> str:
    record = {"activity_label": "a", "ctx": "A man", "endings": ["sits.", "flies.", "is.", "was."], "label": 0}
    return (json.dumps(record) + "\n") * n


def test_published_numbers_are_shown_for_whole_tasks_only(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """HellaSwag has 10,042 examples; duplicates are computed once."""
    (tmp_path / "swag.jsonl").write_text(swags(10_042))
    assert main(["eval", "model", "--tasks", "hellaswag=swag.jsonl"]) == 0
    rows = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert "0.2955" in rows["GPT-2 124M"]
    assert "0.337" in rows["GPT-3 125M"]
    assert "0.3089" in rows["reproduction, lr 1.2e-3"]
    assert "all" in rows["model"]
    for n, limit in ((10_042, ["--limit", "2"]), (3, [])):
        (tmp_path / "swag.jsonl").write_text(swags(n))
        assert main(["eval", "model", "--tasks", "hellaswag=swag.jsonl", *limit]) == 0
        shown = capsys.readouterr().out
        assert "GPT-2 124M" not in shown
        assert "they were measured on all 10,042 examples" in shown


def test_a_users_file_is_not_the_task_of_its_name(folder: Path, tmp_path: Path) -> None:
    question = {"query": "Hot and", "choices": ["cold", "warm"], "gold": 0}
    (tmp_path / "hellaswag.jsonl").write_text(json.dumps(question) + "\n")
    assert main(["eval", "model", "--task", "hellaswag.jsonl", "--json", "out.json"]) == 0
    assert set(json.loads(Path("out.json").read_text())["results"]) == {"own-hellaswag"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "helaswag"], "unknown task 'helaswag'; did you mean 'hellaswag'?"),
        (
            ["--tasks", "validation"],
            "model is not a checkpoint of a run, so its data is unknown; name token shards with",
        ),
        (["--tasks", "validation", "--data", "nowhere"], "nowhere: no such folder of token shards"),
        (["--task", "none.jsonl"], "none.jsonl: no such file"),
        (["--task", "questions.jsonl", "--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--task", "questions.jsonl", "--batch", "-1"], "--batch is -1; it must be at least 1"),
        (["--task", "questions.jsonl", "--json", "no/out.json"], "no/out.json: there is no folder no"),
        (["--task", "bad.jsonl"], "bad.jsonl, line 1: not JSON"),
        (["--tsks", "hellaswag"], "did you mean --task"),
        (["--task", "questions.jsonl", "--data", "nope"], "--data needs the validation loss: add validation to"),
        (
            ["--task", "questions.jsonl", "--context", "5"],
            "--context needs the validation loss: add validation to --tasks",
        ),
        (["--tasks", "validation", "--data", "x", "--limit", "5"], "--limit applies to the examples of tasks"),
        (["--task", ""], "--task is empty"),
        (["--task", "questions.jsonl", "--json", ""], "--json is empty"),
        (["--task", "questions.jsonl", "--json", "questions.jsonl"], "questions.jsonl; name two different files"),
        (["--task", "questions.jsonl", "--json", "model/config.json"], "would overwrite a file"),
        (["--tasks", "questions.jsonl", "--task", "questions.jsonl"], "two tasks have the name questions"),
        (["--limit", "x"], "--limit: 'x' is not an integer"),
        (["--context", "1.5"], "--context: '1.5' is not an integer"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], said: str, folder: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.jsonl").write_text("no\n")
    assert main(["eval", "model", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("restomod: error: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_context_beyond_the_positions_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--tasks", "validation", "--context", "33"]) == 2
    assert "--context 33 is longer than the model's context length of 32" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_evaluates_with_two_processes(run: Path, questions: Path, restomod: Callable, tmp_path: Path) -> None:
    program = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "restomod")
    flags = ("--tasks", "validation", "--task", str(questions), "--device", "cpu", "--precision", "fp32")
    process = restomod("eval", str(run), *flags, "--json", "two.json", program=program)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out.count("warning: questions") == 1
    assert json.loads((tmp_path / "two.json").read_text())["environment"]["processes"] == 2


# --- published numbers --------------------------------------------------------------------------------------


def test_published_numbers_belong_to_existing_metrics() -> None:
    found = {name: references(name) for name in (VALIDATION, *TASKS)}
    assert all(r.metric in ("loss", "perplexity", *ACCURACIES) and r.convention for rs in found.values() for r in rs)
    assert all(0.2 < r.value < 0.7 for rs in found.values() for r in rs if r.metric.startswith("acc"))
    assert {(r.model, r.metric, r.value) for r in found["hellaswag"]} >= {
        ("GPT-2 124M", "acc_token", 0.2955),  # 10042 acc_norm: 0.2955, build-nanogpt
        ("GPT-3 125M", "acc_token", 0.337),
    }


def test_the_default_tasks_of_a_model_without_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(name: str, *_: Any) -> None:
        asked.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr("restomod.evals.suite.load_task", refuse)
    assert main(["eval", "model"]) == 130
    assert asked == ["hellaswag"]
    assert torch.get_num_threads() == 1


def test_without_hellaswags_file_the_validation_loss_is_still_computed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*_: Any) -> None:
        raise UserError("cannot download hellaswag_val.jsonl: no connection")

    monkeypatch.setattr("restomod.evals.suite.load_task", offline)
    assert main(["eval", str(run)]) == 0
    out = capsys.readouterr().out
    assert "warning: hellaswag is skipped: cannot download hellaswag_val.jsonl" in out
    assert "validation" in out.replace("warning:", "")
    assert main(["eval", str(run), "--tasks", "validation,hellaswag"]) == 2
    assert "cannot download" in capsys.readouterr().err
