"""Execution of units of work with datatrove, in local processes or on a Ray cluster.

datatrove's executors run each rank. The loops over the ranks are replaced here: datatrove's loops wait forever for a
killed worker, and its Ray loop loses the error of a failed unit.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor

from restomod.config.prepare import Engine
from restomod.data.prepare.worker import WORK, UnitStep, quiet_datatrove
from restomod.utils.errors import UserError
from restomod.utils.text import counted

RAY_LAST = Path("/tmp/ray/ray_current_cluster")  # address file, written by `ray start` and read by `ray.init`
RESUME = "finished units are kept; run the same command again to resume"


def run_units(engine: Engine, step: UnitStep, workers: int) -> None:
    """Run the remaining units of a step; call within `started_engine`.

    Args:
        engine: local processes or Ray.
        step: step with the units to run.
        workers: number of units at the same time; 0: no limit.

    Raises:
        UserError: a unit cannot be prepared, or a worker was killed.
    """
    n = len(step.todo)
    if n == 0:
        return
    quiet_datatrove()
    executor: LocalExecutor | RayExecutor = (RayExecutor if engine == "ray" else LocalExecutor)(
        pipeline=[step],
        tasks=n,
        workers=min(workers or n, n),
        logging_dir=str(step.out / WORK / "datatrove"),
        skip_completed=False,  # finished units are known by their records
    )
    executor.run()


@contextlib.contextmanager
def started_engine(engine: Engine, report: Callable[[str], None]) -> Iterator[None]:
    """Connect to a Ray cluster for the duration of the context; do nothing for other engines.

    Args:
        engine: engine of the preparation.
        report: function that receives a line about the cluster.

    Raises:
        UserError: the Ray cluster does not answer.
    """
    if engine != "ray":
        yield
        return
    import ray

    if ray.is_initialized():  # the caller owns the connection
        yield
        return
    _connect_to_ray()
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        processors = ray.cluster_resources().get("CPU", 0)
        report(f"Ray cluster: {processors:g} CPUs, {counted(len(nodes), 'node')}")
        yield
    finally:
        ray.shutdown()


# --- local processes ----------------------------------------------------------------------------------------


class LocalExecutor(LocalPipelineExecutor):
    """Local executor of datatrove that detects killed workers and ends its workers with the parent process."""

    def run(self) -> None:
        """Run every rank, sequentially in this process or in several worker processes.

        Raises:
            UserError: a worker was killed.
            Exception: error of the first failed rank; unfinished work of other ranks is discarded.
        """
        if self.workers == 1:
            for rank in range(self.tasks):
                self._run_for_rank(rank)
            return
        with _restored_signal(signal.SIGINT, signal.SIG_IGN):  # workers ignore Ctrl-C; the parent ends them
            forkserver.ensure_running()
        context = multiprocessing.get_context("forkserver")
        workers: dict[Connection, Any] = {}
        ranks = iter(range(self.tasks))
        try:
            for rank in islice(ranks, self.workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(self, theirs), daemon=True)
                process.start()
                theirs.close()  # only the worker keeps this end, so that its exit closes the pipe
                workers[ours] = process
                with _exit_as_error(process, self.workers):
                    ours.send(rank)
            working = set(workers)
            while working:
                for pipe in multiprocessing.connection.wait(list(working)):
                    assert isinstance(pipe, Connection)
                    with _exit_as_error(workers[pipe], self.workers):
                        failure = pipe.recv()
                    if failure is not None:
                        raise failure
                    following = next(ranks, None)
                    if following is None:
                        working.remove(pipe)
                        continue
                    with _exit_as_error(workers[pipe], self.workers):
                        pipe.send(following)
        finally:
            for process in workers.values():  # safe: unfinished units have no records
                if process.is_alive():
                    process.kill()
                process.join()


def _work(executor: PipelineExecutor, pipe: Connection) -> None:
    """Run the ranks that the parent process sends, and exit immediately when the parent closes the pipe or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ranks: queue.SimpleQueue[int] = queue.SimpleQueue()

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                ranks.put(pipe.recv())
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        rank, failure = ranks.get(), None
        try:
            executor._run_for_rank(rank, local_rank=1)
        except Exception as e:
            failure = _sendable(e)
        pipe.send(failure)


