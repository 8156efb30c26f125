"""Signals that stop a run: the first one after the current step, a later one immediately."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from restomod.engine import signals
from restomod.engine.signals import StopSignal
from restomod.utils.on_exit import raise_terminated


def test_simultaneous_signals_are_one_request(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignal() as stop:
        assert not stop.requested
        for sent in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(sent)
        assert stop.requested
    assert capfd.readouterr().err.count("stopping after this step") == 1


@pytest.fixture
def usual() -> Iterator[None]:
    """Install Python's default handler of Ctrl-C, which the test runner may have replaced."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual")
def test_a_later_signal_has_its_usual_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(signals, "ONE_REQUEST", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.requested


def test_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_signal_works_with_a_closed_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int, text: bytes) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(signals.os, "write", broken)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested


@pytest.mark.parametrize(
    "sent",
    ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM", "SIGVTALRM", "SIGPWR"],
)
@pytest.mark.parametrize("within_main", [False, True])
def test_every_signal_that_ends_a_process_is_a_request_to_stop(sent: str, within_main: bool) -> None:
    """Both with default handlers and with those of the command line."""
    number = getattr(signal, sent)
    usual = signal.default_int_handler if sent == "SIGINT" else raise_terminated if within_main else signal.SIG_DFL
    before, asked = signal.signal(number, usual), []
    try:
        with StopSignal(lambda: asked.append(sent)) as stop:
            signal.raise_signal(number)
            assert stop.requested
        assert asked == [sent]
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, before)


def test_ignored_signals_and_other_handlers_are_unchanged() -> None:
    def other(*_: object) -> None:
        pass

    before = {s: signal.getsignal(s) for s in (signal.SIGHUP, signal.SIGUSR1)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        signal.signal(signal.SIGUSR1, other)
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGUSR1)
            assert not stop.requested
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def test_a_second_signal_ends_a_command_immediately() -> None:
    """Without clean-up, which would wait for a checkpoint that is being written."""
    script = """
import signal, time
from restomod.utils.on_exit import run_then
from restomod.engine import signals
def work():
    with signals.StopSignal():
        signal.raise_signal(signal.SIGTERM)
        signals.ONE_REQUEST = -1.0
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            time.sleep(60)
run_then(work, None)
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=30, capture_output=True)
    assert done.returncode == -signal.SIGTERM


# --- end of torchrun -----------------------------------------------------------------------------------------

CHILD = """
import sys, time
sys.modules["torch"] = None  # torch, which is slow to import, must not be imported
sys.argv = ["restomod", "--version"]
import runpy
runpy.run_module("restomod", run_name="__main__")
"""


@pytest.mark.parametrize("there", [True, False])
def test_a_process_without_its_torchrun_ends_before_slow_imports(there: bool) -> None:
    with socket.socket() as store:
        store.bind(("127.0.0.1", 0))
        if there:
            store.listen()
        environment = os.environ | {
            "TORCHELASTIC_RUN_ID": "x",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.getsockname()[1]),
        }
        done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True)
    assert done.returncode == (0 if there else -signal.SIGTERM), done.stderr
    assert ("restomod" in done.stdout) == there


@pytest.mark.skipif(sys.platform != "linux", reason="requires prctl, which only Linux has")
def test_a_process_of_torchrun_ends_with_it_during_imports(tmp_path: Path) -> None:
    """Python runs no signal handlers during the import of torch, so torchrun is watched before it."""
    importing = "import sys, time; open('began', 'w').close(); time.sleep(60)"
    (tmp_path / "tyro.py").write_text(importing)  # the first import of a command's module
    parent = (
        "import os, signal, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'restomod', 'data', '--help'])\n"
        "print(child.pid, flush=True)\n"
        "while not os.path.exists('began'): time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": path}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", parent], env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=30
    )  # waits until the child has closed its output
    assert done.returncode == -signal.SIGKILL
    assert time.monotonic() - began < 20
