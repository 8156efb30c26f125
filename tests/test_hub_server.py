"""The simulated hub, tested with the real client."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

from tests.hub import Hub

GPT2 = "openai-community/gpt2"
CLIENT = """
import sys
from huggingface_hub import hf_hub_download
for wanted in sys.argv[1:]:
    try:
        print(hf_hub_download(*wanted.rsplit("/", 1)))
    except Exception as e:
        print(type(e).__name__)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub({GPT2: {"config.json": b"hello\n", "model.safetensors": b"abc"}}) as hub:
        yield hub


def download(hub: Hub, home: Path, *wanted: str) -> list[str]:
    """Download each "repo/file" and return its path in the cache, or the name of the error."""
    command = [sys.executable, "-c", CLIENT, *wanted]
    done = subprocess.run(command, env=hub.environment(home), stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


def test_files_are_cached_under_their_git_or_lfs_hash(hub: Hub, tmp_path: Path) -> None:
    config, weights = map(Path, download(hub, tmp_path, f"{GPT2}/config.json", f"{GPT2}/model.safetensors"))
    assert (config.read_bytes(), weights.read_bytes()) == (b"hello\n", b"abc")
    assert config.resolve().name == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
    assert weights.resolve().name == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert config.parent.name == weights.parent.name == hub.commit(GPT2)


def test_a_cached_file_is_not_sent_again(hub: Hub, tmp_path: Path) -> None:
    first, second = (download(hub, tmp_path, f"{GPT2}/config.json") for _ in range(2))
    assert first == second
    assert [request.method for request in hub.requests] == ["HEAD", "GET", "HEAD"]


def test_a_short_name_is_redirected_to_the_repository(hub: Hub, tmp_path: Path) -> None:
    (path,) = download(hub, tmp_path, "gpt2/config.json")
    assert Path(path).read_bytes() == b"hello\n"
    assert [request.path.split("/resolve")[0] for request in hub.requests] == ["/gpt2", f"/{GPT2}", f"/{GPT2}"]


def test_missing_files_raise_the_errors_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.gated = {"meta/llama"}
    assert download(hub, tmp_path, f"{GPT2}/model.bin", "nobody/nothing/config.json", "meta/llama/config.json") == [
        "RemoteEntryNotFoundError",
        "RepositoryNotFoundError",
        "GatedRepoError",
    ]


def test_a_broken_transfer_is_resumed(hub: Hub, tmp_path: Path) -> None:
    content = bytes(range(256)) * (12 << 12)  # 12 MiB; the client keeps whole chunks of 10 MiB
    hub.repos["a/b"] = {"model.safetensors": content}
    hub.cut(after=11 << 20)
    (path,) = download(hub, tmp_path, "a/b/model.safetensors")
    assert Path(path).read_bytes() == content
    assert [request.range for request in hub.requests if request.method == "GET"] == [None, "bytes=10485760-"]


@pytest.mark.parametrize(
    ("asked", "status", "content_range", "body"),
    [
        (None, 200, None, b"hello\n"),
        ("bytes=2-", 206, "bytes 2-5/6", b"llo\n"),
        ("bytes=1-3", 206, "bytes 1-3/6", b"ell"),
        ("bytes=6-", 416, "bytes */6", b""),
    ],
)
def test_a_range_is_answered_as_rfc_9110_says(
    asked: str | None, status: int, content_range: str | None, body: bytes, hub: Hub
) -> None:
    connection = HTTPConnection("127.0.0.1", hub.port)
    connection.request("GET", f"/{GPT2}/resolve/main/config.json", headers={"Range": asked} if asked else {})
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Content-Range"], answer.read()) == (status, content_range, body)
    assert hub.requests[-1].range == asked


def test_planted_faults_occur_as_often_as_planted(hub: Hub, tmp_path: Path) -> None:
    wanted = f"{GPT2}/model.safetensors"
    hub.answer(503, methods=("GET",))
    hub.flip(-1)
    error, changed = download(hub, tmp_path / "1", wanted, wanted)
    (mended,) = download(hub, tmp_path / "2", wanted)
    assert error == "HfHubHTTPError"
    assert Path(changed).read_bytes() == b"ab\xe3"  # the client does not detect it
    assert Path(mended).read_bytes() == b"abc"
