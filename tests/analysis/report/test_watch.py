"""Live report: responses of the server while a run starts, grows, is damaged, restarts or ends."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from restomod.analysis.report import watch as watching
from restomod.analysis.report.usage import HourlyRates
from restomod.cli import main
from restomod.utils.errors import UserError
from tests.runs.made_runs import HOSTILE, make_run


@contextlib.contextmanager
def served(folder: Path) -> Iterator[int]:
    """Serve a run in a thread and yield the port."""
    server = watching.open_server(folder, "127.0.0.1", 0, HourlyRates())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(port: int, path: str, host: str | None = None) -> tuple[int, str, bytes]:
    """Return status, content type and body of a response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"Host": host} if host is not None else {})
    answer = connection.getresponse()
    found = answer.status, answer.headers["Content-Type"], answer.read()
    connection.close()
    return found


def data(port: int) -> Any:
    return json.loads(ask(port, "/data.json")[2])


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rebuild the page after every change of a file, without idle time."""
    monkeypatch.setattr(watching, "REST", 0)


def test_the_page_and_its_data(tmp_path: Path) -> None:
    with served(make_run(tmp_path / "r", text=HOSTILE)) as port:
        status, kind, body = ask(port, "/")
        assert (status, kind) == (200, "text/html; charset=utf-8")
        assert b"connect-src 'self'" in body
        assert b"window.hurt = 1</script>" not in body
        status, kind, body = ask(port, "/data.json")
        assert (status, kind) == (200, "application/json; charset=utf-8")
        found = json.loads(body)
        assert found["live"] is True
        assert found["runs"][0]["name"] == "r"
        assert ask(port, f"/data.json?since={found['version']}")[0] == 204
        assert ask(port, "/data.json?since=0")[0] == 200
        assert ask(port, "/../../etc/passwd")[0] == 404


def test_new_records_are_seen(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    with served(folder) as port:
        before = data(port)
        assert data(port)["version"] == before["version"]
        with open(folder / "metrics.jsonl", "a") as f:
            f.write('{"kind": "train", "step": 40, "loss": 2.5, "ms": 1.0}\n{"kind": "train", "step": 4')
        after = data(port)
        assert after["version"] != before["version"]
        assert after["runs"][0]["curves"]["loss"]["y"][-1] == 2.5


def test_a_run_that_begins_later_is_replaced_and_ends(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    with served(folder) as port:
        assert data(port)["waiting"] == "waiting for the run to start"
        assert ask(port, "/")[0] == 200
        folder.mkdir()
        assert data(port)["runs"] == []
        folder.rmdir()
        make_run(folder)
        assert data(port)["runs"][0]["state"] == "finished"
        (folder / "environment.json").write_text("{")
        assert "environment.json is damaged" in data(port)["runs"][0]["remark"]
        shutil.rmtree(folder)
        assert data(port)["waiting"] == "waiting for the run to start"
        make_run(folder, steps=7)
        assert len(data(port)["runs"][0]["curves"]["loss"]["x"]) == 7


def test_a_run_is_not_read_again_while_training_needs_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "REST", 1e9)
    folder = make_run(tmp_path / "r")
    watched = watching.Watched(folder, HourlyRates())
    before = watched.data()["version"]
    (folder / "metrics.jsonl").write_text("")
    assert watched.data()["version"] == before
    monkeypatch.setattr(watching, "REST", 0)
    assert watched.data()["version"] != before


def send(port: int, request: bytes) -> bytes:
    """Send bytes and return the complete response."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(2**16), b""))


