"""Barrier with heartbeats, for waiting without the time-out of collective operations.

A collective operation ends the run when one process exceeds its time-out, even if that process is working. Here a
thread of each process writes heartbeats into torchrun's store, and the others wait as long as they change.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import torch.distributed as dist

HEARTBEAT_EVERY = 1.0  # seconds
SILENCE = 60.0  # seconds without a heartbeat after which a process is gone; some work delays the thread for a while
LONGEST_PAUSE = 0.25  # seconds between polls
GONE = b"gone"


class Barrier:
    """Barriers of a run. Every process has one object and calls it equally often."""

    def __init__(self, store: dist.Store, rank: int, count: int) -> None:
        self._store: dist.Store | None = store
        self._count, self._held = count, 0
        self._names = [f"alive/{r}" for r in range(count)]
        self._mine = self._names[rank]
        self._over = threading.Event()
        # a connection of its own: one that waits for an answer keeps others waiting
        self._writer: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._writer.set(self._mine, "0")
        self._place, self._ids = _place(), [f"id/{r}" for r in range(count)]
        self._writer.set(self._ids[rank], f"{self._place} {os.getpid()}")
        self._thread = threading.Thread(target=self._write_heartbeats, name="heartbeat", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until every process has reached this barrier.

        Raises:
            DistError: one is gone.
        """
        self._held += 1
        name = f"barrier/{self._held}"
        came = self._came(name, 1)
        pause, last_look = 0.001, time.monotonic()
        seen: dict[str, tuple[bytes, float]] = {}
        while came is not None and came < self._count:
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            if time.monotonic() > last_look + HEARTBEAT_EVERY:
                last_look = time.monotonic()
                self._require_all_alive(seen)
            came = self._came(name, 0)

    def leave(self) -> None:
        """Announce that this process reaches no further barrier."""
        self._over.set()
        self._thread.join(HEARTBEAT_EVERY)
        with contextlib.suppress(RuntimeError):
            self._writer.set(self._mine, GONE.decode())

    def _came(self, name: str, more: int) -> int | None:
        """Add ``more`` to the count of a barrier and return it; None: the store is gone, the collective decides."""
        if self._store is None:
            return None
        try:
            return int(self._store.add(name, more))
        except RuntimeError:
            self._store = None  # torchrun was killed; its processes save and end without it
            return None

    def _require_all_alive(self, seen: dict[str, tuple[bytes, float]]) -> None:
        """Check the heartbeats. ``seen``: the last one of each process, and when it was new."""
        if self._store is None:
            return
        try:
            beats = self._store.multi_get(self._names)
            ids = self._store.multi_get(self._ids)
        except RuntimeError:
            self._store = None
            return
        now = time.monotonic()
        for rank, (name, beat, ident) in enumerate(zip(self._names, beats, ids, strict=True)):
            before, when = seen.setdefault(name, (beat, now))
            place, _, process = ident.decode().rpartition(" ")
            if beat == GONE or (place == self._place and _is_dead(process)):
                raise dist.DistError(f"process {rank} has ended")
            if beat != before:
                seen[name] = beat, now
            elif now > when + SILENCE:
                raise dist.DistError(f"process {rank} has written no heartbeat for {now - when:.0f} s")

    def _write_heartbeats(self) -> None:
        number = 0
        with contextlib.suppress(RuntimeError):  # the store is gone
            while not self._over.wait(HEARTBEAT_EVERY):
                number += 1
                self._writer.set(self._mine, str(number))


def _place() -> str:
    """Identify the machine and its PID namespace, within which process IDs can be compared."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"unknown {os.urandom(8).hex()}"


def _is_dead(process: str) -> bool:
    """Whether a process of this place has ended; torchrun may take some seconds to ask for its exit code."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:  # no permission
        return False
    return state in ("Z", "X")
