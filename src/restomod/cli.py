"""The command line: each verb parses its flags and calls one function, imported when it is called."""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import tyro

from restomod import __version__
from restomod.commands.flags import (
    CompareSamplesArguments,
    DataArguments,
    EvalArguments,
    GoOnArguments,
    InspectArguments,
    PrepareArguments,
    SampleArguments,
    TrainArguments,
)
from restomod.commands.parsing import ignored_by_run, is_flag, parse, parse_run, refuse_ignored
from restomod.config.model import require_size
from restomod.config.presets import PRESETS, SIZES, is_preset, preset, preset_summary
from restomod.config.run import RunConfig, require_seed
from restomod.utils.errors import (
    EXIT_USER_ERROR,
    UserError,
    did_you_mean,
    reason,
    reported_once,
)
from restomod.utils.output import open_missing, raw_stream, run_guarded
from restomod.utils.then import and_then, take_command

IGNORED_BY_GREEDY = {"--top-k": "with --temperature 0", "--top-p": "with --temperature 0"}
NEEDS_LESS = {  # what needs less memory, by verb
    "train": "lower --micro-batch, --batch-tokens or --sequence-length, or train a smaller model",
    "bench": "lower --micro-batch, --batch-tokens or --sequence-length",
    "plan": "lower --micro-batch, --batch-tokens or --sequence-length",
    "eval": "lower --batch or --context",
    "sample": "give fewer prompts, or lower --num-samples or --max-tokens",
    "compare-samples": "give fewer prompts, or lower --max-tokens",
    "prepare": "lower --workers",
    "report": "lower --error-analysis-tokens, or report fewer runs",
    "": "end other programs, or use a machine with more memory",
}


def train(arguments: list[str]) -> int:
    """Train a preset, or go on with a run."""
    with reported_once():
        parsed = _train_arguments(arguments)
    if isinstance(parsed, int):
        return parsed
    config, folder, resume = parsed

    from restomod.train.loop import train as run

    return run(config, folder, resume)


def _train_arguments(arguments: list[str]) -> tuple[RunConfig, Path, bool] | int:
    """Configuration, folder, and whether to resume; an exit code where only help was asked for."""
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--resume=") else [a])]
    arguments = [re.sub(r"^--(mix|separator)(?==|$)", r"--data.\1", a) for a in arguments]
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, PRESETS))
        print("usage: restomod train PRESET [FLAGS]          start a run in runs/PRESET (or --out FOLDER)")
        print("       restomod train --resume RUN [FLAGS]    go on with a run from its newest checkpoint")
        print("       restomod train PRESET --help           every flag, with the preset's values\n")
        print("presets:")
        for name in PRESETS:
            print(f"  {name:<{width}}  {preset_summary(name)}")
        print(f"  {'|'.join(SIZES)}-dN  the same with N layers, 64 N wide, and the learning rates that belong to it")
        return 0 if arguments else EXIT_USER_ERROR

    if "--resume" in arguments:
        at = arguments.index("--resume")
        if arguments[at + 1 : at + 2] in ([], [""]) or is_flag(arguments[at + 1]):
            raise UserError("--resume needs the folder of a run, for example --resume runs/quickstart")
        folder, rest = Path(arguments[at + 1]), arguments[:at] + arguments[at + 2 :]
        if rest and not rest[0].startswith("-"):
            raise UserError(f"--resume takes the preset from the run; leave {rest[0]!r} out")
        from restomod.config.serialize import read_config

        resumed = GoOnArguments(read_config(folder))
        config = parse(GoOnArguments, resumed, rest, f"restomod train --resume {folder}").config
        refuse_ignored(rest, ignored_by_run(config))
    else:
        name, rest = arguments[0], arguments[1:]
        if name.startswith("-"):
            raise UserError(f"name a preset first: restomod train PRESET {' '.join(arguments)} (restomod train --help)")
        fresh = TrainArguments(preset(name), out=f"runs/{name}")
        parsed = parse_run(fresh, rest, f"restomod train {name}")
        config, folder = parsed.config, Path(parsed.out)
        of_sweep = (folder.parent.parent / "plan.json").exists()  # other trials may need the flags that all share
        refuse_ignored(rest, {} if of_sweep else ignored_by_run(config))
    return config, folder, "--resume" in arguments


