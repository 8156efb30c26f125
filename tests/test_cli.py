"""The command line: every mistake is one line, exit code 2, and nothing left behind."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from restomod import __version__, cli
from restomod.checks.device_parity import random_model
from restomod.cli import main
from restomod.config.prepare import PrepareConfig
from restomod.config.presets import PRESETS
from restomod.config.run import ModelConfig, RunConfig
from restomod.model.hf_io import save_model
from restomod.utils.errors import UserError
from tests.checks.faults import QUICK_FAULTS

SMALL = (
    *("--data.source", "text", "--data.path", "text.txt", "--sequence-length", "64", "--batch-tokens", "256"),
    *("--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "32", "--steps", "1"),
    *("--device", "cpu", "--precision", "fp32", "--sampling.max-tokens", "2", "--eval-tokens", "64"),
)

Refused = Callable[..., str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, but for a text that is long enough to train on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("A text that is long enough to be trained on.\n" * 200)
    return tmp_path


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Run the command line on a mistake; return its one line without the beginning that all have."""

    def run(*arguments: str, encoding: str = "utf-8") -> str:
        before = set(os.listdir(here))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
            assert main(list(arguments)) == 2
        error = capsys.readouterr().err
        assert error.startswith("restomod: error: ")
        assert error.endswith("\n")
        assert error.count("\n") == 1
        assert set(os.listdir(here)) - before <= {"data"}, "a run's folder was left behind"
        return error.removeprefix("restomod: error: ").rstrip("\n")

    return run


# where standard output is not UTF-8, tyro draws its boxes from other characters
ENCODINGS = pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])


# --- mistakes in the text -----------------------------------------------------------------------------------


def test_a_missing_file(refused: Refused) -> None:
    said = refused("train", "quickstart", *SMALL, "--data.path", "nowhere.txt")
    assert said.endswith("nowhere.txt: no such file or folder")


def test_an_empty_file(here: Path, refused: Refused) -> None:
    (here / "text.txt").write_text("")
    assert refused("train", "quickstart", *SMALL) == f"{here / 'text.txt'} is empty: there is nothing to train on"


def test_a_file_that_is_not_utf8(here: Path, refused: Refused) -> None:
    (here / "text.txt").write_bytes(b"caf\xe9 au lait")
    assert "text.txt is not UTF-8 text: byte 0xe9 at offset 3" in refused("train", "quickstart", *SMALL)


def test_a_text_shorter_than_a_window(here: Path, refused: Refused) -> None:
    (here / "text.txt").write_text("Too short.")  # 3 tokens
    said = refused("train", "quickstart", *SMALL, "--data.val-fraction", "0")
    assert said.startswith("the training text has 3 tokens, fewer than a window of 64 and its target")


def test_a_validation_text_shorter_than_a_window(refused: Refused) -> None:
    said = refused("train", "quickstart", *SMALL, "--data.val-fraction", "0.001")
    assert said.startswith("the validation text has 2 tokens, fewer than a window of 64 and its target")


def test_no_text_at_all(refused: Refused) -> None:
    assert refused("train", "gpt2-124m") == "no text to read: add --data.path FILE_OR_FOLDER"


def test_a_folder_in_which_nothing_matches(here: Path, refused: Refused) -> None:
    said = refused("train", "quickstart", *SMALL, "--data.path", str(here), "--data.glob", "*.md")
    assert said == f"{here} holds no text: no file matches the glob '*.md'"


def test_a_pattern_that_is_none(here: Path, refused: Refused) -> None:
    assert "the glob ''" in refused("train", "quickstart", *SMALL, "--data.path", str(here), "--data.glob", "")


def test_a_folder_that_cannot_be_written(here: Path, refused: Refused) -> None:
    (here / "taken").write_text("a file, where the cache should go")
    assert "taken" in refused("train", "quickstart", *SMALL, "--data.cache", "taken")


# --- mistakes in the command --------------------------------------------------------------------------------


def test_an_unknown_verb(refused: Refused) -> None:
    assert refused("trian") == "unknown command 'trian'; did you mean 'train'?"


def test_an_unknown_preset(refused: Refused) -> None:
    assert refused("train", "quikstart") == "unknown preset 'quikstart'; did you mean 'quickstart'?"


