"""Kill tests: tiny runs are killed at random times, resumed, and compared with an undisturbed run.

    python -m benchmarks.kills [--kills 200] [--processes 1 2] [--seed 0] [--folder DIR]

A run is killed with SIGKILL and resumed repeatedly until it finishes. Then its final weights, optimizer state, metrics
and samples must equal those of an undisturbed run bit for bit. All checkpoints are verified before every resume. Half
of the kills occur during a save. With two processes, either both are killed or one; in the second case the other must
exit by itself or after the SIGTERM that torchrun sends.

Every process runs the command line, forked from a server that has imported torch. The exit code is 1 if data was lost
or changed, or if a process failed or hung.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from benchmarks.world import world
from restomod.cli import main as restomod
from restomod.runs.checkpoint import verify_checkpoint
from restomod.runs.metrics import read_jsonl
from restomod.utils.errors import UserError
from restomod.utils.run_files import list_checkpoints

FLAGS = """
    --steps 12 --batch-tokens 64 --sequence-length 16 --micro-batch 1 --model.n-layer 2 --model.n-head 2
    --model.n-embd 32 --model.n-positions 16 --data.source text --data.val-fraction 0.2 --eval-tokens 64
    --optim.lr 3e-3 --optim.warmup-steps 3 --sampling.max-tokens 4 --eval-every 3 --sample-every 5 --save-every 2
    --device cpu --precision fp32
