"""Every engine writes the same bytes, also after kills; errors are one line and leave no processes."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from restomod.config.prepare import PrepareConfig
from restomod.data.prepare import executors, units
from restomod.data.prepare.executors import LocalExecutor
from restomod.data.prepare.run import prepare_folder
from restomod.utils.errors import UserError
from tests.data.prepare.preparing import (
    PROGRAM,
    Command,
    alive,
    finished,
    hashes,
    nothing_but_the_shards,
    texts_of,
    write_jsonl,
)

# Workers import the file of the program and run this code too; it injects a failure into unit 3.
IN_UNIT_3 = """
import os, signal, time
from pathlib import Path
import restomod.data.prepare.worker
def work(self, unit, real=restomod.data.prepare.worker.PrepareUnit.work):
    if unit == 3:
        happened = len(list(Path(TESTS).glob("happened_*")))
        (Path(TESTS) / f"happened_{happened}").touch()
        if happened < int(os.environ.get("TIMES", "1")):
            WHAT
    return real(self, unit)
restomod.data.prepare.worker.PrepareUnit.work = work
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
WAITS = "time.sleep(300)"


def program(folder: Path, what: str) -> str:
    return IN_UNIT_3.replace("TESTS", repr(str(folder))).replace("WHAT", what) + PROGRAM


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Write eight files, and prepare the reference in one process."""
    for i in range(8):
        write_jsonl(tmp_path / "text" / f"{i}.jsonl", texts_of(50, seed=i // 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "UNIT_BYTES", 1)
        prepare_folder((str(tmp_path / "text"),), PrepareConfig(), tmp_path / "reference", workers=1)
    return tmp_path / "text"


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def check_that_all_are_gone(group: int, seconds: float, but: tuple[str, ...] = ()) -> None:
    deadline = time.monotonic() + seconds
    while not set(alive(group)) <= set(but) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(alive(group)) <= set(but)


def error_of(process: subprocess.Popen[str], folder: Path) -> str:
    """Return the error line of a failing command."""
    code, said = process.wait(timeout=100), (folder / "stderr").read_text()
    assert (code, said.count("\n")) == (2, 1), said
    assert said.startswith("restomod: error: ")
    return said.removeprefix("restomod: error: ").strip()


# --- local processes ----------------------------------------------------------------------------------------


def test_a_killed_worker_is_one_line_and_the_same_command_resumes(
    tmp_path: Path, text: Path, restomod: Command
) -> None:
    arguments = ("text", "--out", "out", "--workers", "2")
    process = restomod(*arguments, program=program(tmp_path, KILLED))
    said = error_of(process, tmp_path)
    assert said.startswith("a worker was killed (SIGKILL), possibly because memory ran out")
    assert said.endswith("run the same command again to resume, or lower --workers (now 2)")
    check_that_all_are_gone(process.pid, seconds=5)
    assert len(list((tmp_path / "out/.prepare").glob("unit_*.json"))) >= 2
    assert "resuming: " in finished(restomod(*arguments), tmp_path)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "reference")


@pytest.mark.parametrize("what", ["os._exit(3)", "os.kill(os.getpid(), signal.SIGSEGV)"])
def test_the_exit_status_of_a_worker_is_reported(tmp_path: Path, text: Path, restomod: Command, what: str) -> None:
    process = restomod("text", "--out", "out", "--workers", "2", program=program(tmp_path, what))
    said = error_of(process, tmp_path)
    assert said.startswith(
        "a worker ended unexpectedly with exit code 3; " if "exit" in what else "a worker was killed (SIGSEGV); "
    )


def test_killing_the_parent_alone_leaves_no_process(tmp_path: Path, text: Path, restomod: Command) -> None:
    process = restomod("text", "--out", "out", "--workers", "2", program=program(tmp_path, WAITS))
    wait_for(tmp_path / "happened_0", process)
    assert len(alive(process.pid)) > 2
    process.kill()
    process.wait()
    check_that_all_are_gone(process.pid, seconds=5)
    finished(restomod("text", "--out", "out", "--workers", "2"), tmp_path)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "reference")


def test_an_error_ends_the_other_workers_immediately(tmp_path: Path, text: Path, restomod: Command) -> None:
    (text / "4.jsonl").write_bytes(b"nonsense")
    process = restomod("text", "--out", "out", "--workers", "2", program=program(tmp_path, WAITS))
    assert "4.jsonl" in error_of(process, tmp_path)
    check_that_all_are_gone(process.pid, seconds=5)


def test_a_workers_traceback_is_kept(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    (text / "4.jsonl").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"4\.jsonl") as caught:
        prepare_folder((str(text),), PrepareConfig(), tmp_path / "out", workers=2)
    assert "in read_documents" in "".join(caught.value.__notes__)


def test_an_error_that_cannot_be_pickled_comes_as_its_traceback() -> None:
    class LocalError(Exception):
        pass

    try:
        raise LocalError("what it says")
    except LocalError as e:
        sent = executors._sendable(e)
    assert type(sent) is RuntimeError
    assert "what it says" in str(sent)


@pytest.mark.parametrize("tasks", [2, 7])
def test_every_rank_is_run_once_on_every_number_of_workers(tmp_path: Path, tasks: int) -> None:
    for workers in {1, 2, tasks}:
        where = tmp_path / f"{workers}"
        where.mkdir()
        LocalExecutor([Note(where)], tasks, workers, str(tmp_path / "logs"), skip_completed=False).run()
        assert {path.name: path.read_text() for path in where.iterdir()} == {str(i): "x" for i in range(tasks)}


class Note:
    """Step that records how often each rank was run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, data: object, rank: int, world_size: int) -> list[object]:
        with open(self.folder / str(rank), "a") as f:
            f.write("x")
        return []


