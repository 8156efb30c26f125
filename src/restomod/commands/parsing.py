"""Parsing of flags into dataclasses with tyro; an error is one line with the flag and its valid values."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tyro

from restomod.commands.catalog import heading
from restomod.commands.help_format import help_layout
from restomod.config.presets import with_scaled_warmup
from restomod.config.run import COMMON_FIELDS, RARELY_USED_FIELDS, RunConfig
from restomod.utils.errors import EXIT_USER_ERROR, UserError, shortened
from restomod.utils.output import raw_stream
from restomod.utils.text import visible

Arguments = TypeVar("Arguments")

FLAG = re.compile(r"--[A-Za-z][\w.-]*(=.*)?|-h", re.DOTALL)
SHORT = re.compile(r"^--(mix|separator)(?==|$)")  # short for --data.mix and --data.separator
NUMBER = re.compile(r"-(\d|\.\d)")  # tyro parses negative numbers as values
DASH = "\ue000"  # replaces the first dash of a value, which tyro would parse as a flag
MAY_BE_EMPTY = {"prompt", "prompts", "glob"}  # an empty prompt starts a document; a glob has its own message
METAVARS = {"INT": "an integer", "FLOAT": "a number", "{None}": "None", "STR": "a string"}


def preset_first(command: str, arguments: list[str], usage: str) -> tuple[str, list[str]]:
    """Return the first argument of a command, a preset's name, and the other arguments.

    Args:
        command: name of the command, for messages.
        arguments: arguments of the command.
        usage: help to print.

    Raises:
        UserError: the first argument is a flag.
        SystemExit: ``usage`` was printed, because help was requested or there are no arguments.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        raise SystemExit(0 if arguments else EXIT_USER_ERROR)
    if arguments[0].startswith("-"):
        given = " ".join(arguments)
        raise UserError(f"name a preset first: restomod {command} PRESET {given} (restomod {command} --help)")
    return arguments[0], long_names(arguments[1:])


def long_names(arguments: list[str]) -> list[str]:
    """Replace --mix and --separator by --data.mix and --data.separator."""
    return [SHORT.sub(r"--data.\1", argument) for argument in arguments]


def parse(
    cls: type[Arguments],
    arguments: list[str],
    program: str,
    default: Any = tyro.MISSING_NONPROP,
    rare: Collection[str] = (),
    notes: str = "",
) -> Arguments:
    """Parse flags into the dataclass ``cls``.

    Args:
        cls: dataclass of the flags.
        arguments: flags and values. A value may begin with a dash; if it looks like a flag, write --flag=VALUE.
        program: beginning of the command line for help and messages, such as "restomod train quickstart".
        default: instance with the values of absent flags. Without it, the defaults of ``cls`` are used.
        rare: fields that the help lists last.
        notes: paragraph for the help.

    Raises:
        UserError: a flag is unknown, or its value is invalid.
        SystemExit: the help was printed.
    """
    _refuse_empty(arguments)
    hidden = [a if is_flag(a) or NUMBER.match(a) or a == "--" else re.sub("^-(?=.)", DASH, a) for a in arguments]
    problem = io.StringIO()
    columns = os.environ.get("COLUMNS")
    helps = bool({"-h", "--help"} & set(arguments))
    if helps:  # a run's values may contain control characters, and tyro's own colours must be printed
        default, program = _map_texts(default, visible), visible(program)
    else:
        os.environ["COLUMNS"] = "10000"  # one line per error: without wrapping
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stderr(problem))
            if helps:
                top = heading(program.split()[1]) + (f"\n\n{notes}" if notes else "")
                stack.enter_context(contextlib.redirect_stdout(raw_stream(sys.stdout)))
                stack.enter_context(help_layout(top, COMMON_FIELDS, rare))
            parsed = tyro.cli(cls, default=default, args=hidden, prog=program, description="")
    except UserError as e:
        raise UserError(_restore_dashes(str(e))) from None
    except SystemExit as e:
        if e.code in (0, None):
            raise
        message = _restore_dashes(_one_line(problem.getvalue()))
        raise UserError(f"{message} ({program} --help lists the flags)") from None
    finally:
        os.environ.pop("COLUMNS", None)
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return typing.cast(Arguments, parsed if hidden == arguments else _map_texts(parsed, _restore_dash))


