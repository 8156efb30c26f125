"""Trackers: copies of a run's metrics for TensorBoard, Weights & Biases and Trackio.

Each tracker has its own thread, which imports its package, and a bounded queue. A tracker that fails, hangs or is too
slow is dropped with a warning. Training continues, and `metrics.jsonl` stays complete.
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
QUEUE = 2000  # maximum number of pending records; a tracker with more is dropped
Identity = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]  # used in paths and URLs
CLOSING = 20.0  # seconds to wait for all trackers at the end of a run


class Sink:
    """Base class of trackers, used from a single thread; for services that resume a run by its id."""

    _run: Any

    def begin(self, records: list[Record], fresh: bool) -> None:
        """Receive all records of `metrics.jsonl`, when a run starts, resumes or rolls back.

        Args:
            records: records in the order of the file.
            fresh: the service does not have this run yet.
        """
        for record in records if fresh else []:
            self.write(record)

    def write(self, record: Record) -> None:
        """Log a new record."""
        if values := tracked_values(record):
            self._log(values, record["step"])

    def _log(self, values: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Finish the run of the service."""
        self._run.finish()


def tracked_values(record: Record) -> dict[str, float]:
    """Extract the numbers of a record, under names such as ``train/loss`` or ``task/hellaswag/acc_norm``."""
    prefix = f"task/{record.get('task')}" if record["kind"] == "task" else record["kind"]
    values = {f"{prefix}/{name}": value for name, value in record.items() if name not in ("step", "time")}
    values |= {f"{prefix}/loss/{name}": value for name, value in record.get("sources", {}).items()}
    return {name: float(v) for name, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


class TensorBoard(Sink):
    """TensorBoard event files in RUN/tensorboard, rewritten from `metrics.jsonl` at every start."""

    def __init__(self, run: Path, config: RunConfig, identity: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._new = SummaryWriter
        self._folder = run / "tensorboard"
        self._writer: Any = None

    def begin(self, records: list[Record], fresh: bool) -> None:
        """Replace the event files with new ones of all ``records``; ``fresh`` is ignored."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._writer = self._new(str(self._folder))
        for record in records:
            self.write(record)

    def write(self, record: Record) -> None:
        """Add the numbers of a record to the event file."""
        for name, value in tracked_values(record).items():
            self._writer.add_scalar(name, value, record["step"], record.get("time"), new_style=True)

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class WandB(Sink):
    """Weights & Biases run, offline in RUN/wandb (for `wandb sync`) unless WANDB_MODE is set."""

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
                x_disable_meta=True,  # it contains the user, the host, and secrets of the command line
                host="",
            ),
        )
        # separate step metric, because W&B's step cannot decrease in a rollback
        self._run.define_metric("*", step_metric="step")

    def _log(self, values: dict[str, float], step: int) -> None:
        self._run.log({**values, "step": step})


class Trackio(Sink):
    """Trackio run in its local database, displayed by `trackio show`."""

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
    """Raise UserError if the package of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--track {name} needs the package {name}: pip install -c constraints.txt -e '.[track]'")


class Trackers:
    """All trackers of a run, as a context manager.

    Args:
        run: run folder.
        config: run configuration.
        report: function called with warnings, from any thread.
        writes: True on the main process; other ranks have no trackers.
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
            self._report(f"warning: trackers are disabled: {e}")
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
        """Return the run's id for each tracker, and True if it is new; store new ids in `track.json`."""
        path = self._path / "track.json"
        require_inside(self._path, path, self._path / "tensorboard", self._path / "wandb")
        old = read_json(path, "record of the run's trackers", dict[str, Identity]) if path.exists() else {}
        known = {name: old.get(name) or uuid.uuid4().hex[:8] for name in self._names}
        write_json_atomically(path, {**old, **known})
        return {name: (identity, name not in old) for name, identity in known.items()}

    def put(self, record: Record) -> None:
        """Pass a record of `metrics.jsonl` to all trackers, without waiting for them."""
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
    """Thread and queue of one tracker."""

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
        except BaseException as e:  # some trackers raise SystemExit
            self._drop(f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}")

    def _drop(self, why: str) -> None:
        if not self._dropped.is_set():
            self._dropped.set()
            self._report(f"warning: tracker {self._name} is dropped ({why}); metrics.jsonl stays complete")

    def put(self, item: Record | list[Record]) -> None:
        if not self._dropped.is_set():
            try:
                self._queue.put_nowait(item)
            except queue.Full:
                self._drop(f"{QUEUE} records are pending")

    def end(self) -> None:
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)

    def join(self, until: float) -> None:
        """Wait for the thread until a time of `time.monotonic`; do not wait for a dropped tracker."""
        if not self._dropped.is_set():
            self._thread.join(max(0.0, until - time.monotonic()))
            if self._thread.is_alive():
                self._drop(f"not finished after {CLOSING:.0f} s")
