"""Trackers receive the records of `metrics.jsonl`, and never disturb a run."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from restomod.config.run import RunConfig
from restomod.runs import trackers as track
from restomod.runs.folder import RunFolder
from restomod.runs.metrics import Record, read_jsonl
from restomod.runs.trackers import OPENERS, Trackers, tracked_values

CONFIG = RunConfig(steps=8, batch_tokens=64, sequence_length=64)
EXPECTED = ("train/loss", "train/lr", "val/loss", "val/loss/web", "task/hellaswag/acc")


def tracked(*names: Any) -> RunConfig:
    return dataclasses.replace(CONFIG, track=names)


def log(run: RunFolder, first: int, last: int) -> None:
    """Logs steps like a run, with a validation before every second one."""
    for step in range(first, last):
        if step % 2 == 0:
            run.log("val", step, loss=9 - step / 7, tokens=64, sources={"web": 8 - step / 3})
            run.log("task", step, task="hellaswag", examples=4, acc=0.25)
        run.log("train", step, loss=None if step == 3 else 10 - step / 3, lr=1e-3 / (step + 1), mfu=None)


def session(folder: Path, config: RunConfig, first: int, last: int, said: list[str]) -> None:
    """A start of a run, or its resumption from the checkpoint of step ``first``."""
    run = RunFolder(folder, config)
    if first > 0:
        run.rewind(first)
    with Trackers(folder, config, said.append) as trackers:
        log(dataclasses.replace(run, trackers=trackers), first, last)


def by_name(records: list[Record]) -> dict[str, list[tuple[int, float]]]:
    """Expected series of the records, independent of `tracked_values`."""
    series = defaultdict(list)
    for r in records:
        for key, value in r.items():
            if key in ("kind", "step", "time", "task") or value is None:
                continue
            prefix = "task/hellaswag" if r["kind"] == "task" else r["kind"]
            for name, v in value.items() if key == "sources" else [(None, value)]:
                series[f"{prefix}/loss/{name}" if name else f"{prefix}/{key}"].append((r["step"], v))
    return dict(series)


# --- TensorBoard ---------------------------------------------------------------------------------------------


def events(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    """Step, value and time of every scalar, from TensorBoard's reader."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = accumulators.EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    found = {tag: [(e.step, e.value, e.wall_time) for e in accumulator.Scalars(tag)] for tag in tags["scalars"]}
    for tag in tags["tensors"]:
        found[tag] = [(e.step, e.tensor_proto.float_val[0], e.wall_time) for e in accumulator.Tensors(tag)]
    return found


def assert_events_are_the_metrics(run: Path) -> None:
    found, records = events(run / "tensorboard"), read_jsonl(run / "metrics.jsonl")
    expected = by_name(records)
    assert set(found) == set(expected)
    assert set(EXPECTED) <= set(found)
    for name, series in expected.items():
        assert [(step, value) for step, value, _ in found[name]] == [(step, np.float32(v)) for step, v in series]
    times = [r["time"] for r in records if r["kind"] == "val"]
    assert [t for _, _, t in found["val/loss"]] == pytest.approx(times)


