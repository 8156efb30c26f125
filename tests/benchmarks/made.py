"""Invented measurements for tests of tables and plots."""

from __future__ import annotations

from benchmarks.records import Comparison, Entry, Item, Metric, Series

SPEED, SECONDS = Metric("tokens/s", "", "higher"), Metric("load", "s", "lower")
ENVIRONMENT = {
    "device": "A Processor, 2 threads",
    "torch": "2.99",
    "precision": "fp32",
    "git_revision": "0123456789abcdef+changes",
    "started": "2026-01-02T03:04:05Z",
    "command": "python -m benchmarks.run --only step",
    "smoke": False,
}


def items() -> dict[str, Item]:
    """Return an item with a comparison of three contenders, one of them absent, and an item with a curve."""
    ours = Entry("restomod", {"tokens/s": [200.0, 220.0, 210.0], "load": [1.0, 1.0, 1.0]})
    slower = Entry(
        "other",
        {"tokens/s": [100.0, 110.0, 105.0], "load": [4.0, 4.0, 4.0]},
        {"tokens/s": [200.0, 220.0, 210.0], "load": [1.0, 1.0, 1.0]},
        [1.0, 0.5, 1.0],
    )
    absent = Entry("gone", absent="gone cannot be imported")
    step = Comparison("4 × 256 tokens", [SPEED, SECONDS], [ours, slower, absent], 1, ["a remark"])
    memory = Series("a run", "seconds", "memory, GB", [(float(i), 1.0 + (i >= 6)) for i in range(8)], [(7.0, 3.0)])
    return {
        "step": Item("Step", [step], left_out=["nanogpt: no folder"], seconds=12.0, environment=ENVIRONMENT),
        "growth": Item("Long runs", [], [memory], seconds=3.0, environment=ENVIRONMENT),
    }