@ENCODINGS
def test_an_unknown_flag(refused: Refused, encoding: str) -> None:
    said = refused("train", "quickstart", "--stepps", "3", encoding=encoding)
    assert said.startswith("Unrecognized options: --stepps, 3; did you mean --steps?")
    assert said.endswith("(restomod train quickstart --help lists the flags)")


@ENCODINGS
def test_an_unknown_nested_flag(refused: Refused, encoding: str) -> None:
    said = refused("train", "quickstart", "--model.n-layers", "3", encoding=encoding)
    assert said.startswith("Unrecognized options: --model.n-layers, 3; did you mean --model.n-layer?")


def test_a_suggestion_is_one_flag(refused: Refused) -> None:
    assert re.search(r"; did you mean --model\.[a-z-]+\? \(", refused("train", "quickstart", "--model", "gpt2"))


@ENCODINGS
def test_a_number_that_is_none(refused: Refused, encoding: str) -> None:
    said = refused("train", "quickstart", "--steps", "many", encoding=encoding)
    assert said.startswith("--steps: ")
    assert "'many'" in said


@ENCODINGS
def test_a_choice_that_is_none(refused: Refused, encoding: str) -> None:
    said = refused("train", "quickstart", "--data.source", "txt", encoding=encoding)
    assert said.startswith("invalid choice 'txt' for argument '--data.source'")
    assert "python-stdlib" in said


@ENCODINGS
def test_a_flag_without_its_value(refused: Refused, encoding: str) -> None:
    said = refused("train", "quickstart", "--optim.betas", "0.9", encoding=encoding)
    assert said.startswith("Missing value for argument '--optim.betas'")


@pytest.mark.parametrize("columns", ["40", "200"])
def test_a_long_message_is_one_line_in_a_narrow_terminal(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    said = refused("train", "quickstart", "--optim.warmup-stepps", "3")
    assert said.startswith("Unrecognized options: --optim.warmup-stepps, 3; did you mean --optim.warmup-steps?")


@ENCODINGS
def test_progress_on_an_output_without_some_characters(refused: Refused, encoding: str) -> None:
    said = refused("train", "quickstart", *SMALL, "--data.path", "nowhere.txt", encoding=encoding)
    assert "no such file" in said


def test_a_value_out_of_range(refused: Refused) -> None:
    assert refused("train", "quickstart", "--steps", "0") == "steps is 0; it must be at least 1"


def test_a_batch_that_is_not_whole_sequences(refused: Refused) -> None:
    said = refused("train", "quickstart", *SMALL, "--batch-tokens", "100")
    assert said == "batch_tokens 100 is not a multiple of sequence_length 64; the nearest that are: 64 and 128"


@pytest.mark.parametrize("flag", ["--seed", "--data.split-seed"])
@pytest.mark.parametrize("value", ["-99999999999999999999", "99999999999999999999"])
def test_a_seed_that_no_generator_takes(refused: Refused, flag: str, value: str) -> None:
    assert flag.removeprefix("--").replace("-", "_") in refused("train", "quickstart", *SMALL, flag, value)


def test_a_negative_seed(refused: Refused) -> None:
    assert refused("train", "quickstart", *SMALL, "--seed", "-1").startswith("seed is -1")


def test_a_vocabulary_smaller_than_the_tokenizers(refused: Refused) -> None:
    assert "vocab_size" in refused("train", "quickstart", *SMALL, "--model.vocab-size", "100")


def test_a_device_that_is_not_there(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    said = refused("train", "quickstart", *SMALL, "--device", "cuda")
    assert said.startswith("device 'cuda' is not available here")


def test_flags_without_a_preset(refused: Refused) -> None:
    assert refused("train", "--steps", "3").startswith("name a preset first: restomod train PRESET --steps 3")


@ENCODINGS
def test_a_second_word_after_the_preset(refused: Refused, encoding: str) -> None:
    assert refused("train", "quickstart", "again", encoding=encoding).startswith("Unrecognized options: again")


@pytest.mark.parametrize("arguments", [[], ["train"]])
def test_a_command_that_is_not_finished_shows_its_usage(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().out.startswith(" ".join(["usage: restomod", *arguments]))


# --- mistakes about runs ------------------------------------------------------------------------------------


def test_a_run_folder_that_exists(here: Path, refused: Refused) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "notes.txt").write_text("keep me")
    said = refused("train", "quickstart", *SMALL, "--out", "mine")
    assert said == "mine exists already; choose another folder with --out"
    assert os.listdir(here / "mine") == ["notes.txt"]


def test_a_run_folder_that_can_be_resumed(here: Path, refused: Refused) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "config.json").write_text("{}")
    said = refused("train", "quickstart", *SMALL, "--out", "mine")
    assert "go on with it by `restomod train --resume mine`" in said


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_resuming_what_is_no_run(here: Path, refused: Refused, folder: str) -> None:
    (here / "empty").mkdir()
    assert refused("train", "--resume", folder).startswith(f"{folder} is not a run: it has no config.json")


def test_resuming_nothing(refused: Refused) -> None:
    for nothing in (["--resume"], ["--resume", ""], ["--resume="], ["--resume", "--steps"]):
        assert refused("train", *nothing).startswith("--resume needs the folder of a run")


def test_resuming_with_a_preset(refused: Refused) -> None:
    assert refused("train", "quickstart", "--resume", "x").startswith("--resume takes the preset from the run")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "is damaged: the run's configuration is not valid JSON"),
        ('{"steps": 1}', ": missing batch_tokens, sequence_length"),
        ('{"stepps": 1}', ": unknown key stepps; did you mean 'steps'?"),
    ],
)
def test_resuming_a_run_with_a_damaged_configuration(here: Path, refused: Refused, config: str, said: str) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "config.json").write_text(config)
    error = refused("train", "--resume", "mine")
    assert error.startswith(os.path.join("mine", "config.json"))
    assert said in error


