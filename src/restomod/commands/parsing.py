"""Parsing of flags into dataclasses with tyro. Each mistake is one line that names the flag and what it should be."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import tyro

from restomod.config.presets import with_scaled_warmup
from restomod.config.run import RunConfig
from restomod.utils.errors import EXIT_USER_ERROR, UserError, shortened
from restomod.utils.output import raw_stream
from restomod.utils.text import visible

Arguments = TypeVar("Arguments")

FLAG = re.compile(r"--[A-Za-z][\w.-]*(=.*)?|-h", re.DOTALL)
NUMBER = re.compile(r"-(\d|\.\d)")  # tyro itself takes these for values
DASH = "\ue000"  # a private character in place of the dash of a value that tyro would take for a flag
MAY_BE_EMPTY = {"prompt", "prompts", "glob"}  # an empty prompt begins a document; a glob has a message of its own
METAVARS = {"INT": "a whole number", "FLOAT": "a number", "{None}": "None", "STR": "a text"}


def usage_unless_given(arguments: list[str], usage: Callable[[], str]) -> None:
    """Print the usage where there are no arguments, or only a flag for help.

    Raises:
        SystemExit: it has been printed; the code is 0 where help was asked for.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        raise SystemExit(0 if arguments else EXIT_USER_ERROR)


def preset_first(command: str, arguments: list[str]) -> tuple[str, list[str]]:
    """Split a command line into the name of a preset and the flags.

    Raises:
        UserError: it begins with a flag.
    """
    if arguments[0].startswith("-"):
        given = " ".join(arguments)
        raise UserError(f"name a preset first: restomod {command} PRESET {given} (restomod {command} --help)")
    return arguments[0], arguments[1:]


def parse(
    cls: type[Arguments],
    arguments: list[str],
    program: str,
    default: Any = tyro.MISSING_NONPROP,
    description: str = "",
) -> Arguments:
    """Parse flags into a dataclass.

    Args:
        cls: a dataclass whose fields are flags.
        arguments: the flags. A value may begin with a dash; one that looks like a flag is given as --flag=VALUE.
        program: how the command line begins, for help and messages.
        default: an instance with the values of flags that are not given. Default: those of ``cls``.
        description: text at the head of the help.

    Raises:
        UserError: a flag is wrong.
        SystemExit: help has been printed.
    """
    hidden = [a if is_flag(a) or NUMBER.match(a) or a == "--" else re.sub("^-(?=.)", DASH, a) for a in arguments]
    problem = io.StringIO()
    columns = os.environ.get("COLUMNS")
    helps = bool({"-h", "--help"} & set(arguments))
    if helps:  # tyro prints its own colours, and the values of a run that may come from elsewhere
        default, program = _changed(default, visible), visible(program)
    else:
        os.environ["COLUMNS"] = "10000"  # an error is not to be wrapped: it becomes one line
    shown_at = contextlib.redirect_stdout(raw_stream(sys.stdout)) if helps else contextlib.nullcontext()
    try:
        with contextlib.redirect_stderr(problem), shown_at:
            parsed = tyro.cli(cls, default=default, args=hidden, prog=program, description=description)
    except UserError as e:
        raise UserError(_said(str(e))) from None
    except SystemExit as e:
        if e.code in (0, None):
            raise
        message = _said(_one_line(problem.getvalue()))
        raise UserError(f"{message} ({program} --help lists the flags)") from None
    finally:
        os.environ.pop("COLUMNS", None)
        if columns is not None:
            os.environ["COLUMNS"] = columns
    shown = parsed if hidden == arguments else _changed(parsed, _with_dash)
    _refuse_empty(shown, default)
    return typing.cast(Arguments, shown)


def parse_run(default: Arguments, arguments: list[str], program: str) -> Arguments:
    """Parse flags into a dataclass whose ``config`` is a preset, and scale the warm-up with --steps unless it is given.

    Args:
        default: an instance with the preset.
        arguments: the flags.
        program: how the command line begins, for help and messages.

    Raises:
        UserError: as `parse`.
    """
    given: Any = parse(type(default), arguments, program, default)
    if "--optim.warmup-steps" not in flags_in(arguments):
        base: RunConfig = default.config  # type: ignore[attr-defined]
        given = dataclasses.replace(given, config=with_scaled_warmup(given.config, base))
    return typing.cast(Arguments, given)


def is_flag(argument: str) -> bool:
    """Whether an argument is a flag and not a value, such as -2 or -hello."""
    return FLAG.fullmatch(argument) is not None


def flags_in(arguments: Iterable[str]) -> set[str]:
    """The names of the flags among arguments, without values, with dashes for underscores."""
    return {argument.partition("=")[0].replace("_", "-") for argument in arguments if is_flag(argument)}


def refuse_ignored(arguments: Iterable[str], ignored: Mapping[str, str]) -> None:
    """Raise UserError where a flag is given that has no effect.

    Args:
        arguments: the command line.
        ignored: by flag, what makes it useless, such as "with --optim.optimizer adamw".
    """
    given = flags_in(arguments)
    for flag, why in ignored.items():
        if flag in given:
            raise UserError(f"{flag} has no effect {why}; leave it out or change that")


