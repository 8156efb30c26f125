"""Entry point of the command `restomod`: dispatch to a command's module, exit codes, one-line errors."""

from __future__ import annotations

import importlib
import os
import sys

from restomod import __version__
from restomod.commands.catalog import COMMANDS, FIRST_STEPS, GROUPS
from restomod.utils.errors import EXIT_USER_ERROR, UserError, did_you_mean, reason
from restomod.utils.on_exit import run_then, split_then
from restomod.utils.output import open_missing, run_guarded

EXIT_CODES = {
    0: "success",
    1: "a check failed, a run is unhealthy, or all trials of a sweep failed",
    EXIT_USER_ERROR: "invalid input or a system error: one line on standard error explains how to fix it",
    75: "a run or sweep was stopped by a signal or a limit, and can be resumed",
    130: "stopped by Ctrl-C",
}
RUN_WITHOUT_OUTPUT = ("train", "sweep")  # run even if standard output is closed, and take --then
MEMORY_HINT = "end other programs, or use a machine with more memory"


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: command line without the program's name. None: `sys.argv[1:]`.

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
    except OSError as e:  # several libraries call getcwd() when they are imported
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
    """Return a command's advice for an out-of-memory error; its module may not be imported yet."""
    return getattr(sys.modules.get(_module(name)), "MEMORY_HINT", MEMORY_HINT)


def _help() -> str:
    lines = [
        "usage: restomod COMMAND [ARGUMENTS]     restomod COMMAND --help lists the arguments",
        "\nfirst steps:",
        *(f"  {line:<{max(map(len, FIRST_STEPS))}}  {meaning}" for line, meaning in FIRST_STEPS.items()),
    ]
    for group, commands in GROUPS.items():
        width = max(map(len, COMMANDS))
        lines += [f"\n{group}:", *(f"  {name:<{width}}  {command.summary}" for name, command in commands.items())]
    lines += ["\noptions:", "  --version  print the version", "  --debug    show the traceback of an error"]
    lines += ["\nexit codes:", *(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())]
    return "\n".join(lines)
