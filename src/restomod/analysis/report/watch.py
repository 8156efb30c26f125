"""Command `watch`: HTTP server for the live report of a run."""

from __future__ import annotations

import contextlib
import errno
import http
import http.server
import io
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from restomod.analysis.report.data import ERRORS_FILE
from restomod.analysis.report.html import as_json, as_page, footer, policy
from restomod.analysis.report.usage import HourlyRates
from restomod.analysis.report.write import report_data
from restomod.runs.reader import open_run
from restomod.utils.errors import UserError, one_line
from restomod.utils.output import print_error
from restomod.utils.redaction import redact

SECONDS = 3.0  # interval between requests of a page
REST = 20  # minimum idle time between two builds, in build times, so that training keeps the CPU
FRESH = 60.0  # maximum age of the data in seconds; a run without new records must become "stopped"
LOCAL = ("127.0.0.1", "localhost", "::1")
LOCAL_NAME = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)  # in a Host header
MAX_CONNECTIONS = 32  # concurrent connections, one thread each
REQUEST_TIMEOUT = 5.0  # seconds to receive a request
RESPONSE_TIMEOUT = 30.0  # seconds to send a response
MAX_REQUEST = 2**16  # bytes
MAX_DISCARDED = 2**20  # bytes read from a request that is too long, so that the client can read the response
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Watched:
    """Cached page data of a run's folder, rebuilt when its files change or after `FRESH` seconds."""

    def __init__(self, folder: Path, rates: HourlyRates) -> None:
        self.folder, self.rates = folder, rates
        self._lock = threading.Lock()
        self._seen: object = None
        self._made = 0.0
        self._took = 0.0
        self._data: dict[str, Any] = {}

    def data(self) -> dict[str, Any]:
        """Return the page data, with ``waiting`` if there is no readable run.

        Data is returned without a check of the files for `REST` times as long as its build took.
        """
        with self._lock:
            now = time.monotonic()
            if self._data and now - self._made < REST * self._took:
                return self._data
            seen = self._files()
            if self._data.get("runs") and seen == self._seen and now - self._made < FRESH:
                return self._data
            self._data, self._seen = self._make(), seen
            self._made = time.monotonic()
            self._took = self._made - now
            return self._data

    def _make(self) -> dict[str, Any]:
        about = {"live": True, "seconds": SECONDS, "version": f"{time.time():.3f}"}
        try:
            warnings: list[str] = []
            data = report_data([open_run(self.folder, warn=warnings.append)], self.rates) | about
            for run in data["runs"]:
                run["remark"] = "; ".join([run["remark"], *redact(warnings)])
            return data
        except Exception as e:  # the run may be missing, incomplete or damaged now and readable later
            reason = str(e) if isinstance(e, UserError | OSError) else f"{self.folder} cannot be shown: {one_line(e)}"
            if not os.path.exists(self.folder / "config.json"):
                reason = "waiting for the run to start"
            name = os.path.basename(os.path.realpath(self.folder))
            return about | redact({"title": name, "footer": footer(), "runs": [], "waiting": reason})

    def _files(self) -> object:
        """Return a value that changes if any file of the run changes."""
        names = ("config.json", "environment.json", "data.json", "metrics.jsonl", "samples.jsonl", ERRORS_FILE)
        paths = [
            *(self.folder / name for name in names),
            self.folder / "checkpoints",
            *self.folder.glob("evals/*.json"),
        ]
        found = []
        for path in paths:
            status = None
            with contextlib.suppress(OSError):
                status = path.stat()
            found.append((path.name, status and (status.st_ino, status.st_size, status.st_mtime_ns)))
        return found


class _Server(http.server.ThreadingHTTPServer):
    """Server with at most `MAX_CONNECTIONS` connections. A new one replaces the oldest with an incomplete request."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, watched: Watched) -> None:
        self.watched, self.host = watched, host
        self._connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._pending: dict[socket.socket, None] = {}  # connections with incomplete requests, oldest first
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._connections.acquire(blocking=False):
            for oldest in list(self._pending)[:1]:
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # ends the thread of the connection
            if not self._connections.acquire(timeout=1):
                self.shutdown_request(request)
                return
        self._pending[request] = None
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the thread could not be started
            self._leave(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._leave(request)

    def _leave(self, request: socket.socket) -> None:
        self.request_complete(request)
        self._connections.release()

    def request_complete(self, request: socket.socket) -> None:
        """Record that the request of a connection has been read."""
        self._pending.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print errors of this program. Lost connections are ignored."""
        error = sys.exception()
        if not isinstance(error, OSError):
            print_error(f"warning: a request could not be answered: {type(error).__name__}: {one_line(error)}")


