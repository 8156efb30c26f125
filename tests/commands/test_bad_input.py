"""Invalid command lines and files: exit code 2, one line that names the flag or file, all files unchanged.

`BAD` is a table of invalid command lines. The tests after it try odd values for every flag of every command. They find
the flags in the dataclasses of the commands, so a new flag is tested too.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import shlex
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import restomod.analysis.report.watch
import restomod.checks.doctor
from restomod.checks.device_parity import random_model
from restomod.cli import main
from restomod.commands.bench import BenchArguments
from restomod.commands.compare import CompareArguments
from restomod.commands.compare_samples import CompareSamplesArguments
from restomod.commands.doctor import DoctorArguments
from restomod.commands.plan import PlanArguments
from restomod.commands.prepare import PrepareArguments
from restomod.commands.report import ReportArguments
from restomod.commands.sweep import SweepArguments
from restomod.commands.train import TrainArguments, parse_arguments
from restomod.commands.verdict import VerdictArguments
from restomod.commands.watch import WatchArguments
from restomod.config.presets import preset
from restomod.config.run import ModelConfig, RunConfig
from restomod.model.hf_io import save_model
from restomod.runs.folder import check_resumable
from restomod.utils.errors import UserError
from tests.runs.made_runs import make_run

INTERNAL = re.compile(
    r"\{None\}|INT\b|(Optim|Data|Model|Sampling|Run)Config\(|argparse|instantiated|tyro|<class|typing\.|NoneType|"
    r"invalid literal|could not convert|\ue000|ue000|Traceback"
)
SHORT = {
    "TRAIN": "train quickstart --data.source text --data.path text.txt SMALL",
    "TOKENS": "train quickstart --data.source tokens SMALL",
    "SMALL": "--out new --sequence-length 64 --batch-tokens 256 --steps 1 --eval-tokens 64 --device cpu "
    "--precision fp32 --model.n-layer 1 --model.n-head 2 --model.n-embd 32",
}
# command line with the abbreviations of `SHORT`, and words in its error message
BAD: list[tuple[str, ...]] = [
    # commands, presets and flags that do not exist
    ("trian", "'trian'", "'train'"),
    ("train quikstart", "'quikstart'", "'quickstart'"),
    ("train --steps 3", "name a preset first", "--steps 3"),
    ("plan --gpu a100", "name a preset first", "--gpu a100"),
    ("sweep --grid a=1", "name a preset first", "--grid a=1"),
    ("bench stpe", "'stpe'", "'step'"),
    ("train quickstart again", "again"),
    ("train quickstart --stepps 3", "--stepps", "did you mean --steps?", "restomod train quickstart --help"),
    ("train quickstart --optim.warmup-stepps 3", "did you mean --optim.warmup-steps?"),
    ("train quickstart --model gpt2", "did you mean --model."),
    ("prepare text.txt --out o --shard-token 5", "--shard-token"),
    ("sample", "MODEL"),
    ("inspect", "MODEL"),
    ("data", "DIR"),
    ("verdict", "RUN"),
    ("compare-samples dir", "needs B"),
    ("prepare", "--out"),
    ("prepare text.txt", "--out"),
    ("prepare --out o", "SOURCE"),
    ("report", "name a run"),
    ("compare", "name the runs"),
    # values of the wrong type
    ("train quickstart --steps many", "--steps", "'many'", "integer"),
    ("train quickstart --data.source txt", "--data.source", "'txt'", "python-stdlib"),
    ("train quickstart --optim.betas 0.9", "--optim.betas"),
    ("train quickstart --then", "--then"),
    ("plan quickstart --optim.lr -inf", "--optim.lr: '-inf'"),
    ("plan quickstart --micro-batch x", "--micro-batch: 'x' is not an integer or None"),
    ("plan quickstart --target-loss x", "--target-loss: 'x' is not a number or None"),
    ("plan quickstart --optim.betas a b", "--optim.betas: 'a', 'b' are not 2 numbers"),
    ("compare-samples dir dir --prompt --hello", "--flag=VALUE"),
    ("sample ''", "an argument is empty"),
    ("sample --prompt a ''", "an argument is empty"),
    ("plan quickstart --steps ''", "--steps is empty"),
    ("plan quickstart --json=", "--json is empty"),
    # values that begin with a dash are values
    ("compare-samples dir dir --prompt -hello", "dir is neither a run nor"),
    ("compare-samples dir dir --out -x", "--out -x"),
    ("TRAIN --data.path -x", "-x: no such file"),
    # values out of range
    ("train quickstart --steps 0", "steps is 0"),
    ("TRAIN --batch-tokens 100", "100", "64 and 128"),
    ("TRAIN --seed -1", "seed is -1"),
    *((f"TRAIN --seed {sign}99999999999999999999", "seed") for sign in ("", "-")),
    *((f"TRAIN --data.split-seed {sign}99999999999999999999", "split_seed") for sign in ("", "-")),
    ("TRAIN --model.vocab-size 100", "vocab_size"),
    ("TRAIN --device cuda", "device 'cuda' is not available"),
    *((f"{command} --mix x:-1", "FOLDER:WEIGHT") for command in ("train quickstart", "plan quickstart", "bench step")),
    ("sweep quickstart --grid seed=1,2 --mix=x:-1", "FOLDER:WEIGHT"),
    ("plan quickstart --model.n-embd 999999999999999999", "at most"),
    ("plan gpt2-124m --gpu a100 --gpus 3", "3 processes"),
    ("plan gpt2-124m --gpu a100 --gpus 0", "--gpus is 0"),
    ("plan gpt2-124m --gpu a100 --price -1", "--price is -1.0"),
    ("plan gpt2-124m --gpu a100 --price nan", "--price is nan"),
    ("plan gpt2-124m --gpu a100 --device cpu", "--gpu a100", "--device cpu"),
    ("plan gpt2-124m --price 1", "--gpu"),
    ("plan gpt2-124m --measure --gpu a100", "--measure", "--gpu"),
    ("sweep quickstart --grid seed=1,2 --seeds -2", "--seeds is -2"),
    ("report runs/a --price -2", "--price is -2.0"),
    ("check quickstart --seed -1", "--seed is -1"),
    ("inspect quickstart --seed -1", "--seed is -1"),
    ("inspect model --seed 3", "--seed"),
    ("sample model --num-samples 0", "--num-samples is 0"),
    ("sample model --num-samples 99999999999", "--num-samples is 99999999999"),
    *(
        (f"{command} {flags}", *words)
        for command in ("sample model", "compare-samples model model")
        for flags, *words in (
            ("--max-tokens 0", "max_tokens is 0"),
            ("--temperature -1", "temperature is -1.0"),
            ("--temperature nan", "temperature is nan"),
            ("--top-k -1", "top_k is -1"),
            ("--top-p 0", "top_p is 0.0"),
            ("--top-p 1.1", "top_p is 1.1"),
            ("--top-p nan", "top_p is nan"),
            ("--seed -1", "--seed is -1"),
            ("--prompt a --prompt-file b", "--prompt and --prompt-file"),
            ("--prompt-file b", "--prompt-file b", "No such file"),
            ("--prompt-file .", "--prompt-file .", "Is a directory"),
            ("--prompt-file blank.txt", "--prompt-file blank.txt has no prompts"),
            ("--prompt-file latin.txt", "--prompt-file latin.txt", "0xe9", "offset 3"),
        )
    ),
    ("prepare text.txt --out o --workers -1", "--workers is -1"),
    ("prepare text.txt --out o --val-fraction 1", "--val-fraction is 1.0"),
    ("prepare text.txt --out o --val-fraction nan", "--val-fraction is nan"),
    ("prepare text.txt --out o --shard-tokens 0", "--shard-tokens is 0"),
    ("prepare text.txt --out o --split-seed -1", "--split-seed is -1"),
    # text files and token shards
    ("TRAIN --data.path nowhere.txt", "nowhere.txt: no such file"),
    ("TRAIN --data.path empty.txt", "empty.txt is empty"),
    ("TRAIN --data.path latin.txt", "latin.txt", "0xe9", "offset 3"),
    ("TRAIN --data.path short.txt --data.val-fraction 0", "training split has 3 tokens", "64"),
    ("TRAIN --data.val-fraction 0.001", "validation split has 2 tokens", "64"),
    ("train gpt2-124m", "--data.path"),
    ("TRAIN --data.path dir --data.glob *.md", "dir", "'*.md'"),
    ("TRAIN --data.path dir --data.glob ''", "the glob ''"),
    ("TRAIN --data.cache file", "file"),
    ("TOKENS", "--data.path"),
    ("TOKENS --data.path nowhere", "nowhere: no such folder", "restomod prepare"),
    ("prepare nowhere --out o", "nowhere: no such file, folder or source"),
    ("prepare text.txt --out text.txt", "--out text.txt is not a folder"),
    ("prepare dir --out ./dir", "--out ./dir is also a source"),
    ("prepare empty.txt --out data/o", "empty.txt is empty"),
    ("data nowhere", "nowhere: no such folder"),
    ("data text.txt", "text.txt: no such folder"),
    ("data .", "manifest.json"),
    # runs and models
    ("TRAIN --out dir", "dir already exists", "--out"),
    ("TRAIN --out runs/a", "restomod train --resume runs/a"),
    ("train --resume nowhere", "nowhere is not a run", "config.json"),
    ("train --resume dir", "dir is not a run", "config.json"),
    *(
        (f"train {nothing}", "--resume needs")
        for nothing in ("--resume", "--resume ''", "--resume=", "--resume --steps")
    ),
    ("train quickstart --resume x", "--resume", "'quickstart'"),
    ("train --resume damaged/json", "damaged/json/config.json", "not valid JSON"),
    ("train --resume damaged/missing", "damaged/missing/config.json", "missing batch_tokens"),
    ("train --resume damaged/unknown", "damaged/unknown/config.json", "'steps'?"),
    *((f"TRAIN --init {name}", name) for name in ("nowhere", "runs/quikstart", "text.txt", "dir")),
    ("sample nowhere", "nowhere: no such run or model folder"),
    ("sample runs/quikstart", "runs/quikstart: no such", "'quickstart'"),
    ("sample damaged/missing", "damaged/missing has no checkpoint"),
    ("sample dir", "dir is neither a run nor a model folder"),
    ("sample other --prompt 'the cat'", "other: the tokenizer does not fit the model", "50,257", "97"),
    ("compare-samples model other", "other: the tokenizer does not fit the model"),
    ("inspect gtp2", "'gpt2'"),
    ("inspect gpt2 --plots here --diff gpt2-medium", "--plots", "--diff"),
    ("inspect model --diff mdel", "mdel: no such preset, run or model"),
    ("inspect hostile", "model.safetensors", "unexpected ␛[2J␇a b"),  # control characters are not printed
    ("check gpt2-124", "'gpt2-124m'"),
    ("check runs/nowhere", "runs/nowhere: "),
    ("check text.txt", "text.txt is a file"),
    # outputs that cannot be written, or would overwrite a file
    ("inspect model --plots text.txt", "--plots text.txt is a file"),
    ("compare-samples model model --out samples.txt", "--out samples.txt"),
    ("compare-samples model model --out nowhere/samples.md", "--out nowhere/samples.md"),
    ("plan gpt2-124m --measure --json no/p.json", "no/p.json", "no folder no"),
    ("plan gpt2-124m --gpu a100 --json .", "--json . is a folder"),
    ("plan gpt2-124m --prices none.toml", "none.toml"),
    # one file for two purposes
    ("report runs/a --out o --markdown ./o", "--out and --markdown are the same file"),
    ("report runs/a --out o --png o", "would overwrite each other"),
    ("report runs/a --out dir/loss.png --png dir", "would overwrite each other"),
    ("report runs/a --png file", "--png file is a file"),
    ("compare runs/a --json link --plot target.png", "--json and --plot are the same file"),
    ("bench step quickstart --json o --trace o", "--json and --trace are the same file"),
    ("plan quickstart --prices prices.toml --json prices.toml", "--prices and --json are the same file"),
    ("compare-samples a b --prompt-file p.md --out p.md", "--prompt-file and --out are the same file"),
    # files that restomod needs
    ("report runs/a --out runs/a/config.json", "runs/a/config.json would overwrite a file"),
    ("compare runs/a --json runs/b/metrics.jsonl", "would overwrite a file"),
    ("verdict runs/a --json runs/a/data.json", "would overwrite a file"),
    ("eval runs/a --tasks validation --json runs/a/config.json", "would overwrite a file"),
    # flags without an effect
    ("report runs/a --error-analysis-tokens 5", "--error-analysis-tokens has no effect without --error-analysis"),
    ("report runs/a --device cpu", "--device has no effect without --error-analysis"),
    ("plan quickstart --optim.muon-lr 1", "--optim.muon-lr has no effect with --optim.optimizer adamw"),
    ("train quickstart --optim.cooldown=0.2", "--optim.cooldown has no effect with --optim.decay cosine"),
    ("train quickstart --model.rope_theta 5", "--model.rope-theta has no effect with --model.positions learned"),
    ("train quickstart --data.glob *", "--data.glob has no effect with --data.source python-stdlib"),
    ("train quickstart --mix a:1,b:1 --data.val-fraction 0.1", "--data.val-fraction has no effect with --data.mix"),
    ("train quickstart --eval-limit 5", "--eval-limit has no effect without --eval-tasks"),
    ("train quickstart --keep-checkpoints 0 --keep-every 5", "--keep-every has no effect with --keep-checkpoints"),
    ("train --resume runs/a --optim.muon-lr 1", "--optim.muon-lr has no effect"),
    ("bench step quickstart --data.path file --data.source text", "has no effect with --tokens synthetic"),
    ("sweep quickstart --grid optim.lr=1,2 --search-seed 3", "--search-seed has no effect with --grid"),
    ("sweep quickstart --grid optim.lr=1,2 --optim.muon-lr 3", "--optim.muon-lr has no effect"),
    # --- analysis and sweeps
    ("compare nowhere", "nowhere: no such run"),
    ("compare runs/a --price 0", "--price is 0.0"),
    ("compare runs/a --target-loss nan", "--target-loss is nan"),
    ("compare runs/a --x dollars", "--x dollars needs --price"),
    ("compare runs/a --x epochs", "--x", "epochs"),
    ("compare runs/a --plot a.pdf", "a.pdf", ".png"),
    ("compare runs/a --json no/such/o.json", "there is no folder no/such"),
    ("compare runs/a --markdown runs/b", "runs/b is a folder"),
    ("compare runs/a runs/a", "runs/a is given twice"),
    ("compare runs/a --baseline nowhere", "nowhere: no such run"),
    ("verdict nowhere", "nowhere: no such run"),
    ("verdict runs/a --json no/such/o.json", "there is no folder no/such"),
    ("verdict runs/a --wieghts", "--weights"),
    ("report runs/aa", "runs/aa: no such run; did you mean 'a'?"),
    ("report runs", "is not a run"),
    ("report runs/a --out no/r.html", "--out no/r.html", "no folder no"),
    ("report runs/a --markdown runs", "--markdown runs is a folder"),
    ("report runs/a --price nan", "--price is nan"),
    ("report runs/a --watts -1", "--watts is -1.0"),
    ("sweep quickstart", "--grid", "--random", "--tpe"),
    ("sweep quickstart --grid optim.lr=1 --tpe seed=1,2 --trials 1", "--grid", "--random", "--tpe"),
    ("sweep quickstart --random optim.lr=1e-3..1e-2", "--random needs --trials N"),
    ("sweep quickstart --grid optim.lr=1,2 --trials 2", "--trials belongs to"),
    ("sweep quickstart --grid optim.lr=1,2 --optim.lr 3", "optim.lr is swept and fixed by --optim.lr"),
    ("sweep quickstart --grid optim.lr=1 optim.lr=2", "optim.lr is swept twice"),
    ("sweep quickstart --grid seed=1,2 --seeds 2", "--seeds"),
    ("sweep quickstart --grid optim.lr=1 --max-dollars 3", "--max-dollars", "--price"),
    ("sweep quickstart --grid optim.lr=1 --max-hours 0", "--max-hours is 0.0"),
    ("sweep quickstart --grid optim.lr=1 --steps 0", "steps is 0"),
    ("sweep quickstart --grid optim.lr=1 --stepz 1", "--stepz"),
    ("sweep quickstart --grid optim.lr=1 --data.val-fraction 0", "--data.val-fraction"),
    ("compare-samples a b --temperature 0 --top-k 3", "--top-k has no effect with --temperature 0"),
    ("sample model --temperature 0 --top-p 0.5", "--top-p has no effect with --temperature 0"),
    ("inspect model --plots ''", "--plots is empty"),
    ("inspect model --diff ''", "--diff is empty"),
    ("prepare text.txt --out o --hub-config x", "--hub-config has no effect"),
    ("prepare text.txt --out o --hub-split=test", "--hub-split has no effect"),
    ("prepare text.txt --out o --hub-revision x", "--hub-revision has no effect"),
    ("prepare text.txt --out o --keep-downloads", "--keep-downloads has no effect"),
    ("prepare text.txt --out o --glob *.md", "--glob has no effect"),
    ("prepare python-stdlib --out o --text_column x", "--text-column has no effect"),
    ("prepare python-stdlib --out o --separator x", "--separator has no effect"),
]
BOXED = [  # errors in a box of tyro, or after a progress line
    *(line for line, *_ in BAD if line.startswith(("sample ", "train quickstart --"))),
    "sample",
    "TRAIN --data.path nowhere.txt",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Valid and damaged runs, models and texts. A rejected command does not change them, so all tests share them."""
    folder = tmp_path_factory.mktemp("made")
    texts = {
        "text.txt": "A text that is long enough to be trained on.\n" * 200,
        "short.txt": "Too short.",  # 3 tokens
        "empty.txt": "",
        "blank.txt": "\n",
        "file": "do not overwrite",
        "dir/notes.txt": "keep me",
        "damaged/json/config.json": "{",
        "damaged/missing/config.json": '{"steps": 1}',
        "damaged/unknown/config.json": '{"stepps": 1}',
        "p.md": "a prompt\n",
        "prices.toml": '[[price]]\nprovider=""\ngpu=""\ngpus=1\ndollars_per_gpu_hour=1\ndate=2026-01-01\nsource=""\n',
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (folder / "link").symlink_to("target.png")
    (folder / "runs" / "quickstart" / "checkpoints").mkdir(parents=True)
    (folder / "data").mkdir()  # cache of texts, which a rejected command may write to
    make_run(folder / "runs" / "a")
    make_run(folder / "runs" / "b")
    for name, vocab_size in (("model", 50257), ("hostile", 50257), ("other", 97)):
        (folder / name).mkdir()
        config = ModelConfig(n_layer=1, n_head=1, n_embd=4, n_positions=8, vocab_size=vocab_size)
        save_model(random_model(config), folder / name)
    weights = folder / "hostile" / "model.safetensors"
    save_file(load_file(weights) | {"\x1b[2J\x07a\nb": torch.zeros(1)}, weights)
    return folder


Refused = Callable[[str], str]


@pytest.fixture
def refused(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run an invalid command line, check exit code, message and files, and return the message."""
    monkeypatch.chdir(made)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def files() -> dict[str, int]:
        paths = [path for path in made.rglob("*") if path.relative_to(made).parts[0] != "data"]
        return {str(path): 0 if path.is_dir() else path.lstat().st_mtime_ns for path in paths}

    def run(line: str) -> str:
        before = files()
        for name, words in SHORT.items():
            line = line.replace(name, words)
        assert main(shlex.split(line)) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"restomod: error: .+\n", error)
        assert not INTERNAL.search(error)
        assert not re.search(r"did you mean [^?]* ", error), "several suggestions"
        assert files() == before
        return error

    return run


@pytest.mark.parametrize(("line", "words"), [(line, words) for line, *words in BAD], ids=[line for line, *_ in BAD])
def test_an_error_is_one_line_with_the_expected_words(line: str, words: list[str], refused: Refused) -> None:
    error = refused(line)
    assert [word for word in words if word not in error] == [], error


@pytest.mark.parametrize("columns", ["40", "200"])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_the_error_is_the_same_in_every_terminal(
    encoding: str, columns: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The box of tyro depends on the width of the terminal and on its encoding."""
    for line in BOXED:
        usual = refused(line)
        with monkeypatch.context() as patch:
            patch.setenv("COLUMNS", columns)
            patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
            assert refused(line) == usual, line


@pytest.mark.parametrize("command", ["", "train", "plan", "bench", "sweep"])
def test_a_command_without_arguments_prints_its_usage(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    assert capsys.readouterr().out.startswith(f"usage: restomod {command}")


# --- odd values of every flag ------------------------------------------------------------------------------------

ODD = (
    "x",
    "",
    "-1",
    "0",
    "nan",
    "-inf",
    "9" * 30,
    "9" * 5000,
    "-x",
    "1.5",
    "é\udce9",
    "--",
    "no/such/thing",
    "/dev/null",
)
COMMANDS: dict[str, tuple[type, tuple[str, ...]]] = {  # arguments before the flag; the command then fails or is fast
    "report": (ReportArguments, ("runs/a",)),
    "compare": (CompareArguments, ("runs/a", "runs/b")),
    "verdict": (VerdictArguments, ("runs/a",)),
    "watch": (WatchArguments, ("runs/a",)),
    "prepare": (PrepareArguments, ("nowhere", "--out", "o")),
    "compare-samples": (CompareSamplesArguments, ("dir", "dir")),
    "doctor": (DoctorArguments, ()),
    "bench": (BenchArguments, ("step", "quickstart", "--micro-batch", "3")),
    "sweep": (SweepArguments, ("quickstart", "--out", "file")),
    "train": (TrainArguments, ("quickstart", "--data.source", "text", "--data.path", "nowhere")),
    "plan": (PlanArguments, ("quickstart", "--gpus", "0")),
}
SKIPPED = {"then", "error_analysis"}  # runs a shell command; needs a checkpoint

Answer = Callable[..., tuple[int, str]]


def flags_of(cls: Any, prefix: str = "") -> Iterator[str]:
    """Yield the flags of a dataclass."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        kind = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
        if dataclasses.is_dataclass(kind):
            yield from flags_of(kind, "" if kind is not hint else f"{prefix}{name}.")
        elif name not in SKIPPED and "Positional" not in repr(hint):
            yield f"--{prefix}{name}".replace("_", "-")


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Answer:
    """Run a command line in a folder with two runs and a few files; return exit code and standard error."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "b")
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").write_text("do not overwrite")
    monkeypatch.setattr(restomod.analysis.report.watch, "watch", lambda *a: None)
    monkeypatch.setattr(restomod.checks.doctor, "check_machine", lambda *a: iter(()))
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def run(*arguments: str) -> tuple[int, str]:
        code = main(list(arguments))
        shown = capsys.readouterr()
        assert code in (0, 1, 2, 75)
        assert code != 2 or "usage: " in shown.out or shown.err.startswith("restomod: error: ")
        assert shown.err.count("\n") == (code == 2 and "usage: " not in shown.out)
        assert not INTERNAL.search(shown.err)
        assert {path: path.read_bytes() for path in kept if path.exists()} == kept
        return code, shown.err

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_odd_values_of_every_flag(command: str, answer: Answer) -> None:
    cls, before = COMMANDS[command]
    for flag in flags_of(cls):
        if command in ("plan", "train", "bench", "sweep") and flag in RUN_FLAGS - {"--steps", "--seed"}:
            continue  # these are tested with `plan` only
        for value in ODD:
            code, said = answer(command, *before, flag, value)
            if flag in PATHS and value == "":
                assert (code, said) == (2, f"restomod: error: {flag} is empty; give it a value or omit it\n")
        answer(command, *before, flag)


PATHS = {"--out", "--json", "--markdown", "--png", "--plot", "--trace", "--prices", "--baseline", "--prompt-file"}
RUN_FLAGS = set(flags_of(RunConfig))


@pytest.mark.parametrize("flag", sorted(RUN_FLAGS))
def test_odd_values_of_every_setting(flag: str, answer: Answer) -> None:
    for value in ("x", "", "-1", "9" * 30, "-x"):
        answer("plan", "quickstart", "--gpus", "0", flag, value)


@pytest.mark.parametrize(
    "command", ["report", "compare", "verdict", "watch", "data", "prepare", "check", "train", "plan"]
)
def test_odd_arguments_of_every_command(command: str, answer: Answer) -> None:
    for value in (*ODD, "dir", "file"):
        if command != "check" or value != "--":
            answer(command, value)


def test_a_trial_accepts_flags_that_only_other_trials_use(answer: Answer) -> None:
    grid = ("--grid", "optim.optimizer=adamw,muon", "--optim.muon-lr", "0.1")
    assert "another" not in answer("sweep", "quickstart", *grid, "--out", "file")[1]
    trial = Path("s/trials/000")
    trial.parent.mkdir(parents=True)
    (trial.parent.parent / "plan.json").write_text("{}")
    nothing = ("--data.source", "text", "--data.path", "nowhere", "--optim.muon-lr", "1")
    assert "nowhere: no such file" in answer("train", "quickstart", *nothing, "--out", str(trial))[1]


def test_values_may_begin_with_a_dash() -> None:
    flags = ["--sampling.prompts", "-a", "- b", "--- c", "--out", "-x", "--target-loss", "-1.5", "--data.cache=--d"]
    config, folder, _ = parse_arguments(["quickstart", *flags])
    assert config.sampling.prompts == ("-a", "- b", "--- c")
    assert (str(folder), config.target_loss, config.data.cache) == ("-x", -1.5, "--d")


def test_settings_that_cannot_change_on_resume_are_named_with_both_values(tmp_path: Path) -> None:
    config = dataclasses.replace(preset("quickstart"), steps=99)
    other = dataclasses.replace(config, seed=5, optim=dataclasses.replace(config.optim, lr=3.0, betas=(0.5, 0.9)))
    with pytest.raises(UserError) as caught:
        check_resumable(make_run(tmp_path / "r"), other, None)  # type: ignore[arg-type]
    said = str(caught.value)
    parts = ("optim.lr", "0.002", "3.0", "optim.betas", "[0.9, 0.95]", "[0.5, 0.9]", "seed", "1337", "5")
    assert [part for part in parts if part not in said] == []
    assert "warmup" not in said
    assert not INTERNAL.search(said)


def test_a_device_is_never_replaced_by_a_file(answer: Answer) -> None:
    for device in ("/dev/null", "/dev/stdout"):
        for line in ("compare runs/a --json", "report runs/a --markdown", "verdict runs/a --json"):
            assert answer(*line.split(), device)[0] in (0, 1)  # verdict: 1, the run is not healthy
        assert not os.path.isfile("/dev/null")
