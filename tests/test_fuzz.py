"""Damaged files of every format are refused in one line or read as something valid: campaigns of `tests.fuzz`."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from restomod.engine.device import keep_freed_memory
from tests import fuzz
from tests.fuzz import Command, Format, campaign
from tests.mutations import KINDS, mutated

QUICK = (
    "run-config,run-environment,run-metrics,checkpoint-state,data-manifest,data-unit,sweep-journal,prices,"
    "task-parquet,text-csv,model-config"
)


def run_campaign(*arguments: str) -> str:
    """Run a campaign without faults and return its output."""
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_a_few_damaged_files() -> None:
    run_campaign("--mutations", "8", "--formats", QUICK)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_500_damaged_files_of_each_format() -> None:
    run_campaign("--mutations", "500")


def faulty(folder: Path) -> int:
    """Show every fault, selected by the first byte of the damaged file."""
    kind = (folder / "a.txt").read_bytes()[:1]
    if kind == b"1":
        raise KeyError("x")
    if kind == b"2":
        while True:
            pass
    if kind == b"3":
        return len(b"x" * 500_000_000) and 0
    if kind == b"4":
        print("\x1b[2J")
    elif kind == b"5":
        (folder / "a.tmp").touch()
    elif kind == b"6":
        (folder / "b.txt").write_text("other")
    elif kind == b"7":
        print("restomod: error: one\nrestomod: error: a.txt", file=sys.stderr)
        return 2
    elif kind == b"8":
        os._exit(3)
    elif kind == b"9":
        print("restomod: error: a.txt: it is damaged", file=sys.stderr)
        return 2
    return 0


def test_each_fault_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixtures = tmp_path / "fixtures"
    (fixtures / "x").mkdir(parents=True)
    (fixtures / "x/a.txt").write_text("0")
    (fixtures / "x/b.txt").write_text("1")
    monkeypatch.setattr(fuzz, "FORMATS", {"x": Format("x/a.txt", "text", (Command("faulty"),))})
    monkeypatch.setattr(fuzz, "faulty", lambda: faulty(Path("x")), raising=False)
    keep_freed_memory()  # memory kept by earlier tests must not count for a command
    kept = b"y" * 600_000_000
    del kept
    monkeypatch.setattr(fuzz, "CPU_SECONDS", 3.0)
    monkeypatch.setattr(fuzz, "MEMORY", 10**8)  # allocating a gigabyte may take longer on a busy machine
    monkeypatch.setattr(fuzz, "mutated", lambda content, kind, rng: str(_number(rng)).encode())
    numbers = {r.number: r.outcome for r in campaign(["x"], range(11), 2, tmp_path)}
    expected = ["same", "traceback", "hang", "memory", "control characters", "left over", "changed", "not one line"]
    assert [numbers[i] for i in range(10)] == [*expected, "traceback", "refused by name"]
    assert numbers[10] == "traceback"  # also begins with 1


def _number(rng: random.Random) -> int:
    return next(i for i in range(11) if random.Random(f"x:{i}").getstate() == rng.getstate())


@pytest.mark.parametrize("name", [name for name in KINDS if name != "shard"])
def test_damage_is_a_function_of_the_seed_and_of_many_kinds(name: str) -> None:
    contents = {
        "json": b'{"a": [1, 2], "b": {"c": "d"}}',
        "jsonl": b'{"a": 1}\n{"a": 2}\n',
        "toml": b"[[price]]\na = 1\nb = 2\n",
        "safetensors": (2).to_bytes(8, "little") + b"{}" + bytes(64),
        "csv": b"a,b\n1,2\n",
        "text": b"a\nb\nc\n",
        "bytes": bytes(range(256)),
    }
    packed = KINDS[name](_packed(name), random.Random(0)) if name in ("gz", "bz2", "zst") else contents[name]
    seen = [mutated(packed, name, random.Random(seed)) for seed in range(200)]
    assert seen == [mutated(packed, name, random.Random(seed)) for seed in range(200)]
    most = Counter(seen).most_common(1)[0][1]
    assert most < 40, "hardly anything differs"


def _packed(name: str) -> bytes:
    import bz2
    import gzip

    from tests.mutations import _pack_zstd

    lines = b'{"text": "a", "id": 1}\n' * 3
    return {"gz": gzip.compress, "bz2": bz2.compress, "zst": _pack_zstd}[name](lines)