"""
WORDS = "the a cat dog house tree runs sleeps eats sees green old quickly never and or but with under over"
TIMEOUT = 120.0  # seconds for a complete run
GRACE = 30.0  # seconds between SIGTERM and SIGKILL, as in torchrun
TIMINGS = ("time", "ms", "data_ms", "tokens_per_second", "mfu")  # the other values of metrics.jsonl must be equal

COLUMNS = ["processes", "kills", "before first checkpoint", "during a save", "between saves", "one of two", "runs"]
COLUMNS += ["checkpoints verified", "problems"]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["restomod.cli", "restomod.train.loop", "torch._dynamo"])


def process(environment: dict[str, str], arguments: list[str], log: Path) -> None:
    """Run the command line as torchrun starts it; the target of a forked process."""
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    torch.set_num_threads(1)
    sys.exit(restomod(arguments))


def start(count: int, arguments: list[str], log: Path) -> tuple[list[BaseProcess], dist.Store | None]:
    """Start the command in ``count`` processes; the caller must keep the rendezvous store while they run."""
    store, environments = world(count) if count > 1 else (None, [{}])
    started: list[BaseProcess] = []
    for own in environments:
        started.append(CONTEXT.Process(target=process, args=(own, arguments, log)))
        started[-1].start()
    return started, store


def ended(processes: list[BaseProcess], seconds: float) -> bool:
    """Wait at most ``seconds`` for all processes, and return whether all have ended."""
    until = time.monotonic() + seconds
    for p in processes:
        p.join(max(0.0, until - time.monotonic()))
    return not any(p.is_alive() for p in processes)


def wait_randomly(run: Path, processes: list[BaseProcess], chance: random.Random, longest: float) -> None:
    """Wait until a random time, in half of all cases during a save, or until the run ends."""
    if chance.random() < 0.5:
        ended(processes, chance.uniform(0, longest))
        return
    skipped, seen = chance.randrange(3), set[str]()
    until = time.monotonic() + longest
    while time.monotonic() < until and any(p.is_alive() for p in processes):
        seen.update(f.name for f in (run / "checkpoints").glob(".restomod.*.tmp"))
        if len(seen) > skipped:
            break
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.05))


def metrics(run: Path) -> list[dict[str, object]]:
    """Return the metrics of a run without `TIMINGS`."""
    return [{k: v for k, v in r.items() if k not in TIMINGS} for r in read_jsonl(run / "metrics.jsonl")]


def samples(run: Path) -> list[dict[str, object]]:
    """Return the samples of a run."""
    return read_jsonl(run / "samples.jsonl")


def contents(run: Path) -> dict[str, bytes]:
    """Return the bytes of all tensors and files of the last checkpoint."""
    last = list_checkpoints(run)[-1]
    found = {"": last.name.encode()}
    for f in sorted(last.rglob("*")):
        if f.suffix == ".safetensors":  # the order of its metadata varies
            found |= {f"{f.name}: {k}": v.numpy().tobytes() for k, v in load_file(f).items()}
        elif f.is_file() and f.name != "COMPLETE":  # hashes of the other files
            found[f.name] = f.read_bytes()
    return found


class Trial:
    """Repeated kills of runs with ``count`` processes, and their statistics."""

    def __init__(self, count: int, folder: Path, chance: random.Random) -> None:
        self.count, self.folder, self.chance = count, folder / f"{count}-processes", chance
        self.folder.mkdir(parents=True)
        self.log = self.folder / "output.txt"
        self.tally: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.flags = [*FLAGS.split(), "--data.path", str(folder / "text"), "--data.cache", str(folder / "data")]

    def command(self, run: Path) -> list[str]:
        """Return the arguments that resume ``run`` or start it."""
        if (run / "config.json").exists():
            return ["train", "--resume", str(run)]
        return ["train", "quickstart", "--out", str(run), *self.flags]

    def undisturbed(self) -> float:
        """Run the undisturbed reference, and return its seconds."""
        self.reference = self.folder / "reference"
        ended(start(1, ["--version"], self.log)[0], TIMEOUT)  # the server imports torch
        began = time.monotonic()
        processes, store = start(self.count, self.command(self.reference), self.log)
        if not ended(processes, TIMEOUT) or any(p.exitcode for p in processes):
            sys.exit(f"the undisturbed run failed; see {self.log}")
        del store
        return time.monotonic() - began

    def strike(self, run: Path, longest: float) -> bool:
        """Start or resume a run and kill it; return whether it finished before the kill."""
        self.verify(run)
        processes, store = start(self.count, self.command(run), self.log)
        wait_randomly(run, processes, self.chance, longest)
        if not any(p.is_alive() for p in processes):
            return self.judge(run, processes)
        victims = processes if self.count == 1 or self.chance.random() < 0.5 else [self.chance.choice(processes)]
        for victim in victims:
            victim.kill()
        if not ended(processes, 0.2):  # torchrun sends SIGTERM to the remaining processes
            for p in processes:
                p.terminate()
        if not ended(processes, GRACE):
            self.problems.append(f"{run.name}: the remaining process hangs after SIGTERM")
            for p in processes:
                p.kill()
        del store
        if all(p.exitcode == 0 for p in processes if p not in victims) and all(v.exitcode == 0 for v in victims):
            return self.judge(run, processes)  # finished before the kill
        self.tally["kills"] += 1
        self.tally["one of two"] += len(victims) < self.count
        saving = any((run / "checkpoints").glob(".restomod.*.tmp"))
        where = "during a save" if saving else "between saves" if list_checkpoints(run) else "before first checkpoint"
        self.tally[where] += 1
        return False

    def finish(self, run: Path) -> None:
        """Run to the last step without a kill."""
        self.verify(run)
        processes, store = start(self.count, self.command(run), self.log)
        if not ended(processes, TIMEOUT):
            self.problems.append(f"{run.name}: still running after {TIMEOUT:g} s")
            for p in processes:
                p.kill()
        del store
        self.judge(run, processes)

    def judge(self, run: Path, processes: list[BaseProcess]) -> bool:
        """Compare an ended run with the reference and record all problems; return True."""
        self.tally["runs"] += 1
        codes = [p.exitcode for p in processes]
        if any(codes):
            self.problems.append(f"{run.name}: exit codes {codes}; see {self.log}")
            return True
        for what, read in (("metrics", metrics), ("samples", samples), ("the last checkpoint", contents)):
            if read(run) != read(self.reference):
                self.problems.append(f"{run.name}: {what} differ")
        if any(run.rglob(".restomod.*.tmp")):
            self.problems.append(f"{run.name}: a temporary file remains")
        self.verify(run)
        return True

    def verify(self, run: Path) -> None:
        """Verify all checkpoints of a run and record the damaged ones."""
        for checkpoint in list_checkpoints(run):
            self.tally["checkpoints verified"] += 1
            try:
                verify_checkpoint(checkpoint)
            except UserError as e:
                self.problems.append(f"{run.name}: {e}")

    def go(self, kills: int) -> None:
        """Kill runs ``kills`` times, then finish the last run."""
        longest = self.undisturbed()
        number = 0
        run = self.folder / f"run_{number:03d}"
        while self.tally["kills"] < kills and len(self.problems) < 10:
            if self.strike(run, longest):
                if not self.problems:
                    shutil.rmtree(run)
                number += 1
                run = self.folder / f"run_{number:03d}"
        self.finish(run)


def main() -> int:
    """Run the kill tests and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="total number of kills (default: %(default)s)")
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes to test (default: 1 2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="new folder for the runs, which is kept")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "kills"
        (folder / "text").mkdir(parents=True)
        chance = random.Random(arguments.seed)
        for i in range(8):
            (folder / "text" / f"{i}.txt").write_text(" ".join(chance.choices(WORDS.split(), k=200)))
        trials = [Trial(count, folder, chance) for count in arguments.processes]
        for i, trial in enumerate(trials):
            trial.go(arguments.kills // len(trials) + (i < arguments.kills % len(trials)))
        print("  ".join(COLUMNS))
        for trial in trials:
            tally = {name: trial.tally[name] for name in COLUMNS} | {
                "processes": trial.count,
                "problems": len(trial.problems),
            }
            print("  ".join(f"{tally[name]:>{len(name)}}" for name in COLUMNS))
        problems = [f"{trial.count} processes: {problem}" for trial in trials for problem in trial.problems]
        print("\n".join(problems) or "all runs equal the undisturbed run bit for bit")
        print(f"seed {arguments.seed}, {time.monotonic() - began:.0f} s")
        if problems and trials:
            print((trials[-1].log.read_text() if trials[-1].problems else trials[0].log.read_text())[-3000:])
        return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