def parse_run(default: Arguments, arguments: list[str], program: str, rare: Collection[str] = ()) -> Arguments:
    """Parse the flags of a run, and scale the preset's warm-up in proportion to --steps.

    Args:
        default: dataclass with the preset in its field ``config``.
        arguments: flags and values. The warm-up is not scaled if --optim.warmup-steps is among them.
        program: beginning of the command line for help and messages.
        rare: fields that the help lists last, in addition to `RARELY_USED_FIELDS`.

    Raises:
        UserError: a flag is unknown, or its value is invalid.
        SystemExit: the help was printed.
    """
    given: Any = parse(type(default), arguments, program, default, {*RARELY_USED_FIELDS, *rare})
    if "--optim.warmup-steps" not in flags_in(arguments):
        base: RunConfig = default.config  # type: ignore[attr-defined]
        given = dataclasses.replace(given, config=with_scaled_warmup(given.config, base))
    return typing.cast(Arguments, given)


def is_flag(argument: str) -> bool:
    """Return whether an argument is a flag; -2 and -hello are values."""
    return FLAG.fullmatch(argument) is not None


def flags_in(arguments: Iterable[str]) -> set[str]:
    """Return the flags in a command line, without values and with dashes instead of underscores."""
    return {argument.partition("=")[0].replace("_", "-") for argument in arguments if is_flag(argument)}


def refuse_ignored(arguments: Iterable[str], ignored: Mapping[str, str]) -> None:
    """Raise UserError if a flag has no effect.

    Args:
        arguments: command line.
        ignored: flags without effect, with the reason, such as "with --optim.decay cosine".
    """
    given = flags_in(arguments)
    for flag, why in ignored.items():
        if flag in given:
            raise UserError(f"{flag} has no effect {why}; omit it or change the other setting")


def require_number(flag: str, value: float | None, above_0: bool = False) -> None:
    """Raise UserError unless ``value`` is None, or finite and at least 0 (with ``above_0``: greater than 0)."""
    if value is not None and not (0 < value < math.inf or (value == 0 and not above_0)):
        raise UserError(f"{flag} is {value}; it must be {'above 0' if above_0 else '0 or more'}")


def ignored_by_run(config: RunConfig) -> dict[str, str]:
    """Return the flags without effect in a configuration, with the reason, such as "with --optim.decay cosine"."""
    data, optim = config.data, config.optim
    source = "with --data.mix" if data.mix is not None else f"with --data.source {data.source}"
    prepared = data.mix is not None or data.source == "tokens"
    adamw = optim.optimizer == "adamw" and "with --optim.optimizer adamw"
    rules = {
        "--data.glob --data.text-column": (prepared or data.source != "text") and source,
        "--data.val-fraction --data.split-seed": prepared and source,
        "--optim.muon-lr --optim.muon-momentum --optim.muon-weight-decay": adamw,
        "--optim.cooldown": optim.decay in ("cosine", "linear") and f"with --optim.decay {optim.decay}",
        "--model.rope-theta": config.model.positions == "learned" and "with --model.positions learned",
        "--sampling.top-k --sampling.top-p": config.sampling.temperature == 0 and "with --sampling.temperature 0",
        "--keep-every": config.keep_checkpoints == 0 and "with --keep-checkpoints 0, which keeps all",
        "--eval-limit": config.eval_limit is not None and not config.eval_tasks and "without --eval-tasks",
    }
    return {flag: why for flags, why in rules.items() if why for flag in flags.split()}


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of a dataclass with ``change`` applied to every text in it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        new = {f.name: _map_texts(getattr(value, f.name), change) for f in dataclasses.fields(value)}
        changed = {name: v for name, v in new.items() if v != getattr(value, name)}
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, tuple):
        return tuple(_map_texts(part, change) for part in value)
    if isinstance(value, Path):
        return Path(change(str(value)))
    return change(value) if isinstance(value, str) else value