def test_sampling_a_run_that_is_missing(refused: Refused) -> None:
    assert refused("sample", "nowhere") == (
        "nowhere: no such run or model folder; known: gpt2, gpt2-large, gpt2-medium, gpt2-xl"
    )


def test_sampling_a_run_that_has_no_checkpoint(here: Path, refused: Refused) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "config.json").write_text('{"steps": 9}')
    assert refused("sample", "mine").startswith("mine holds no checkpoint yet")


def test_sampling_a_folder_of_something_else(here: Path, refused: Refused) -> None:
    (here / "mine").mkdir()
    assert refused("sample", "mine").startswith("mine is neither a run nor a model folder")


@ENCODINGS
def test_more_samples_than_can_be_listed(refused: Refused, encoding: str) -> None:
    said = refused("sample", "mine", "--num-samples", "99999999999", encoding=encoding)
    assert said.startswith("--num-samples is 99999999999; it must be at most 1,000,000")


@ENCODINGS
def test_sampling_nothing(refused: Refused, encoding: str) -> None:
    assert refused("sample", encoding=encoding).startswith("restomod sample needs MODEL (")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--num-samples", "0"), "--num-samples is 0; it must be at least 1"),
        (("--max-tokens", "0"), "sampling.max_tokens is 0; it must be at least 1"),
        (("--temperature", "-1"), "sampling.temperature is -1.0; it must be 0 or more"),
        (("--temperature", "nan"), "sampling.temperature is nan; it must be 0 or more"),
        (("--top-k", "-1"), "sampling.top_k is -1; it must be at least 0"),
        (("--top-p", "0"), "sampling.top_p is 0.0; it must be above 0 and at most 1"),
        (("--top-p", "1.1"), "sampling.top_p is 1.1; it must be above 0 and at most 1"),
        (("--top-p", "nan"), "sampling.top_p is nan; it must be above 0 and at most 1"),
        (("--seed", "-1"), "--seed is -1; it must be at least 0 and below 2**32"),
        (("--prompt", "a", "--prompt-file", "b"), "--prompt and --prompt-file both name prompts: give one of them"),
        (
            ("--prompt-file", "b"),
            "--prompt-file b: No such file or directory; it should be a text file, a prompt per line",
        ),
        (("--prompt-file", "."), "--prompt-file .: Is a directory; it should be a text file, a prompt per line"),
        (("--prompt-file", "empty"), "--prompt-file empty holds no prompt: write one per line"),
        (
            ("--prompt-file", "latin"),
            "--prompt-file latin is not UTF-8 text: byte 0xe9 at offset 3 (unexpected end of data)",
        ),
    ],
)
@pytest.mark.parametrize("verb", [("sample", "mine"), ("compare-samples", "mine", "yours")])
def test_sampling_settings_out_of_range(
    here: Path, refused: Refused, verb: tuple[str, ...], flags: tuple[str, ...], said: str
) -> None:
    (here / "empty").write_text("\n")
    (here / "latin").write_bytes(b"caf\xe9")
    if flags[0] != "--num-samples" or verb[0] == "sample":
        assert refused(*verb, *flags) == said


