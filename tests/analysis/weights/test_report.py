"""Output of `inspect`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from restomod.analysis.weights.report import compare_weights, inspect_weights
from restomod.checks.device_parity import random_model
from restomod.cli import main
from restomod.config.run import ModelConfig
from restomod.model.hf_io import save_model
from restomod.utils.errors import UserError
from tests.models import to_transformers

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, n_positions=12, vocab_size=97)
WPE, BIAS = "transformer.wpe.weight", "transformer.h.1.mlp.c_fc.bias"


@pytest.fixture(scope="module")
def theirs() -> GPT2LMHeadModel:
    return to_transformers(random_model(CONFIG))


@pytest.fixture
def folder(theirs: GPT2LMHeadModel, tmp_path: Path) -> Path:
    theirs.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def table(lines: list[str]) -> dict[str, list[str]]:
    """Return the cells of each tensor's line by name."""
    rows = lines[1 : lines.index("")]
    return {row.split("  ")[0].strip(): [cell.strip() for cell in row.split("  ")[1:] if cell.strip()] for row in rows}


def test_every_tensor_has_a_line_with_numpys_statistics(theirs: GPT2LMHeadModel, folder: Path) -> None:
    rows = table(list(inspect_weights(str(folder), seed=0)))
    values = {name: value.numpy() for name, value in theirs.state_dict().items() if name != "lm_head.weight"}
    assert list(rows) == list(values), "in the model's order"
    for name, value in values.items():
        shape = " × ".join(map(str, value.shape))
        x = value.astype(np.float64)
        assert rows[name] == [shape, f"{x.size:,}", f"{x.mean():.5f}", f"{x.std():.5f}"]


def test_the_totals_follow(theirs: GPT2LMHeadModel, folder: Path) -> None:
    lines = list(inspect_weights(str(folder), seed=0))
    count = sum(parameter.numel() for parameter in theirs.parameters())
    embeddings = (97 + 12) * 16
    assert f"{'parameters':<19} {count:,}" in lines
    assert f"{'without embeddings':<19} {count - embeddings:,}" in lines
    x = theirs.state_dict()[WPE].numpy().astype(np.float64)
    rough = np.mean((np.diff(x, axis=0) ** 2).sum(0) / (2 * ((x - x.mean(0)) ** 2).sum(0)))
    assert lines[-1].startswith(f"{'positions':<19} roughness {rough:.2f} ")


def test_numbers_that_are_not_finite_are_pointed_out(theirs: GPT2LMHeadModel, tmp_path: Path) -> None:
    bias = theirs.state_dict()[BIAS]
    before = bias[:2].clone()
    bias[:2] = torch.tensor([torch.nan, torch.inf])
    theirs.save_pretrained(tmp_path)
    bias[:2] = before
    rows = table(list(inspect_weights(str(tmp_path), seed=0)))
    assert rows[BIAS][-1] == "2 not finite"
    assert len(rows[WPE]) == 4


@pytest.mark.parametrize("n_positions", [1, 2])
def test_one_position_has_no_roughness(tmp_path: Path, n_positions: int) -> None:
    to_transformers(random_model(ModelConfig(1, 1, 4, n_positions, 7))).save_pretrained(tmp_path)
    shown = "\n".join(inspect_weights(str(tmp_path), seed=0))
    assert ("nan" in shown, "roughness" in shown) == (False, n_positions > 1)


def test_a_presets_initial_weights_follow_the_seed() -> None:
    first, again, other = (list(inspect_weights("quickstart", seed)) for seed in (1, 1, 2))
    assert first == again != other
    rows = table(first)
    assert rows[WPE][-1].startswith(("0.0199", "0.0200", "0.0201"))  # GPT-2's 0.02
    assert rows["transformer.ln_f.weight"][-2:] == ["1.00000", "0.00000"]