# --- lock of the output folder ------------------------------------------------------------------------------


def test_a_second_call_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    refusals = []

    def again(line: str) -> None:
        with pytest.raises(UserError) as caught:
            prepare_folder((str(tmp_path / "a.jsonl"),), PrepareConfig(), tmp_path / "out", workers=1)
        refusals.append(str(caught.value))

    prepare_folder((str(tmp_path / "a.jsonl"),), PrepareConfig(), tmp_path / "out", 1, again)
    assert len(refusals) == 1
    assert "another `restomod prepare` is writing" in refusals[0]
    assert nothing_but_the_shards(tmp_path / "out")


EARLIER_PLAN = {"name": "d", "settings": {"dedup": False}, "datasets": {}, "units": [], "tokenizer": "gpt2"}


def test_a_lock_file_is_accepted_and_kept_when_the_plan_changes(tmp_path: Path) -> None:
    """Test a command that was killed before the first record, and a command with other settings."""
    (tmp_path / "out/.prepare").mkdir(parents=True)
    (tmp_path / "out/.prepare/lock").touch()
    (tmp_path / "out/.prepare/plan.json").write_text(json.dumps(EARLIER_PLAN))
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    locks: list[bool] = []
    look = lambda line: locks.append((tmp_path / "out/.prepare/lock").exists())  # noqa: E731
    prepare_folder((str(tmp_path / "a.jsonl"),), PrepareConfig(), tmp_path / "out", 1, look)
    assert locks == [True]
    assert nothing_but_the_shards(tmp_path / "out")


# --- Ray ----------------------------------------------------------------------------------------------------

ray_is_there = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (pip install -e '.[ray]')"
)
RAY = ("text", "--out", "out", "--engine", "ray")
LOCAL = {"RAY_ADDRESS": "local"}  # do not use another cluster on this machine


def test_without_ray_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        prepare_folder(("text",), PrepareConfig(), tmp_path / "out", 0, engine="ray")
    assert str(caught.value) == "--engine ray needs the package ray: pip install -c constraints.txt -e '.[ray]'"
    assert not (tmp_path / "out").exists()