def _restore_dash(text: str) -> str:
    """Return a value with the first dash that `parse` replaced by `DASH`."""
    return "-" + text[1:] if text.startswith(DASH) else text


def _restore_dashes(message: str) -> str:
    """Return a message with the dashes that `parse` replaced, also in values quoted by `repr`."""
    return message.replace(DASH, "-").replace(ascii(DASH)[1:-1], "-")


def _refuse_empty(arguments: list[str]) -> None:
    """Raise UserError if a value is empty: an empty path would mean the current folder."""
    flag = "an argument"
    for argument in arguments:
        value = argument
        if is_flag(argument):
            name, equals, value = argument.partition("=")
            flag = name.replace("_", "-")
            if not equals:
                continue
        if value == "" and flag.lstrip("-").rpartition(".")[2] not in MAY_BE_EMPTY:
            raise UserError(f"{flag} is empty; give it a value or omit it")
        if "\0" in value:
            raise UserError(f"{flag} contains a NUL byte, which no file name can contain")
        if not flag.endswith("prompts"):  # --prompts has several values
            flag = "an argument"


def _one_line(box: str) -> str:
    """Return tyro's boxed error as one line: its message and the nearest suggestion."""
    rows = [row.strip("│ ") for row in box.splitlines()[1:-1]]
    if rows and set(rows[0]) == {"-"}:  # a line under the title, if standard output is not UTF-8
        rows = rows[1:]
    rule = [i for i, row in enumerate(rows) if set(row) in ({"─"}, {"-"})]
    message = " ".join(row.strip() for row in rows[: rule[0] if rule else None]).rstrip(".")
    message = message.removeprefix("Error parsing ")
    if message.startswith("Missing from "):  # the help of the missing arguments follows
        program = message.removeprefix("Missing from ").partition(":")[0]
        missing = [found[0] for row in rows if (found := re.match(r"--[a-z]\S*( [A-Z]+)?|[A-Z]+(?=  |$)", row))]
        message = f"{program} needs {' and '.join(missing)}" if missing else message
    suggested = re.search(r"Perhaps you meant:\s*(--[^\s,]+)", " ".join(rows))
    message = re.sub(r"\S{121,}", lambda word: shortened(word[0]), _in_words(message))
    return f"{message}; did you mean {suggested[1]}?" if suggested else message


def _in_words(message: str) -> str:
    """Return tyro's message about an invalid value without Python's types and errors."""
    flag, _, detail = message.partition(": ")
    union = re.match(r"no type matching (\S+) could be instantiated from \[(.*)\]\.\s+Got errors", detail, re.DOTALL)
    number = re.match(r"(invalid literal for int\(\)|could not convert string to float|Exceeds the limit)", detail)
    several = re.match(r"Could not parse arguments \[(.*)\] into tuple type \S+?\[(.*)\]", detail, re.DOTALL)
    if union:
        kinds = [METAVARS.get(kind, kind) for kind in sorted(union[1].split("|"), key=lambda kind: kind == "{None}")]
        return f"{flag}: {shortened(union[2])} is not {' or '.join(kinds)}"
    if number and number[0].startswith("Exceeds"):
        return f"{flag}: the number has too many digits"
    if number:
        kind = "a number" if "float" in number[0] else "an integer"
        return f"{flag}: {shortened(detail.partition(': ')[2])} is not {kind}"
    if several:
        return f"{flag}: {shortened(several[1])} are not {several[2].count(',') + 1} numbers"
    if "Expected 1 values" in message:
        message = message.replace("Expected 1 values", "Expected 1 value (--flag=VALUE where it begins with --)")
    return message
