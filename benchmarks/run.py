"""Runner of the benchmarks, which writes JSON, Markdown and a plot.

    python -m benchmarks.run [--only step,loss] [--smoke] [--peer build-nanogpt=PATH] [--data DIR] [--out FOLDER]

Results are written after every item: the raw values to FOLDER/cpu.json (gpu.json on a GPU), the tables to cpu.md, the
plot to cpu.png. Earlier results of other items in FOLDER are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks import peers, plot, records, table
from benchmarks.contenders import reason
from benchmarks.harness import BenchPlan
from benchmarks.machine import environment
from benchmarks.records import Item
from restomod.config.model import require_size
from restomod.engine.device import choose_device
from restomod.utils.errors import EXIT_USER_ERROR, UserError, did_you_mean
from restomod.utils.files import write_text_atomically

MINE = Path(__file__).parent / "results" / "mine"
MINUTES = {  # time limit of each item, in order; --minutes scales all
    "cpu": {
        "startup": 2.0,
        "tokenizing": 1.0,
        "loader": 0.8,
        "loss": 1.5,
        "checkpoint": 1.1,
        "hellaswag": 3.0,
        "generation": 3.7,
        "growth": 4.0,
        "recipe": 2.8,
        "step": 8.8,
        "shakespeare": 600.0,
    },
    "cuda": {
        "step": 3.0,
        "shakespeare": 2.0,
        "loss": 0.5,
        "generation": 0.5,
        "hellaswag": 0.5,
        "checkpoint": 0.5,
        "growth": 0.5,
        "loader": 0.3,
        "startup": 0.4,
        "tokenizing": 0.5,
        "recipe": 4.0,
    },
}
ITEMS = tuple(MINUTES["cpu"])
ON_REQUEST = ("shakespeare",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks and return the exit code: 0 for success, 1 if an item failed, 2 for a user error."""
    try:
        return run(list(sys.argv[1:] if arguments is None else arguments))
    except UserError as e:
        print(f"benchmarks: error: {e}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("benchmarks: stopped; the results of finished items are written", file=sys.stderr)
        return 130


def run(arguments: list[str]) -> int:
    """Run the benchmarks that ``arguments`` select and return 0, or 1 if an item failed.

    Raises:
        UserError: an argument is invalid or a folder is unusable.
    """
    given = _parser().parse_args(arguments)
    device = choose_device(given.device).type
    if device not in MINUTES:
        device = "cpu"  # MPS is not measured
    items = chosen_items(given.only, device)
    require_size("--rounds", given.rounds)
    if given.data is not None and not given.data.is_dir():
        raise UserError(
            f"--data {given.data}: no such folder; omit --data to use the source of Python's standard library"
        )
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{given.out}: cannot create this folder ({e.strerror}); choose another with --out") from None
    file = given.out / f"{'gpu' if device == 'cuda' else 'cpu'}.json"
    if given.smoke:
        items = dict.fromkeys(items, 5.0)
    finished = records.read(file)
    minutes = given.minutes or sum(items.values())
    failed = []
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
        plan = BenchPlan(
            Path(scratch),
            device,
            given.smoke,
            dict(peers.parse(peer) for peer in given.peer),
            given.data,
            given.rounds,
            command=arguments,
            out=given.out,
            say=lambda text: print(text, flush=True),
        )
        print(f"{table.machine(environment(plan))}; time limit about {minutes:g} minutes", flush=True)
        end = time.monotonic() + 60 * minutes
        for number, name in enumerate(items):
            left = dict(list(items.items())[number:])
            plan.deadline = time.monotonic() + (end - time.monotonic()) * items[name] / sum(left.values())
            print(f"\n{name} …", flush=True)
            try:
                with tempfile.TemporaryDirectory(dir=scratch) as own:  # per item, as checkpoints take gigabytes
                    item = measured(name, dataclasses.replace(plan, scratch=Path(own)))
            except Exception as e:
                failed.append(name)
                traceback.print_exc()
                print(f"{name} failed ({reason(e)}); the others continue", file=sys.stderr, flush=True)
                continue
            finished[name] = item
            finished = {n: finished[n] for n in (*ITEMS, *finished) if n in finished}
            write(file, finished)
            print(table.body(item), flush=True)
    print(f"\nwritten: {file}, {file.with_suffix('.md').name}, {file.with_suffix('.png').name}")
    return int(bool(failed))


def measured(name: str, plan: BenchPlan) -> Item:
    """Measure one item."""
    start = time.perf_counter()
    about = environment(plan)
    item: Item = importlib.import_module(f"benchmarks.items.{name}").measure(plan)
    return dataclasses.replace(item, seconds=time.perf_counter() - start, environment=about)


def write(file: Path, items: dict[str, Item]) -> None:
    """Write the JSON file, its tables and its plot."""
    records.write(file, items)
    write_text_atomically(file.with_suffix(".md"), table.page(items))
    plot.draw(items, file.with_suffix(".png"))


def chosen_items(only: str | None, device: str) -> dict[str, float]:
    """Return the items to measure with their minutes; raises UserError for an unknown item."""
    names = [name for name in ITEMS if name not in ON_REQUEST] if only is None else only.split(",")
    for name in names:
        if name not in ITEMS:
            raise UserError(f"unknown item {name!r}{did_you_mean(name, ITEMS)}")
    return {name: minutes for name, minutes in MINUTES[device].items() if name in names}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").splitlines()[0])
    names = f"{', '.join(ITEMS)} (default: all except {', '.join(ON_REQUEST)})"
    parser.add_argument("--only", help=f"items, separated by commas: {names}")
    parser.add_argument("--smoke", action="store_true", help="smoke test with tiny sizes and meaningless numbers")
    peers.add_argument(parser)
    parser.add_argument("--data", type=Path, help="folder with corpus/, eval/hellaswag_val.jsonl, tinyshakespeare/")
    parser.add_argument("--out", type=Path, default=MINE, help="folder of the results (default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="device to measure")
    parser.add_argument("--rounds", type=int, help="number of timed rounds (default: set by each item)")
    parser.add_argument("--minutes", type=float, help="time limit for all items; each runs at least one round")
    return parser


if __name__ == "__main__":
    sys.exit(main())
