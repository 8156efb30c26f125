"""Collector of the results of check.sh and measure.sh in one file of `benchmarks.records`.

    python -m benchmarks.gpu.collect part NAME --results FOLDER --out gpu.json --exit-code 0 --limit 85 --log NAME.log
    python -m benchmarks.gpu.collect merge CHECK/gpu.json MEASURE/gpu.json    # into benchmarks/results/gpu.json

The scripts call `part` after every part, so results are safe if the machine fails later. A part without results is in
the file with the reason. `merge` joins the files of both scripts, with tables and a plot, for `benchmarks.readme`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.records import Comparison, Entry, Item, Metric
from restomod.utils.errors import EXIT_USER_ERROR, UserError
from restomod.utils.json_files import read_json

ROOT = Path(__file__).parents[2]
TIMED_OUT = (124, 137)  # exit codes of the command timeout, after SIGINT or SIGKILL
BENCH_METRICS = [
    Metric("tokens/s", "", "higher"),
    Metric("step", "ms", "lower"),
    Metric("MFU", "%", "higher"),
    Metric("peak memory", "GB", "lower"),
]


@dataclass(frozen=True)
class Part:
    """Part of a script, which measures an item of gpu.json or one contender of it."""

    item: str
    """Name of the item."""
    title: str
    """Title of the item."""
    what: str
    """Description of the part, a few words."""
    script: str = "measure.sh"
    """Script that runs the part."""


def _bench(what: str) -> Part:
    return Part("bench", "Training step of 524,288 tokens: `restomod bench step gpt2-124m`", what)


PARTS: dict[str, Part] = {  # in the order of the page
    "bench": _bench("micro-batch 64"),
    "bench-micro-32": _bench("micro-batch 32"),
    "bench-micro-128": _bench("micro-batch 128"),
    "bench-eager": _bench("micro-batch 64, eager"),
    "bench-residual-bf16": _bench("micro-batch 64, residual stream in bf16"),
    "step": Part("step", "Training step of GPT-2 124M", "compared with build-nanogpt"),
    "shakespeare": Part("shakespeare", "TinyShakespeare to a loss of 0.09", "the run"),
    "recipe": Part("recipe", "Tokens to GPT-2's loss", "modern compared with gpt2"),
    "hellaswag": Part("hellaswag", "HellaSwag", "all contenders"),
    "generation": Part("generation", "Generation with GPT-2 124M", "all contenders"),
    "checkpoint": Part("checkpoint", "Checkpoints of GPT-2 124M", "all contenders"),
    "variants": Part("variants", "Variants of the training step", "all variants", "check.sh"),
    "tests": Part("tests", "Tests on the GPU", "all tests", "check.sh"),
}
ITEMS = tuple(dict.fromkeys(part.item for part in PARTS.values()))


def collect(name: str, results: Path, missing: str | None, code: int, limit: int, log: Path | None) -> Item:
    """Return the results of a part; `Item.left_out` has the reason if results are missing or incomplete.

    Args:
        name: name of the part.
        results: folder with NAME.json, NAME/gpu.json or NAME/cpu.json.
        missing: reason why the part was not started; None if it ran.
        code: exit code.
        limit: time limit in seconds.
        log: file with the output of the part; None if there is none.
    """
    part = PARTS[name]
    item = Item(part.title)
    files = [results / f"{name}.json", results / name / "gpu.json", results / name / "cpu.json"]
    found = next((file for file in files if file.exists()), None)
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log else []
    said = f": {_without_folders(lines[-1], results):.160}" if lines else ""
    if found is not None:
        try:
            item = READERS.get(part.item, _from_records)(found, part)
        except (UserError, LookupError, TypeError, ValueError, AttributeError) as e:
            print(found.read_text(errors="replace"))  # for the log of the scripts
            missing = f"damaged results ({type(e).__name__}: {_without_folders(str(e), results):.160})"
    elif name == "tests" and code == 0 and lines:
        item = Item(part.title, notes=[f"`tests/cuda`{said}"])
    elif code == 0 and missing is None:
        missing = f"no results{said}"
    if code in TIMED_OUT:
        missing = f"stopped after the limit of {limit} s{said}"
    elif code:
        missing = f"exit code {code}{said}"
    if missing is not None:
        item = dataclasses.replace(item, left_out=[*item.left_out, f"{part.what}: {missing}"])
    return item


def _without_folders(text: str, results: Path) -> str:
    for folder in (str(results), os.environ.get("KIT"), str(ROOT)):
        text = text.replace(f"{folder}/", "") if folder else text
    return text.replace(sys.executable, "python")


def _from_records(file: Path, part: Part) -> Item:
    """Read the results of a part that writes a file of `benchmarks.records`."""
    item = records.read(file)[part.item]
    return dataclasses.replace(item, environment=_environment(item.environment, part))


def _from_bench(file: Path, part: Part) -> Item:
    """Read the results of `restomod bench step --json`."""
    found = read_json(file, "benchmark")
    milliseconds: list[float] = found["step_ms"]["all"]
    speeds = [1000 * found["tokens_per_step"] / ms for ms in milliseconds]
    values = {"tokens/s": speeds, "step": milliseconds}
    if found["peak_flops"]:
        values["MFU"] = [100 * speed * found["flops_per_token"] / found["peak_flops"] for speed in speeds]
    if found["peak_memory_bytes"]:
        values["peak memory"] = [found["peak_memory_bytes"] / 1e9]
    case = f"{found['tokens_per_step']:,} tokens per step"
    comparison = Comparison(case, BENCH_METRICS, [Entry(part.what, values)], found["warmup_steps"])
    return Item(part.title, [comparison], environment=_environment(found["environment"], part))


def _from_recipe(file: Path, part: Part) -> Item:
    """Read the trials of `benchmarks.recipe` for modern and gpt2, one round per seed that both have finished."""
    from benchmarks.harness import comparison_of  # imports torch
    from benchmarks.items.recipe import METRICS, measured
    from benchmarks.recipe import BASELINE, rows_of

    rows = rows_of(file)
    by_seed: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], {})[row["recipe"]] = row
    whole = [results for results in by_seed.values() if {"modern", BASELINE} <= results.keys()]
    notes = [f"{row['recipe']}, seed {row['seed']}: validation loss {row['loss']:.4f}" for row in rows]
    config = rows[0]["config"]
    case = f"{config['model']['n_layer']} layers, width {config['model']['n_embd']}, {rows[0]['tokens']:,} tokens"
    rounds = [measured(results) for results in whole]
    comparisons = [comparison_of(case, ["modern", BASELINE], rounds, METRICS)] if rounds else []
    return Item(part.title, comparisons, notes=notes, environment=_environment(rows[0]["environment"], part))


READERS: dict[str, Callable[[Path, Part], Item]] = {"bench": _from_bench, "recipe": _from_recipe}


def _environment(found: dict[str, Any], part: Part) -> dict[str, Any]:
    """Return an environment with the script as command, the revision, and whether this is a smoke test."""
    return found | {
        "command": f"benchmarks/gpu/{part.script}",
        "smoke": found.get("smoke", os.environ.get("RESTOMOD_SMOKE") == "cpu"),
        "git_revision": found.get("git_revision") or os.environ.get("REVISION"),
    }


def joined(old: Item | None, new: Item) -> Item:
    """Join two results of an item; the new results replace the old ones, unless there are none.

    Parts of the item `bench` each add their contender to the same comparison.
    """
    if old is None or new.title != _bench("").title:
        return new if old is None or _has_results(new) or not _has_results(old) else old
    comparisons = {comparison.case: comparison for comparison in old.comparisons}
    for comparison in new.comparisons:
        before = comparisons.get(comparison.case, comparison)
        entries = {entry.name: entry for entry in (*before.entries, *comparison.entries)}
        comparisons[comparison.case] = dataclasses.replace(comparison, entries=list(entries.values()))
    here = {entry.name for comparison in comparisons.values() for entry in comparison.entries}
    missing = [line for line in (*old.left_out, *new.left_out) if line.partition(": ")[0] not in here]
    return dataclasses.replace(
        new,
        comparisons=list(comparisons.values()),
        left_out=list(dict.fromkeys(missing)),
        environment=new.environment or old.environment,
    )


def _has_results(item: Item) -> bool:
    return bool(item.comparisons or item.series or item.notes)


def add(items: dict[str, Item], more: dict[str, Item]) -> dict[str, Item]:
    """Return all items of both, in the order of the page."""
    every = items | {name: joined(items.get(name), item) for name, item in more.items()}
    return {name: every[name] for name in (*ITEMS, *every) if name in every}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code: 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.collect", description=(__doc__ or "").split("\n")[0]
    )
    actions = parser.add_subparsers(dest="action", required=True)
    one = actions.add_parser("part", help="add the results of one part, or the reason why there are none")
    one.add_argument("name", choices=PARTS, help="name of the part")
    one.add_argument("--results", type=Path, required=True, help="folder with NAME.json or NAME/gpu.json")
    one.add_argument("--out", type=Path, required=True, help="file to which the results are added")
    one.add_argument("--missing", help="reason why the part was not started")
    one.add_argument("--exit-code", type=int, default=0, help="exit code of the part")
    one.add_argument("--limit", type=int, default=0, help="time limit of the part in seconds")
    one.add_argument("--log", type=Path, help="file with the output of the part")
    both = actions.add_parser("merge", help="join the files of several sessions")
    both.add_argument(
        "files", type=Path, nargs="+", help="gpu.json of each session; later results replace earlier ones"
    )
    both.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json", help="file of the joined results"
    )
    given = parser.parse_args(arguments)
    try:
        if given.action == "part":
            item = collect(given.name, given.results, given.missing, given.exit_code, given.limit, given.log)
            records.write(given.out, add(records.read(given.out), {PARTS[given.name].item: item}))
        else:
            merge(given.files, given.out)
    except UserError as e:
        print(f"benchmarks: error: {e}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def merge(files: Sequence[Path], out: Path) -> None:
    """Join the items of all files in ``out``, with tables and a plot in the same folder.

    Raises:
        UserError: a file is missing or damaged.
    """
    from benchmarks.run import write  # imports matplotlib

    items: dict[str, Item] = {}
    for file in files:
        found = records.read(file)
        if not found:
            raise UserError(f"{file}: no such file, or no measurements in it; run check.sh and measure.sh first")
        items = add(items, found)
    write(out, items)


if __name__ == "__main__":
    sys.exit(main())
