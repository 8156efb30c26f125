"""Trackers: TensorBoard, Weights & Biases and Trackio receive a run's metrics.

Each tracker has its own thread and a bounded queue. One that fails, hangs or is too slow is dropped with a warning, and
training continues: `metrics.jsonl` has everything. Their packages are imported in that thread.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

from pydantic import Field

from restomod.config.run import RunConfig, Tracker
from restomod.config.serialize import to_dict
from restomod.runs.metrics import Record, read_jsonl
from restomod.utils.errors import UserError
from restomod.utils.files import require_inside, write_json_atomically
from restomod.utils.json_files import read_json
from restomod.utils.redaction import redact

PROJECT = "restomod"
QUEUE = 2000  # pending records at which a tracker is dropped
Identity = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]  # it becomes a part of paths and addresses
CLOSING = 20.0  # seconds that the end of a run waits for all of them


class Sink:
    """One tracker, used from one thread. Written for services that resume a run by its id; `TensorBoard` differs."""

    _run: Any

    def begin(self, records: list[Record], fresh: bool) -> None:
        """Take all of `metrics.jsonl`: when a run starts (then ``fresh``), resumes or rolls back."""
        for record in records if fresh else []:
            self.write(record)

    def write(self, record: Record) -> None:
        """Take one more record."""
        if values := tracked_values(record):
            self._log(values, record["step"])

    def _log(self, values: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Finish."""
        self._run.finish()


def tracked_values(record: Record) -> dict[str, float]:
    """The numbers of a record of `metrics.jsonl` by name: ``train/loss``, ``val/loss``, ``task/hellaswag/acc_norm``."""
    prefix = f"task/{record.get('task')}" if record["kind"] == "task" else record["kind"]
    values = {f"{prefix}/{name}": value for name, value in record.items() if name not in ("step", "time")}
    values |= {f"{prefix}/loss/{name}": value for name, value in record.get("sources", {}).items()}
    return {name: float(v) for name, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


class TensorBoard(Sink):
    """Event files in RUN/tensorboard, written anew at every start: they say what `metrics.jsonl` says."""

    def __init__(self, run: Path, config: RunConfig, identity: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._new = SummaryWriter
        self._folder = run / "tensorboard"
        self._writer: Any = None

    def begin(self, records: list[Record], fresh: bool) -> None:
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._writer = self._new(str(self._folder))
        for record in records:
            self.write(record)

    def write(self, record: Record) -> None:
        for name, value in tracked_values(record).items():
            self._writer.add_scalar(name, value, record["step"], record.get("time"), new_style=True)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB(Sink):
    """Weights & Biases: offline in RUN/wandb, for `wandb sync`, unless the user has set WANDB_MODE."""

    def __init__(self, run: Path, config: RunConfig, identity: str) -> None:
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_PROJECT", PROJECT)
        import wandb

        self._run = wandb.init(
            dir=str(run),
            id=identity,
            name=run.resolve().name,
            resume="allow",
            config=redact(to_dict(config)),
            settings=wandb.Settings(
                silent=True,
                console="off",
                x_disable_meta=True,  # the command line with its secrets, the user and the host
                host="",
            ),
        )
        # its own step metric: W&B's step only grows, and a run may roll back
        self._run.define_metric("*", step_metric="step")

    def _log(self, values: dict[str, float], step: int) -> None:
        self._run.log({**values, "step": step})


class Trackio(Sink):
    """Trackio: its database on this machine, which `trackio show` shows."""

    def __init__(self, run: Path, config: RunConfig, identity: str) -> None:
        import trackio

        name = f"{run.resolve().name}-{identity}"
        self._run = trackio.init(PROJECT, name, resume="allow", config=redact(to_dict(config)), embed=False)

    def _log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)


OPENERS: dict[Tracker, Callable[[Path, RunConfig, str], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def require_installed(names: Iterable[Tracker]) -> None:
    """Raise UserError if the package of one of the trackers is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--track {name} needs the package {name}: pip install -c constraints.txt -e '.[track]'")


class Trackers:
    """All trackers of a run, as a context in which they take records; without ``writes`` there are none.

    ``report`` is called with warnings, from any thread.
    """

    def __init__(self, run: Path, config: RunConfig, report: Callable[[str], None], writes: bool = True) -> None:
        self._path, self._config, self._report = run, config, report
        self._names = tuple(dict.fromkeys(config.track)) if writes else ()
        self._feeds: list[_Feed] = []

    def __enter__(self) -> Trackers:
        if not self._names:
            return self
        try:
            known = self._identities()
        except (UserError, OSError) as e:
            self._report(f"warning: nothing is tracked: {e}")
            return self
        records = read_jsonl(self._path / "metrics.jsonl")
        for name in self._names:
            identity, fresh = known[name]

            def start(name: Tracker = name, identity: str = identity, fresh: bool = fresh) -> Sink:
                sink = OPENERS[name](self._path, self._config, identity)
                sink.begin(records, fresh)
                return sink

            self._feeds.append(_Feed(name, start, self._report))
        return self

    def _identities(self) -> dict[str, tuple[str, bool]]:
        """What each tracker knows this run by, and whether that is new; kept in the run's folder."""
        path = self._path / "track.json"
        require_inside(self._path, path, self._path / "tensorboard", self._path / "wandb")
        old = read_json(path, "record of the run's trackers", dict[str, Identity]) if path.exists() else {}
        known = {name: old.get(name) or uuid.uuid4().hex[:8] for name in self._names}
        write_json_atomically(path, {**old, **known})
        return {name: (identity, name not in old) for name, identity in known.items()}

    def put(self, record: Record) -> None:
        """Hand a record over, which has just been written to `metrics.jsonl`. It never waits."""
        if not self._feeds:
            return
        again = read_jsonl(self._path / "metrics.jsonl") if record["kind"] == "rollback" else None
        for feed in self._feeds:
            feed.put(record if again is None else again)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for feed in self._feeds:
            feed.end()
        until = time.monotonic() + CLOSING
        for feed in self._feeds:
            feed.join(until)
        self._feeds = []


class _Feed:
    """The thread of one tracker."""

    def __init__(self, name: str, start: Callable[[], Sink], report: Callable[[str], None]) -> None:
        self._name, self._start, self._report = name, start, report
        self._queue: queue.Queue[Record | list[Record] | None] = queue.Queue(QUEUE)
        self._dropped = threading.Event()
        self._thread = threading.Thread(target=self._feed, name=f"track {name}", daemon=True)
        self._thread.start()

    def _feed(self) -> None:
        try:
            sink = self._start()
            while (item := self._queue.get()) is not None and not self._dropped.is_set():
                if isinstance(item, list):
                    sink.begin(item, fresh=False)
                else:
                    sink.write(item)
            sink.close()
        except BaseException as e:  # whatever it is, it ends here; some trackers exit
            self._drop(f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}")

    def _drop(self, why: str) -> None:
        if not self._dropped.is_set():
            self._dropped.set()
            self._report(f"warning: {self._name} tracks no more ({why}); metrics.jsonl has everything")

    def put(self, item: Record | list[Record]) -> None:
        if not self._dropped.is_set():
            try:
                self._queue.put_nowait(item)
            except queue.Full:
                self._drop(f"{QUEUE} records wait for it")

    def end(self) -> None:
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)

    def join(self, until: float) -> None:
        """Wait for the end, but not past a time of `time.monotonic`, nor for one that is dropped."""
        if not self._dropped.is_set():
            self._thread.join(max(0.0, until - time.monotonic()))
            if self._thread.is_alive():
                self._drop(f"it has not ended after {CLOSING:.0f} s")
