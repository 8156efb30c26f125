"""The command line: each verb parses its flags and calls one function, imported when it is called."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeVar

import tyro

from restomod import __version__
from restomod.config import Device, Precision, PrepareConfig, RunConfig, SamplingConfig, require_seed
from restomod.errors import ReportedElsewhere, UserError, describe_os_error, did_you_mean
from restomod.presets import PRESETS, preset, summary

EXIT_CHECK_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_ABORTED = 130

STATUS_WORDS = {"pass": "passed", "warn": "to look at", "fail": "failed", "skip": "skipped"}

Arguments = TypeVar("Arguments")


@dataclasses.dataclass(frozen=True)
class ResumeArguments:
    config: Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True)
class TrainArguments(ResumeArguments):
    out: str
    """Folder of the run; it must not exist yet."""


@dataclasses.dataclass(frozen=True)
class SampleArguments:
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run (its newest checkpoint is used), a model folder, or a name on the Hugging Face hub, such as gpt2."""
    prompt: str = ""
    """Text to continue; empty starts a new document."""
    num_samples: int = 3
    """How many continuations."""
    max_tokens: int = 100
    """Length of each, in tokens."""
    temperature: float = 0.8
    """Below 1 sharpens the distribution, above 1 flattens it; 0 always takes the likeliest token."""
    top_k: int = 50
    """Sample among this many likeliest tokens (0: all)."""
    seed: int = 1337
    """The same seed gives the same text."""
    device: Device = "auto"
    """Where to compute. auto: CUDA, else MPS, else CPU."""
    precision: Precision = "auto"
    """Of the matrix products."""


@dataclasses.dataclass(frozen=True)
class InspectArguments:
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run, a model folder, a name on the Hugging Face hub, such as gpt2, or a preset (its initial weights)."""
    plots: str | None = None
    """Draw the weights into this folder as PNG files."""
    diff: str | None = None
    """Compare with this model instead, tensor by tensor; named like MODEL."""
    seed: int = 1337
    """Of a preset's initial weights."""


@dataclasses.dataclass(frozen=True)
class CheckArguments:
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = "gpt2-124m"
    """A preset (its initial weights), a run, a model folder, or a name on the Hugging Face hub, such as gpt2."""
    seed: int = 1337
    """Of a preset's initial weights."""
    device: Device = "auto"
    """Where to compute. auto: CUDA, else MPS, else CPU."""
    precision: Precision = "auto"
    """Of the matrix products."""


@dataclasses.dataclass(frozen=True)
class PrepareArguments:
    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE ...")]
    """Text to read, in this order: files and folders (text, .jsonl or .parquet, also .gz, .xz or .zst); on the hub
    fineweb-edu, fineweb, hf:OWNER/NAME, or token shards pretokenized:OWNER/NAME; python-stdlib; tinyshakespeare."""
    config: Annotated[PrepareConfig, tyro.conf.arg(name="")]
    out: str
    """Folder of the token shards; what an interrupted run left there is gone on with."""
    workers: int = 0
    """Files to work on at once, each in a process of its own (0: one per processor)."""