HOST = b"Host: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: [\r\n\r\n", 403),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 403),
        (b"GET http://[ HTTP/1.1\r\n" + HOST, 400),
        (b"GET http://evil.example/ HTTP/1.1\r\n" + HOST, 403),
        (b"GET http://127.0.0.1/data.json?since=%ff%zz HTTP/1.1\r\n" + HOST, 200),
        (b"GET /%zz%00 HTTP/1.1\r\n" + HOST, 404),
        (b"POST / HTTP/1.1\r\n" + HOST, 501),
        (b"\x1b[2J / HTTP/1.1\r\n" + HOST, 501),
        (b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\n" + HOST, 431),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 500_000 + b"\r\n" + HOST, 431),
        (b"GET / HTTP/1.1\r\n" + b"X: x\r\n" * 500 + HOST, 431),
        (b"GET /data.json HTTP/1.1\r\n" + HOST + b"GET /data.json HTTP/1.1\r\n" + HOST, 200),
    ],
)
def test_odd_requests_get_one_answer_and_print_nothing(
    tmp_path: Path, request_: bytes, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with served(make_run(tmp_path / "r")) as port:
        answer = send(port, request_)
        assert ask(port, "/data.json")[0] == 200
    assert answer.startswith(b"HTTP/1.0 %d " % status)
    assert answer.count(b"HTTP/1.0 ") == 1
    assert capfd.readouterr() == ("", "")


def test_every_response_has_the_security_headers(tmp_path: Path) -> None:
    with served(make_run(tmp_path / "r")) as port:
        for path, policy in (("/", b"default-src 'none'; script-src 'sha256-"), ("/data.json", b"default-src 'none';")):
            head, _, body = send(port, f"HEAD {path} HTTP/1.1\r\n".encode() + HOST).partition(b"\r\n\r\n")
            assert body == b""
            assert b"Content-Security-Policy: " + policy in head
            for line in (b"frame-ancestors 'none'", b"X-Frame-Options: DENY", b"Referrer-Policy: no-referrer"):
                assert line in head


def test_silent_and_slow_connections_hold_no_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "REQUEST_TIMEOUT", 0.5)
    with served(make_run(tmp_path / "r")) as port, contextlib.ExitStack() as stack:
        before = threading.active_count()
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(150)]
        assert ask(port, "/data.json")[0] == 200
        assert threading.active_count() - before <= watching.MAX_CONNECTIONS + 1
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(5)]
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            for connection in slow:
                with contextlib.suppress(OSError):
                    connection.send(b"G")
            time.sleep(0.1)
        assert threading.active_count() == before
        assert len(silent) == 150


@pytest.mark.parametrize("name", ["config.json", "data.json"])
def test_a_damaged_run_is_reported_and_shown_again_after_repair(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path / "r")
    content = (folder / name).read_bytes()
    with served(folder) as port:
        assert len(data(port)["runs"]) == 1
        (folder / name).write_text("{")
        found = data(port)
        assert (name in found["waiting"], found["runs"]) == (True, [])
        assert name.encode() in ask(port, "/")[2]
        (folder / name).write_bytes(content)
        assert len(data(port)["runs"]) == 1


def test_an_unexpected_error_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TypeError("a value\x1b of another type")

    folder = make_run(tmp_path / "r")
    with served(folder) as port:
        monkeypatch.setattr(watching, "report_data", fail)
        assert "a value␛ of another type" in data(port)["waiting"]
        monkeypatch.undo()
        assert ask(port, "/")[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_other_names_for_this_machine_are_refused(tmp_path: Path, host: str) -> None:
    with served(make_run(tmp_path / "r")) as port:
        assert ask(port, "/data.json", host)[0] == 403
        assert ask(port, "/data.json", f"localhost:{port}")[0] == 200


def test_user_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    for arguments, said in (
        (
            ["--port", str(port), str(tmp_path / "r")],
            f"port {port} of 127.0.0.1 is in use; choose another port with --port",
        ),
        (["--port", "70000", "r"], "--port is 70000"),
        ([str(tmp_path / "file")], "is a file; name the folder of a run"),
        (["--host", "no.such.host.invalid", "r"], "--host no.such.host.invalid: cannot listen on this address"),
    ):
        assert main(["watch", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    taken.close()
    with pytest.raises(UserError, match="cannot listen on this address"):
        watching.open_server(tmp_path, "192.0.2.1", 0, HourlyRates())


def test_ctrl_c_ends_it_cleanly(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-m", "restomod", "watch", str(make_run(tmp_path / "r")), "--port", "0"]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in the background ignore SIGINT
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        port = int(line.split("127.0.0.1:")[1].split("/")[0])
        assert ask(port, "/")[0] == 200
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, error) == (0, "server stopped; the run is not affected\n", "")
