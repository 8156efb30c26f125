"""Data of tasks: a download checked by its hash, the hub through its real client, or a named file."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from restomod.evals.tasks.registry import TASKS, load_task, task_names, with_absolute_path
from restomod.evals.tasks.task import Download
from restomod.utils.errors import UserError
from tests.hub import DATASETS, Hub

SWAG = {"activity_label": "Sitting", "ctx": "A man sits. he", "endings": ["rises.", "falls."], "label": 1}
SWAGS = "".join(json.dumps(SWAG | {"label": i % 2}) + "\n" for i in range(6)).encode()
ARC = {"question": "Wet?", "choices": {"text": ["fire", "water"], "label": ["A", "B"]}, "answerKey": "B"}
PIQA = {"goal": "Open it", "sol1": "Push.", "sol2": "Wait.", "label": 0}
WSC = {
    "text": "Ann hit Bob because he fell.",
    "pronoun": "he",
    "pronoun_loc": 20,
    "options": ["Ann", "Bob"],
    "label": 1,
}


def parquet(*records: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), buffer)
    return buffer.getvalue()


def take_from(url: str, sha256: str, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Download(url, sha256, "hellaswag_val.jsonl")
    monkeypatch.setitem(TASKS, task, dataclasses.replace(TASKS[task], source=source))


@pytest.fixture
def authors(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve HellaSwag's file on this machine and return the list of requested paths."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(SWAGS)))
            self.end_headers()
            self.wfile.write(SWAGS)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/hellaswag_val.jsonl"
    for name in ("hellaswag", "hellaswag-harness"):
        take_from(url, hashlib.sha256(SWAGS).hexdigest(), name, monkeypatch)
    monkeypatch.setenv("NO_PROXY", "*")
    yield asked
    server.shutdown()
    server.server_close()


def test_hellaswag_is_downloaded_once(authors: list[str], tmp_path: Path) -> None:
    for name in ("hellaswag", "hellaswag", "hellaswag-harness"):
        assert [example.gold for example in load_task(name, tmp_path).examples] == [0, 1, 0, 1, 0, 1]
    assert authors == ["/hellaswag_val.jsonl"]
    assert (tmp_path / "hellaswag_val.jsonl").read_bytes() == SWAGS


def test_another_file_than_the_authors_is_refused(
    authors: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = TASKS["hellaswag"].source
    assert isinstance(source, Download)
    take_from(source.url, "0" * 64, "hellaswag", monkeypatch)
    with pytest.raises(UserError, match=r"cannot download .*hash.*--tasks hellaswag=FILE"):
        load_task("hellaswag", tmp_path)
    assert not (tmp_path / "hellaswag_val.jsonl").exists()


CARD = {  # as allenai/ai2_arc's
    "configs": [
        {"config_name": f"ARC-{kind}", "data_files": [{"split": "test", "path": f"ARC-{kind}/test-*"}]}
        for kind in ("Challenge", "Easy")
    ]
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    arc = {
        "ARC-Easy/test-00000-of-00001.parquet": parquet(ARC, ARC | {"answerKey": "A"}),
        "ARC-Easy/train-00000-of-00001.parquet": parquet(ARC),
        "ARC-Challenge/test-00000-of-00001.parquet": parquet(ARC),
        "README.md": b"---\n---\n",
    }
    repositories = {
        "allenai/ai2_arc": arc,
        "baber/piqa": {
            "data/train-00000-of-00001.parquet": parquet(PIQA | {"label": 1}),
            "data/validation-00000-of-00001.parquet": parquet(PIQA),
        },
        "lighteval/winograd_wsc": {"wsc273/test-00000-of-00001.parquet": parquet(WSC)},
        "EleutherAI/lambada_openai": {"default/test-00000-of-00001.parquet": parquet({"text": "a b c"})},
    }
    with Hub({DATASETS + name: files for name, files in repositories.items()}) as hub:
        hub.cards[DATASETS + "allenai/ai2_arc"] = CARD
        hub.adopt_client(tmp_path / "home", monkeypatch)
        yield hub


@pytest.mark.parametrize(
    ("name", "context", "continuation", "gold"),
    [
        ("arc-easy", "Question: Wet?\nAnswer:", " fire", [1, 0]),
        ("arc-challenge", "Question: Wet?\nAnswer:", " fire", [1]),
        ("piqa", "Question: Open it\nAnswer:", " Push.", [0]),
        ("winograd", "Ann hit Bob because Ann", " fell.", [1]),
        ("lambada", "a b", " c", [0]),
    ],
)
def test_other_data_comes_from_the_hub(
    name: str, context: str, continuation: str, gold: list[int], hub: Hub, tmp_path: Path
) -> None:
    examples = load_task(name, tmp_path).examples
    assert [example.gold for example in examples] == gold
    assert (examples[0].contexts[0], examples[0].continuations[0]) == (context, continuation)


def test_an_unreachable_hub_names_the_alternative(hub: Hub, tmp_path: Path) -> None:
    hub.close()
    with pytest.raises(UserError, match=r"cannot be reached.*--tasks piqa=FILE"):
        load_task("piqa", tmp_path)


@pytest.mark.parametrize(("limit", "n", "limited"), [(None, 6, False), (4, 4, True), (6, 6, False), (100, 6, False)])
def test_a_named_file_replaces_the_official_one_and_a_limit_takes_the_first(
    limit: int | None, n: int, limited: bool, tmp_path: Path
) -> None:
    (tmp_path / "mine.jsonl").write_bytes(SWAGS)
    loaded = load_task(f"hellaswag={tmp_path}/mine.jsonl", tmp_path, limit)
    assert loaded.task is TASKS["hellaswag"]
    assert ([e.gold for e in loaded.examples], loaded.limited) == ([0, 1, 0, 1, 0, 1][:n], limited)


def test_a_users_file_is_a_task_with_the_name_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "birds.jsonl"
    path.write_text(json.dumps({"query": "A bird", "choices": ["flies", "barks"], "gold": 0}))
    loaded = load_task(str(path), tmp_path)
    assert (loaded.task.name, loaded.task.headline, len(loaded.examples)) == ("birds", "acc_norm", 1)


def test_an_unknown_task_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown task 'helaswag'; did you mean 'hellaswag'"):
        load_task("helaswag", tmp_path)
    with pytest.raises(UserError, match="unknown task 'helaswag'; did you mean 'hellaswag'"):
        load_task("helaswag=a.jsonl", tmp_path)
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        load_task("none.jsonl", tmp_path)


def test_a_task_without_official_data_asks_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "colours", dataclasses.replace(TASKS["piqa"], name="colours", source=None))
    with pytest.raises(UserError, match="colours=FILE"):
        load_task("colours", tmp_path)


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").touch()
    assert with_absolute_path("hellaswag") == "hellaswag"
    assert with_absolute_path("hellaswag=mine.jsonl") == f"hellaswag={tmp_path}/mine.jsonl"
    assert with_absolute_path("mine.jsonl") == f"{tmp_path}/mine.jsonl"
    assert with_absolute_path("nonesuch") == "nonesuch"


def test_a_list_of_tasks_may_name_files_with_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "my, own.jsonl", "x"):
        Path(name).touch()
    given = "hellaswag, lambada=a,b.jsonl,piqa,my, own.jsonl"
    assert task_names(given) == ["hellaswag", "lambada=a,b.jsonl", "piqa", "my, own.jsonl"]
    assert task_names("hellaswag,piqa=x") == ["hellaswag", "piqa=x"]


def test_an_empty_task_name_is_refused_and_not_the_working_folder(tmp_path: Path) -> None:
    for given in ("hellaswag,", "hellaswag,,piqa", ",", ""):
        with pytest.raises(UserError, match="a task has an empty name"):
            task_names(given)
    with pytest.raises(UserError, match="no file after the ="):
        load_task(with_absolute_path("lambada="), tmp_path)
    for name in ("", with_absolute_path("")):
        with pytest.raises(UserError, match="a task has an empty name"):
            load_task(name, tmp_path)
