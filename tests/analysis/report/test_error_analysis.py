"""Error analysis compared with losses that torch computes from the logits of `transformers`."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from transformers import GPT2LMHeadModel

from restomod.analysis.report.error_analysis import KINDS, PASSAGE, _analyse, _pieces, analyse_errors, kind_of_token
from restomod.analysis.report.usage import HourlyRates
from restomod.analysis.report.write import report_data
from restomod.cli import main
from restomod.config.run import DataConfig
from restomod.data.dataset import mix
from restomod.data.prepare.text_cache import prepare_text
from restomod.data.tokenizer import Tokenizer
from restomod.evals.validation import validation_loss
from restomod.model.hf_io import load_model
from restomod.runs.reader import open_run

T = 64
FLAGS = (
    *("--sequence-length", str(T), "--batch-tokens", "256", "--steps", "3", "--eval-tokens", "64"),
    *("--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "32", "--model.n-positions", str(T)),
    *("--device", "cpu", "--precision", "fp32", "--sampling.max-tokens", "2", "--optim.lr", "0.01"),
)
TEXT = "In 1924 the car, a Bentley, won (again!). Zoë's naïve 東京 text: it was 1,024 kilometres.\n\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tiny run on text with many kinds of tokens and return its folder."""
    folder = tmp_path_factory.mktemp("error_analysis")
    for i in range(20):
        (folder / "texts").mkdir(exist_ok=True)
        (folder / "texts" / f"{i}.txt").write_text(f"Number {i}. " + TEXT * 8)
    source = ("--data.source", "text", "--data.path", str(folder / "texts"), "--data.cache", str(folder / "data"))
    split = ("--data.val-fraction", "0.3", "--out", str(folder / "r"))
    assert main(["train", "quickstart", *FLAGS, *source, *split]) == 0
    return folder / "r"


