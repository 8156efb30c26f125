"""Simulated Hugging Face hub for the real `huggingface_hub` client, with planted faults.

It answers the requests of `hf_hub_download` (1.x and 2.x): HEAD and GET of `/{repo}/resolve/{revision}/{file}`. As on
huggingface.co, weights are "LFS" files: their ETag is the content's sha256, and they are redirected to another host
(`localhost` here); other files are served in place, with the git blob's sha1 as ETag. Connections are not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
from huggingface_hub import constants

METHODS = ("HEAD", "GET")
LFS = (".safetensors", ".bin", ".parquet", ".xz", ".npy")
DATASETS = "datasets/"  # prefix of dataset repositories


class Request(NamedTuple):
    """Request of a client."""

    method: str
    path: str
    range: str | None


def etag(name: str, content: bytes) -> str:
    """Return the hash of a file on the hub, which is its blob name in the cache."""
    if name.endswith(LFS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _times(value: Any, times: int | None) -> Iterator[Any]:
    return repeat(value) if times is None else repeat(value, times)


class Hub:
    """Server of ``repos`` (repo id -> file name -> content, mutable) at ``url`` until closed.

    A fault applies to the next ``times`` matching requests (None: all).
    """

    def __init__(self, repos: dict[str, dict[str, bytes]] | None = None) -> None:
        self.repos = repos or {}
        self.moved = {"gpt2": "openai-community/gpt2"}  # old names, redirected
        self.gated: set[str] = set()
        self.cards: dict[str, dict[str, Any]] = {}  # front matter of a dataset's README
        self.requests: list[Request] = []
        self.mend()
        self.pause = time.sleep  # real setting, which `adopt_client` changes in this process
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server; later connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    def mend(self) -> None:
        """Remove all faults."""
        self.cuts: Iterator[int] = iter(())
        self.flips: Iterator[int] = iter(())
        self.stalls: Iterator[float] = iter(())
        self.hidden: set[str] = set()  # listed files that are missing
        self.bytes_per_second = 0.0
        self.answers: dict[str, Iterator[tuple[int, str]]] = {}

    def cut(self, after: int, times: int | None = 1) -> None:
        """Close the connection after this many bytes of a body."""
        self.cuts = _times(after, times)

    def flip(self, bit: int = 0, times: int | None = 1) -> None:
        """Flip one bit of a file (-1: the last), so that it differs from its ETag."""
        self.flips = _times(bit, times)

    def stall(self, seconds: float, times: int | None = 1) -> None:
        """Pause in the middle of a body."""
        self.stalls = _times(seconds, times)

    def answer(self, status: int, code: str = "", times: int | None = 1, methods: Sequence[str] = METHODS) -> None:
        """Answer with an error, such as 503, or 404 with the X-Error-Code RepoNotFound."""
        self.answers = dict.fromkeys(methods, _times((status, code), times))

    def commit(self, repo: str) -> str:
        """Return the revision of a repository, a function of its content."""
        files = sorted((name, etag(name, content)) for name, content in self.repos[repo].items())
        return hashlib.sha1(json.dumps(files).encode()).hexdigest()

    def adopt_client(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Connect the client of this process to this hub, with its cache in ``home`` and without delays."""
        for name, value in self.environment(home).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HOME", str(home))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("restomod.utils.hub.SECONDS_BETWEEN_ATTEMPTS", 0.0)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        huggingface_hub.close_session()

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of a process that downloads from this hub into ``home``."""
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        return {**mine, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "*", "no_proxy": "*"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        hub = self.hub
        listing = re.fullmatch(r"/api/datasets/([^/]+/[^/?]+)(?:/revision/([^/?]+))?(?:\?.*)?", self.path)
        if self.path.startswith("/api/") and not listing:  # telemetry: not logged and without faults
            return self._empty(404)
        hub.requests.append(Request(self.command, self.path, self.headers["Range"]))
        if error := next(hub.answers.get(self.command, iter(())), None):
            return self._empty(*error)
        if blob := re.fullmatch(r"/cdn/(\w{64})", self.path):
            files = [file for repo in hub.repos.values() for file in repo.items()]
            return self._serve(*next(file for file in files if etag(*file) == blob[1]))
        if listing:
            return self._list(DATASETS + listing[1], listing[2] or "main")
        asked = re.fullmatch(r"/((?:datasets/)?[^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)", self.path)
        repo, revision, name = asked.groups() if asked else ("", "", "")
        if repo in hub.moved:
            return self._empty(307, Location=f"/{hub.moved[repo]}/resolve/{revision}/{name}")
        if not (commit := self._commit(repo, revision)):
            return None
        if name not in hub.repos[repo] or name in hub.hidden:
            return self._empty(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        content = hub.repos[repo][name]
        if not name.endswith(LFS):
            return self._serve(name, content, X_Repo_Commit=commit)
        sha256 = etag(name, content)
        linked = {"X_Linked_Etag": f'"{sha256}"', "X_Linked_Size": str(len(content)), "X_Repo_Commit": commit}
        return self._empty(302, Location=f"http://localhost:{hub.port}/cdn/{sha256}", **linked)

    do_HEAD = do_GET

    def _commit(self, repo: str, revision: str) -> str | None:
        """Return the commit of a revision, or None after an error has been sent."""
        if repo in self.hub.gated:
            return self._empty(401, "GatedRepo", f"Access to {repo} is restricted. Please log in.")
        if repo not in self.hub.repos:  # without a login the hub does not distinguish private and missing repositories
            return self._empty(401, "RepoNotFound", "Invalid username or password.")
        commit = self.hub.commit(repo)
        if revision not in ("main", commit):
            return self._empty(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _list(self, repo: str, revision: str) -> None:
        """Return the hub's metadata of a dataset: commit, front matter of the card, files with sizes."""
        if not (commit := self._commit(repo, revision)):
            return
        siblings = [{"rfilename": name, "size": len(content)} for name, content in self.hub.repos[repo].items()]
        answer = {"id": repo.removeprefix(DATASETS), "sha": commit, "siblings": siblings}
        answer["cardData"] = self.hub.cards.get(repo)
        body = json.dumps(answer).encode()
        self._start(200, len(body), {"Content-Type": "application/json"})
        self.wfile.write(body)

    def _start(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(length), "Connection": "close"}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()

    def _empty(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        errors = {"X_Error_Code": code, "X_Error_Message": message} if code else {}
        self._start(status, 0, {**headers, **errors})

    def _serve(self, name: str, content: bytes, **headers: str) -> None:
        headers |= {"ETag": f'"{etag(name, content)}"', "Content-Disposition": f'inline; filename="{name}";'}
        headers["Accept-Ranges"] = "bytes"
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        first, last = (int(asked[1]), int(asked[2] or len(content) - 1)) if asked else (0, len(content) - 1)
        if asked and first >= len(content):
            return self._empty(416, Content_Range=f"bytes */{len(content)}")
        if asked:
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
        if self.command == "GET" and (bit := next(self.hub.flips, None)) is not None:
            byte = bit // 8 % len(content)
            content = content[:byte] + bytes([content[byte] ^ 1 << bit % 8]) + content[byte + 1 :]
        body = content[first : last + 1]
        self._start(206 if asked else 200, len(body), headers)
        if self.command == "GET":
            with contextlib.suppress(ConnectionError):  # a client may disconnect
                self._send(body[: next(self.hub.cuts, None)])

    def _send(self, body: bytes) -> None:
        pause, half = next(self.hub.stalls, 0.0), len(body) // 2
        if self.hub.bytes_per_second:
            for start in range(0, len(body), 1000):
                self.wfile.write(body[start : start + 1000])
                self.hub.pause(1000 / self.hub.bytes_per_second)
        elif pause:
            self.wfile.write(body[:half])
            self.wfile.flush()
            self.hub.pause(pause)
            self.wfile.write(body[half:])
        else:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
