"""Downloads of models from a local hub with faults, with the real client: complete and unchanged, or an error.

The client runs in this process with changed settings and without waiting. tests/end_to_end/test_hub.py tests the
command line.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import pytest
from huggingface_hub import constants, hf_hub_download

from restomod.model.hf_io import download_model, hub_name
from restomod.utils import hub as module
from restomod.utils.errors import UserError
from tests.hub import Hub, etag

REPO = "someone/tiny"
CONFIG, WEIGHTS = b'{"model_type": "gpt2"}', bytes(range(256)) * 16
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Start a hub with one model, and make it the hub of this process's client."""
    with Hub({REPO: dict(FILES)}) as hub:
        hub.adopt_client(tmp_path, monkeypatch)
        yield hub
    huggingface_hub.close_session()


def refusal(repository: str = REPO) -> str:
    with pytest.raises(UserError) as caught:
        download_model(repository)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def gets(hub: Hub) -> list[str]:
    """Return the names of the downloaded files, in order."""
    return [request.path.rpartition("/")[2] for request in hub.requests if request.method == "GET"]


def blobs(cache: Path) -> dict[str, Path]:
    """Return the cached files by hash."""
    return {path.name: path for path in cache.glob("models--*/blobs/*")}


NO_NAMES = ["", "gpt3", "a/b/c", "/a/b", "a/", "/b", "./a", "../a", "a/..", "~/a", "a b/c", "a/b\n", "a\\b", "-a/b"]


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        *((name, f"openai-community/{name}") for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")),
        *((name, name) for name in ("openai-community/gpt2", "a/b", "someone/Tiny_model-1.0")),
        *((name, None) for name in [*NO_NAMES, "http://a/b"]),
    ],
)
def test_names_of_the_hub_are_distinguished_from_paths(name: str, repository: str | None) -> None:
    assert hub_name(name) == repository


# --- successful downloads ------------------------------------------------------------------------------------


def test_a_model_is_downloaded_unchanged(hub: Hub) -> None:
    folder = download_model(REPO)
    assert contents(folder) == FILES
    assert folder.name == hub.commit(REPO)


def test_a_second_call_downloads_nothing(hub: Hub) -> None:
    first = download_model(REPO)
    hub.requests.clear()
    assert download_model(REPO) == first
    assert [request.method for request in hub.requests] == ["HEAD"]


def test_all_files_belong_to_one_commit(hub: Hub) -> None:
    """A commit that is pushed between two downloads must not mix the files."""
    download_model(REPO)
    first, *rest = [request.path.split("/")[4] for request in hub.requests if "/resolve/" in request.path]
    assert first == "main"
    assert set(rest[:-1]) == {hub.commit(REPO)}
    assert hub.requests[-1].path.endswith("/main/config.json"), "main is recorded only after all downloads"


def test_a_new_commit_is_downloaded_and_the_old_one_kept(hub: Hub) -> None:
    old = download_model(REPO)
    hub.repos[REPO] = {"config.json": b'{"new": 1}', "model.safetensors": b"new weights"}
    new = download_model(REPO)
    assert contents(new) == hub.repos[REPO]
    assert contents(old) == FILES


def test_a_new_commit_downloads_only_changed_files(hub: Hub) -> None:
    download_model(REPO)
    hub.requests.clear()
    hub.repos[REPO]["config.json"] = b'{"new": 1}'
    assert contents(download_model(REPO)) == hub.repos[REPO]
    assert gets(hub) == ["config.json"]


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_the_vocabulary_is_downloaded(hub: Hub, name: str) -> None:
    """A model with GPT-2's vocabulary size may have other tokens."""
    hub.repos[REPO][name] = b'{"a": 0}'
    assert contents(download_model(REPO)) == hub.repos[REPO]


@pytest.mark.parametrize(("kind", "ending"), [("model.safetensors", "safetensors"), ("pytorch_model.bin", "bin")])
def test_all_shards_are_downloaded(hub: Hub, kind: str, ending: str) -> None:
    shards = {f"part-{i}.{ending}": bytes([i]) * 99 for i in range(3)}
    index = json.dumps({"weight_map": {str(i): name for i, name in enumerate(shards)}}).encode()
    hub.repos[REPO] = {"config.json": CONFIG, f"{kind}.index.json": index, **shards}
    assert contents(download_model(REPO)) == hub.repos[REPO]


