"""Replacement of `restomod train` for tests of sweeps: a run of a few steps in a tenth of a second.

The script takes the arguments of `train`. It writes `config.json`, `metrics.jsonl` and `environment.json` (with
STAND_IN_PROCESSES processes), a checkpoint after every second step, and a line per start to `starts.txt`. SIGTERM stops
it after its step. The loss depends on `--optim.lr`, `--seed`, the step and the checkpoint. Some learning rates make it
fail.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

KILLED, DIVERGED, CRASHED, SILENT = "66", "67", "68", "69"  # learning rates that cause these failures


def main(arguments: list[str]) -> int:
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    flags = dict(itertools.pairwise(arguments))
    resumed = "--resume" in flags
    run = Path(flags["--resume" if resumed else "--out"])
    if resumed:
        flags = json.loads((run / "config.json").read_text())
    else:
        if run.exists():
            print(f"restomod: error: {run} exists already", file=sys.stderr)
            return 2
        run.mkdir(parents=True)
        temporary = run / "config.tmp"
        temporary.write_text(json.dumps(flags))
        temporary.rename(run / "config.json")
    processes = int(os.environ.get("STAND_IN_PROCESSES", "1"))
    (run / "environment.json").write_text(json.dumps([{"processes": processes}]))
    with open(run / "starts.txt", "a") as f:
        f.write(f"{os.getpid()}\n")
    rate, seed, pause = flags["--optim.lr"], int(flags["--seed"]), float(os.environ.get("STAND_IN_PAUSE", "0"))
    checkpoint = run / "checkpoint.json"
    done, total = json.loads(checkpoint.read_text()) if checkpoint.exists() else (0, 0.0)
    metrics = run / "metrics.jsonl"
    kept = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    metrics.write_text("".join(json.dumps(r) + "\n" for r in kept if r["step"] <= done))
    for step in range(done + 1, int(flags["--steps"]) + 1):
        time.sleep(pause)
        if step == 3:
            if rate == KILLED:
                os.kill(os.getpid(), signal.SIGKILL)
            if rate == DIVERGED:
                print("restomod: error: step 3: the loss is nan, so nothing was updated", file=sys.stderr)
                return 2
            if rate == CRASHED:
                raise RuntimeError("a fault")
        total += math.sin(1000 * float(rate) + seed + step) / step
        if rate != SILENT:
            with open(metrics, "a") as f:
                f.write(json.dumps({"kind": "val", "step": step, "loss": 10 - step + float(rate) + total}) + "\n")
        if step % 2 == 0 or stopping:
            temporary = run / "checkpoint.tmp"
            temporary.write_text(json.dumps([step, total]))
            temporary.rename(checkpoint)
        if stopping:
            return 75
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