class _Handler(http.server.BaseHTTPRequestHandler):
    """Handler of one request. A request that is incomplete after `REQUEST_TIMEOUT` seconds is dropped."""

    server: _Server
    connection: socket.socket
    server_version = "restomod"
    sys_version = ""

    def handle(self) -> None:
        head = self._head()
        self.server.request_complete(self.connection)
        self.connection.settimeout(RESPONSE_TIMEOUT)
        if len(head) > MAX_REQUEST:
            self.requestline = self.request_version = self.command = ""
            self.send_error(http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif head:
            self.rfile = io.BytesIO(head)
            self.handle_one_request()

    def _head(self) -> bytes:
        """Read a request up to its empty line.

        Returns:
            Request; more than `MAX_REQUEST` bytes if it is too long, no bytes if it is incomplete.
        """
        until, head, last, size = time.monotonic() + REQUEST_TIMEOUT, bytearray(), b"", 0
        while size < MAX_DISCARDED and (left := until - time.monotonic()) > 0:
            self.connection.settimeout(left)
            part = self.connection.recv(MAX_REQUEST)
            size += len(part)
            head += part[: MAX_REQUEST + 1 - len(head)]
            if not part or re.search(rb"\n\r?\n", last + part):
                return bytes(head)
            last = (last + part)[-3:]
        return bytes(head) if size > MAX_REQUEST else b""

    def do_GET(self) -> None:
        try:
            asked = urlsplit(self.path)
        except ValueError:
            self.send_error(http.HTTPStatus.BAD_REQUEST)
            return
        if not self._is_for_us(asked.netloc):
            self._answer(http.HTTPStatus.FORBIDDEN, "text/plain", b"this page is only available on its own machine\n")
        elif asked.path == "/":
            self._answer(http.HTTPStatus.OK, "text/html", as_page(self.server.watched.data()).encode(), policy(True))
        elif asked.path == "/data.json":
            data = self.server.watched.data()
            if parse_qs(asked.query).get("since") == [data["version"]]:
                self._answer(http.HTTPStatus.NO_CONTENT, "application/json", b"")
            else:
                self._answer(http.HTTPStatus.OK, "application/json", as_json(data).encode())
        else:
            self._answer(http.HTTPStatus.NOT_FOUND, "text/plain", b"not found; available: / and /data.json\n")

    do_HEAD = do_GET

    def _is_for_us(self, named: str) -> bool:
        """Return whether a request names this machine. This prevents DNS rebinding.

        Args:
            named: host in the request line, usually empty; the Host headers are checked as well.
        """
        if self.server.host not in LOCAL:
            return True
        hosts = [*self.headers.get_all("Host", [""]), *([named] if named else [])]
        return all(LOCAL_NAME.fullmatch(host.strip()) for host in hosts)

    def _answer(self, status: http.HTTPStatus, kind: str, body: bytes, allowed: str = "") -> None:
        """Send a response; ``allowed`` is the Content-Security-Policy of a page."""
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self._allowed = allowed
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    _allowed = ""

    def end_headers(self) -> None:
        """Add `HEADERS` to every response, including errors."""
        for name, value in HEADERS.items():
            if name == "Content-Security-Policy" and self._allowed:
                value = f"{self._allowed}; frame-ancestors 'none'"
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, because pages send a request every few seconds."""


def open_server(folder: Path, host: str, port: int, rates: HourlyRates) -> _Server:
    """Bind a server. It answers requests after a call of `serve_forever`.

    Args:
        folder: folder of the run, which may be missing.
        host: address to listen on.
        port: port; 0: any free port.
        rates: price and power.

    Raises:
        UserError: the port is in use or not allowed, or the host is not an address of this machine.
    """
    try:
        return _Server(host, port, Watched(folder, rates))
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use; choose another port with --port, or 0 for any") from None
        if e.errno == errno.EACCES:
            raise UserError(f"port {port}: permission denied; choose a port above 1023 with --port") from None
        raise UserError(f"--host {host}: cannot listen on this address ({e.strerror or e})") from None


def watch(folder: Path, host: str, port: int, rates: HourlyRates, say: Callable[[str], None] = print) -> None:
    """Serve the live page of a run until Ctrl-C.

    Args:
        folder: folder of the run, which may be missing.
        host: address to listen on.
        port: port; 0: any free port.
        rates: price and power.
        say: function that prints a line.

    Raises:
        UserError: see `open_server`; or plotly is missing.
    """
    with open_server(folder, host, port, rates) as server:
        as_page(server.watched.data())
        shown = f"[{host}]" if ":" in host else host
        say(f"{folder} at http://{shown}:{server.server_address[1]}/ (Ctrl-C stops the server)")
        if host not in LOCAL:
            say("warning: anyone who can reach this address can read the run's metrics, samples and settings")
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            say("server stopped; the run is not affected")
