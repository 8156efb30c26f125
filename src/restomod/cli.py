"""The command `restomod`: finds the module of a command, runs it, and turns errors into one line."""

from __future__ import annotations

import importlib
import os
import sys

from restomod import __version__
from restomod.utils.errors import EXIT_USER_ERROR, UserError, did_you_mean, reason
from restomod.utils.on_exit import run_then, split_then
from restomod.utils.output import open_missing, run_guarded

COMMANDS = {  # one module of `restomod.commands` each, with `run(arguments) -> exit code`
    "prepare": "Turn text into a verified folder of token shards.",
    "data": "Show what is in a folder of token shards.",
    "plan": "Estimate memory, time, cost and final loss of a run before it starts.",
    "train": "Train a model from a preset, or resume a run.",
    "sample": "Generate text with the model of a run, or with any GPT-2.",
    "compare-samples": "Generate text with two models from the same prompts, side by side.",
    "eval": "Evaluate a model: validation loss, HellaSwag, LAMBADA, ARC, PIQA, Winograd, your own questions.",
    "inspect": "Show statistics and pictures of a model's weights, or compare two models.",
    "check": "Check that a preset or a model is a correct model that can learn.",
    "doctor": "Check that this machine is fit for training, and measure its speed.",
    "sweep": "Train a run for every point of a grid, or for points chosen by a sampler.",
    "bench": "Measure the speed of a training step: tokens/s, time per phase, memory, MFU.",
    "compare": "Compare runs: curves, seeds, significance, tokens to a target loss.",
    "verdict": "Look for symptoms of an unhealthy run, and say what to do.",
    "report": "Write a page about runs: curves, evaluations, samples, settings, cost.",
    "watch": "Serve the page of a run to the browser while the run trains.",
}
EXIT_CODES = {
    0: "success",
    1: "a check failed, a run is unhealthy, or all trials of a sweep failed",
    EXIT_USER_ERROR: "a mistake, or an error of the system: one line on standard error says what to do",
    75: "a run or sweep was stopped by a signal or a limit, and can be resumed",
    130: "stopped by Ctrl-C",
}
RUN_WITHOUT_OUTPUT = ("train", "sweep")  # and take --then; all other commands exist to print something
MEMORY_HINT = "end other programs, or use a machine with more memory"


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the command line without the program's name. Default: that of this process.

    Returns:
        The exit code, one of `EXIT_CODES`.
    """
    open_missing()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    name, then = (arguments or [""])[0], None
    long = name in RUN_WITHOUT_OUTPUT
    if long:
        arguments, then = split_then(arguments)
    return run_then(lambda: run_guarded(lambda: _run(arguments), debug, long, lambda: _memory_hint(name)), then)


def _run(arguments: list[str]) -> int:
    try:
        os.getcwd()
    except OSError as e:  # libraries ask for it wherever they are imported
        raise UserError(f"the working directory cannot be used ({reason(e)}); change to another one") from None
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else EXIT_USER_ERROR
    name, *rest = arguments
    if name == "--version":
        print(f"restomod {__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}")
    return int(importlib.import_module(_module(name)).run(rest))


def _module(name: str) -> str:
    return f"restomod.commands.{name.replace('-', '_')}"


def _memory_hint(name: str) -> str:
    """What a command says where memory runs out; its module may not have been imported."""
    return getattr(sys.modules.get(_module(name)), "MEMORY_HINT", MEMORY_HINT)


def _help() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: restomod COMMAND [ARGUMENTS]     restomod COMMAND --help lists the arguments",
            "\ncommands:",
            *(f"  {name:<{width}}  {meaning}" for name, meaning in COMMANDS.items()),
            "\noptions:\n  --version  print the version\n  --debug    show the traceback of an error",
            "\nexit codes:",
            *(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items()),
        ]
    )