@dataclasses.dataclass(frozen=True)
class DataArguments:
    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A folder that `restomod prepare` made, or one of published shards (llm.c's .bin, build-nanogpt's .npy)."""
    verify: bool = False
    """Read every byte and compare its SHA-256 with the manifest."""


def train(arguments: list[str]) -> int:
    """Train a preset, or go on with a run."""
    try:
        parsed = _train_arguments(arguments)
    except UserError as e:
        if os.environ.get("RANK", "0") == "0":
            raise
        raise ReportedElsewhere from e  # torchrun starts every process with the same arguments
    if isinstance(parsed, int):
        return parsed
    config, folder, resume = parsed

    from restomod.train.loop import train as run

    return run(config, folder, resume)


def _train_arguments(arguments: list[str]) -> tuple[RunConfig, Path, bool] | int:
    """Configuration, folder, and whether to resume; an exit code where only help was asked for."""
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--resume=") else [a])]
    arguments = [re.sub(r"^--mix(?==|$)", "--data.mix", a) for a in arguments]
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, PRESETS))
        print("usage: restomod train PRESET [FLAGS]          start a run in runs/PRESET (or --out FOLDER)")
        print("       restomod train --resume RUN [FLAGS]    go on with a run from its newest checkpoint")
        print("       restomod train PRESET --help           every flag, with the preset's values\n")
        print("presets:")
        for name in PRESETS:
            print(f"  {name:<{width}}  {summary(name)}")
        return 0 if arguments else EXIT_USER_ERROR

    if "--resume" in arguments:
        at = arguments.index("--resume")
        if at + 1 == len(arguments) or arguments[at + 1].startswith("-"):
            raise UserError("--resume needs the folder of a run, for example --resume runs/quickstart")
        folder, rest = Path(arguments[at + 1]), arguments[:at] + arguments[at + 2 :]
        if rest and not rest[0].startswith("-"):
            raise UserError(f"--resume takes the preset from the run; leave {rest[0]!r} out")
        from restomod.train.run import read_config

        resumed = ResumeArguments(read_config(folder))
        config = _parse(ResumeArguments, resumed, rest, f"restomod train --resume {folder}").config
    else:
        name, rest = arguments[0], arguments[1:]
        if name.startswith("-"):
            raise UserError(f"name a preset first: restomod train PRESET {' '.join(arguments)} (restomod train --help)")
        fresh = TrainArguments(preset(name), out=f"runs/{name}")
        parsed = _parse(TrainArguments, fresh, rest, f"restomod train {name}")
        config, folder = parsed.config, Path(parsed.out)
    return config, folder, "--resume" in arguments


def sample(arguments: list[str]) -> int:
    """Let a run's model, or any GPT-2, continue a text."""
    parsed = _parse(SampleArguments, tyro.MISSING_NONPROP, arguments, "restomod sample")
    if parsed.num_samples < 1:
        raise UserError(f"--num-samples is {parsed.num_samples}; it must be at least 1")
    require_seed("--seed", parsed.seed)
    settings = SamplingConfig(max_tokens=parsed.max_tokens, temperature=parsed.temperature, top_k=parsed.top_k)

    from restomod.generate import sample as run

    texts = run(
        parsed.model,
        parsed.prompt,
        parsed.num_samples,
        settings,
        parsed.seed,
        parsed.device,
        parsed.precision,
    )
    for i, text in enumerate(texts, 1):
        print(f"--- {i} of {len(texts)} ---\n{parsed.prompt}{text}")
    return 0


def prepare(arguments: list[str]) -> int:
    """Turn text into a verified folder of token shards."""
    parsed = _parse(PrepareArguments, tyro.MISSING_NONPROP, arguments, "restomod prepare")
    if not parsed.sources:
        raise UserError("name what to prepare: restomod prepare SOURCE --out DIR (restomod prepare --help)")
    if parsed.workers < 0:
        raise UserError(f"--workers is {parsed.workers}; it must be 0 or more")

    from restomod.data.pipeline import prepare_and_report

    workers = parsed.workers or os.cpu_count() or 1
    with _stopped_by_signals():
        prepare_and_report(
            parsed.sources, parsed.config, Path(parsed.out), workers, report=functools.partial(print, flush=True)
        )
    return 0


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM is as Ctrl-C, and what breaks because other processes got the signal too is no error of its own."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Exception:
        if received:
            raise KeyboardInterrupt from None
        raise
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def data(arguments: list[str]) -> int:
    """Show what is in a folder of token shards."""
    parsed = _parse(DataArguments, tyro.MISSING_NONPROP, arguments, "restomod data")

    from restomod.data.overview import overview

    for line in overview(Path(parsed.folder), parsed.verify):
        print(line)
    return 0


def inspect(arguments: list[str]) -> int:
    """Show a model's weights in numbers and pictures, or compare two models."""
    parsed = _parse(InspectArguments, tyro.MISSING_NONPROP, arguments, "restomod inspect")
    require_seed("--seed", parsed.seed)
    if parsed.plots is not None and parsed.diff is not None:
        raise UserError("--plots draws one model and --diff compares two: give one of them")

    from restomod.inspection import compare
    from restomod.inspection import inspect as run

    if parsed.diff is not None:
        lines = compare(parsed.model, parsed.diff, parsed.seed)
    else:
        lines = run(parsed.model, parsed.seed, Path(parsed.plots) if parsed.plots is not None else None)
    for line in lines:
        print(line)
    return 0


