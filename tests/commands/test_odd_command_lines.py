"""Every flag of every verb with odd values: one line, exit code 2, no word of the parser's own, nothing lost.

What is tried follows from the flags themselves, so a new flag is tried too.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import restomod.analysis.report.serve
import restomod.checks.doctor
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
from restomod.config.run import RunConfig
from tests.runs.made_runs import make_run

INTERNAL = re.compile(
    r"\{None\}|INT\b|(Optim|Data|Model|Sampling|Run)Config\(|argparse|instantiated|tyro|<class|typing\.|NoneType|"
    r"invalid literal|could not convert|\ue000|ue000|Traceback"
)
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
VERBS: dict[str, tuple[type, tuple[str, ...]]] = {  # what comes before a flag; everything else is refused, or quick
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
SKIPPED = {"then", "examine"}  # a command of the shell; needs a checkpoint

Answer = Callable[..., tuple[int, str]]


def flags_of(cls: Any, prefix: str = "") -> Iterator[str]:
    """The flags that a dataclass stands for."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        kind = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
        if dataclasses.is_dataclass(kind):
            yield from flags_of(kind, "" if kind is not hint else f"{prefix}{name}.")
        elif name not in SKIPPED and "Positional" not in repr(hint):
            yield f"--{prefix}{name}".replace("_", "-")


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Answer:
    """Runs a command line among two runs and a few files; returns its exit code and what it says on stderr."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "b")
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").write_text("not to be lost")
    monkeypatch.setattr(restomod.analysis.report.serve, "watch", lambda *a: None)
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


@pytest.mark.parametrize("verb", VERBS)
def test_odd_values_of_every_flag(verb: str, answer: Answer) -> None:
    cls, before = VERBS[verb]
    for flag in flags_of(cls):
        if verb in ("plan", "train", "bench", "sweep") and flag[2:].replace("-", "_") in RUN_FIELDS - {"steps", "seed"}:
            continue  # of which one verb has to do with
        for value in ODD:
            answer(verb, *before, flag, value)
        answer(verb, *before, flag)


RUN_FIELDS = {flag[2:].replace("-", "_") for flag in flags_of(RunConfig)}


@pytest.mark.parametrize("flag", sorted(f"--{name.replace('_', '-')}" for name in RUN_FIELDS))
def test_odd_values_of_every_setting(flag: str, answer: Answer) -> None:
    for value in ("x", "", "-1", "9" * 30, "-x"):
        answer("plan", "quickstart", "--gpus", "0", flag, value)


@pytest.mark.parametrize("verb", ["report", "compare", "verdict", "watch", "data", "prepare", "check", "train", "plan"])
def test_odd_arguments_of_every_verb(verb: str, answer: Answer) -> None:
    for value in (*ODD, "dir", "file"):
        if verb != "check" or value != "--":
            answer(verb, value)


@pytest.mark.parametrize("verb", VERBS)
def test_no_path_is_empty(verb: str, answer: Answer) -> None:
    cls, before = VERBS[verb]
    paths = {"--out", "--json", "--markdown", "--png", "--plot", "--trace", "--offers", "--baseline", "--prompt-file"}
    for flag in paths & set(flags_of(cls)):
        code, said = answer(verb, *(part for part in before if part not in ("--micro-batch", "3")), flag, "")
        assert (code, said) == (2, f"restomod: error: {flag} is empty; give it a value or leave it out\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sweep quickstart --grid seed=1,2 --seeds -2", "--seeds is -2"),
        ("report runs/a --price -2", "--price is -2.0"),
        ("compare-samples dir dir --prompt -hello", "dir is neither a run nor"),
        ("compare-samples dir dir --prompt --hello", "--flag=VALUE"),
        ("compare-samples dir dir --out -x", "--out -x"),
        ("train quickstart --data.source text --data.path -x", "-x: no such file"),
        ("plan quickstart --optim.lr -inf", "--optim.lr: '-inf'"),
        ("plan quickstart --micro-batch x", "--micro-batch: 'x' is not a whole number or None"),
        ("plan quickstart --target-loss x", "--target-loss: 'x' is not a number or None"),
        ("plan quickstart --optim.betas a b", "--optim.betas: 'a', 'b' are not 2 numbers"),
        ("plan quickstart --model.n-embd 999999999999999999", "at most"),
        # one file for two things
        ("report runs/a --out o --markdown ./o", "--out and --markdown are the same file"),
        ("report runs/a --out o --png o", "would overwrite each other"),
        ("report runs/a --out dir/loss.png --png dir", "would overwrite each other"),
        ("report runs/a --png file", "--png file is a file"),
        ("compare runs/a --json link --plot target.png", "--json and --plot are the same file"),
        ("bench step quickstart --json o --trace o", "--json and --trace are the same file"),
        ("plan quickstart --offers offers.toml --json offers.toml", "--offers and --json are the same file"),
        ("compare-samples a b --prompt-file p.md --out p.md", "--prompt-file and --out are the same file"),
        ("prepare dir --out ./dir", "--out ./dir is also a source"),
        # files that restomod needs
        ("report runs/a --out runs/a/config.json", "runs/a/config.json would overwrite a file"),
        ("compare runs/a --json runs/b/metrics.jsonl", "would overwrite a file"),
        ("verdict runs/a --json runs/a/data.json", "would overwrite a file"),
        ("eval runs/a --tasks validation --json runs/a/config.json", "would overwrite a file"),
        # flags without an effect
        ("report runs/a --examine-tokens 5", "--examine-tokens has no effect without --examine"),
        ("report runs/a --device cpu", "--device has no effect without --examine"),
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
        ("compare-samples a b --temperature 0 --top-k 3", "--top-k has no effect with --temperature 0"),
    ],
)
def test_the_line_names_what_is_wrong(line: str, said: str, answer: Answer) -> None:
    Path("link").symlink_to("target.png")
    Path("offers.toml").write_text('[[offer]]\nprovider="M"\ngpu="a100"\ngpus=1\nprice=1\ndate=2026-01-01\nsource=""\n')
    Path("p.md").write_text("a prompt\n")
    before = {path for path in Path().rglob("*") if "data" not in path.parts}
    code, error = answer(*line.split())
    assert code == 2
    assert said in error
    assert {path for path in Path().rglob("*") if "data" not in path.parts} == before


def test_a_flag_that_other_trials_need_is_no_mistake(answer: Answer) -> None:
    grid = ("--grid", "optim.optimizer=adamw,muon", "--optim.muon-lr", "0.1")
    assert "another" not in answer("sweep", "quickstart", *grid, "--out", "file")[1]
    trial = Path("s/trials/000")
    trial.parent.mkdir(parents=True)
    (trial.parent.parent / "plan.json").write_text("{}")
    nothing = ("--data.source", "text", "--data.path", "nowhere", "--optim.muon-lr", "1")
    assert "nowhere: no such file" in answer("train", "quickstart", *nothing, "--out", str(trial))[1]


def test_values_keep_their_dashes() -> None:
    flags = ["--sampling.prompts", "-a", "- b", "--- c", "--out", "-x", "--target-loss", "-1.5", "--data.cache=--d"]
    config, folder, _ = parse_arguments(["quickstart", *flags])
    assert config.sampling.prompts == ("-a", "- b", "--- c")
    assert (str(folder), config.target_loss, config.data.cache) == ("-x", -1.5, "--d")


def test_what_cannot_change_on_resuming_is_named_with_both_values(tmp_path: Path) -> None:
    from restomod.config.presets import preset
    from restomod.config.run import OptimConfig
    from restomod.data.dataset import Dataset
    from restomod.runs.folder import check_resumable
    from restomod.utils.errors import UserError

    folder = make_run(tmp_path / "r")
    config = dataclasses.replace(preset("quickstart"), steps=99)
    other = dataclasses.replace(config, seed=5, optim=dataclasses.replace(config.optim, lr=3.0, betas=(0.5, 0.9)))
    assert isinstance(other.optim, OptimConfig)
    dataset: Dataset = None  # type: ignore[assignment]
    with pytest.raises(UserError) as caught:
        check_resumable(folder, other, dataset)
    said = str(caught.value)
    for part in ("optim.lr", "0.002", "3.0", "optim.betas", "[0.9, 0.95]", "[0.5, 0.9]", "seed", "1337", "5"):
        assert part in said, part
    assert "warmup" not in said
    assert not INTERNAL.search(said)


def test_a_device_is_never_replaced_by_a_file(answer: Answer) -> None:
    for device in ("/dev/null", "/dev/stdout"):
        for line in ("compare runs/a --json", "report runs/a --markdown", "verdict runs/a --json"):
            assert answer(*line.split(), device)[0] in (0, 1)  # a verdict of 1: not healthy
        assert not os.path.isfile("/dev/null")
