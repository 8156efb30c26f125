"""Simulation of scale: data loading by 1,024 ranks from 10 trillion tokens, and the time of their steps.

    python -m benchmarks.scale [--part data|steps|all] [--json OUT] [--smoke] [--rounds N] [--folder DIR]

`data` checks with the package's loading code that the sequences of 1,024 ranks are disjoint and complete, and measures
memory and time of a rank that resumes in the middle of an epoch. Sparse files replace 20 TB (`scale_data.py`).

`steps` compares a model of a data-parallel step (`scale_network.py`) with measured steps of two processes
(`scale_steps.py`), and predicts steps on 8, 64 and 1,024 GPUs from published figures (`scale_gpus.py`).

Tables are printed as Markdown. `--smoke` runs in seconds with small sizes and meaningless times.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import scale_gpus, scale_steps
from benchmarks.scale_data import Reader, in_fresh_process, numbered_stream, write_sparse_dataset
from restomod.config.model import require_size
from restomod.config.presets import preset
from restomod.data.batches import Batches
from restomod.engine.device import describe_device
from restomod.runs.folder import environment
from restomod.utils.errors import EXIT_USER_ERROR, UserError, describe_os_error
from restomod.utils.files import write_json_atomically
from restomod.utils.output_files import require_outputs

SEED = 1
AT = (0.0, 0.5, 0.999)  # fractions of an epoch at which a rank resumes


@dataclass(frozen=True)
class Scale:
    """Sizes of the data simulation."""

    ranks: int
    """Number of ranks."""
    share: int
    """Sequences per rank and step."""
    T: int
    """Sequence length."""
    sizes: tuple[tuple[int, int], ...]
    """Data sets, each as (shards, tokens per shard); the order of windows is checked in the largest."""
    steps: int
    """Number of steps sampled across an epoch."""
    windows: int
    """Number of windows looked up with the inverse permutation."""
    exhaustive: int
    """Number of windows in the data set that is read completely."""

    @property
    def batch(self) -> int:
        """Sequences per step."""
        return self.ranks * self.share


FULL = Scale(
    ranks=1024,
    share=4,
    T=1024,
    sizes=((100, 10**8), (1000, 10**8), (10_000, 10**8), (100_000, 10**8), (10_000, 10**9)),
    steps=16,
    windows=500,
    exhaustive=41_000,  # slightly more than ten steps
)
SMOKE = Scale(ranks=16, share=2, T=16, sizes=((4, 10_000), (40, 10_000)), steps=4, windows=20, exhaustive=500)


def measure_data(scale: Scale, folder: Path) -> dict[str, Any]:
    """Run the data simulation and return its results; ``folder`` is for the sparse files."""
    shards, shard_tokens = max(scale.sizes, key=lambda size: size[0] * size[1])
    batches = Batches(numbered_stream(shards * shard_tokens, shard_tokens, scale.T), scale.T, scale.batch, SEED)
    reader, n = Reader(batches, scale.ranks), batches.n_windows
    ends = n // scale.batch  # step in which the first epoch ends
    steps = sorted({0, ends - 1, ends, ends + 1, *np.linspace(0, ends, scale.steps, dtype=int).tolist()})
    say(f"{n:,} windows: {len(steps)} steps of {scale.ranks:,} ranks")
    sequences, duplicates = reader.duplicates(steps)
    drawn = np.random.default_rng(SEED).integers(n, size=scale.windows)
    looked_up = np.concatenate([[0, 1, n - 2, n - 1], drawn])
    lost = reader.not_found(looked_up)
    say(f"complete epoch of {scale.exhaustive:,} windows")
    small = numbered_stream(scale.exhaustive * 8 + 1, 1001, 8)
    missing = Reader(Batches(small, 8, scale.batch, SEED), scale.ranks).missing()
    return {
        "ranks": scale.ranks,
        "sequence_length": scale.T,
        "batch_sequences": scale.batch,
        "windows": n,
        "steps_of_an_epoch": n / scale.batch,
        "sampled": {"steps": steps, "sequences": sequences, "duplicates": duplicates},
        "looked_up": {"windows": len(looked_up), "not_found": lost},
        "exhaustive": {"windows": scale.exhaustive, "not_once": missing},
        "ranks_measured": [costs(scale, *size, folder) for size in scale.sizes],
    }


def costs(scale: Scale, shards: int, shard_tokens: int, folder: Path) -> dict[str, Any]:
    """Measure time and memory of a rank that resumes at each fraction of `AT`, in a new process."""
    say(f"{shards:,} shards of {shard_tokens:,} tokens")
    data = folder / f"{shards}x{shard_tokens}"
    write_sparse_dataset(data, shards, shard_tokens)
    return in_fresh_process(data, scale.T, scale.batch, scale.ranks, AT)


def data_lines(found: dict[str, Any]) -> list[str]:
    """Return the results of the data simulation as lines of Markdown."""
    sampled, looked_up, exhaustive = found["sampled"], found["looked_up"], found["exhaustive"]
    lines = [
        f"{found['ranks']:,} ranks, {found['windows']:,} windows of {found['sequence_length']:,} tokens, "
        f"{found['steps_of_an_epoch']:,.1f} steps per epoch",
        f"- {len(sampled['steps'])} steps across an epoch: {sampled['sequences']:,} sequences, "
        f"{sampled['duplicates']} duplicates",
        f"- {looked_up['windows']:,} windows looked up with the inverse permutation: {looked_up['not_found']} missing "
        f"at the computed rank and step",
        f"- complete epoch of {exhaustive['windows']:,} windows: {exhaustive['not_once']} not read exactly once",
        "",
        "| tokens | shards | open, s (CPU s) | first batch at 0, ½, 1 of an epoch, ms | order, ms | load, ms "
        "| memory of a step, kB | memory of the data set, MB | open files |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in found["ranks_measured"]:
        lines.append(
            f"| {r['tokens']:,} | {r['shards']:,} | {r['open_seconds']:.2f} ({r['open_cpu_seconds']:.2f}) "
            f"| {', '.join(f'{1e3 * seconds:.1f}' for seconds in r['first_batch_seconds'])} "
            f"| {1e3 * r['order_seconds']:.2f} | {1e3 * r['load_seconds']:.2f} "
            f"| {r['step_peak_bytes'] / 1e3:.0f} | {r['opened_bytes'] / 1e6:.1f} "
            f"| {r['files_open']:.0f} |"
        )
    return lines


def measure_steps(smoke: bool, rounds: int | None) -> dict[str, Any]:
    """Measure and predict steps of two processes, and predict steps on GPUs."""
    trial = scale_steps.trial(smoke)
    if rounds is not None:
        trial = dataclasses.replace(trial, rounds=rounds)
    say(f"two processes, {trial.rounds} rounds")
    payloads = {name: scale_steps.payload(preset(name).model) for name in scale_gpus.MODELS}
    return {
        "here": scale_steps.compared(trial, scale_steps.measure(trial)),
        "networks": {gpu: dataclasses.asdict(network) for gpu, network in scale_gpus.NETWORKS.items()},
        "predictions": scale_gpus.predictions(payloads),
    }


def step_lines(found: dict[str, Any]) -> list[str]:
    """Return measured and predicted steps of two processes as lines of Markdown."""
    here = found["here"]
    lines = [
        f"- {kind}: {1e6 * network['latency']:.0f} µs per message, {network['bandwidth'] / 1e9:.2f} GB/s"
        for kind, network in here["networks"].items()
    ]
    lines += [
        "",
        "| method | micro-batches | compute, ms | communication, ms | predicted, ms | measured, ms | error |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in here["rows"]:
        e = r["error_percent"]
        lines.append(
            f"| {r['way']} | {r['micro_batches']} | {1e3 * r['alone_seconds']['median']:.0f} "
            f"| {1e3 * r['predicted_communication_seconds']:.0f} | {1e3 * r['predicted_seconds']['median']:.0f} "
            f"| {1e3 * r['measured_seconds']['median']:.0f} "
            f"| {e['median']:+.0f}% ({e['min']:+.0f} to {e['max']:+.0f}) |"
        )
    return lines


def say(what: str) -> None:
    """Print time and progress to standard error."""
    print(f"{time.strftime('%H:%M:%S')} {what} …", file=sys.stderr, flush=True)


def run(given: argparse.Namespace) -> None:
    """Run the simulation, print tables and write JSON; raises UserError if a file or folder is unusable."""
    if given.json:
        require_outputs({"--json": given.json})
    require_size("--rounds", given.rounds)
    result: dict[str, Any] = {"environment": environment(describe_device(torch.device("cpu")), "fp32")}
    result["environment"]["command"] = ["python", "-m", "benchmarks.scale", "--part", given.part]  # without paths
    result["smoke"] = given.smoke
    lines: list[str] = []
    if given.part in ("data", "all"):
        if given.folder and not given.folder.is_dir():
            raise UserError(f"--folder {given.folder}: no such folder; create it or omit --folder")
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            result["data"] = measure_data(SMOKE if given.smoke else FULL, Path(folder))
        lines += data_lines(result["data"])
    if given.part in ("steps", "all"):
        result["steps"] = measure_steps(given.smoke, given.rounds)
        lines += ["", *step_lines(result["steps"]), "", *scale_gpus.table(result["steps"]["predictions"])]
    print("\n".join(lines))
    if given.json:
        write_json_atomically(given.json, json.loads(json.dumps(result)))


def main() -> int:
    """Run the simulation and return the exit code: 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=("data", "steps", "all"), default="all", help="part to run (default: all)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="JSON file for all results")
    parser.add_argument("--smoke", action="store_true", help="smoke test with small sizes, a few seconds")
    parser.add_argument("--rounds", type=int, metavar="N", help="number of rounds of measured steps (default: 7)")
    parser.add_argument("--folder", type=Path, help="folder for the sparse files (default: the system's temporary one)")
    try:
        run(parser.parse_args())
    except (UserError, OSError) as e:
        print(f"scale: error: {e if isinstance(e, UserError) else describe_os_error(e)}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
