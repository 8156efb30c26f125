"""Kill tests: tiny runs are killed at random moments, resumed, and compared with an undisturbed run.

    python -m benchmarks.kills [--kills 200] [--processes 1 2] [--seed 0] [--folder DIR]

A run is begun, killed with SIGKILL at a random moment, resumed, killed again, and so on, until it is finished; then
its last weights, the optimizer's state, the metrics and the samples are compared bit for bit with those of a run that
was left alone. Before every resumption all checkpoints are verified. Half of the kills wait for a save to begin and
strike within it. Of two processes either both are killed, or one, and then the other has to end by itself or on the
SIGTERM that torchrun sends it.

Every process is the command line itself, in a fork of a server that has imported torch. Exit code 1 if anything was
lost, changed, refused or hanging.
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
PATIENCE = 120.0  # seconds for a run to end
GRACE = 30.0  # seconds after which torchrun kills what it has asked to end
TIMINGS = ("time", "ms", "data_ms", "tokens_per_second", "mfu")  # all else in metrics.jsonl is to be the same

COLUMNS = ["processes", "kills", "before a checkpoint", "in a save", "between saves", "of one of two", "runs"]
COLUMNS += ["checkpoints verified", "problems"]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["restomod.cli", "restomod.train.loop", "torch._dynamo"])


def process(environment: dict[str, str], arguments: list[str], log: Path) -> None:
    """The command line, as torchrun would start it; the target of a fork."""
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    torch.set_num_threads(1)
    sys.exit(restomod(arguments))


def start(count: int, arguments: list[str], log: Path) -> tuple[list[BaseProcess], dist.Store | None]:
    """Start the command in ``count`` processes; the store by which they find each other is to be kept meanwhile."""
    store, environments = world(count) if count > 1 else (None, [{}])
    started: list[BaseProcess] = []
    for own in environments:
        started.append(CONTEXT.Process(target=process, args=(own, arguments, log)))
        started[-1].start()
    return started, store


def ended(processes: list[BaseProcess], seconds: float) -> bool:
    """Wait until all have ended, but not for more than ``seconds``."""
    until = time.monotonic() + seconds
    for p in processes:
        p.join(max(0.0, until - time.monotonic()))
    return not any(p.is_alive() for p in processes)


def wait_for_a_moment(run: Path, processes: list[BaseProcess], chance: random.Random, longest: float) -> None:
    """Until a random moment of the run, in half of all cases one within a save, or until it ends."""
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
    """Records of a run without times."""
    return [{k: v for k, v in r.items() if k not in TIMINGS} for r in read_jsonl(run / "metrics.jsonl")]


def samples(run: Path) -> list[dict[str, object]]:
    """Texts that a run has generated."""
    return read_jsonl(run / "samples.jsonl")


def contents(run: Path) -> dict[str, bytes]:
    """Every tensor of the last checkpoint, and every other file."""
    last = list_checkpoints(run)[-1]
    found = {"": last.name.encode()}
    for f in sorted(last.rglob("*")):
        if f.suffix == ".safetensors":  # the order of metadata in its header varies
            found |= {f"{f.name}: {k}": v.numpy().tobytes() for k, v in load_file(f).items()}
        elif f.is_file() and f.name != "COMPLETE":  # the hashes of the others
            found[f.name] = f.read_bytes()
    return found


class Trial:
    """Kills runs of one number of processes, and counts."""

    def __init__(self, count: int, folder: Path, chance: random.Random) -> None:
        self.count, self.folder, self.chance = count, folder / f"{count}-processes", chance
        self.folder.mkdir(parents=True)
        self.log = self.folder / "output.txt"
        self.tally: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.flags = [*FLAGS.split(), "--data.path", str(folder / "text"), "--data.cache", str(folder / "data")]

    def command(self, run: Path) -> list[str]:
        """Arguments that resume a run, or start it."""
        if (run / "config.json").exists():
            return ["train", "--resume", str(run)]
        return ["train", "quickstart", "--out", str(run), *self.flags]

    def undisturbed(self) -> float:
        """Make the run that is left alone; return its seconds."""
        self.reference = self.folder / "reference"
        ended(start(1, ["--version"], self.log)[0], PATIENCE)  # the server has imported torch
        began = time.monotonic()
        processes, store = start(self.count, self.command(self.reference), self.log)
        if not ended(processes, PATIENCE) or any(p.exitcode for p in processes):
            sys.exit(f"the undisturbed run failed; see {self.log}")
        del store
        return time.monotonic() - began

    def strike(self, run: Path, longest: float) -> bool:
        """Begin or resume a run and kill it. Returns whether it was finished before."""
        self.verify(run)
        processes, store = start(self.count, self.command(run), self.log)
        wait_for_a_moment(run, processes, self.chance, longest)
        if not any(p.is_alive() for p in processes):
            return self.judge(run, processes)
        victims = processes if self.count == 1 or self.chance.random() < 0.5 else [self.chance.choice(processes)]
        for victim in victims:
            victim.kill()
        if not ended(processes, 0.2):  # as torchrun does for those that are left
            for p in processes:
                p.terminate()
        if not ended(processes, GRACE):
            self.problems.append(f"{run.name}: a process that was left alone hangs")
            for p in processes:
                p.kill()
        del store
        if all(p.exitcode == 0 for p in processes if p not in victims) and all(v.exitcode == 0 for v in victims):
            return self.judge(run, processes)  # too late
        self.tally["kills"] += 1
        self.tally["of one of two"] += len(victims) < self.count
        saving = any((run / "checkpoints").glob(".restomod.*.tmp"))
        where = "in a save" if saving else "between saves" if list_checkpoints(run) else "before a checkpoint"
        self.tally[where] += 1
        return False

    def finish(self, run: Path) -> None:
        """Let a run come to its end."""
        self.verify(run)
        processes, store = start(self.count, self.command(run), self.log)
        if not ended(processes, PATIENCE):
            self.problems.append(f"{run.name}: does not end")
            for p in processes:
                p.kill()
        del store
        self.judge(run, processes)

    def judge(self, run: Path, processes: list[BaseProcess]) -> bool:
        """Compare a finished run with the reference; a run that failed is a problem, and given up."""
        self.tally["runs"] += 1
        codes = [p.exitcode for p in processes]
        if any(codes):
            self.problems.append(f"{run.name}: exit codes {codes}; see {self.log}")
            return True
        for what, read in (("metrics", metrics), ("samples", samples), ("the last checkpoint", contents)):
            if read(run) != read(self.reference):
                self.problems.append(f"{run.name}: {what} differ")
        if any(run.rglob(".restomod.*.tmp")):
            self.problems.append(f"{run.name}: something half written is left")
        self.verify(run)
        return True

    def verify(self, run: Path) -> None:
        for checkpoint in list_checkpoints(run):
            self.tally["checkpoints verified"] += 1
            try:
                verify_checkpoint(checkpoint)
            except UserError as e:
                self.problems.append(f"{run.name}: {e}")

    def go(self, kills: int) -> None:
        """Kill as often, then let the last run finish."""
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="in all")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="a new folder for the runs; kept")
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
        print("\n".join(problems) or "every run ended as the one that was left alone, bit for bit")
        print(f"seed {arguments.seed}, {time.monotonic() - began:.0f} s")
        if problems and trials:
            print((trials[-1].log.read_text() if trials[-1].problems else trials[0].log.read_text())[-3000:])
        return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
