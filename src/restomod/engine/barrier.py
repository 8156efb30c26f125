"""Barrier with heartbeats, which has no time-out while all ranks are alive.

A collective operation fails if one rank takes longer than its time-out, even if that rank is working. With this barrier
a thread of each rank writes heartbeats to torchrun's store. The other ranks wait while the heartbeats change.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import torch.distributed as dist

HEARTBEAT_EVERY = 1.0  # seconds
SILENCE = 60.0  # seconds without a heartbeat after which a rank is lost; long, because some work delays the thread
LONGEST_PAUSE = 0.25  # seconds between polls
GONE = b"gone"


class Barrier:
    """Reusable barrier of a run. All ranks must call `wait` equally often.

    Args:
        store: torchrun's store.
        rank: rank of this process.
        count: world size.
    """

    def __init__(self, store: dist.Store, rank: int, count: int) -> None:
        self._store: dist.Store | None = store
        self._count, self._held = count, 0
        self._names = [f"alive/{r}" for r in range(count)]
        self._mine = self._names[rank]
        self._over = threading.Event()
        # a separate connection, because a waiting request blocks all others on its connection
        self._writer: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._writer.set(self._mine, "0")
        self._place, self._ids = _place(), [f"id/{r}" for r in range(count)]
        self._writer.set(self._ids[rank], f"{self._place} {os.getpid()}")
        self._thread = threading.Thread(target=self._write_heartbeats, name="heartbeat", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until all ranks have reached this barrier.

        Raises:
            DistError: a rank has ended or writes no heartbeats.
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
        """Announce that this rank calls no further barrier, so that the others do not wait for it."""
        self._over.set()
        self._thread.join(HEARTBEAT_EVERY)
        with contextlib.suppress(RuntimeError):
            self._writer.set(self._mine, GONE.decode())

    def _came(self, name: str, more: int) -> int | None:
        """Add ``more`` to the count of a barrier and return the count; None if the store is gone."""
        if self._store is None:
            return None
        try:
            return int(self._store.add(name, more))
        except RuntimeError:
            self._store = None  # torchrun was killed; the ranks still save a checkpoint, without barriers
            return None

    def _require_all_alive(self, seen: dict[str, tuple[bytes, float]]) -> None:
        """Check the heartbeats of all ranks.

        Args:
            seen: last heartbeat of each rank and its time in seconds; updated.

        Raises:
            DistError: a rank has ended or writes no heartbeats.
        """
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
                raise dist.DistError(f"rank {rank} has ended")
            if beat != before:
                seen[name] = beat, now
            elif now > when + SILENCE:
                raise dist.DistError(f"no heartbeat from rank {rank} for {now - when:.0f} s")

    def _write_heartbeats(self) -> None:
        number = 0
        with contextlib.suppress(RuntimeError):  # raised when the store is gone
            while not self._over.wait(HEARTBEAT_EVERY):
                number += 1
                self._writer.set(self._mine, str(number))


def _place() -> str:
    """Return an identifier of the machine and its PID namespace; process IDs are comparable within it."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"unknown {os.urandom(8).hex()}"


def _is_dead(process: str) -> bool:
    """Return whether a process of this machine has ended, including zombies that torchrun has not reaped."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:  # no permission
        return False
    return state in ("Z", "X")