def _sendable(error: Exception) -> Exception:
    """Return an error that can be pickled, with the worker's traceback as a note for --debug."""
    trace = "".join(traceback.format_exception(error))
    error.add_note(f"\nin a worker:\n{trace}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(trace)
    return error


@contextlib.contextmanager
def _exit_as_error(process: Any, workers: int) -> Iterator[None]:
    """Convert a broken pipe, which means that the worker has ended, into a UserError with its exit status."""
    try:
        yield
    except (EOFError, ConnectionError):
        process.join(timeout=5)
        code = process.exitcode
        if code is None or code >= 0:
            how = f"ended unexpectedly with exit code {code}"
        else:
            memory = ", possibly because memory ran out" if -code == signal.SIGKILL else ""
            how = f"was killed ({signal.Signals(-code).name}){memory}"
        raise UserError(f"a worker {how}; {RESUME}, or lower --workers (now {workers})") from None


@contextlib.contextmanager
def _restored_signal(number: signal.Signals, meanwhile: signal.Handlers | None = None) -> Iterator[None]:
    """Restore the handler of a signal at the end of the context; until then use ``meanwhile`` if it is given."""
    if threading.current_thread() is not threading.main_thread():  # other threads cannot set handlers
        yield
        return
    before = signal.getsignal(number)
    if meanwhile is not None:
        signal.signal(number, meanwhile)
    try:
        yield
    finally:
        signal.signal(number, before)


# --- Ray ----------------------------------------------------------------------------------------------------


class RayExecutor(RayPipelineExecutor):
    """Ray executor of datatrove that runs ranks directly in Ray's worker processes.

    datatrove's executor forks a process in each worker and waits forever if it is killed. Ray detects lost workers
    and restarts their units, at most three times.
    """

    def run(self) -> None:
        """Run every rank on the connected cluster.

        Raises:
            UserError: workers were lost repeatedly.
            Exception: error of the first failed rank; unfinished work of other ranks is discarded.
        """
        import ray

        executor, run = ray.put(self), ray.remote(_run_rank)
        ranks = iter(range(self.tasks))
        running = [run.remote(executor, rank) for rank in islice(ranks, self.workers)]
        try:
            while running:
                done, running = ray.wait(running)
                ray.get(done)
                running += [run.remote(executor, rank) for rank in islice(ranks, len(done))]
        except ray.exceptions.RayTaskError as e:
            raise (e.cause or e) from None
        except ray.exceptions.RayError as e:
            raise UserError(
                f"a Ray worker was lost ({type(e).__name__}), possibly because memory ran out; {RESUME}"
            ) from None
        finally:
            with contextlib.suppress(Exception):  # the cluster may be down; the first error matters
                for task in running:
                    ray.cancel(task, force=True)
                if running:
                    ray.wait(running, num_returns=len(running), timeout=10)


def _run_rank(executor: PipelineExecutor, rank: int) -> None:
    executor._run_for_rank(rank, local_rank=1)


def require_engine(engine: Engine) -> None:
    """Check that the package of an engine is installed.

    Raises:
        UserError: the package is missing.
    """
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError("--engine ray needs the package ray: pip install -c constraints.txt -e '.[ray]'")


def _connect_to_ray() -> None:
    """Connect to the cluster of RAY_ADDRESS or the one on this machine, otherwise start a new one.

    Raises:
        UserError: the cluster of RAY_ADDRESS does not answer, or the connection fails.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # disable telemetry
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # prevents a warning
    import ray

    address = os.environ.get("RAY_ADDRESS") or None
    if address and not _answers(address):  # Ray would retry for minutes
        raise UserError(
            f"the Ray cluster at {address} (RAY_ADDRESS) does not answer; start it, or set RAY_ADDRESS=local"
        )
    if address is None and RAY_LAST.exists() and not _answers(RAY_LAST.read_text().strip()):
        address = "local"  # the cluster in the address file has ended
    try:
        # workers import modules from the current folder, so use the folder of the package; Ray's core writes to
        # standard error during retries, and `ray.init` replaces the handler of SIGTERM
        with contextlib.chdir(Path(__file__).parents[3]), _restored_signal(signal.SIGTERM), redirected_stderr():
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as e:
        raise UserError(f"cannot connect to a Ray cluster ({' '.join(str(e).split())})") from None


def _answers(address: str) -> bool:
    """Return whether a server listens at HOST:PORT; True for addresses of other forms."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def redirected_stderr() -> Iterator[IO[str]]:
    """Redirect file descriptor 2, including the output of child processes and C code, to the yielded file."""
    with tempfile.TemporaryFile("w+") as said:
        sys.stderr.flush()
        terminal = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