def ignored_by_run(config: RunConfig) -> dict[str, str]:
    """The flags of a run that have no effect, each with the setting that makes it so: "with --optim.decay cosine"."""
    data, optim = config.data, config.optim
    source = "with --data.mix" if data.mix is not None else f"with --data.source {data.source}"
    prepared = data.mix is not None or data.source == "tokens"
    rules = (
        (prepared or data.source != "text", source, ("--data.glob", "--data.text-column")),
        (prepared, source, ("--data.val-fraction", "--data.split-seed")),
        (
            optim.optimizer == "adamw",
            "with --optim.optimizer adamw",
            ("--optim.muon-lr", "--optim.muon-momentum", "--optim.muon-weight-decay"),
        ),
        (optim.decay in ("cosine", "linear"), f"with --optim.decay {optim.decay}", ("--optim.cooldown",)),
        (config.model.positions == "learned", "with --model.positions learned", ("--model.rope-theta",)),
        (
            config.sampling.temperature == 0,
            "with --sampling.temperature 0",
            ("--sampling.top-k", "--sampling.top-p"),
        ),
        (config.keep_checkpoints == 0, "with --keep-checkpoints 0, which keeps all", ("--keep-every",)),
        (config.eval_limit is not None and not config.eval_tasks, "without --eval-tasks", ("--eval-limit",)),
    )
    return {flag: why for ignored, why, flags in rules if ignored for flag in flags}


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A dataclass with every text in it changed."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        new = {f.name: _changed(getattr(value, f.name), change) for f in dataclasses.fields(value)}
        changed = {name: v for name, v in new.items() if v != getattr(value, name)}
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, tuple):
        return tuple(_changed(part, change) for part in value)
    return change(value) if isinstance(value, str) else value


def _with_dash(text: str) -> str:
    """A value with the dash back that `parse` has hidden."""
    return "-" + text[1:] if text.startswith(DASH) else text


def _said(message: str) -> str:
    """A message, which may quote values by `repr`, with the dashes back that `parse` has hidden."""
    return message.replace(DASH, "-").replace(ascii(DASH)[1:-1], "-")


def _refuse_empty(value: Any, default: Any, prefix: str = "") -> None:
    """Raise UserError where a text that is given is empty: as a path it would stand for the present folder."""
    hints = typing.get_type_hints(type(value), include_extras=True)
    for field in dataclasses.fields(value):
        found, before = getattr(value, field.name), getattr(default, field.name, None)
        if dataclasses.is_dataclass(found):
            unnamed = any(getattr(part, "name", None) == "" for part in typing.get_args(hints[field.name]))
            _refuse_empty(found, before, prefix if unnamed else f"{prefix}{field.name}.")
            continue
        texts = [text for text in (found if isinstance(found, tuple) else (found,)) if isinstance(text, str)]
        flag = f"--{prefix}{field.name}".replace("_", "-")
        if tyro.conf.Positional in typing.get_args(hints[field.name]):
            flag = "an argument"
        if "" in texts and found != before and field.name not in MAY_BE_EMPTY:
            raise UserError(f"{flag} is empty; give it a value or leave it out")
        if any("\0" in text for text in texts):
            raise UserError(f"{flag} contains a NUL byte, which no file name can contain")


def _one_line(box: str) -> str:
    """The message of tyro's boxed error, and its nearest suggestion, as one line."""
    rows = [row.strip("│ ") for row in box.splitlines()[1:-1]]
    if rows and set(rows[0]) == {"-"}:  # where standard output is not UTF-8, a rule stands under the title
        rows = rows[1:]
    rule = [i for i, row in enumerate(rows) if set(row) in ({"─"}, {"-"})]
    message = " ".join(row.strip() for row in rows[: rule[0] if rule else None]).rstrip(".")
    message = message.removeprefix("Error parsing ")
    if message.startswith("Missing from "):  # and then the help of what is missing
        program = message.removeprefix("Missing from ").partition(":")[0]
        missing = [found[0] for row in rows if (found := re.match(r"--[a-z]\S*( [A-Z]+)?|[A-Z]+(?=  |$)", row))]
        message = f"{program} needs {' and '.join(missing)}" if missing else message
    suggested = re.search(r"Perhaps you meant:\s*(--[^\s,]+)", " ".join(rows))
    message = re.sub(r"\S{121,}", lambda word: shortened(word[0]), _in_words(message))
    return f"{message}; did you mean {suggested[1]}?" if suggested else message


def _in_words(message: str) -> str:
    """What tyro says of a value that cannot be read, without Python's types and errors."""
    flag, _, said = message.partition(": ")
    union = re.match(r"no type matching (\S+) could be instantiated from \[(.*)\]\.\s+Got errors", said, re.DOTALL)
    number = re.match(r"(invalid literal for int\(\)|could not convert string to float|Exceeds the limit)", said)
    several = re.match(r"Could not parse arguments \[(.*)\] into tuple type \S+?\[(.*)\]", said, re.DOTALL)
    if union:
        kinds = [METAVARS.get(kind, kind) for kind in sorted(union[1].split("|"), key=lambda kind: kind == "{None}")]
        return f"{flag}: {shortened(union[2])} is not {' or '.join(kinds)}"
    if number and number[0].startswith("Exceeds"):
        return f"{flag}: the number has too many digits"
    if number:
        kind = "a number" if "float" in number[0] else "a whole number"
        return f"{flag}: {shortened(said.partition(': ')[2])} is not {kind}"
    if several:
        return f"{flag}: {shortened(several[1])} are not {several[2].count(',') + 1} numbers"
    if "Expected 1 values" in message:
        message = message.replace("Expected 1 values", "Expected 1 value (--flag=VALUE where it begins with --)")
    return message