@pytest.mark.parametrize("out", ["samples.txt", "nowhere/samples.md"])
def test_a_report_that_cannot_be_written_is_refused_before_the_models_are_looked_for(
    refused: Refused, out: str
) -> None:
    assert refused("compare-samples", "mine", "yours", "--out", out).startswith(f"--out {out}: ")


def test_comparing_samples_of_one_model(refused: Refused) -> None:
    assert refused("compare-samples", "mine").startswith("restomod compare-samples needs B (")


def test_checking_what_is_no_model(refused: Refused) -> None:
    assert refused("check", "gpt2-124") == "gpt2-124: no such preset, run or model; did you mean 'gpt2-124m'?"
    assert refused("check", "qickstart").endswith("did you mean 'quickstart'?")


def test_checking_a_folder_that_is_missing(refused: Refused) -> None:
    assert refused("check", "runs/nowhere").startswith("runs/nowhere: ")


def test_checking_a_file(refused: Refused) -> None:
    assert refused("check", "text.txt") == "text.txt is a file; give the folder of a run or a model"


def test_checking_with_a_seed_that_no_generator_takes(refused: Refused) -> None:
    assert refused("check", "quickstart", "--seed", "-1") == "--seed is -1; it must be at least 0 and below 2**32"


def test_checking_on_a_device_that_is_not_there(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert refused("check", "quickstart", "--device", "cuda").startswith("device 'cuda' is not available here")


# --- mistakes about models ----------------------------------------------------------------------------------


@pytest.fixture
def model(here: Path) -> str:
    """A model folder with GPT-2's vocabulary; the hub must not be asked for one that has a folder."""
    (here / "model").mkdir()
    save_model(random_model(ModelConfig(n_layer=1, n_head=1, n_embd=4, n_positions=8)), here / "model")
    return "model"


@pytest.mark.parametrize("verb", ["sample", "inspect"])
def test_a_slip_in_the_path_of_a_run(here: Path, refused: Refused, verb: str) -> None:
    (here / "runs" / "quickstart" / "checkpoints").mkdir(parents=True)
    said = refused(verb, "runs/quikstart")
    assert said == "runs/quikstart: no such run or model folder; did you mean 'quickstart'?"


def test_inspecting_what_is_nothing(refused: Refused) -> None:
    assert refused("inspect", "gtp2") == "gtp2: no such preset, run or model; did you mean 'gpt2'?"


def test_inspecting_nothing(refused: Refused) -> None:
    assert refused("inspect").startswith("restomod inspect needs MODEL (")


def test_inspecting_with_a_seed_that_no_generator_takes(refused: Refused) -> None:
    assert refused("inspect", "quickstart", "--seed", "-1").startswith("--seed is -1")


def test_pictures_of_a_difference(refused: Refused) -> None:
    said = refused("inspect", "gpt2", "--plots", "here", "--diff", "gpt2-medium")
    assert said == "--plots draws one model and --diff compares two: give one of them"


def test_comparing_with_what_is_nothing(model: str, refused: Refused) -> None:
    assert refused("inspect", model, "--diff", "mdel").startswith("mdel: no such preset, run or model")


def test_pictures_where_a_file_is(here: Path, model: str, refused: Refused) -> None:
    assert refused("inspect", model, "--plots", "text.txt") == "--plots text.txt is a file; name a folder"


def test_a_name_in_a_damaged_file_does_not_steer_the_terminal(here: Path, model: str, refused: Refused) -> None:
    tensors = load_file(here / model / "model.safetensors")
    save_file(tensors | {"\x1b[2J\x07a\nb": torch.zeros(1)}, here / model / "model.safetensors")
    assert refused("inspect", model).endswith("unexpected ␛[2J␇a b")


@pytest.mark.parametrize("vocab_size", [97, 50256])
def test_sampling_a_model_with_another_vocabulary(here: Path, refused: Refused, vocab_size: int) -> None:
    (here / "other").mkdir()
    config = ModelConfig(n_layer=1, n_head=1, n_embd=4, n_positions=8, vocab_size=vocab_size)
    save_model(random_model(config), here / "other")
    said = refused("sample", "other", "--prompt", "the cat")
    assert said.startswith(f"other has a vocabulary of {vocab_size:,} tokens, ")
    assert "50,257" in said


@pytest.mark.parametrize("init", ["nowhere", "runs/quikstart", "text.txt", "empty"])
def test_starting_from_what_is_no_model(here: Path, refused: Refused, init: str) -> None:
    (here / "runs").mkdir()
    (here / "empty").mkdir()
    assert init in refused("train", "quickstart", *SMALL, "--init", init)


# --- mistakes about data ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "restomod prepare needs --out STR (restomod prepare --help lists the flags)"),
        (("--out", "o"), "name what to prepare: restomod prepare SOURCE --out DIR"),
        (("text.txt",), "restomod prepare needs --out STR (restomod prepare --help lists the flags)"),
        (("nowhere", "--out", "o"), "nowhere: no such file, folder or source; known: "),
        (("text.txt", "--out", "text.txt"), "--out text.txt is not a folder; name another"),
        (("text.txt", "--out", "o", "--hub-config", "x"), "--hub-config has no effect without a dataset on the hub"),
        (("text.txt", "--out", "o", "--hub-split=test"), "--hub-split has no effect without a dataset on the hub"),
        (("text.txt", "--out", "o", "--hub-revision", "x"), "--hub-revision has no effect without a source on the hub"),
        (("text.txt", "--out", "o", "--keep-downloads"), "--keep-downloads has no effect without a source on the hub"),
        (("text.txt", "--out", "o", "--glob", "*.md"), "--glob has no effect without a folder of text"),
        (("python-stdlib", "--out", "o", "--text_column", "x"), "--text-column has no effect on these sources"),
        (("python-stdlib", "--out", "o", "--separator", "x"), "--separator has no effect on these sources"),
        (("text.txt", "--out", "o", "--workers", "-1"), "--workers is -1; it must be 0 or more"),
        (("text.txt", "--out", "o", "--val-fraction", "1"), "--val-fraction is 1.0; it must be at least 0 and below 1"),
        (("text.txt", "--out", "o", "--val-fraction", "nan"), "--val-fraction is nan; it must be"),
        (("text.txt", "--out", "o", "--shard-tokens", "0"), "--shard-tokens is 0; it must be at least 1"),
        (("text.txt", "--out", "o", "--split-seed", "-1"), "--split-seed is -1; it must be"),
        (("text.txt", "--out", "o", "--shard-token", "5"), "Unrecognized options: --shard-token, 5"),
    ],
)
def test_preparing_wrongly(refused: Refused, arguments: tuple[str, ...], said: str) -> None:
    assert refused("prepare", *arguments).startswith(said)


