"""The errors a user can cause or mend. Each is one line: what is wrong, where, and how to mend it."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
from collections.abc import Iterable, Iterator

EXIT_USER_ERROR = 2
NOT_FINITE = (
    "the model's output is not finite; its weights are damaged (see `restomod inspect`), or fp16 overflows "
    "(try --precision fp32)"
)
# messages of torch, the driver, Triton, NCCL and MPS; cuBLAS; cuDNN; CPU allocators; the system (libraries, threads)
OUT_OF_MEMORY = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "can't allocate memory",
    "annot allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "failed to map segment",
    "can't start new thread",
    "could not create a primitive",  # oneDNN gives no reason
    "could not create a memory",
)


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
    """Return the first line of an error's message, at most 200 characters, or else its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def reason(error: BaseException) -> str:
    """Return the system's reason of an error, without number and path; else `one_line`."""
    return getattr(error, "strerror", None) or one_line(error)


def shortened(text: str) -> str:
    """Return at most 80 characters of a text, for a message."""
    return text if len(text) <= 80 else f"{text[:80]}…"


def describe_os_error(e: OSError) -> str:
    """Return what the system refused, in one line."""
    return f"{e.filename or 'input/output'}: {reason(e)}"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or its cause, says that a device or the system is out of memory."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True  # numpy's and C++'s (std::bad_alloc) are MemoryErrors
        if isinstance(error, (RuntimeError, ImportError)) and any(sign in str(error) for sign in OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False


class ReportedElsewhere(UserError):
    """Another process of the same run has reported what went wrong."""

    known_to_all = True


@contextlib.contextmanager
def reported_once() -> Iterator[None]:
    """Report an error in the arguments from one process only: torchrun starts all with the same."""
    try:
        yield
    except UserError as e:
        if os.environ.get("RANK", "0") == "0":
            raise
        raise ReportedElsewhere from e