def test_pickles_are_downloaded_only_without_safetensors(hub: Hub) -> None:
    hub.repos[REPO]["pytorch_model.bin"] = b"pickle"
    assert set(contents(download_model(REPO))) == {"config.json", "model.safetensors"}
    hub.repos[REPO] = {"config.json": CONFIG, "pytorch_model.bin": b"pickle", "README.md": b"not needed"}
    assert contents(download_model(REPO)) == {"config.json": CONFIG, "pytorch_model.bin": b"pickle"}


def test_missing_files_are_requested_once_and_without_pauses(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    hub.repos[REPO] = {"config.json": CONFIG, "pytorch_model.bin": b"pickle"}
    folder = download_model(REPO)
    absent = [request.path for request in hub.requests if "model.safetensors" in request.path]
    assert [path.rpartition("/")[2] for path in absent] == ["model.safetensors", "model.safetensors.index.json"]
    assert pauses == []
    hub.requests.clear()
    assert download_model(REPO) == folder
    assert [request.method for request in hub.requests] == ["HEAD"]


def test_a_renamed_repository_is_followed(hub: Hub) -> None:
    hub.moved["old/name"] = REPO
    assert contents(download_model("old/name")) == FILES


# --- broken connections --------------------------------------------------------------------------------------


def test_an_interrupted_download_is_resumed(hub: Hub) -> None:
    hub.repos[REPO]["model.safetensors"] = content = WEIGHTS * (12 << 8)  # 12 MiB; the client keeps chunks of 10 MiB
    hub.cut(after=11 << 20, times=2)  # the config, which is shorter, and the weights once
    assert (download_model(REPO) / "model.safetensors").read_bytes() == content
    assert [request.range for request in hub.requests if request.method == "GET"][1:] == [None, "bytes=10485760-"]


def test_a_download_that_the_client_gives_up_is_restarted(hub: Hub) -> None:
    hub.cut(after=10, times=8)  # the client gives up at the sixth
    assert contents(download_model(REPO)) == FILES


def test_a_connection_that_always_breaks_is_an_error_until_it_works_again(hub: Hub, cache: Path) -> None:
    hub.cut(after=10, times=None)
    said = refusal()
    assert said.startswith(f"cannot download config.json of {REPO}: ")
    assert said.endswith("run the same command again later")
    assert blobs(cache) == {}
    hub.mend()
    assert contents(download_model(REPO)) == FILES


def test_a_downloaded_config_is_kept_if_the_weights_fail(hub: Hub) -> None:
    hub.cut(after=len(CONFIG), times=None)
    assert refusal().startswith(f"cannot download model.safetensors of {REPO}: ")
    hub.mend()
    hub.requests.clear()
    assert contents(download_model(REPO)) == FILES
    assert gets(hub) == [etag("model.safetensors", WEIGHTS)]


def test_a_request_is_repeated_after_a_server_error(hub: Hub) -> None:
    hub.answer(503, times=3, methods=("GET",))
    assert contents(download_model(REPO)) == FILES


@pytest.mark.parametrize("fault", ["a drop", "an error", "a disk that looks full"])
def test_recovered_errors_print_no_warnings(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, fault: str
) -> None:
    said = io.StringIO()
    handler, logger = logging.StreamHandler(said), logging.getLogger("huggingface_hub")
    logger.addHandler(handler)
    if fault == "a drop":
        hub.cut(after=10)
    elif fault == "an error":
        hub.answers = {"HEAD": iter([(), (503, ""), (503, "")])}  # the client repeats the request
    else:
        full = shutil.disk_usage("/")._replace(free=0)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    try:
        assert contents(download_model(REPO)) == FILES
        assert (said.getvalue(), [str(w.message) for w in recwarn]) == ("", [])
        logger.warning("Rate limited. Waiting 60s before retry [Retry 1/5].")
    finally:
        logger.removeHandler(handler)
    assert said.getvalue().startswith("Rate limited")


def test_attempts_are_separated_by_pauses(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_ATTEMPTS", 2.5)
    hub.answer(503, times=None, methods=("GET",))
    assert "503" in refusal()
    assert len(gets(hub)) == module.ATTEMPTS
    assert pauses == [2.5] * (module.ATTEMPTS - 1)


def test_ctrl_c_is_not_treated_as_a_broken_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download_model(REPO)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cannot save config.json (No space left on device)"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache/blobs"), "/cache/blobs: cannot save config.json"),
    ],
)
def test_a_disk_error_is_not_treated_as_a_broken_connection(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, error: OSError, said: str
) -> None:
    calls = []

    def refused(*_: object, **__: object) -> NoReturn:
        calls.append(1)
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
    assert said in refusal()
    assert len(calls) == 1


