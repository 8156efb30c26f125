"""Comparison of restomod's compiled training step with unmodified build-nanogpt, on the same 64 × 1,024 tokens.

    python -m benchmarks.gpu.versus --peer build-nanogpt=PATH --out step.json [--seconds 70] [--smoke]

The item `step` of `benchmarks.run` has more contenders and shapes, and takes minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import peers, records, table
from benchmarks.contenders import Contender, Worker
from benchmarks.gpu.collect import PARTS
from benchmarks.harness import BenchPlan, compare
from benchmarks.items.step import EAGER, METRICS, OURS, SMALL, Shape, rounds
from benchmarks.machine import environment
from benchmarks.records import Item
from restomod.utils.errors import EXIT_USER_ERROR, UserError


def measure(plan: BenchPlan) -> Item:
    """Measure restomod and all checkouts of ``plan``."""
    ours, shape = plan.pick(OURS, EAGER), plan.pick(Shape(), SMALL)
    batch, length = plan.pick((64, 1024), (2, 16))
    repeat = plan.pick(10, 1)
    contenders: list[Contender] = [
        Worker(name, rounds, (name, plan.peers.get(name), shape, batch, length, plan.device, repeat))
        for name in (ours, *plan.peers)
    ]
    case = f"{batch} × {length} tokens per step"
    return Item(PARTS["step"].title, [compare(plan, case, contenders, METRICS, plan.pick(4, 2))])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison and return the exit code: 0, or 2 for a user error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.versus", description=(__doc__ or "").split("\n")[0])
    peers.add_argument(parser)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--seconds", type=float, default=70, help="time after which no round starts")
    parser.add_argument("--smoke", action="store_true", help="smoke test with tiny sizes on a CPU")
    given = parser.parse_args(words)
    device = "cpu" if given.smoke else "cuda"
    try:
        with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
            deadline = time.monotonic() + given.seconds
            chosen = dict(peers.parse(peer) for peer in given.peer)
            plan = BenchPlan(Path(scratch), device, given.smoke, chosen, deadline=deadline, command=words)
            about = environment(plan) | {"command": "python -m benchmarks.gpu.versus"}
            item = dataclasses.replace(measure(plan), environment=about)
        records.write(given.out, {"step": item})
    except UserError as e:
        print(f"benchmarks: error: {e}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(table.body(item))
    return 0


if __name__ == "__main__":
    sys.exit(main())