def everywhere(folder: Path, what: str) -> dict[str, str]:
    """Return an environment in which ``what`` happens in unit 3; Ray workers do not import the program's file."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(program(folder, what).removesuffix(PROGRAM))
    return LOCAL | {"PYTHONPATH": os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])}


@ray_is_there
@pytest.mark.slow
def test_on_ray_the_bytes_are_the_same_and_nothing_else_is_said(tmp_path: Path, text: Path, restomod: Command) -> None:
    finished(restomod("text", "--out", "deduplicated", "--dedup", "--workers", "2"), tmp_path)
    process = restomod(*RAY, "--dedup", **LOCAL)
    said = [line for line in finished(process, tmp_path).splitlines() if not line.endswith(" tokens/s")]
    assert said[0] == "input: 8 .jsonl files; 8 units of work"
    assert said[1].startswith("Ray cluster: ")
    assert said[2] == "finding duplicate documents"
    assert said[3].startswith("out: ")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "deduplicated") != hashes(tmp_path / "reference")
    check_that_all_are_gone(process.pid, seconds=10)


@ray_is_there
@pytest.mark.slow
def test_on_ray_a_bad_file_is_the_same_one_line(tmp_path: Path, text: Path, restomod: Command) -> None:
    good = (text / "4.jsonl").read_bytes()
    (text / "4.jsonl").write_bytes(b"nonsense")
    said = error_of(restomod("text", "--out", "local", "--workers", "2"), tmp_path)
    assert "4.jsonl" in said
    assert error_of(restomod(*RAY, **LOCAL), tmp_path) == said
    assert not list((tmp_path / "out").glob(".*.tmp"))
    (text / "4.jsonl").write_bytes(good)
    finished(restomod(*RAY, **LOCAL), tmp_path)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "reference")


@ray_is_there
@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_on_ray_a_killed_or_stopped_preparation_is_resumed(
    tmp_path: Path, text: Path, restomod: Command, sent: signal.Signals
) -> None:
    process = restomod(*RAY, "--workers", "1", **everywhere(tmp_path, WAITS))
    wait_for(tmp_path / "happened_0", process)
    process.send_signal(sent)
    code, said = process.wait(timeout=60), (tmp_path / "stderr").read_text()
    assert (code, said) == ((-9, "") if sent == signal.SIGKILL else (130, "restomod: stopped\n"))
    if sent == signal.SIGKILL:  # two idle helper processes of Ray remain for about a minute
        check_that_all_are_gone(process.pid, seconds=10, but=("ray::DashboardAgent", "ray::RuntimeEnvAgent"))
    else:
        check_that_all_are_gone(process.pid, seconds=10)
    assert "resuming: 3 of 8 units finished" in finished(restomod(*RAY, **LOCAL), tmp_path)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "reference")


@ray_is_there
@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 100])
def test_on_ray_a_killed_worker_is_replaced_and_at_last_one_line(
    tmp_path: Path, text: Path, restomod: Command, times: int
) -> None:
    process = restomod(*RAY, TIMES=str(times), **everywhere(tmp_path, KILLED))
    if times == 1:
        finished(process, tmp_path)
        assert hashes(tmp_path / "out") == hashes(tmp_path / "reference")
    else:
        assert error_of(process, tmp_path) == (
            "a Ray worker was lost (WorkerCrashedError), possibly because memory ran out; "
            "finished units are kept; run the same command again to resume"
        )


@pytest.fixture
def cluster() -> Iterator[str]:
    """Return the address of a cluster with three CPUs in a separate folder, which others do not find."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        flags = (f"--port={port}", "--num-cpus=3", f"--temp-dir={folder}", "--include-dashboard=false")
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *flags],
            env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
        status = [sys.executable, "-m", "ray.scripts.scripts", "status", f"--address=127.0.0.1:{port}"]
        for _ in range(20):  # a cluster starts slowly on a busy machine
            if subprocess.run(status, env=environment, capture_output=True, check=False).returncode == 0:
                break
        yield f"127.0.0.1:{port}"
        os.killpg(process.pid, signal.SIGKILL)  # a clean shutdown takes half a minute
        process.wait(timeout=60)


@ray_is_there
@pytest.mark.slow
def test_a_running_cluster_is_used_and_stays(tmp_path: Path, text: Path, restomod: Command, cluster: str) -> None:
    for out in ("one", "two"):
        said = finished(
            restomod("text", "--out", out, "--engine", "ray", RAY_ADDRESS=cluster, RAY_AUTH_MODE="disabled"), tmp_path
        )
        assert "Ray cluster: 3 CPUs, 1 node\n" in said
        assert hashes(tmp_path / out) == hashes(tmp_path / "reference")


@ray_is_there
@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_one_line(tmp_path: Path, text: Path, restomod: Command) -> None:
    said = error_of(restomod(*RAY, RAY_ADDRESS="127.0.0.1:9"), tmp_path)
    assert said.startswith("the Ray cluster at 127.0.0.1:9 (RAY_ADDRESS) does not answer")


@ray_is_there
@pytest.mark.slow
def test_only_a_cluster_started_here_is_shut_down(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster is shut down if this package started it, and kept if the caller started it."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    before = signal.getsignal(signal.SIGTERM)
    prepare_folder((str(text),), PrepareConfig(), tmp_path / "one", 0, engine="ray")
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) == before
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        prepare_folder((str(text),), PrepareConfig(), tmp_path / "two", 0, engine="ray")
        assert ray.is_initialized()
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two") == hashes(tmp_path / "reference")