def test_preparing_an_empty_file(here: Path, refused: Refused) -> None:
    (here / "empty.txt").write_text("")
    (here / "data").mkdir()  # where something may be left
    assert refused("prepare", "empty.txt", "--out", "data/o").endswith(
        "empty.txt is empty: there is nothing to train on"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "restomod data needs DIR (restomod data --help lists the flags)"),
        (("nowhere",), "nowhere: no such folder of token shards"),
        (("text.txt",), "text.txt: no such folder of token shards"),
        ((".",), ". holds no token shards: no manifest.json"),
    ],
)
def test_looking_at_what_is_no_data(refused: Refused, arguments: tuple[str, ...], said: str) -> None:
    assert refused("data", *arguments).startswith(said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "no tokens to read: add --data.path FOLDER"),
        (
            ("--data.path", "nowhere"),
            "nowhere: no such folder of token shards; `restomod prepare SOURCE --out ",
        ),
    ],
)
def test_training_on_missing_tokens(refused: Refused, flags: tuple[str, ...], said: str) -> None:
    assert said in refused("train", "quickstart", *SMALL[4:], "--data.source", "tokens", *flags)


# --- what works ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [[], *([verb] for verb in cli.COMMANDS), *(["train", name] for name in PRESETS)], ids=" ".join
)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_exits_with_0(capsys: pytest.CaptureFixture[str], arguments: list[str], flag: str) -> None:
    code = main([*arguments, flag])
    shown = capsys.readouterr()
    assert (code, shown.err) == (0, "")
    assert shown.out.startswith(" ".join(["usage: restomod", *arguments]))


