"""Helpers of the `restomod prepare` tests: small texts, a command line with small units, and checks of the results."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WORDS = "the a cat dog house tree runs sleeps eats sees green old quickly never naïve café 中 and 🔥 <|endoftext|>"

# command line with units of a given size; only the parent process reads the variable, because it makes the plan
PROGRAM = """
import sys
import restomod.data.prepare.units
if __name__ == "__main__":
    restomod.data.prepare.units.UNIT_BYTES = int(sys.argv.pop(1))
    from restomod.cli import main
    sys.exit(main())
"""


def texts_of(n: int, seed: int, length: int = 30) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS.split(), k=chance.randrange(1, length))) for _ in range(n)]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


Command = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def restomod(tmp_path: Path) -> Iterator[Command]:
    """Start `restomod prepare` with small units in a separate process group, which is killed after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(
        *arguments: str, unit_bytes: int = 1, cwd: Path = tmp_path, program: str = PROGRAM, **env: str
    ) -> subprocess.Popen[str]:
        script = tmp_path / "small_units.py"
        script.write_text(program)
        with open(tmp_path / "stdout", "w") as out, open(tmp_path / "stderr", "w") as err:
            process = subprocess.Popen(
                [sys.executable, str(script), str(unit_bytes), "prepare", *arguments],
                cwd=cwd,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
                stdout=out,
                stderr=err,
                text=True,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


MEMORY = """
import sys
from restomod.cli import main
from restomod.utils.process_memory import peak_resident_bytes
code = main(sys.argv[1:])
print(peak_resident_bytes())
sys.exit(code)
"""


def peak_memory(folder: Path, *arguments: str) -> int:
    """Return the peak memory of a command with one process, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *arguments], cwd=folder, capture_output=True, text=True, timeout=280, check=True
    )
    peak = int(done.stdout.splitlines()[-1])
    print(f"peak {peak / 2**20:.0f} MiB")
    return peak


def alive(group: int) -> list[str]:
    """Return the command lines of the running processes of a group."""
    listed = subprocess.run(
        ["ps", "-e", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    fields = [line.split(None, 2) for line in listed]
    return [args for pgid, stat, args in fields if int(pgid) == group and not stat.startswith("Z")]


def finished(process: subprocess.Popen[str], folder: Path) -> str:
    """Wait until a command succeeds, and return its output."""
    code = process.wait(timeout=120)
    assert (code, (folder / "stderr").read_text()) == (0, "")
    return (folder / "stdout").read_text()


def nothing_but_the_shards(out: Path) -> bool:
    manifest = json.loads((out / "manifest.json").read_text())
    shards = {entry["file"] for split in manifest["splits"].values() for entry in split["shards"]}
    return set(os.listdir(out)) == shards | {"manifest.json"}