# --- wrong hashes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2])
def test_a_damaged_file_is_downloaded_again(hub: Hub, times: int) -> None:
    hub.flip(-1, times)
    assert contents(download_model(REPO)) == FILES
    assert len(gets(hub)) == 2 + times


def test_a_file_that_is_always_damaged_is_refused_and_not_kept(hub: Hub, cache: Path) -> None:
    hub.flip(times=None)
    said = refusal()
    assert said.startswith(f"cannot download config.json of {REPO}: its SHA differs from the hub's")
    assert blobs(cache) == {}
    assert not list(cache.glob("models--*/snapshots/*/*"))
    hub.mend()
    assert contents(download_model(REPO)) == FILES


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_changed_byte_in_the_cache_is_detected_and_repaired(hub: Hub, cache: Path, name: str) -> None:
    folder = download_model(REPO)
    blob = blobs(cache)[etag(name, FILES[name])]
    blob.write_bytes(b"\xff" + FILES[name][1:])
    hub.requests.clear()
    assert download_model(REPO) == folder
    assert contents(folder) == FILES
    assert len(gets(hub)) == 1


def test_a_cached_file_of_two_commits_is_repaired_for_both(hub: Hub, cache: Path) -> None:
    old = download_model(REPO)
    hub.repos[REPO]["config.json"] = b'{"new": 1}'
    new = download_model(REPO)
    blobs(cache)[etag("model.safetensors", WEIGHTS)].write_bytes(b"spoiled")
    assert contents(download_model(REPO)) == hub.repos[REPO]
    assert contents(new) == hub.repos[REPO]
    assert contents(old) == FILES


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_deleted_from_the_cache_is_downloaded_again(hub: Hub, cache: Path, name: str) -> None:
    download_model(REPO)
    blobs(cache)[etag(name, FILES[name])].unlink()
    assert contents(download_model(REPO)) == FILES


def test_hashes_are_sha256_and_gits(tmp_path: Path) -> None:
    """The values are the example of FIPS 180-2, and `printf 'hello\\n' | git hash-object --stdin`."""
    sha256 = tmp_path / "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    git = tmp_path / "ce013625030ba8dba906f756967f9e9ca394464a"
    for blob, right in ((sha256, b"abc"), (git, b"hello\n")):
        blob.write_bytes(right)
        link = tmp_path / "link"
        link.symlink_to(blob)
        assert module.as_published(link)
        blob.write_bytes(right[:-1])
        assert not module.as_published(link)
        link.unlink()


# --- refused requests ----------------------------------------------------------------------------------------


def test_an_unknown_repository_is_one_line(hub: Hub) -> None:
    assert refusal("nobody/nothing") == (
        "nobody/nothing: no such local folder, and no such public model on the Hugging Face hub; "
        "OpenAI's models are gpt2, gpt2-medium, gpt2-large, gpt2-xl"
    )
    assert len(hub.requests) == 1


def test_a_repository_that_is_not_found_by_404_is_one_line(hub: Hub) -> None:
    hub.answer(404, "RepoNotFound", times=None)
    assert "no such public model" in refusal()


def test_a_name_that_the_client_refuses_is_one_line(hub: Hub) -> None:
    assert "no such public model" in refusal("a--b/c..d")
    assert hub.requests == []


def test_a_gated_repository_is_one_line_with_advice(hub: Hub) -> None:
    hub.gated = {REPO}
    assert refusal() == f"{REPO} on the hub is gated: accept its terms on the website, then run `hf auth login`"
    assert len(hub.requests) == 1


