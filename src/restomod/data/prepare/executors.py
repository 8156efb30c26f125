"""Runs units of work on datatrove's executors: local processes or a Ray cluster.

datatrove's executors do the work of a rank. The loops around it are our own: datatrove's wait forever for a worker
that was killed, and the one for Ray drops the error of a unit that failed.
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

RAY_LAST = Path("/tmp/ray/ray_current_cluster")  # `ray start` leaves its address there, and `ray.init` looks there
RESUME = "finished units are kept, and the same command resumes with the rest"


def run_units(engine: Engine, step: UnitStep, workers: int) -> None:
    """Run the units of a step on ``workers`` workers (0: as many as there is room for), within `started_engine`.

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
        skip_completed=False,  # a unit's own record, written with its shards, says whether it is finished
    )
    executor.run()


@contextlib.contextmanager
def started_engine(engine: Engine, report: Callable[[str], None]) -> Iterator[None]:
    """Connect to a Ray cluster while units are worked on; nothing for other engines."""
    if engine != "ray":
        yield
        return
    import ray

    if ray.is_initialized():  # by our caller, whose cluster it is
        yield
        return
    _connect_to_ray()
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        processors = ray.cluster_resources().get("CPU", 0)
        report(f"on Ray: {processors:g} processors of {counted(len(nodes), 'machine')}")
        yield
    finally:
        ray.shutdown()


# --- local processes ----------------------------------------------------------------------------------------


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's local executor, but killed workers are noticed, and workers end with their parent."""

    def run(self) -> None:
        """Run every rank: one after the other in this process, or on several workers.

        Raises:
            UserError: a worker was killed.
            Exception: that of the first rank that fails; unfinished work of the others is dropped.
        """
        if self.workers == 1:
            for rank in range(self.tasks):
                self._run_for_rank(rank)
            return
        with _signal_kept(signal.SIGINT, signal.SIG_IGN):  # workers ignore Ctrl-C: their parent ends them
            forkserver.ensure_running()
        context = multiprocessing.get_context("forkserver")
        workers: dict[Connection, Any] = {}
        ranks = iter(range(self.tasks))
        try:
            for rank in islice(ranks, self.workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(self, theirs), daemon=True)
                process.start()
                theirs.close()  # the worker's copy is the only one left: when it ends, our end is told so
                workers[ours] = process
                with _end_noticed(process, self.workers):
                    ours.send(rank)
            working = set(workers)
            while working:
                for pipe in multiprocessing.connection.wait(list(working)):
                    assert isinstance(pipe, Connection)
                    with _end_noticed(workers[pipe], self.workers):
                        failure = pipe.recv()
                    if failure is not None:
                        raise failure
                    following = next(ranks, None)
                    if following is None:
                        working.remove(pipe)
                        continue
                    with _end_noticed(workers[pipe], self.workers):
                        pipe.send(following)
        finally:
            for process in workers.values():  # nothing is lost: what they are at is not recorded yet
                if process.is_alive():
                    process.kill()
                process.join()


def _work(executor: PipelineExecutor, pipe: Connection) -> None:
    """A worker: run the ranks that the parent names, until it hangs up or is gone, in the middle of one too."""
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
    """An error that can be pickled, with the worker's traceback for --debug."""
    trace = "".join(traceback.format_exception(error))
    error.add_note(f"\nin a worker:\n{trace}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(trace)
    return error


@contextlib.contextmanager
def _end_noticed(process: Any, workers: int) -> Iterator[None]:
    """Turn a broken pipe, which means that the worker has ended, into a UserError that says how it ended."""
    try:
        yield
    except (EOFError, ConnectionError):
        process.join(timeout=5)
        code = process.exitcode
        if code is None or code >= 0:
            how = f"ended unexpectedly (exit code {code})"
        else:
            memory = ", as happens when memory runs out" if -code == signal.SIGKILL else ""
            how = f"was killed ({signal.Signals(-code).name}){memory}"
        raise UserError(f"a worker {how}; {RESUME}, perhaps with fewer --workers than {workers}") from None


@contextlib.contextmanager
def _signal_kept(number: signal.Signals, meanwhile: signal.Handlers | None = None) -> Iterator[None]:
    """Restore the handler of a signal afterwards, and replace it ``meanwhile``."""
    if threading.current_thread() is not threading.main_thread():  # signals can be set in no other
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
    """datatrove's executor for Ray, with Ray's own processes as workers.

    datatrove's forks another one in each of them and waits forever if that one is killed. Ray's are noticed; a unit
    whose worker or machine was lost is begun again three times.
    """

    def run(self) -> None:
        """Run every rank on the cluster to which this process is connected.

        Raises:
            UserError: workers were lost again and again.
            Exception: that of the first rank that fails; unfinished work of the others is dropped.
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
                f"a worker of Ray was lost ({type(e).__name__}), as happens when memory runs out; {RESUME}"
            ) from None
        finally:
            with contextlib.suppress(Exception):  # of a cluster that is gone; the first error is the one to tell
                for task in running:
                    ray.cancel(task, force=True)
                if running:
                    ray.wait(running, num_returns=len(running), timeout=10)


def _run_rank(executor: PipelineExecutor, rank: int) -> None:
    executor._run_for_rank(rank, local_rank=1)


def require_engine(engine: Engine) -> None:
    """Raise UserError where an engine is not installed."""
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError("--engine ray needs the package ray: pip install -c constraints.txt -e '.[ray]'")


def _connect_to_ray() -> None:
    """Connect to the cluster of RAY_ADDRESS or the one that runs on this machine; else start one of our own.

    Raises:
        UserError: there should be a cluster, and it does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no statistics
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it announces a change to come
    import ray

    address = os.environ.get("RAY_ADDRESS") or None
    if address and not _answers(address):  # Ray would try for minutes
        raise UserError(f"the Ray cluster at {address} (RAY_ADDRESS) does not answer; without one, set it to local")
    if address is None and RAY_LAST.exists() and not _answers(RAY_LAST.read_text().strip()):
        address = "local"  # a cluster that ran here and is gone
    try:
        # workers import from the folder in which this is called, which may be someone else's: let it be the package's;
        # Ray's core writes to standard error while it tries, and `ray.init` replaces the handler of SIGTERM
        with contextlib.chdir(Path(__file__).parents[3]), _signal_kept(signal.SIGTERM), standard_error_aside():
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as e:
        raise UserError(f"cannot connect to a Ray cluster ({' '.join(str(e).split())})") from None


def _answers(address: str) -> bool:
    """Whether somebody listens at an address; True of what is no host and port."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def standard_error_aside() -> Iterator[IO[str]]:
    """Redirect the process's standard error, also of other languages and programs, to the file yielded."""
    with tempfile.TemporaryFile("w+") as said:
        sys.stderr.flush()
        terminal = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