def test_tensorboard_has_the_metrics_also_after_a_resumption(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    said: list[str] = []
    session(tmp_path, tracked("tensorboard"), 0, 5, said)
    assert_events_are_the_metrics(tmp_path)
    session(tmp_path, tracked("tensorboard"), 4, 8, said)  # from its newest checkpoint: step 4 is repeated
    assert_events_are_the_metrics(tmp_path)
    assert len(by_name(read_jsonl(tmp_path / "metrics.jsonl"))["train/lr"]) == 8
    assert said == []


def test_tensorboard_drops_steps_before_a_rollback(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = tracked("tensorboard")
    with Trackers(tmp_path, config, print) as trackers:
        run = RunFolder(tmp_path, config, trackers=trackers)
        log(run, 0, 7)
        run.rewind(4)
        run.log("rollback", 4, failed_step=6, data_offset=3)
        log(run, 5, 8)
    records = [r for r in read_jsonl(tmp_path / "metrics.jsonl") if r["kind"] != "rollback"]
    found = events(tmp_path / "tensorboard")
    assert [(s, v) for s, v, _ in found["train/lr"]] == [(s, np.float32(v)) for s, v in by_name(records)["train/lr"]]


# --- W&B and Trackio -----------------------------------------------------------------------------------------


def test_wandb_writes_an_offline_run_and_resumes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # restored after the sink has set them
    monkeypatch.setattr(track, "CLOSING", 120.0)
    said: list[str] = []
    session(tmp_path, tracked("wandb"), 0, 5, said)
    session(tmp_path, tracked("wandb"), 4, 8, said)
    assert said == []
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({folder.name.split("-")[3] for folder in folders}) == 1, "not the same run"
    logged = []
    for folder in folders:
        (path,) = folder.glob("*.wandb")
        rows = []
        for data in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
        logged.append([(int(r["step"]), r["train/lr"]) for r in rows if "train/lr" in r])
    lr = dict(by_name(read_jsonl(tmp_path / "metrics.jsonl"))["train/lr"])
    assert logged == [[(s, pytest.approx(lr[s])) for s in range(5)], [(s, pytest.approx(lr[s])) for s in range(4, 8)]]


def log_records(data: bytes) -> list[bytes]:
    """The records of a W&B file: LevelDB's log format (doc/log_format.md there) after a head of 7 bytes."""
    records, parts, at = [], b"", 7
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no record starts in the last bytes of a block
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # complete, or the last part
            records.append(parts)
            parts = b""
    return records


class FakeRun:
    """Object returned by a tracker's `init`."""

    def __init__(self, **options: Any) -> None:
        self.options, self.rows, self.finished = options, list[Any](), False

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_trackio_logs_locally_and_resumes_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the module trackio; the arguments are those of trackio 0.43."""
    import sys
    import types

    runs: list[FakeRun] = []

    def init(
        project: str, name: str | None = None, *, config: dict[str, Any], resume: str = "never", embed: bool = True
    ) -> FakeRun:
        runs.append(FakeRun(project=project, name=name, config=config, resume=resume, embed=embed))
        return runs[-1]

    fake = types.ModuleType("trackio")
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", fake)
    said: list[str] = []
    session(tmp_path, tracked("trackio"), 0, 5, said)
    session(tmp_path, tracked("trackio"), 4, 8, said)
    assert said == []
    assert [run.finished for run in runs] == [True, True]
    assert runs[0].options["name"] == runs[1].options["name"]
    assert runs[0].options["name"].startswith(tmp_path.name)
    assert {run.options["resume"] for run in runs} == {"allow"}
    steps = [[step for step, values in run.rows if "train/lr" in values] for run in runs]
    assert steps == [list(range(5)), list(range(4, 8))]


def test_a_tracker_added_later_receives_earlier_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[int, bool]] = []

    class Noting(Quiet):
        def begin(self, records: list[Record], fresh: bool) -> None:
            begun.append((len(records), fresh))

    monkeypatch.setitem(OPENERS, "wandb", Noting)
    session(tmp_path, CONFIG, 0, 4, [])
    assert not (tmp_path / "track.json").exists()
    kept = len(read_jsonl(tmp_path / "metrics.jsonl"))
    session(tmp_path, tracked("wandb"), 4, 6, [])
    session(tmp_path, tracked("wandb"), 6, 8, [])
    assert begun[0] == (kept, True)
    assert begun[1][1] is False


# --- what goes wrong -----------------------------------------------------------------------------------------


class Quiet:
    """Does nothing."""

    def __init__(self, run: Path, config: RunConfig, identity: str) -> None:
        self.written: list[Record] = []

    def begin(self, records: list[Record], fresh: bool) -> None: ...

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


def raises(*_: Any, **__: Any) -> None:
    raise ConnectionError("unreachable\nand more")


def exits(*_: Any, **__: Any) -> None:
    raise SystemExit(1)


def hangs(*_: Any, **__: Any) -> None:
    threading.Event().wait(30)


@pytest.mark.parametrize("fault", [raises, exits, hangs])
@pytest.mark.parametrize("where", ["__init__", "begin", "write", "close"])
def test_a_tracker_that_fails_or_hangs_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, fault: Any
) -> None:
    monkeypatch.setattr(track, "CLOSING", 0.5)
    monkeypatch.setitem(OPENERS, "trackio", type("Faulty", (Quiet,), {where: fault}))
    written: list[Record] = []

    class Sound(Quiet):
        def write(self, record: Record) -> None:
            written.append(record)

    monkeypatch.setitem(OPENERS, "wandb", Sound)
    said: list[str] = []
    began = time.monotonic()
    session(tmp_path, tracked("trackio", "wandb"), 0, 8, said)
    assert time.monotonic() - began < 10
    assert len(said) == 1
    assert said[0].startswith("warning: tracker trackio is dropped (")
    assert "\n" not in said[0]
    assert written == read_jsonl(tmp_path / "metrics.jsonl"), "the other tracker has suffered"


def test_a_full_queue_drops_the_tracker_and_never_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "CLOSING", 0.5)
    monkeypatch.setattr(track, "QUEUE", 5)
    monkeypatch.setitem(OPENERS, "wandb", type("Hanging", (Quiet,), {"write": hangs}))
    said: list[str] = []
    config = tracked("wandb")
    with Trackers(tmp_path, config, said.append) as trackers:
        run = RunFolder(tmp_path, config, trackers=trackers)
        began = time.monotonic()
        for step in range(100):
            run.log("train", step, loss=1.0)
        assert time.monotonic() - began < 5
    assert said == ["warning: tracker wandb is dropped (5 records are pending); metrics.jsonl stays complete"]
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 100


def test_a_damaged_record_of_identities_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "track.json").write_text("{")
    said: list[str] = []
    session(tmp_path, tracked("tensorboard"), 0, 2, said)
    assert len(said) == 1
    assert "track.json is damaged" in said[0]


def test_only_the_main_process_tracks(tmp_path: Path) -> None:
    with Trackers(tmp_path, tracked("tensorboard"), print, writes=False) as trackers:
        trackers.put({"kind": "train", "step": 0, "loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_only_numbers_are_tracked_under_their_kind() -> None:
    assert tracked_values({"kind": "train", "step": 3, "time": 1.0, "loss": None, "lr": 2, "skipped": "why"}) == {
        "train/lr": 2.0
    }
    assert tracked_values({"kind": "rollback", "step": 3, "time": 1.0}) == {}
    assert math.isclose(tracked_values({"kind": "val", "step": 0, "sources": {"a": 1.5}})["val/loss/a"], 1.5)
