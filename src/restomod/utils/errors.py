"""Errors that a user can fix. Each message is one line: the problem, its place, and the fix."""

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
# messages of torch, CUDA, Triton, NCCL, MPS, cuBLAS, cuDNN, CPU allocators, dynamic linker, threads, oneDNN
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
    """Error that the user can fix. The command line prints it as one line and exits with code 2."""

    known_to_all = False
    """Whether all ranks of the run know about the error."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean X?"`` with the most similar known name, or the list of known names."""
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(choices))}"


def one_line(error: object) -> str:
    """Return the first line of an error's message, at most 200 characters; its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def reason(error: BaseException) -> str:
    """Return the operating system's reason of an error, without number and path; otherwise `one_line`."""
    return getattr(error, "strerror", None) or one_line(error)


def shortened(text: str) -> str:
    """Return a text cut to 80 characters, for a message."""
    return text if len(text) <= 80 else f"{text[:80]}…"


def describe_os_error(e: OSError) -> str:
    """Describe an operating system error in one line: path and reason."""
    return f"{e.filename or 'input/output'}: {reason(e)}"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error or one of its causes means that a device or the system is out of memory."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True  # also raised for numpy and std::bad_alloc
        if isinstance(error, (RuntimeError, ImportError)) and any(sign in str(error) for sign in OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False


class ReportedElsewhere(UserError):
    """Error that another rank of the same run has already reported."""

    known_to_all = True


@contextlib.contextmanager
def reported_once() -> Iterator[None]:
    """Report an error in the arguments on rank 0 only, because torchrun starts all ranks with the same arguments."""
    try:
        yield
    except UserError as e:
        if os.environ.get("RANK", "0") == "0":
            raise
        raise ReportedElsewhere from e
