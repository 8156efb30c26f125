"""The verb `watch`: a report that follows a run, served on this machine."""

from __future__ import annotations

import errno
import http
import http.server
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from restomod.errors import UserError
from restomod.experiments.report import page_data
from restomod.experiments.report_html import as_json, as_page, footer
from restomod.experiments.report_usage import Prices
from restomod.experiments.runs import open_run
from restomod.text import visible

SECONDS = 3.0  # between two questions of a page
REST = 20  # a page is made again only after so many times as long as that has taken: training needs the processor
FRESH = 60.0  # seconds after which it is made again though no file has changed: a silent run has stopped
LOCAL = ("127.0.0.1", "localhost", "::1")


class Watched:
    """A run's folder, and the page's data made of it, no more often than its files change."""

    def __init__(self, folder: Path, prices: Prices) -> None:
        self.folder, self.prices = folder, prices
        self._lock = threading.Lock()
        self._seen: object = None
        self._made = 0.0
        self._took = 0.0
        self._data: dict[str, Any] = {}

    def data(self) -> dict[str, Any]:
        """The newest data, or a little older; with ``waiting`` where there is no run yet, or none that can be read."""
        with self._lock:
            now = time.monotonic()
            if self._data and now - self._made < REST * self._took:
                return self._data
            seen = self._files()
            if self._data and seen == self._seen and now - self._made < FRESH:
                return self._data
            self._data, self._seen = self._make(), seen
            self._made = time.monotonic()
            self._took = self._made - now
            return self._data

    def _make(self) -> dict[str, Any]:
        about = {"live": True, "seconds": SECONDS, "version": f"{time.time():.3f}"}
        name = visible(self.folder.resolve().name)
        try:
            return page_data([open_run(self.folder, warn=lambda text: None)], self.prices) | about
        except (UserError, OSError) as e:  # not begun, being replaced, or a file half written
            reason = "waiting for the run to begin" if not (self.folder / "config.json").exists() else str(e)
            return about | {"title": name, "footer": footer(), "runs": [], "waiting": visible(reason)}

    def _files(self) -> object:
        """What changes when a file of the run does."""
        names = ("config.json", "environment.json", "metrics.jsonl", "samples.jsonl", "examined.json")
        paths = [
            *(self.folder / name for name in names),
            self.folder / "checkpoints",
            *self.folder.glob("evals/*.json"),
        ]
        found = []
        for path in paths:
            try:
                status = path.stat()
                found.append((path.name, status.st_ino, status.st_size, status.st_mtime_ns))
            except OSError:
                found.append((path.name, 0, 0, 0))
        return found


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, watched: Watched) -> None:
        self.watched, self.host = watched, host
        super().__init__((host, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that was closed in the middle of an answer is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    server_version = "restomod"
    sys_version = ""

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        if not self._is_for_us():
            self._answer(http.HTTPStatus.FORBIDDEN, "text/plain", b"this page is for its own machine\n")
        elif asked.path == "/":
            self._answer(http.HTTPStatus.OK, "text/html", as_page(self.server.watched.data()).encode())
        elif asked.path == "/data.json":
            data = self.server.watched.data()
            if parse_qs(asked.query).get("since") == [data["version"]]:
                self._answer(http.HTTPStatus.NO_CONTENT, "application/json", b"")
            else:
                self._answer(http.HTTPStatus.OK, "application/json", as_json(data).encode())
        else:
            self._answer(http.HTTPStatus.NOT_FOUND, "text/plain", b"there is only / and /data.json\n")

    def _is_for_us(self) -> bool:
        """Whether a request names this machine: a page from elsewhere whose name was made to lead here does not."""
        if self.server.host not in LOCAL:
            return True
        name = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        return name in LOCAL

    def _answer(self, status: http.HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Questions every few seconds are not worth a line."""


def open_server(folder: Path, host: str, port: int, prices: Prices) -> _Server:
    """A server that is bound, but does not answer yet.

    Raises:
        UserError: the port is in use or not allowed, or the host is not one of this machine.
    """
    try:
        return _Server(host, port, Watched(folder, prices))
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use; choose another with --port, or 0 for any") from None
        if e.errno == errno.EACCES:
            raise UserError(f"port {port} is not allowed for you; choose one above 1023 with --port") from None
        raise UserError(f"--host {host}: cannot listen there ({e.strerror or e})") from None


def watch(folder: Path, host: str, port: int, prices: Prices, say: Callable[[str], None] = print) -> None:
    """Serve the page of a run until Ctrl-C.

    Args:
        folder: the run's; it need not be there yet.
        host: address to listen on.
        port: 0 for any that is free.
        prices: see `restomod.experiments.report`.
        say: takes a line.

    Raises:
        UserError: see `open_server`; or plotly is missing.
    """
    with open_server(folder, host, port, prices) as server:
        as_page(server.watched.data())
        shown = f"[{host}]" if ":" in host else host
        say(f"{folder} at http://{shown}:{server.server_address[1]}/ (Ctrl-C ends it)")
        if host not in LOCAL:
            say("warning: whoever reaches this address can read the run's numbers, samples and settings")
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            say("ended; the run goes on by itself")