def test_pictures_are_named_at_the_end(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}

    def draw(tensors: dict[str, torch.Tensor], title: str, where: Path) -> list[Path]:
        drawn.update({"tensors": set(tensors), "title": title, "where": where})
        return [where / "a.png", where / "b.png"]

    monkeypatch.setattr("restomod.analysis.weights.plots.draw_weights", draw)
    lines = list(inspect_weights(str(folder), 0, tmp_path / "new"))
    assert lines[-2:] == [f"{'drawn':<19} {tmp_path / 'new' / name}" for name in ("a.png", "b.png")]
    assert (drawn["title"], drawn["where"]) == (str(folder), tmp_path / "new")
    assert drawn["tensors"] == set(table(lines))


def test_a_model_is_identical_to_itself(folder: Path) -> None:
    lines = list(compare_weights(str(folder), str(folder), 0))
    assert lines[-1] == "all 28 tensors are identical"
    assert all(cells == ["=", "=", "="] for cells in table(lines).values())


def test_one_changed_number_shows_in_one_line(theirs: GPT2LMHeadModel, folder: Path, tmp_path: Path) -> None:
    bias = theirs.state_dict()[BIAS]
    x = bias.numpy().astype(np.float64).copy()
    bias[3] += 0.5
    y = bias.numpy().astype(np.float64).copy()
    theirs.save_pretrained(tmp_path / "changed")
    bias[3] = float(x[3])
    lines = list(compare_weights(str(folder), str(tmp_path / "changed"), 0))
    assert "27 of 28 tensors are identical" in lines
    assert lines[-1].endswith(f" in {BIAS}")
    changed = {name: cells for name, cells in table(lines).items() if cells != ["=", "=", "="]}
    relative = np.linalg.norm(x - y) / np.linalg.norm(x)
    cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    assert changed == {BIAS: [f"{abs(y[3] - x[3]):.2e}", f"{relative:.2e}", f"{cosine:.5f}"]}


def test_models_of_different_depth_can_be_compared(folder: Path, tmp_path: Path) -> None:
    deeper = random_model(ModelConfig(n_layer=3, n_head=2, n_embd=16, n_positions=10, vocab_size=97))
    to_transformers(deeper).save_pretrained(tmp_path / "deeper")
    lines = list(compare_weights(str(folder), str(tmp_path / "deeper"), 0))
    rows = table(lines)
    assert rows[WPE] == ["(12, 16) and (10, 16)"]
    assert rows["transformer.h.2.ln_1.bias"] == ["only in the second"]
    assert any(line.endswith(" of 40 tensors are identical") for line in lines)
    assert any(line.startswith("the configurations differ: 2 layers") and "3 layers" in line for line in lines)


@pytest.mark.parametrize("second", ["nowhere", "quikstart"])
def test_a_missing_second_model_is_an_error_before_any_output(folder: Path, second: str) -> None:
    with pytest.raises(UserError, match=f"^{second}: no such preset, run or model"):
        next(compare_weights(str(folder), second, 0))


def test_the_seed_of_a_preset_that_is_compared_is_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "quickstart", "--diff", str(folder), "--seed", "3"]) == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("command", [["check"], ["eval", "--tasks", "hellaswag=x.jsonl"], ["sample"], ["train"]])
def test_weights_that_are_not_finite_are_refused_by_all_others(
    command: list[str], bad: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").write_text('{"ctx": "A", "endings": ["b", "c"], "label": 0, "activity_label": "d"}\n')
    model = random_model(ModelConfig(n_layer=1, n_head=1, n_embd=8, n_positions=32))
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[1, 2] = bad
    Path("model").mkdir()
    save_model(model, Path("model"))
    arguments = [command[0], "model", *command[1:]]
    if command == ["train"]:
        shape = ["--model.n-layer", "1", "--model.n-head", "1", "--model.n-embd", "8", "--model.n-positions", "32"]
        steps = ["--steps", "1", "--sequence-length", "32", "--batch-tokens", "64", "--optim.warmup-steps", "0"]
        Path("text.txt").write_text("some words " * 500)
        arguments = ["train", "quickstart", "--init", "model", *shape, *steps, "--data.source", "text"]
        arguments += ["--data.path", "text.txt"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "1 weights are NaN or infinite, in transformer.h.0.mlp.c_fc.weight" in error
    assert error.count("\n") == 1
    assert not Path("runs").exists()
