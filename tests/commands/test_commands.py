"""Complete commands on tiny models: exit code, printed lines, written files."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from restomod.checks.device_parity import random_model
from restomod.cli import main
from restomod.config.prepare import PrepareConfig
from restomod.config.presets import PRESETS
from restomod.config.run import ModelConfig, RunConfig
from restomod.model.hf_io import save_model
from tests.checks.faults import QUICK_FAULTS

SMALL = (
    *("--data.source", "text", "--data.path", "text.txt", "--sequence-length", "64", "--batch-tokens", "256"),
    *("--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "32", "--steps", "1"),
    *("--device", "cpu", "--precision", "fp32", "--sampling.max-tokens", "2", "--eval-tokens", "64"),
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Current folder with one text file that is long enough for training."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("A text that is long enough to be trained on.\n" * 200)
    return tmp_path


@pytest.fixture
def model(here: Path) -> str:
    """Model folder with GPT-2's vocabulary."""
    (here / "model").mkdir()
    save_model(random_model(ModelConfig(n_layer=1, n_head=1, n_embd=4, n_positions=8)), here / "model")
    return "model"


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Preset with a tiny model, and a `torch.compile` without effect."""
    config = RunConfig(1, 64, 64, ModelConfig(n_layer=2, n_head=2, n_embd=64, n_positions=64, vocab_size=499))
    monkeypatch.setitem(PRESETS, "tiny", lambda: config)
    monkeypatch.setattr("torch.compile", lambda module: module.forward)


CHECK_NAMES = [
    *("initial loss", "targets", "causality", "gradients", "tied lm_head", "kernel shapes"),
    *("initial weights", "activations", "bf16", "compiled", "NaN gradients", "overfit batch"),
]


def test_check_prints_one_line_per_check_and_a_summary(tiny_preset: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "tiny", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    *lines, total = shown.out.splitlines()
    assert [line[:24] for line in lines] == [f"pass  {name:<18}" for name in CHECK_NAMES]
    assert (total, shown.err) == (f"tiny: {len(CHECK_NAMES)} passed", "")


def test_a_warning_and_a_skipped_check_do_not_count_as_failures(
    tiny_preset: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(n_layer=1, n_head=2, n_embd=30, n_positions=1, vocab_size=97)
    monkeypatch.setitem(PRESETS, "tiny", lambda: RunConfig(1, 1, 1, model))
    assert main(["check", "tiny", "--device", "cpu"]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1] == f"tiny: {len(CHECK_NAMES) - 2} passed, 1 with a warning, 1 skipped"
    )


def test_a_failed_check_gives_exit_code_1(
    tiny_preset: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    QUICK_FAULTS["a mask that hides nothing"][0](monkeypatch)
    assert main(["check", "tiny", "--device", "cpu"]) == 1
    shown = capsys.readouterr()
    *lines, total = shown.out.splitlines()
    (failed,) = [line for line in lines if not line.startswith("pass  ")]
    assert failed.startswith("fail  causality         changing token 32 of 64 changes earlier")
    assert len(lines) == len(CHECK_NAMES), "the checks after the failed one were not run"
    assert (total, shown.err) == (f"tiny: {len(CHECK_NAMES) - 1} passed, 1 failed", "")


def test_check_passes_on_its_flags_and_checks_gpt2_124m_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []
    monkeypatch.setattr("restomod.checks.model_slow.check", lambda *arguments: seen.append(arguments) or [])
    assert main(["check"]) == 0
    assert main(["check", "mine", "--seed", "3", "--device", "cpu", "--precision", "bf16"]) == 0
    assert seen == [("gpt2-124m", 1337, "auto", "auto"), ("mine", 3, "cpu", "bf16")]


def test_a_run_can_be_trained_and_sampled(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "quickstart", *SMALL, "--out", "mine"]) == 0
    capsys.readouterr()
    sample = ["sample", "mine", "--prompt", "A text", "--num-samples", "2", "--max-tokens", "2", "--device", "cpu"]
    assert main(sample) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("--- 1 of 2 ---\nA text")
    assert "\n--- 2 of 2 ---\nA text" in shown


def test_text_can_be_prepared_inspected_and_trained_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "text.txt", "--out", "tokens", "--val-fraction", "0.1", "--workers", "1"]) == 0
    assert "to train: restomod train PRESET --data.source tokens --data.path tokens\n" in capsys.readouterr().out
    assert main(["data", "tokens", "--verify"]) == 0
    assert capsys.readouterr().out.endswith("verified: SHA-256 of all shards\n")
    arguments = [*SMALL[4:], "--data.source", "tokens", "--data.path", "tokens"]
    assert main(["train", "quickstart", *arguments, "--out", "mine"]) == 0


@pytest.mark.parametrize("workers", [None, 0, 3])
def test_there_is_one_worker_per_cpu_unless_workers_is_given(
    here: Path, monkeypatch: pytest.MonkeyPatch, workers: int | None
) -> None:
    given = []
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    monkeypatch.setattr("restomod.data.prepare.run.prepare_and_report", lambda *a: given.append(a))
    flags = [] if workers is None else ["--workers", str(workers)]
    assert main(["prepare", "a", "b", "--out", "o", "--dedup", *flags]) == 0
    assert [(*a[:4], a[5]) for a in given] == [
        (("a", "b"), PrepareConfig(dedup=True), Path("o"), workers or 7, "local")
    ]


def test_a_run_is_named_after_its_preset(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []

    def train(config: object, folder: Path, resume: bool) -> int:
        folders.append((folder, resume))
        return 0

    monkeypatch.setattr("restomod.train.loop.train", train)
    assert main(["train", "quickstart"]) == 0
    assert main(["train", "quickstart", "--out", "mine"]) == 0
    assert folders == [(Path("runs/quickstart"), False), (Path("mine"), False)]


def test_a_model_folder_can_be_sampled_and_inspected(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    sample = ("sample", model, "--prompt", "The", "--num-samples", "1", "--max-tokens", "20", "--device", "cpu")
    assert main([*sample]) == 0
    assert capsys.readouterr().out.startswith("--- 1 of 1 ---\nThe")
    assert main(["inspect", model]) == 0
    shown = capsys.readouterr().out
    assert "transformer.wte.weight" in shown
    assert "50257 × 4" in shown


def test_models_are_compared(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", model, "--diff", model]) == 0
    assert capsys.readouterr().out.endswith("\nall 16 tensors are identical\n")


def test_plots_are_written_to_the_given_folder(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "restomod.analysis.weights.plots.draw_weights", lambda tensors, title, folder: [folder / "a.png"]
    )
    assert main(["inspect", model, "--plots", "pictures"]) == 0
    assert capsys.readouterr().out.endswith(f"drawn               {Path('pictures/a.png')}\n")


class Terminal(io.StringIO):
    """Standard output that is a terminal and records its content at every flush."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed: list[str] = []

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        self.flushed.append(self.getvalue())


