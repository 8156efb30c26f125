"""The command of --then runs exactly once at the end of a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from restomod.cli import main
from restomod.utils.on_exit import split_then

WORK = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored by what they start in the background
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this one
from restomod import cli
from restomod.commands import train
from restomod.utils.errors import UserError
def work(arguments):
    print("at work", flush=True)
    kind = arguments[0]
    if kind == "user error": raise UserError("wrong")
    if kind == "crash": raise RuntimeError("a fault")
    if kind == "interrupt": raise KeyboardInterrupt
    if kind == "exit": sys.exit(9)
    if kind == "abort": os.abort()
    if kind == "stopped": return 75
    if kind == "wait": time.sleep(60)
    return 0
train.run = work
sys.exit(cli.main(sys.argv[1:]))
"""


def start(kind: str, said: Path, then: str = "", work: str = WORK, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", work, "train", kind, "--then", then or f"echo the end >> '{said}'; exit 5"],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


CODES = {"fine": 0, "stopped": 75, "user error": 2, "crash": 1, "interrupt": 130, "exit": 9, "abort": -signal.SIGABRT}


@pytest.mark.parametrize(("kind", "code"), CODES.items())
def test_it_runs_once_and_keeps_the_exit_code(tmp_path: Path, kind: str, code: int) -> None:
    said = tmp_path / "said"
    process = start(kind, said)
    _, errors = process.communicate(timeout=60)  # the watching shell has the same standard error
    assert process.returncode == code, errors
    assert said.read_text() == "the end\n"
    if kind != "abort":
        assert "failed with exit code 5" in errors


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGHUP])
def test_it_runs_after_a_signal_too(tmp_path: Path, sent: signal.Signals) -> None:
    said = tmp_path / "said"
    process = start("wait", said)
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == (130 if sent == signal.SIGINT else -sent)
    assert said.read_text() == "the end\n"


@pytest.mark.parametrize(
    ("kind", "environment", "runs"),
    [
        ("fine", {"RANK": "1"}, False),
        ("fine", {"RANK": "0"}, True),
        ("crash", {"TORCHELASTIC_MAX_RESTARTS": "2", "TORCHELASTIC_RESTART_COUNT": "1"}, False),
        ("crash", {"TORCHELASTIC_MAX_RESTARTS": "2", "TORCHELASTIC_RESTART_COUNT": "2"}, True),
        ("fine", {"TORCHELASTIC_MAX_RESTARTS": "2", "TORCHELASTIC_RESTART_COUNT": "1"}, True),
    ],
)
def test_only_rank_0_runs_it_after_the_last_restart(
    tmp_path: Path, kind: str, environment: dict[str, str], runs: bool
) -> None:
    process = start(kind, tmp_path / "said", **environment)
    process.communicate(timeout=60)
    assert (tmp_path / "said").exists() == runs


def test_it_runs_after_an_error_in_the_arguments(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = tmp_path / "said"
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for command in ("train", "sweep"):
        assert main([command, "quikstart", "--then", f"echo {command} >> '{said}'", "--nonsense"]) == 2
    assert said.read_text() == "train\nsweep\n"
    assert "did you mean 'quickstart'" in capfd.readouterr().err
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_other_commands_keep_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def command(arguments: list[str]) -> int:
        seen.append(arguments)
        return 0

    monkeypatch.setattr("restomod.commands.sample.run", command)
    assert main(["sample", "--then", "exit 1"]) == 0
    assert seen == [["--then", "exit 1"]]


def test_the_command_is_split_off_before_other_arguments() -> None:
    assert split_then(["a", "--then", "x y", "-b"]) == (["a", "-b"], "x y")
    assert split_then(["a", "--then=x=y", "-b"]) == (["a", "-b"], "x=y")
    assert split_then(["a", "--then"]) == (["a", "--then"], None)
    assert split_then(["a"]) == (["a"], None)


def test_it_does_not_wait_for_child_processes(tmp_path: Path) -> None:
    """A child process that outlives the work does not delay the command."""
    left = WORK.replace('print("at work"', 'import subprocess; subprocess.Popen(["sleep", "20"]); print("at work"')
    said, began = tmp_path / "said", time.monotonic()
    start("abort", said, work=left).wait(60)
    while not said.exists():
        assert time.monotonic() < began + 15, "the command has not run"
        time.sleep(0.05)


def test_it_runs_after_the_reader_of_the_output_has_exited(tmp_path: Path) -> None:
    said = tmp_path / "said"
    process = start("fine", said)
    assert process.stdout is not None
    process.stdout.close()
    process.wait(60)
    assert said.read_text() == "the end\n"


def test_after_sigterm_the_process_itself_runs_it_before_it_ends(tmp_path: Path) -> None:
    said = tmp_path / "said"
    process = start("wait", said, f"sleep 0.5; echo the end >> '{said}'")
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM
    assert said.read_text() == "the end\n"


# --- cleaning up ---------------------------------------------------------------------------------------------

HALF_DONE = """
import pathlib, signal, sys, time
from restomod import cli
from restomod.commands import data
def work(arguments):
    try:
        print("at work", flush=True)
        time.sleep(60)
    finally:
        pathlib.Path(sys.argv[1]).unlink()
data.run = work
sys.exit(cli.main(["data"]))
"""


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGXCPU])
def test_a_signal_runs_cleanup(tmp_path: Path, sent: signal.Signals, ignored: bool) -> None:
    half = tmp_path / "half written"
    half.touch()
    process = subprocess.Popen(
        [sys.executable, "-c", HALF_DONE, str(half)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(sent, signal.SIG_IGN if ignored else signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    process.send_signal(sent)
    if ignored:  # as under nohup
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        assert half.exists()
        process.kill()
        process.communicate()
        return
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -sent  # the default effect of the signal
    assert not half.exists()
    assert "Traceback" not in errors