def test_help_names_every_verb_and_preset(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    main(["train", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*cli.COMMANDS, *PRESETS))


def test_help_of_a_preset_shows_what_flags_mean_and_the_presets_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "gpt2-124m", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Optimizer steps. (default: 19073)" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"restomod {__version__}\n"


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset that is checked in a moment, and a compiler that leaves everything as it is."""
    config = RunConfig(1, 64, 64, ModelConfig(n_layer=2, n_head=2, n_embd=64, n_positions=64, vocab_size=499))
    monkeypatch.setitem(PRESETS, "tiny", lambda: config)
    monkeypatch.setattr("torch.compile", lambda module: module.forward)


CHECK_NAMES = [
    *("initial loss", "targets", "causality", "gradients", "tied lm_head", "kernel shapes"),
    *("initial weights", "activations", "bf16", "compiled", "overfitting"),
]


def test_check_prints_a_line_for_each_check_and_a_sum(tiny_preset: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "tiny", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    *lines, total = shown.out.splitlines()
    assert [line[:24] for line in lines] == [f"pass  {name:<18}" for name in CHECK_NAMES]
    assert (total, shown.err) == ("tiny: 11 passed", "")


def test_a_warning_and_a_skipped_check_do_not_count_as_failures(
    tiny_preset: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(n_layer=1, n_head=2, n_embd=30, n_positions=1, vocab_size=97)
    monkeypatch.setitem(PRESETS, "tiny", lambda: RunConfig(1, 1, 1, model))
    assert main(["check", "tiny", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "tiny: 9 passed, 1 to look at, 1 skipped"


def test_a_check_that_fails_is_exit_code_1(
    tiny_preset: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    QUICK_FAULTS["a mask that hides nothing"][0](monkeypatch)
    assert main(["check", "tiny", "--device", "cpu"]) == 1
    shown = capsys.readouterr()
    *lines, total = shown.out.splitlines()
    (failed,) = [line for line in lines if not line.startswith("pass  ")]
    assert failed.startswith("fail  causality         changing token 32 changes logits before it")
    assert len(lines) == len(CHECK_NAMES), "the checks after the one that failed are missing"
    assert (total, shown.err) == ("tiny: 10 passed, 1 failed", "")


def test_check_passes_its_flags_on_and_checks_gpt2_124m_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []
    monkeypatch.setattr("restomod.checks.model_slow.check", lambda *arguments: seen.append(arguments) or [])
    assert main(["check"]) == 0
    assert main(["check", "mine", "--seed", "3", "--device", "cpu", "--precision", "bf16"]) == 0
    assert seen == [("gpt2-124m", 1337, "auto", "auto"), ("mine", 3, "cpu", "bf16")]


def test_debug_shows_where_an_error_comes_from() -> None:
    with pytest.raises(UserError, match="unknown preset"):
        main(["train", "quikstart", "--debug"])


def test_an_error_of_the_operating_system_is_one_line(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: list[str]) -> int:
        raise PermissionError(13, "Permission denied", "there")

    monkeypatch.setattr("restomod.commands.train.run", fail)
    assert refused("train") == "there: Permission denied"


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("restomod.commands.train.run", interrupt)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "restomod: stopped\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "quickstart", "--help"]])
def test_a_reader_that_has_left_is_no_error(arguments: list[str], unbuffered: str) -> None:
    """As in `restomod --help | head -1`; without buffering the break shows at once, with it at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "restomod", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_can_be_trained_and_sampled(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "quickstart", *SMALL, "--out", "mine"]) == 0
    capsys.readouterr()
    sample = ["sample", "mine", "--prompt", "A text", "--num-samples", "2", "--max-tokens", "2", "--device", "cpu"]
    assert main(sample) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("--- 1 of 2 ---\nA text")
    assert "\n--- 2 of 2 ---\nA text" in shown


