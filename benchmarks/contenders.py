"""Contenders of a comparison: a function in this process, a function in a separate process, or a command.

A contender that cannot run raises `Absent` with the reason; the others continue.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from benchmarks.records import Values

TIMEOUT = 600.0  # seconds for a start or a round
PEAK_MEMORY = Path(__file__).with_name("peak_memory.py")


class Absent(Exception):
    """Reason why a contender cannot run, in one line."""


class Measured(NamedTuple):
    """Result of one round."""

    values: Values
    """Measured numbers by name of the metric."""
    output: Any = None
    """Output, for the comparison with the first contender's output."""


Round = Callable[[], Measured]


class Contender(Protocol):
    """Participant of a comparison. `start` and `round` may raise `Absent`."""

    name: str

    def start(self) -> None:
        """Prepare the rounds."""

    def round(self) -> Measured:
        """Run and measure one round."""

    def stop(self) -> None:
        """Release all resources."""


def reason(e: BaseException) -> str:
    """Return an exception as one short line without paths of this machine."""
    if isinstance(e, Absent):
        return str(e)
    if isinstance(e, ImportError):
        return f"{e.name or e} cannot be imported"
    if isinstance(e, OSError):  # its message contains a path
        return f"{type(e).__name__}: {e.strerror or 'refused by the system'}"
    line = next((line.strip() for line in str(e).splitlines() if line.strip()), "no message")
    return f"{type(e).__name__}: {line:.160}"


@dataclass
class InProcess:
    """Function in this process; ``make`` prepares it and returns it."""

    name: str
    make: Callable[[], Round]
    _round: Round | None = field(default=None, init=False)

    def start(self) -> None:
        """Prepare the function; raise Absent if that fails."""
        try:
            self._round = self.make()
        except Exception as e:
            raise Absent(reason(e)) from e

    def round(self) -> Measured:
        """Call the function; raise Absent if it fails."""
        assert self._round is not None
        try:
            return self._round()
        except Exception as e:
            raise Absent(reason(e)) from e

    def stop(self) -> None:
        """Drop the function and its data."""
        self._round = None


@dataclass
class Worker:
    """Function in a separate process, with separate peak memory; a crash ends only that process.

    ``make`` is a module-level function, called in that process with ``arguments``; it returns the function for a round.
    The process has the same number of threads as this one. Its output is discarded unless the environment variable
    BENCH_OUTPUT is set.
    """

    name: str
    make: Callable[..., Round]
    arguments: tuple[Any, ...] = ()
    timeout: float = TIMEOUT
    """Seconds for the start or a round."""
    _process: BaseProcess | None = field(default=None, init=False)
    _pipe: Connection | None = field(default=None, init=False)
    _ready: bool = field(default=False, init=False)

    def start(self) -> None:
        """Start the process without waiting for it."""
        import torch

        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        threads = torch.get_num_threads()
        self._process = context.Process(target=_work, args=(self.make, self.arguments, threads, theirs), daemon=True)
        self._process.start()
        theirs.close()  # otherwise the pipe stays open after the process has ended
        self._ready = False

    def round(self) -> Measured:
        """Run one round in the process, after it is ready; raise Absent if it fails or times out."""
        assert self._pipe is not None
        if not self._ready:  # all workers start at the same time; the warm-up round waits for them
            self._answer()
            self._ready = True
        try:
            self._pipe.send(True)
        except OSError:
            raise Absent(self._ended()) from None
        answer = self._answer()
        assert isinstance(answer, Measured)
        return answer

    def _answer(self) -> Measured | None:
        assert self._pipe is not None
        try:
            if not self._pipe.poll(self.timeout):
                raise Absent(f"no answer after {self.timeout:g} s")
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise Absent(self._ended()) from None
        if isinstance(answer, str):
            raise Absent(answer)
        return answer

    def _ended(self) -> str:
        assert self._process is not None
        self._process.join(10)
        return f"its process ended with code {self._process.exitcode}"

    def stop(self) -> None:
        """End the process, with a kill if necessary."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.join(5)
            if self._process.is_alive():
                self._process.kill()
            self._process.join()
        self._pipe = self._process = None


def _work(make: Callable[..., Round], arguments: tuple[Any, ...], threads: int, pipe: Connection) -> None:
    """Run the process of a `Worker`: send None when it is ready, then a result per request, or a reason and exit."""
    import torch

    torch.set_num_threads(threads)
    if "BENCH_OUTPUT" not in os.environ:
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        try:
            one_round = make(*arguments)
            pipe.send(None)
            while pipe.recv():
                pipe.send(one_round())
        except (EOFError, OSError):
            raise
        except Exception as e:
            pipe.send(reason(e))


@dataclass
class Command:
    """Program that is started in every round.

    Its metrics are ``seconds`` and ``peak memory`` (GB, largest process).
    """

    name: str
    command: Sequence[str]
    also: Callable[[float], Values] = lambda seconds: {}
    """Function that computes more metrics from the seconds."""
    before: Callable[[], None] = lambda: None
    """Function to call before every round, not timed."""
    environment: dict[str, str] = field(default_factory=dict)
    """Additional environment variables."""
    timeout: float = TIMEOUT
    """Seconds for a round."""

    def start(self) -> None:
        """Do nothing; every round starts the program."""

    def round(self) -> Measured:
        """Run the program; raise Absent if it fails or times out."""
        try:
            self.before()
        except Exception as e:
            raise Absent(reason(e)) from e
        launcher = [sys.executable, "-S", str(PEAK_MEMORY), "--json", *self.command]
        try:
            done = subprocess.run(
                launcher, capture_output=True, text=True, timeout=self.timeout, env=os.environ | self.environment
            )
        except subprocess.TimeoutExpired:
            raise Absent(f"still running after {self.timeout:g} s") from None
        found = json.loads(done.stdout) if done.returncode == 0 else {"code": done.returncode}
        if found["code"]:
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
            raise Absent(f"exit code {found['code']}: {last.replace(sys.executable, 'python'):.160}")
        seconds = found["seconds"]
        return Measured({"seconds": seconds, "peak memory": found["peak_bytes"] / 1e9} | self.also(seconds))

    def stop(self) -> None:
        """Do nothing; the program has ended."""
