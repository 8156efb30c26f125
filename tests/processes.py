"""Launcher of several ranks, like torchrun but ten times as fast.

A server process imports torch once and is forked for every rank.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.world import world
from restomod.engine.distributed import join_processes
from restomod.utils.errors import ReportedElsewhere, UserError

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["restomod.cli", "restomod.train.loop", "torch._dynamo", "tests.trainee", "pytest"])


@dataclasses.dataclass(frozen=True)
class Ended:
    """Result of one rank."""

    code: int
    """Exit code; a negative value is the signal that killed the process."""
    result: Any
    """Return value of the work; None if it failed."""
    output: str
    error: str


def launch(
    count: int,
    work: Callable[..., Any],
    *arguments: Any,
    timeout: float = 120,
    environment: dict[str, str] | None = None,
) -> list[Ended]:
    """Run a function of a module on ``count`` ranks and return the results by rank.

    Raises:
        AssertionError: a rank is still running after ``timeout`` seconds.
    """
    _store, environments = world(count)  # the store must outlive all ranks
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank, own in enumerate(environments):
            own |= environment or {}
            process = CONTEXT.Process(target=_run, args=(Path(folder), rank, timeout, own, work, arguments))
            process.start()
            processes.append(process)
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        texts = [[_text(Path(folder) / f"{rank}.{kind}") for kind in ("out", "err")] for rank in range(count)]
        assert not hanging, f"processes {hanging} hang: {texts}"
        return [
            Ended(process.exitcode or 0, _result(Path(folder) / f"{rank}.result"), *texts[rank])
            for rank, process in enumerate(processes)
        ]


def results(count: int, work: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """Return the results of a function on ``count`` ranks, which must all succeed."""
    ended = launch(count, work, *arguments, timeout=timeout)
    assert [e.code for e in ended] == [0] * count, [e.error for e in ended]
    return [e.result for e in ended]


def error_lines(ended: list[Ended]) -> list[str]:
    """Return all lines of standard error."""
    return [line for e in ended for line in e.error.splitlines()]


def _run(
    folder: Path,
    rank: int,
    timeout: float,
    environment: dict[str, str],
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    faulthandler.dump_traceback_later(timeout - 1)  # shows where a rank hangs
    os.environ.update(environment)
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{kind}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    torch.set_num_threads(1)
    (folder / f"{rank}.result").write_bytes(pickle.dumps(work(*arguments)))


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _result(path: Path) -> Any:
    return pickle.loads(path.read_bytes()) if path.exists() else None


def member(work: Any, *arguments: Any) -> Any:
    """Run a function as one of several ranks, and report errors like the command line."""
    try:
        with join_processes() as processes:
            return work(processes, *arguments)
    except ReportedElsewhere:
        sys.exit(2)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
