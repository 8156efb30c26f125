"""The errors a user can cause or mend. Each is one line: what is wrong, where, and how to mend it."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator

EXIT_USER_ERROR = 2


class UserError(Exception):
    """Something the user can mend. The command line prints it as one line and exits with code 2."""

    known_to_all = False
    """Whether the other processes of the same run, if there are any, have been told."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean X?"`` for the nearest known name, or the full list where none is near."""
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(choices))}"


def one_line(error: object) -> str:
    """The first line of an error's message, at most 200 characters; the error's kind where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def describe_os_error(e: OSError) -> str:
    """What the system refused, in one line."""
    return f"{e.filename or 'input/output'}: {e.strerror or e}"


class ReportedElsewhere(UserError):
    """Another process of the same run has reported what went wrong."""

    known_to_all = True


@contextlib.contextmanager
def reported_once() -> Iterator[None]:
    """What is wrong with the arguments is said by one process: torchrun starts all with the same."""
    try:
        yield
    except UserError as e:
        if os.environ.get("RANK", "0") == "0":
            raise
        raise ReportedElsewhere from e