def texts(shown: str) -> list[str]:
    """Return the texts that `sample` printed."""
    return [part.partition("\n")[2].rstrip("\n") for part in re.split(r"(?m)^--- (?=\d+ of )", shown)[1:]]


def test_prompts_are_continued_in_the_order_of_the_flags_or_of_the_file(
    here: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "prompts.txt").write_text("One\n\nAnother\n")
    flags = ("--num-samples", "2", "--max-tokens", "4", "--device", "cpu", "--precision", "fp32")
    assert main(["sample", model, "--prompt-file", "prompts.txt", *flags]) == 0
    of_file = capsys.readouterr().out
    assert [text[:3] for text in texts(of_file)] == ["One", "One", "Ano", "Ano"]
    assert main(["sample", model, "--prompt", "One", "--prompt", "Another", *flags]) == 0
    assert capsys.readouterr().out == of_file
    assert main(["sample", model, "--prompt", "Another", *flags, "--stream"]) == 0
    assert texts(capsys.readouterr().out) == texts(of_file)[2:]


def test_one_text_in_a_terminal_is_streamed_without_control_characters(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("restomod.generate.text.stream_text", lambda *a: iter(["one", "\x1b[2J", "two"]))
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main(["sample", model, "--prompt", "The", "--stream", "--num-samples", "1", "--device", "cpu"]) == 0
    start = "--- 1 of 1 ---\nThe"
    assert sys.stdout.flushed[:4] == [start, start + "one", start + "one␛[2J", start + "one␛[2Jtwo"]


def test_a_text_is_unchanged_if_the_output_is_not_a_terminal(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("restomod.generate.text.stream_text", lambda *a: iter(["one", "\x1b[2J", "\r\u202etwo"]))
    assert main(["sample", model, "--prompt", "The", "--num-samples", "1", "--stream", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "--- 1 of 1 ---\nTheone\x1b[2J\r\u202etwo\n"


def test_several_texts_in_a_terminal_are_generated_in_batches(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("restomod.generate.text.stream_text", lambda *a: pytest.fail("streamed"))
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main(["sample", model, "--num-samples", "2", "--max-tokens", "2", "--device", "cpu"]) == 0
    assert len(texts(sys.stdout.getvalue())) == 2


@pytest.mark.parametrize("out", ["samples.md", "samples.html"])
def test_samples_are_compared_in_the_terminal_and_in_a_file(
    here: Path, model: str, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    prompts = ("--prompt", "A first", "--prompt", "A second\udcff")
    arguments = (*prompts, "--max-tokens", "3", "--device", "cpu", "--out", out)
    assert main(["compare-samples", model, model, *arguments]) == 0
    shown = capsys.readouterr().out
    assert "1. A first" in shown
    assert "2. A second" in shown
    assert "3 tokens, temperature 0.8, top-k 50, top-p 1, seed 1337" in shown
    assert "A second" in (here / out).read_text()