def reference(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return targets and losses of the complete validation split, (windows, T) each."""
    shard = next((run.parent / "data").glob("*/val_*.bin"))
    tokens = np.fromfile(shard, dtype="<u2", offset=1024).astype(np.int64)
    n = (len(tokens) - 1) // T
    x, y = torch.from_numpy(tokens[: n * T].reshape(n, T)), torch.from_numpy(tokens[1 : n * T + 1].reshape(n, T))
    model = GPT2LMHeadModel.from_pretrained(sorted((run / "checkpoints").iterdir())[-1]).eval()
    with torch.no_grad():
        logits = model(x).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(n, T)
    return y.numpy(), losses.numpy()


def test_losses_are_those_of_transformers(run: Path, tiktoken_gpt2: tiktoken.Encoding) -> None:
    lines: list[str] = []
    analyse_errors(open_run(run), 10**9, "cpu", "fp32", lines.append)
    assert lines == [f"written: {run / 'error_analysis.json'}"]
    found = json.loads((run / "error_analysis.json").read_text())
    targets, losses = reference(run)
    assert found["step"] == 3
    assert found["tokens"] == losses.size
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-4)

    digits = np.array([any(c.isdigit() for c in tiktoken_gpt2.decode([t])) for t in targets.ravel().tolist()])
    number = next(kind for kind in found["kinds"] if kind["name"] == "number")
    assert number["loss"] == pytest.approx(losses.ravel()[digits].mean(), rel=1e-4)
    assert number["share"] == pytest.approx(digits.mean())
    assert number["of_loss"] == pytest.approx(losses.ravel()[digits].sum() / losses.sum(), rel=1e-4)
    assert sum(kind["share"] for kind in found["kinds"]) == pytest.approx(1)
    assert sum(kind["of_loss"] for kind in found["kinds"]) == pytest.approx(1)
    assert {kind["name"] for kind in found["kinds"]} == set(KINDS)

    assert found["positions"]["x"][0] == 1
    assert found["positions"]["y"][0] == pytest.approx(losses[:, 0].mean(), rel=1e-4)

    length = min(PASSAGE, T // 2)
    passages = sorted(float(row[start : start + length].mean()) for row in losses for start in (T - length,))
    assert [p["loss"] for p in found["worst"]] == pytest.approx(passages[::-1][:5], rel=1e-4)
    assert [p["loss"] for p in found["best"]] == pytest.approx(passages[:5], rel=1e-4)
    for passage in found["best"]:
        assert len(passage["tokens"]) == length
        assert passage["loss"] == pytest.approx(np.mean([loss for _, loss in passage["tokens"]]), abs=1e-3)


def test_a_current_analysis_is_kept_and_shown(run: Path) -> None:
    lines: list[str] = []
    for _ in range(2):
        analyse_errors(open_run(run), 256, "cpu", "fp32", lines.append)
    assert "already contains the error analysis of step_000003" in lines[-1]
    (shown,) = report_data([open_run(run)], HourlyRates())["runs"]
    assert shown["error_analysis"]["tokens"] == 256
    assert shown["error_analysis"]["remark"] == ""
    (run / "checkpoints" / "step_000009").mkdir()
    (shown,) = report_data([open_run(run)], HourlyRates())["runs"]
    (run / "checkpoints" / "step_000009").rmdir()
    assert shown["error_analysis"]["remark"] == "There is a newer checkpoint, step_000009: repeat --error-analysis."


def test_a_run_without_a_checkpoint_is_reported_without(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    for name in ("config.json", "metrics.jsonl", "data.json"):
        (folder / name).write_bytes((run / name).read_bytes())
    assert main(["report", str(folder), "--error-analysis"]) == 0
    out = capsys.readouterr().out
    assert f"{folder}: no error analysis: " in out
    assert (folder / "report.html").exists()
    (shown,) = report_data([open_run(folder)], HourlyRates())["runs"]
    assert shown["error_analysis"] == {"reason": "the run has no checkpoint yet"}


def test_data_that_has_changed_is_not_analysed(run: Path) -> None:
    path, lines = run / "data.json", list[str]()
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"fingerprint": "another"}))
    analyse_errors(open_run(run), 512, "cpu", "fp32", lines.append)
    path.write_text(before)
    assert lines == [f"{run}: no error analysis: the data has changed since training"]


def test_each_source_of_a_mix_has_its_own_loss(run: Path, tmp_path: Path) -> None:
    parts = []
    for name, text in (("words", "the cat sat on the mat " * 300), ("digits", "31 41 59 26 53 " * 300)):
        (tmp_path / f"{name}.txt").write_text(text)
        config = DataConfig(source="text", path=str(tmp_path / f"{name}.txt"), val_fraction=0.5, cache=str(tmp_path))
        parts.append((prepare_text(config), Fraction(1, 2)))
    opened, model = open_run(run), load_model(sorted((run / "checkpoints").iterdir())[-1], torch.device("cpu"))
    found = _analyse(opened, model, mix(parts), 10**9, torch.device("cpu"), torch.float32)
    for source, (dataset, _) in zip(found["sources"], parts, strict=True):
        windows = (len(dataset.val) - 1) // T
        held = validation_loss(model, dataset.val, T, torch.device("cpu"), torch.float32, windows * T)
        assert source["tokens"] == held.tokens
        assert source["loss"] == pytest.approx(held.loss, rel=1e-5)
    assert found["sources"][0]["loss"] != pytest.approx(found["sources"][1]["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        (" the", "word after a space"),
        ("ing", "word without a space"),
        (" 1924", "number"),
        ("km2", "number"),
        (" (", "punctuation"),
        ("...", "punctuation"),
        ("  ", "white space"),
        ("\n", "white space"),
        (" é", "word after a space"),
    ],
)
def test_kinds_of_tokens(piece: str, kind: str) -> None:
    assert kind_of_token(piece.encode()) == kind
    assert kind_of_token("é".encode()[:1]) == "part of a character"
    assert kind_of_token(b"", True) == "end of text"


def test_characters_of_several_tokens_are_complete(tokenizer: Tokenizer) -> None:
    text = "naïve 東京 🦜, \x1b[2J"
    tokens = [int(t) for t in tokenizer.encode(text)]
    pieces = list(_pieces([*tokens, tokenizer.end_of_text], tokenizer))
    assert len(pieces) == len(tokens) + 1
    assert "".join(pieces) == text.replace("\x1b", "␛") + "<|endoftext|>"