def check(arguments: list[str]) -> int:
    """Check that a preset or a model is a sound GPT-2 that can learn."""
    parsed = _parse(CheckArguments, tyro.MISSING_NONPROP, arguments, "restomod check")
    require_seed("--seed", parsed.seed)

    from restomod.train.check import check as run
    from restomod.train.console import Display

    display, statuses = Display(), []
    for verdict in run(parsed.model, parsed.seed, parsed.device, parsed.precision):
        display.verdict(verdict)
        statuses.append(verdict.status)
    counts = [f"{statuses.count(s)} {word}" for s, word in STATUS_WORDS.items() if s in statuses]
    display.line(f"{parsed.model}: {', '.join(counts)}")
    return EXIT_CHECK_FAILED if "fail" in statuses else 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "prepare": prepare,
    "data": data,
    "train": train,
    "sample": sample,
    "inspect": inspect,
    "check": check,
}


def _parse(cls: type[Arguments], default: Any, arguments: list[str], program: str) -> Arguments:
    """Fill ``cls`` from flags; what tyro finds wrong becomes one line."""
    problem = io.StringIO()
    columns = os.environ.get("COLUMNS")
    if not {"-h", "--help"} & set(arguments):
        os.environ["COLUMNS"] = "10000"  # an error is not to be wrapped: it becomes one line
    try:
        with contextlib.redirect_stderr(problem):
            return tyro.cli(cls, default=default, args=arguments, prog=program, description="")
    except SystemExit as e:
        if e.code in (0, None):
            raise
        raise UserError(f"{_one_line(problem.getvalue())} ({program} --help lists the flags)") from None
    finally:
        os.environ.pop("COLUMNS", None)
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _one_line(box: str) -> str:
    """The message of tyro's boxed error, and its nearest suggestion, as one line."""
    rows = [row.strip("│ ") for row in box.splitlines()[1:-1]]
    if rows and set(rows[0]) == {"-"}:  # where standard output is not UTF-8, a rule stands under the title
        rows = rows[1:]
    rule = [i for i, row in enumerate(rows) if set(row) in ({"─"}, {"-"})]
    message = " ".join(row.strip() for row in rows[: rule[0] if rule else None]).rstrip(".")
    message = message.removeprefix("Error parsing ")
    suggested = re.search(r"Perhaps you meant:\s*(--\S+)", " ".join(rows))
    return f"{message}; did you mean {suggested[1]}?" if suggested else message


def _printable(message: str) -> str:
    """Without control characters: a name that a downloaded file holds must not steer the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: restomod VERB [ARGUMENTS]     restomod VERB --help tells more\n\nverbs:")
        for name, verb in VERBS.items():
            print(f"  {name:<8}  {verb.__doc__}")
        print("\n  --version   print the version\n  --debug     show the traceback of an error")
        return 0 if arguments else EXIT_USER_ERROR
    if arguments[0] == "--version":
        print(f"restomod {__version__}")
        return 0
    if arguments[0] not in VERBS:
        raise UserError(f"unknown verb {arguments[0]!r}{did_you_mean(arguments[0], VERBS)}")
    return VERBS[arguments[0]](arguments[1:])


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 2 with one line on stderr for whatever the user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an output that is not UTF-8 lacks characters such as "…"
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # a reader that has left is noticed here and not when Python exits
    except BrokenPipeError:  # the reader of a pipe has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ReportedElsewhere:
        return EXIT_USER_ERROR
    except (UserError, OSError) as e:
        if debug:
            raise
        message = str(e) if isinstance(e, UserError) else describe_os_error(e)
        print(f"restomod: error: {_printable(' '.join(message.split()))}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("restomod: stopped", file=sys.stderr)
        return EXIT_ABORTED