def test_a_repository_without_a_config_is_one_line(hub: Hub) -> None:
    del hub.repos[REPO]["config.json"]
    assert refusal() == f"{REPO} on the hub has no config.json: it is not a `transformers` model"


def test_a_repository_without_weights_is_one_line(hub: Hub) -> None:
    hub.repos[REPO] = {"config.json": CONFIG, "tf_model.h5": b"TensorFlow"}
    assert refusal() == f"{REPO} on the hub has no weights: model.safetensors and pytorch_model.bin are missing"
    hub.repos[REPO]["model.safetensors"] = WEIGHTS
    assert (download_model(REPO) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("shard", ["../../blobs/x", "..", "/etc/passwd", "absent.safetensors"])
def test_an_index_cannot_lead_out_of_the_repository(hub: Hub, shard: str) -> None:
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    hub.repos[REPO] = {"config.json": CONFIG, "model.safetensors.index.json": index}
    assert shard in refusal()
    assert not [path for path in gets(hub) if path in ("passwd", "x", "..")]


# --- without a connection ------------------------------------------------------------------------------------


def offline(hub: Hub, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "closed":
        hub.close()
        huggingface_hub.close_session()
    elif how == "503":
        hub.answer(503, times=None)
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        huggingface_hub.close_session()


WAYS = pytest.mark.parametrize("how", ["closed", "503", "HF_HUB_OFFLINE"])


@WAYS
def test_without_connection_and_cache_the_reason_is_one_line(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    offline(hub, how, monkeypatch)
    said = refusal()
    assert said.startswith(f"{REPO}: the Hugging Face hub cannot be reached (")
    assert {"closed": "refused", "503": "503", "HF_HUB_OFFLINE": "offline mode"}[how] in said
    assert said.endswith(
        "the model is not in the cache; connect to the internet, or give the folder of a downloaded model"
    )


@WAYS
def test_without_a_connection_an_incomplete_download_is_refused_immediately(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    hub.cut(after=len(CONFIG), times=None)
    refusal()
    offline(hub, how, monkeypatch)
    hub.requests.clear()
    assert "the model is not in the cache" in refusal()
    assert len(hub.requests) <= 1


@WAYS
def test_without_a_connection_a_complete_commit_is_used_instead_of_a_newer_incomplete_one(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    old = download_model(REPO)
    hub.repos[REPO] = {"config.json": CONFIG, "model.safetensors": b"new" + WEIGHTS}
    hub.cut(after=10, times=None)
    refusal()
    offline(hub, how, monkeypatch)
    assert download_model(REPO) == old
    assert contents(old) == FILES


@WAYS
def test_without_a_connection_the_newest_complete_commit_is_used(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    download_model(REPO)
    hub.repos[REPO]["config.json"] = b'{"new": 1}'
    new = download_model(REPO)
    hub.requests.clear()
    offline(hub, how, monkeypatch)
    assert download_model(REPO) == new
    assert [request.method for request in hub.requests] == (["HEAD"] if how == "503" else [])


@WAYS
def test_downloads_of_another_program_are_found(hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """`hf download` does not record which files are missing on the hub."""
    hub.repos[REPO] = {"config.json": CONFIG, "pytorch_model.bin": WEIGHTS}
    for name in hub.repos[REPO]:
        hf_hub_download(REPO, name)
    offline(hub, how, monkeypatch)
    assert contents(download_model(REPO)) == {"config.json": CONFIG, "pytorch_model.bin": WEIGHTS}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_without_a_connection_a_damaged_file_is_refused(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    download_model(REPO)
    blobs(cache)[etag(name, FILES[name])].write_bytes(b"spoiled")
    offline(hub, "HF_HUB_OFFLINE", monkeypatch)
    assert "the model is not in the cache" in refusal()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    assert contents(download_model(REPO)) == FILES


def test_a_hub_that_closes_during_a_download_causes_one_series_of_retries(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    ask: Any = huggingface_hub.get_hf_file_metadata

    def ask_and_close(*arguments: Any, **keywords: Any) -> Any:
        answer = ask(*arguments, **keywords)
        offline(hub, "closed", monkeypatch)
        return answer

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask_and_close)
    assert refusal().startswith(f"cannot download config.json of {REPO}: ")
    assert sum(seconds) < 30
