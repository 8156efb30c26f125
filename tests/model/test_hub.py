"""Models of the hub arrive whole and as published, or not at all: the real client against a hub with faults.

The client runs in this process, with its settings changed and its waiting taken away; tests/end_to_end/test_hub.py
runs the command line.
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
    """A hub with one model, to which the client of this process is turned."""
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
    """The files that were sent, by the last part of their address."""
    return [request.path.rpartition("/")[2] for request in hub.requests if request.method == "GET"]


def blobs(cache: Path) -> dict[str, Path]:
    """The cached contents by their hash."""
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
def test_names_of_the_hub_are_told_from_paths(name: str, repository: str | None) -> None:
    assert hub_name(name) == repository


# --- what goes well ------------------------------------------------------------------------------------------


def test_a_model_arrives_as_it_was_published(hub: Hub) -> None:
    folder = download_model(REPO)
    assert contents(folder) == FILES
    assert folder.name == hub.commit(REPO)


def test_a_second_time_nothing_is_sent(hub: Hub) -> None:
    first = download_model(REPO)
    hub.requests.clear()
    assert download_model(REPO) == first
    assert [request.method for request in hub.requests] == ["HEAD"]


def test_every_file_is_asked_for_at_one_commit(hub: Hub) -> None:
    """A commit that lands between two files must not mix them."""
    download_model(REPO)
    first, *rest = [request.path.split("/")[4] for request in hub.requests if "/resolve/" in request.path]
    assert first == "main"
    assert set(rest[:-1]) == {hub.commit(REPO)}
    assert hub.requests[-1].path.endswith("/main/config.json"), "main is noted only after all has arrived"


def test_a_new_commit_is_fetched_whole_and_the_old_one_stays(hub: Hub) -> None:
    old = download_model(REPO)
    hub.repos[REPO] = {"config.json": b'{"new": 1}', "model.safetensors": b"new weights"}
    new = download_model(REPO)
    assert contents(new) == hub.repos[REPO]
    assert contents(old) == FILES


def test_a_new_commit_with_the_same_weights_sends_only_what_changed(hub: Hub) -> None:
    download_model(REPO)
    hub.requests.clear()
    hub.repos[REPO]["config.json"] = b'{"new": 1}'
    assert contents(download_model(REPO)) == hub.repos[REPO]
    assert gets(hub) == ["config.json"]


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_the_vocabulary_comes_along(hub: Hub, name: str) -> None:
    """A GPT-2 whose tokens are others than GPT-2's can have as many of them."""
    hub.repos[REPO][name] = b'{"a": 0}'
    assert contents(download_model(REPO)) == hub.repos[REPO]


@pytest.mark.parametrize(("kind", "ending"), [("model.safetensors", "safetensors"), ("pytorch_model.bin", "bin")])
def test_all_shards_arrive(hub: Hub, kind: str, ending: str) -> None:
    shards = {f"part-{i}.{ending}": bytes([i]) * 99 for i in range(3)}
    index = json.dumps({"weight_map": {str(i): name for i, name in enumerate(shards)}}).encode()
    hub.repos[REPO] = {"config.json": CONFIG, f"{kind}.index.json": index, **shards}
    assert contents(download_model(REPO)) == hub.repos[REPO]


def test_pickles_are_fetched_only_where_there_is_nothing_safer(hub: Hub) -> None:
    hub.repos[REPO]["pytorch_model.bin"] = b"pickle"
    assert set(contents(download_model(REPO))) == {"config.json", "model.safetensors"}
    hub.repos[REPO] = {"config.json": CONFIG, "pytorch_model.bin": b"pickle", "README.md": b"not needed"}
    assert contents(download_model(REPO)) == {"config.json": CONFIG, "pytorch_model.bin": b"pickle"}


