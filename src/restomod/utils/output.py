"""Standard output and error: control characters made visible, and errors in one line.

Names, texts and messages come from files, which may be malicious. Within `run_guarded`, standard output and error are
sanitized streams, so callers need not escape anything. Colours and progress bars (`restomod.utils.terminal`) are
written to the raw stream.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from restomod.utils.errors import (
    EXIT_USER_ERROR,
    ReportedElsewhere,
    UserError,
    describe_os_error,
    is_out_of_memory,
    one_line,
    reason,
)
from restomod.utils.text import visible

EXIT_ABORTED = 130

Name = Literal["stdout", "stderr"]


def open_missing() -> None:
    """Open what is closed of standard input, output and error onto nothing.

    Otherwise the next file that is opened gets the number, and what a library prints is written into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


class SanitizedStream:
    """Text stream that makes control characters `visible`, except ``keep``, and writes to the stream ``raw``."""

    def __init__(self, raw: Any, keep: str = "") -> None:
        self.raw, self._keep = raw, keep

    def write(self, text: str) -> int:
        parts = text.split(self._keep) if self._keep else [text]
        self.raw.write(self._keep.join(map(visible, parts)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def raw_stream(stream: Any) -> Any:
    """The stream to which a `SanitizedStream`, or rich's stream of a progress bar, writes; any other stream itself."""
    stream = getattr(stream, "rich_proxied_file", stream)
    return stream.raw if isinstance(stream, SanitizedStream) else stream


def sanitize_output() -> None:
    """Replace standard output and error by sanitized streams, once."""
    if sys.stdout is not None and not isinstance(sys.stdout, SanitizedStream):
        sys.stdout = SanitizedStream(sys.stdout)
    if sys.stderr is not None and not isinstance(sys.stderr, SanitizedStream):
        sys.stderr = SanitizedStream(sys.stderr, keep="\r")  # of the progress bars of downloads


@contextlib.contextmanager
def _sanitized_output() -> Iterator[None]:
    """Sanitize standard output and error within a `with` block."""
    before = sys.stdout, sys.stderr
    sanitize_output()
    ours = sys.stdout, sys.stderr
    try:
        yield
    finally:  # a stream that has replaced them meanwhile stays (see `drop_stream`)
        if sys.stdout is ours[0]:
            sys.stdout = before[0]
        if sys.stderr is ours[1]:
            sys.stderr = before[1]


def is_open(name: Name) -> bool:
    """Return whether a stream is there and open."""
    stream = getattr(sys, name)
    return stream is not None and not getattr(stream, "closed", False)  # a stand-in may have `write` alone


def flush_stream(name: Name) -> Exception | None:
    """Flush standard output or error. Returns the error, if any, after which the stream is dropped."""
    try:
        if is_open(name):
            getattr(sys, name).flush()
            return None
    except (OSError, ValueError) as e:
        drop_stream(name)
        return e
    drop_stream(name)
    return None


def drop_stream(name: Name) -> None:
    """Discard pending and further output, so that Python's own last flush succeeds."""
    stream = getattr(sys, name)
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
    except (OSError, ValueError, AttributeError):  # closed, or no file
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def print_error(line: str) -> None:
    """Print a line to standard error, if it can be written."""
    try:
        if is_open("stderr"):  # print() takes None for standard output
            print(visible(line), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        drop_stream("stderr")


def print_if_possible(line: str) -> None:
    """Print a line; warn on standard error if it cannot be printed. Raises BrokenPipeError if a pipe's reader left."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as e:
        drop_stream("stdout")
        print_error(f"standard output cannot be written ({reason(e)}); continuing without it")


@_sanitized_output()
def run_guarded(
    work: Callable[[], int],
    debug: bool = False,
    without_output: bool = False,
    memory_hint: Callable[[], str] = lambda: "use less",
) -> int:
    """Run ``work`` and report errors in it, or in printing, in one line.

    Args:
        work: a command.
        debug: raise errors, for their traceback.
        without_output: whether ``work`` shall run even if nothing can be printed.
        memory_hint: returns what to do if there is not enough memory.

    Returns:
        The exit code of ``work``, 2 for an error, 130 after Ctrl-C, 0 where the reader of a pipe has left.
    """
    behind = raw_stream(sys.stdout)
    if isinstance(behind, io.TextIOWrapper) and is_open("stdout"):
        behind.reconfigure(errors="replace")  # an output that is not UTF-8 lacks characters such as "…"
    try:
        if not without_output and not is_open("stdout"):
            raise UserError("standard output is closed")
        code = work()
        failure = flush_stream("stdout")  # noticed here and not when Python exits
        if failure is not None and not without_output and not isinstance(failure, BrokenPipeError):
            raise UserError(_cannot_print(failure))
        return code
    except BrokenPipeError:  # the reader of a pipe has left
        return 0
    except SystemExit as e:
        if isinstance(e.__context__, BrokenPipeError):  # rich has met it
            return 0
        if isinstance(e.code, str):
            raise
        return e.code or 0
    except ReportedElsewhere:
        return EXIT_USER_ERROR
    except Exception as e:
        no_memory = is_out_of_memory(e) and not isinstance(e, UserError)
        if not (no_memory or isinstance(e, UserError | OSError | ValueError)):
            raise
        of_printing = isinstance(e, UnicodeEncodeError) or not is_open("stdout")
        failure = flush_stream("stdout")
        if debug or (isinstance(e, ValueError) and not of_printing):
            raise
        if no_memory:
            message = f"out of memory ({one_line(e)}); {memory_hint()}"
        elif isinstance(e, OSError) and failure is None:
            message = describe_os_error(e)
        else:
            message = str(e) if isinstance(e, UserError) else _cannot_print(failure or e)
        print_error(f"restomod: error: {' '.join(message.split())}")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print_error("restomod: stopped")
        return EXIT_ABORTED
    finally:
        flush_stream("stdout")
        flush_stream("stderr")


def _cannot_print(e: Exception) -> str:
    return f"standard output cannot be written ({reason(e)})"