def sample(arguments: list[str]) -> int:
    """Let a run's model, or any GPT-2, continue texts."""
    parsed = parse(SampleArguments, tyro.MISSING_NONPROP, arguments, "restomod sample")
    require_size("--num-samples", parsed.num_samples, most=10**6)
    refuse_ignored(arguments, IGNORED_BY_GREEDY if parsed.temperature == 0 else {})
    settings, n = parsed.settings(), parsed.num_samples

    from restomod.generate.text import choose_prompts, streamed
    from restomod.generate.text import sample_texts as run

    prompts = choose_prompts(parsed.prompt, parsed.prompt_file, ("",))
    terminal, count = sys.stdout.isatty(), len(prompts) * n
    how = parsed.model, prompts, n, settings, parsed.seed, parsed.device, parsed.precision
    pieces: Iterable[Iterable[str]]
    if parsed.stream or (terminal and count == 1):
        pieces = streamed(*how)
    else:
        pieces = ([text] for texts in run(*how) for text in texts)
    for i, text in enumerate(pieces):
        print(f"--- {i + 1} of {count} ---")
        for piece in itertools.chain([prompts[i // n]], text):
            print(piece, end="", flush=True, file=sys.stdout if terminal else raw_stream(sys.stdout))
        print()
    return 0


def compare_samples(arguments: list[str]) -> int:
    """Show two models' continuations of the same texts side by side."""
    parsed = parse(CompareSamplesArguments, tyro.MISSING_NONPROP, arguments, "restomod compare-samples")
    refuse_ignored(arguments, IGNORED_BY_GREEDY if parsed.temperature == 0 else {})
    settings = parsed.settings()

    from restomod.generate.compare import DEFAULT_PROMPTS, as_table, report_writer
    from restomod.generate.compare import compare_samples as run
    from restomod.generate.text import choose_prompts

    write = report_writer(parsed.out, parsed.prompt_file)
    prompts = choose_prompts(parsed.prompt, parsed.prompt_file, DEFAULT_PROMPTS)
    compared = run(parsed.a, parsed.b, prompts, settings, parsed.seed, parsed.device, parsed.precision)
    print(as_table(compared), end="")
    write(compared)
    return 0


def evaluate(arguments: list[str]) -> int:
    """Measure a model: validation loss, HellaSwag, LAMBADA, ARC, PIQA, Winograd, your own questions."""
    with reported_once():
        parsed = parse(EvalArguments, tyro.MISSING_NONPROP, arguments, "restomod eval")
        for flag in ("limit", "context", "batch"):
            value = getattr(parsed, flag)
            if value is not None and value < 1:
                raise UserError(f"--{flag} is {value}; it must be at least 1")

    from restomod.evals.suite import evaluate_model
    from restomod.evals.tasks import task_names

    tasks = [] if parsed.tasks is None else task_names(parsed.tasks)
    tasks += [] if parsed.task is None else [parsed.task]

    return evaluate_model(
        parsed.model,
        tasks or None,
        parsed.limit,
        parsed.data,
        parsed.context,
        parsed.batch,
        parsed.device,
        parsed.precision,
        Path(parsed.json) if parsed.json is not None else None,
        Path(parsed.cache),
    )


def prepare(arguments: list[str]) -> int:
    """Turn text into a verified folder of token shards."""
    parsed = parse(PrepareArguments, tyro.MISSING_NONPROP, arguments, "restomod prepare")
    if not parsed.sources:
        raise UserError("name what to prepare: restomod prepare SOURCE --out DIR (restomod prepare --help)")
    if parsed.workers < 0:
        raise UserError(f"--workers is {parsed.workers}; it must be 0 or more")
    same = [source for source in parsed.sources if os.path.realpath(source) == os.path.realpath(parsed.out)]
    if same and os.path.isdir(same[0]):
        raise UserError(f"--out {parsed.out} is also a source; name another folder")
    if os.path.lexists(parsed.out) and not os.path.isdir(parsed.out):
        raise UserError(f"--out {parsed.out} is not a folder; name another")

    from restomod.data.prepare.units import ignored_by_sources

    refuse_ignored(arguments, ignored_by_sources(parsed.sources))

    from restomod.data.prepare.run import prepare_and_report, stopped_by_signals

    workers, out = parsed.workers, Path(parsed.out)
    if parsed.engine == "local":
        workers = workers or os.cpu_count() or 1
    report = functools.partial(print, flush=True)
    with stopped_by_signals():
        prepare_and_report(parsed.sources, parsed.config, out, workers, report, parsed.engine, parsed.slurm)
    return 0


def data(arguments: list[str]) -> int:
    """Show what is in a folder of token shards."""
    parsed = parse(DataArguments, tyro.MISSING_NONPROP, arguments, "restomod data")

    from restomod.data.summary import overview

    for line in overview(Path(parsed.folder), parsed.verify):
        print(line)
    return 0


def inspect(arguments: list[str]) -> int:
    """Show a model's weights in numbers and pictures, or compare two models."""
    parsed = parse(InspectArguments, tyro.MISSING_NONPROP, arguments, "restomod inspect")
    require_seed("--seed", parsed.seed)
    if parsed.seed != InspectArguments.seed and not any(is_preset(m) for m in (parsed.model, parsed.diff or "")):
        raise UserError("--seed sets the initial weights of a preset, and no preset is named; leave it out")
    if parsed.plots is not None and parsed.diff is not None:
        raise UserError("--plots draws one model and --diff compares two: give one of them")

    from restomod.analysis.weights.report import compare_weights
    from restomod.analysis.weights.report import inspect_weights as run

    if parsed.diff is not None:
        lines = compare_weights(parsed.model, parsed.diff, parsed.seed)
    else:
        lines = run(parsed.model, parsed.seed, Path(parsed.plots) if parsed.plots is not None else None)
    for line in lines:
        print(line)
    return 0


def _later(module: str, meaning: str) -> Callable[[list[str]], int]:
    """A verb whose module, one of `restomod.commands`, is imported when it is called."""

    def verb(arguments: list[str]) -> int:
        return int(importlib.import_module(f"restomod.commands.{module}").run(arguments))

    verb.__doc__ = meaning
    return verb


VERBS: dict[str, Callable[[list[str]], int]] = {
    "prepare": prepare,
    "data": data,
    "plan": _later("plan", "Say what a run takes before it is paid for: memory, time, cost, final loss."),
    "train": train,
    "sample": sample,
    "compare-samples": compare_samples,
    "eval": evaluate,
    "inspect": inspect,
    "check": _later("check", "Check that a preset or a model is a sound GPT-2 that can learn."),
    "doctor": _later("doctor", "Examine this machine: is it fit to train, and how fast is it?"),
    "sweep": _later("sweep", "Train a run for every point of a grid, or for points that a sampler chooses."),
    "bench": _later("bench", "Measure the speed of a training step: tokens/s, its phases, memory, MFU."),
    "compare": _later("compare", "Lay runs side by side: curves, seeds, significance, tokens to a target."),
    "verdict": _later("verdict", "Is a run healthy? Named symptoms, and what to do; exit code 1 if it is not."),
    "report": _later("report", "Write a page of runs: curves, evaluations, strengths, samples, settings, cost."),
    "watch": _later("watch", "Show the page of a run in the browser while it goes on."),
}


def _run(arguments: list[str]) -> int:
    try:
        os.getcwd()
    except OSError as e:  # libraries ask for it wherever they are imported
        raise UserError(f"the working directory cannot be used ({reason(e)}); change to another one") from None
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: restomod VERB [ARGUMENTS]     restomod VERB --help tells more\n\nverbs:")
        width = max(map(len, VERBS))
        for name, verb in VERBS.items():
            print(f"  {name:<{width}}  {verb.__doc__}")
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
    open_missing()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    command = None
    goes_on = arguments[:1] in (["train"], ["sweep"])  # without output; all other verbs are there to print
    if goes_on:
        arguments, command = take_command(arguments)
    needs_less = NEEDS_LESS.get((arguments or [""])[0], NEEDS_LESS[""])
    return and_then(lambda: run_guarded(lambda: _run(arguments), debug, goes_on, needs_less), command)