def test_what_the_hub_lacks_is_asked_for_once_and_not_waited_for(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_transfer_that_breaks_goes_on_where_it_broke(hub: Hub) -> None:
    hub.repos[REPO]["model.safetensors"] = content = WEIGHTS * (12 << 8)  # 12 MiB; the client keeps chunks of 10 MiB
    hub.cut(after=11 << 20, times=2)  # the config, which is shorter, and the weights once
    assert (download_model(REPO) / "model.safetensors").read_bytes() == content
    assert [request.range for request in hub.requests if request.method == "GET"][1:] == [None, "bytes=10485760-"]


def test_a_transfer_that_breaks_more_often_than_the_client_bears_is_begun_again(hub: Hub) -> None:
    hub.cut(after=10, times=8)  # the client gives up at the sixth
    assert contents(download_model(REPO)) == FILES


def test_a_connection_that_always_breaks_is_one_line_and_mending_it_is_enough(hub: Hub, cache: Path) -> None:
    hub.cut(after=10, times=None)
    said = refusal()
    assert said.startswith(f"cannot download config.json of {REPO}: ")
    assert said.endswith("run the same command again later")
    assert blobs(cache) == {}
    hub.mend()
    assert contents(download_model(REPO)) == FILES


def test_weights_that_never_arrive_leave_the_config_for_the_next_time(hub: Hub) -> None:
    hub.cut(after=len(CONFIG), times=None)
    assert refusal().startswith(f"cannot download model.safetensors of {REPO}: ")
    hub.mend()
    hub.requests.clear()
    assert contents(download_model(REPO)) == FILES
    assert gets(hub) == [etag("model.safetensors", WEIGHTS)]


def test_a_server_that_fails_now_and_then_is_asked_again(hub: Hub) -> None:
    hub.answer(503, times=3, methods=("GET",))
    assert contents(download_model(REPO)) == FILES


@pytest.mark.parametrize("fault", ["a drop", "an error", "a disk that looks full"])
def test_what_is_got_over_is_not_talked_of(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, fault: str
) -> None:
    said = io.StringIO()
    handler, logger = logging.StreamHandler(said), logging.getLogger("huggingface_hub")
    logger.addHandler(handler)
    if fault == "a drop":
        hub.cut(after=10)
    elif fault == "an error":
        hub.answers = {"HEAD": iter([(), (503, ""), (503, "")])}  # the client itself asks again
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


def test_between_attempts_there_is_a_pause(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_ATTEMPTS", 2.5)
    hub.answer(503, times=None, methods=("GET",))
    assert "503" in refusal()
    assert len(gets(hub)) == module.ATTEMPTS
    assert pauses == [2.5] * (module.ATTEMPTS - 1)


def test_ctrl_c_is_not_taken_for_a_broken_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_disk_that_refuses_is_not_taken_for_a_bad_connection(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, error: OSError, said: str
) -> None:
    calls = []

    def refused(*_: object, **__: object) -> NoReturn:
        calls.append(1)
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
    assert said in refusal()
    assert len(calls) == 1


# --- contents that are not what was promised -----------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2])
def test_a_spoiled_file_is_fetched_again(hub: Hub, times: int) -> None:
    hub.flip(-1, times)
    assert contents(download_model(REPO)) == FILES
    assert len(gets(hub)) == 2 + times


def test_a_file_that_always_comes_spoiled_is_refused_and_not_kept(hub: Hub, cache: Path) -> None:
    hub.flip(times=None)
    said = refusal()
    assert said.startswith(f"cannot download config.json of {REPO}: its SHA differs from the hub's")
    assert blobs(cache) == {}
    assert not list(cache.glob("models--*/snapshots/*/*"))
    hub.mend()
    assert contents(download_model(REPO)) == FILES


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_byte_that_changes_in_the_cache_is_noticed_and_mended(hub: Hub, cache: Path, name: str) -> None:
    folder = download_model(REPO)
    blob = blobs(cache)[etag(name, FILES[name])]
    blob.write_bytes(b"\xff" + FILES[name][1:])
    hub.requests.clear()
    assert download_model(REPO) == folder
    assert contents(folder) == FILES
    assert len(gets(hub)) == 1


def test_a_cached_file_that_two_commits_share_is_mended_for_both(hub: Hub, cache: Path) -> None:
    old = download_model(REPO)
    hub.repos[REPO]["config.json"] = b'{"new": 1}'
    new = download_model(REPO)
    blobs(cache)[etag("model.safetensors", WEIGHTS)].write_bytes(b"spoiled")
    assert contents(download_model(REPO)) == hub.repos[REPO]
    assert contents(new) == hub.repos[REPO]
    assert contents(old) == FILES


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_vanished_from_the_cache_is_fetched_again(hub: Hub, cache: Path, name: str) -> None:
    download_model(REPO)
    blobs(cache)[etag(name, FILES[name])].unlink()
    assert contents(download_model(REPO)) == FILES


def test_the_hashes_are_those_of_sha2_and_of_git(tmp_path: Path) -> None:
    """FIPS 180-2's example, and `printf 'hello\\n' | git hash-object --stdin`."""
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


# --- what the hub refuses ------------------------------------------------------------------------------------


def test_an_unknown_repository_is_one_line(hub: Hub) -> None:
    assert refusal("nobody/nothing") == (
        "nobody/nothing: no such folder here, and no such public model on the Hugging Face hub; "
        "OpenAI's are gpt2, gpt2-medium, gpt2-large, gpt2-xl"
    )
    assert len(hub.requests) == 1


def test_a_repository_that_is_not_found_by_404_is_one_line(hub: Hub) -> None:
    hub.answer(404, "RepoNotFound", times=None)
    assert "no such public model" in refusal()


def test_a_name_that_the_client_refuses_is_one_line(hub: Hub) -> None:
    assert "no such public model" in refusal("a--b/c..d")
    assert hub.requests == []


def test_a_gated_repository_says_what_to_do(hub: Hub) -> None:
    hub.gated = {REPO}
    assert refusal() == f"{REPO} on the hub is gated: accept its terms there, then `hf auth login`"
    assert len(hub.requests) == 1


def test_a_repository_without_a_config_is_one_line(hub: Hub) -> None:
    del hub.repos[REPO]["config.json"]
    assert refusal() == f"{REPO} on the hub has no config.json: it is not a model for `transformers`"


def test_a_repository_without_weights_is_one_line(hub: Hub) -> None:
    hub.repos[REPO] = {"config.json": CONFIG, "tf_model.h5": b"TensorFlow"}
    assert refusal() == f"{REPO} on the hub has no weights: no model.safetensors and no pytorch_model.bin"
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
    assert said.endswith("the model is not in its cache; connect once, or give the folder of a downloaded model")


@WAYS
def test_without_a_connection_half_a_model_is_none_and_nothing_waits_for_the_rest(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    hub.cut(after=len(CONFIG), times=None)
    refusal()
    offline(hub, how, monkeypatch)
    hub.requests.clear()
    assert "the model is not in its cache" in refusal()
    assert len(hub.requests) <= 1


@WAYS
def test_without_a_connection_a_commit_that_came_whole_is_taken_and_not_a_newer_half(
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
def test_without_a_connection_the_newest_whole_commit_is_taken(
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
def test_what_another_program_downloaded_is_found(hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """`hf download` fetches what there is, and leaves no note of what there is not."""
    hub.repos[REPO] = {"config.json": CONFIG, "pytorch_model.bin": WEIGHTS}
    for name in hub.repos[REPO]:
        hf_hub_download(REPO, name)
    offline(hub, how, monkeypatch)
    assert contents(download_model(REPO)) == {"config.json": CONFIG, "pytorch_model.bin": WEIGHTS}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_without_a_connection_a_spoiled_file_is_refused(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    download_model(REPO)
    blobs(cache)[etag(name, FILES[name])].write_bytes(b"spoiled")
    offline(hub, "HF_HUB_OFFLINE", monkeypatch)
    assert "the model is not in its cache" in refusal()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    assert contents(download_model(REPO)) == FILES


def test_a_hub_that_goes_away_in_the_middle_is_waited_for_once_and_not_four_times(
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