def test_text_can_be_prepared_looked_at_and_trained_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "text.txt", "--out", "tokens", "--val-fraction", "0.1", "--workers", "1"]) == 0
    assert "train on it: restomod train PRESET --data.source tokens --data.path tokens\n" in capsys.readouterr().out
    assert main(["data", "tokens", "--verify"]) == 0
    assert capsys.readouterr().out.endswith("every shard has the SHA-256 of the manifest\n")
    arguments = [*SMALL[4:], "--data.source", "tokens", "--data.path", "tokens"]
    assert main(["train", "quickstart", *arguments, "--out", "mine"]) == 0


@pytest.mark.parametrize("workers", [None, 0, 3])
def test_the_workers_are_as_many_as_processors_unless_said(
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


def test_pictures_are_drawn_into_the_folder_that_is_named(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "restomod.analysis.weights.plots.draw_weights", lambda tensors, title, folder: [folder / "a.png"]
    )
    assert main(["inspect", model, "--plots", "pictures"]) == 0
    assert capsys.readouterr().out.endswith(f"drawn               {Path('pictures/a.png')}\n")


class Terminal(io.StringIO):
    """A standard output that is one, and remembers each piece that was written before the next was flushed."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed: list[str] = []

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        self.flushed.append(self.getvalue())


def texts(shown: str) -> list[str]:
    """The texts that `sample` printed."""
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


def test_one_text_in_a_terminal_appears_as_it_is_made_and_cannot_steer_it(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("restomod.generate.text.stream_text", lambda *a: iter(["one", "\x1b[2J", "two"]))
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main(["sample", model, "--prompt", "The", "--stream", "--num-samples", "1", "--device", "cpu"]) == 0
    start = "--- 1 of 1 ---\nThe"
    assert sys.stdout.flushed[:4] == [start, start + "one", start + "one␛[2J", start + "one␛[2Jtwo"]


def test_a_text_is_exact_where_the_output_is_no_terminal(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("restomod.generate.text.stream_text", lambda *a: iter(["one", "\x1b[2J", "\r\u202etwo"]))
    assert main(["sample", model, "--prompt", "The", "--num-samples", "1", "--stream", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "--- 1 of 1 ---\nTheone\x1b[2J\r\u202etwo\n"


def test_several_texts_in_a_terminal_are_made_together(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("restomod.generate.text.stream_text", lambda *a: pytest.fail("streamed"))
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main(["sample", model, "--num-samples", "2", "--max-tokens", "2", "--device", "cpu"]) == 0
    assert len(texts(sys.stdout.getvalue())) == 2


def test_a_model_of_another_vocabulary_cannot_be_compared(here: Path, model: str, refused: Refused) -> None:
    (here / "other").mkdir()
    save_model(random_model(ModelConfig(n_layer=1, n_head=1, n_embd=4, n_positions=8, vocab_size=99)), here / "other")
    assert refused("compare-samples", model, "other").startswith("other has a vocabulary of 99 tokens")


@pytest.mark.parametrize("out", ["samples.md", "samples.html"])
def test_samples_are_compared_in_the_terminal_and_in_a_file(
    here: Path, model: str, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    arguments = [
        "--prompt",
        "A first",
        "--prompt",
        "A second\udcff",
        "--max-tokens",
        "3",
        "--device",
        "cpu",
        "--out",
        out,
    ]
    assert main(["compare-samples", model, model, *arguments]) == 0
    shown = capsys.readouterr().out
    assert "1. A first" in shown
    assert "2. A second" in shown
    assert "3 tokens, temperature 0.8, top-k 50, top-p 1, seed 1337" in shown
    assert "A second" in (here / out).read_text()
