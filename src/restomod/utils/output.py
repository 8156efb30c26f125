"""Standard output and standard error: control characters made visible, coloured messages, errors in one line.

Names, texts and messages may come from malicious files. Within `run_guarded`, standard output and standard error are
sanitized streams, so callers do not escape control characters. `restomod.utils.terminal` writes colours and progress
bars to the raw stream.
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

STYLES = {"warning: ": "yellow", "restomod: error: ": "red"}  # colour by the beginning of a message
ANSI = {"yellow": "\x1b[33m", "red": "\x1b[31m", "": "\x1b[0m"}

Name = Literal["stdout", "stderr"]


def open_missing() -> None:
    """Open closed file descriptors of standard input, output and error on the null device.

    Otherwise the next open file gets such a descriptor, and a library's output is written into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor


def message_style(line: str) -> str:
    """Return the colour of a message: "yellow" for a warning, "red" for an error, "" for other lines."""
    return next((style for start, style in STYLES.items() if line.startswith(start)), "")


def has_colours(stream: Any) -> bool:
    """Return whether a stream is a terminal with colours; the environment variable NO_COLOR disables them."""
    if os.name == "nt" or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    try:
        return bool(stream.isatty())
    except (AttributeError, OSError, ValueError):  # replaced or closed stream
        return False


class SanitizedStream:
    """Text stream that makes control characters `visible` and colours messages in a terminal.

    Args:
        raw: stream to write to.
        keep: control character to write unchanged; "": none.
    """

    def __init__(self, raw: Any, keep: str = "") -> None:
        self.raw, self._keep = raw, keep

    def write(self, text: str) -> int:
        """Write sanitized text; a warning or error at its beginning is coloured. Return the length of ``text``."""
        parts = text.split(self._keep) if self._keep else [text]
        shown = self._keep.join(map(visible, parts))
        if (style := message_style(text)) and has_colours(self.raw):
            line, newline, rest = shown.partition("\n")
            shown = f"{ANSI[style]}{line}{ANSI['']}{newline}{rest}"
        self.raw.write(shown)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several sanitized texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def raw_stream(stream: Any) -> Any:
    """Return the stream behind a `SanitizedStream` or rich's progress bar; any other stream is returned itself."""
    stream = getattr(stream, "rich_proxied_file", stream)
    return stream.raw if isinstance(stream, SanitizedStream) else stream


def sanitize_output() -> None:
    """Replace standard output and standard error by sanitized streams; repeated calls have no effect."""
    if sys.stdout is not None and not isinstance(sys.stdout, SanitizedStream):
        sys.stdout = SanitizedStream(sys.stdout)
    if sys.stderr is not None and not isinstance(sys.stderr, SanitizedStream):
        sys.stderr = SanitizedStream(sys.stderr, keep="\r")  # needed by progress bars of downloads


@contextlib.contextmanager
def _sanitized_output() -> Iterator[None]:
    """Sanitize standard output and error within a `with` block."""
    before = sys.stdout, sys.stderr
    sanitize_output()
    ours = sys.stdout, sys.stderr
    try:
        yield
    finally:  # a stream that `drop_stream` has set meanwhile is kept
        if sys.stdout is ours[0]:
            sys.stdout = before[0]
        if sys.stderr is ours[1]:
            sys.stderr = before[1]


def is_open(name: Name) -> bool:
    """Return whether a stream exists and is open."""
    stream = getattr(sys, name)
    return stream is not None and not getattr(stream, "closed", False)  # a replacement may only have `write`


def flush_stream(name: Name) -> Exception | None:
    """Flush standard output or standard error. On failure, drop the stream and return the error."""
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
    """Discard pending and further output, so that Python's final flush succeeds."""
    stream = getattr(sys, name)
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
    except (OSError, ValueError, AttributeError):  # closed, or no file
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def print_error(line: str) -> None:
    """Print a line to standard error; a failure is ignored."""
    try:
        if is_open("stderr"):  # print(file=None) would write to standard output
            print(visible(line), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        drop_stream("stderr")


def print_if_possible(line: str) -> None:
    """Print a line; if that fails, print a warning to standard error.

    Raises:
        BrokenPipeError: the reader of standard output has exited.
    """
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as e:
        drop_stream("stdout")
        print_error(f"warning: standard output cannot be written ({reason(e)}); continuing without it")


@_sanitized_output()
def run_guarded(
    work: Callable[[], int],
    debug: bool = False,
    without_output: bool = False,
    memory_hint: Callable[[], str] = lambda: "use less",
) -> int:
    """Run a command and report its errors, and errors of printing, in one line.

    Args:
        work: command, which returns its exit code.
        debug: whether to raise errors instead, for their traceback.
        without_output: whether to run the command even if standard output is closed or cannot be written.
        memory_hint: function that returns advice for the case that memory runs out.

    Returns:
        Exit code of ``work``, 2 for an error, 130 after Ctrl-C, 0 if the reader of standard output has exited.
    """
    behind = raw_stream(sys.stdout)
    if isinstance(behind, io.TextIOWrapper) and is_open("stdout"):
        behind.reconfigure(errors="replace")  # encodings other than UTF-8 lack "…"
    try:
        if not without_output and not is_open("stdout"):
            raise UserError("standard output is closed")
        code = work()
        failure = flush_stream("stdout")  # otherwise it fails when Python exits
        if failure is not None and not without_output and not isinstance(failure, BrokenPipeError):
            raise UserError(_cannot_print(failure))
        return code
    except BrokenPipeError:
        return 0
    except SystemExit as e:
        if isinstance(e.__context__, BrokenPipeError):  # raised by rich
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
