"""Command `sweep`: train a run for every point of a grid, or for points chosen by a sampler."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from restomod.commands.parsing import (
    ignored_by_run,
    is_flag,
    parse,
    parse_run,
    preset_first,
    refuse_ignored,
    require_number,
)
from restomod.commands.train import TrainArguments
from restomod.config.model import require_size
from restomod.config.presets import preset
from restomod.config.run import RunConfig, require_seed
from restomod.experiments.sweep import space
from restomod.experiments.sweep.space import Method, Value, grid, parse_dimension
from restomod.experiments.sweep.study import Pruning, SweepPlan
from restomod.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SweepArguments:
    grid: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE,VALUE: train all combinations of these values of any settings (--grid optim.lr=6e-4,1.2e-3
    model.n-layer=2,4)."""
    random: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=LOW..HIGH or NAME=VALUE,VALUE: train --trials configurations drawn at random. A range whose ends are above 0
    and differ by a factor of ten or more is log-uniform; LOW..HIGH:log and LOW..HIGH:linear override that."""
    tpe: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """As --random, but chosen by Optuna's TPE sampler, which learns from earlier trials."""
    trials: int | None = None
    """Number of configurations of --random or --tpe."""
    seeds: int = 1
    """Number of seeds per configuration: the run's seed and the following ones."""
    search_seed: int = 0
    """Seed of --random and --tpe."""
    prune: Pruning = "none"
    """Stop bad trials early: median: validation loss above the median of earlier trials at that step (from the sixth
    trial on, after the warm-up); hyperband: by Hyperband."""
    max_hours: float | None = None
    """Limit in hours of all trials together, on all machines: no trial is started that would exceed it, judged by the
    finished ones; at the limit, the running trial is stopped with a checkpoint."""
    max_dollars: float | None = None
    """The same limit in US dollars, for all GPUs together; needs --price."""
    price: float | None = None
    """US dollars for one GPU and one hour (on a CPU: for one process and one hour)."""
    then: str | None = None
    """Shell command to run at the end, however the sweep ends (--then "sudo shutdown now")."""
    out: str
    """Folder of the sweep. The same command resumes it, also while other processes work on it."""


SPACES = ("--grid", "--random", "--tpe")
USAGE = """\
usage: restomod sweep PRESET --grid NAME=VALUE,VALUE [FLAGS]                train all combinations of values
       restomod sweep PRESET --random NAME=LOW..HIGH --trials N [FLAGS]    train random points (--tpe: chosen ones)
       restomod sweep PRESET --help                                        list the flags of sweep; those of
                                                                           `restomod train PRESET` may be given too"""
OWN = {field.name for field in dataclasses.fields(SweepArguments)}


def run(arguments: list[str]) -> int:
    """Train the trials of a sweep. Returns the exit code."""
    name, rest = preset_first("sweep", arguments, USAGE)
    base = preset(name)
    own, others = split(rest)
    given = parse(SweepArguments, own, f"restomod sweep {name}", SweepArguments(out=f"sweeps/{name}"))
    plan = plan_of(name, base, given, others)
    refuse_ignored(own, {"--search-seed": "with --grid"} if given.grid else {})
    for flag in ("max_hours", "max_dollars", "price"):
        require_number(f"--{flag.replace('_', '-')}", getattr(given, flag), above_0=True)
    if given.max_dollars is not None and given.price is None:
        raise UserError("--max-dollars needs the price of an hour: add --price DOLLARS")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "a sweep trains each trial with one process; instead of torchrun, start the same command once per GPU, "
            "each with its own CUDA_VISIBLE_DEVICES"
        )
    if importlib.util.find_spec("optuna") is None:
        raise UserError("a sweep needs the package optuna: pip install -c constraints.txt -e '.[sweep]'")

    from restomod.experiments.sweep.worker import Limits, sweep

    return sweep(plan, Path(given.out), Limits(given.max_hours, given.max_dollars, given.price))


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split arguments into the sweep's own flags with their values, and those of its trials."""
    own: list[str] = []
    others: list[str] = []
    target, again = others, False
    for argument in arguments:
        if is_flag(argument):
            flag = argument.lstrip("-").partition("=")[0].replace("-", "_")
            target = own if flag in {*OWN, "h", "help"} else others
            target.append(argument)
        else:  # --grid A B is --grid A --grid B
            repeated = [own[-2]] if again and target is own and len(own) > 1 and own[-2] in SPACES else []
            target += [*repeated, argument]
        again = target is own and not is_flag(argument)
    return own, others


def plan_of(name: str, base: RunConfig, given: SweepArguments, flags: list[str]) -> SweepPlan:
    """Build the plan of a sweep over the preset ``base``, called ``name``, from its own flags and those of its trials.

    Raises:
        UserError: the flags contradict each other.
    """
    methods: dict[Method, tuple[str, ...]] = {"grid": given.grid, "random": given.random, "tpe": given.tpe}
    asked = [method for method, space in methods.items() if space]
    if len(asked) != 1:
        raise UserError("a sweep needs one of --grid, --random and --tpe, as in --grid optim.lr=6e-4,1.2e-3,1.8e-3")
    method = asked[0]
    dimensions = [parse_dimension(text, method) for text in methods[method]]
    swept = [dimension.name for dimension in dimensions]
    for field in swept:
        if swept.count(field) > 1:
            raise UserError(f"{field} is swept twice; give all its values at once")
        flag = f"--{field.replace('_', '-')}"
        if any(f.partition("=")[0].replace("_", "-") == flag for f in flags):
            raise UserError(f"{field} is swept and fixed by {flag}; leave one of them out")
    if method == "grid":
        if given.trials is not None:
            raise UserError("--trials belongs to --random and --tpe; a grid has one trial per combination")
        trials = len(grid(dimensions))
    elif given.trials is None:
        raise UserError(f"--{method} needs --trials N, the number of configurations")
    else:
        trials = given.trials
    require_size("--trials", trials, most=space.MOST_TRIALS)
    require_size("--seeds", given.seeds, most=space.MOST_TRIALS)
    if given.seeds > 1 and "seed" in swept:
        raise UserError("seed is swept; leave --seeds out")
    require_seed("--search-seed", given.search_seed)
    longest: dict[str, Value] = {d.name: d.greatest for d in dimensions if d.name in ("steps", "optim.warmup_steps")}
    of_trials = TrainArguments(base, out=given.out)
    config = parse_run(of_trials, [*flags, *space.flags(longest)], f"restomod sweep {name}").config
    ignored = ignored_by_run(config)
    decided = {flag for flag, why in ignored.items() if why.split()[1][2:].replace("-", "_") not in swept}
    refuse_ignored(flags, {flag: ignored[flag] for flag in decided})
    require_seed("the last seed", config.seed + given.seeds - 1)
    if not config.data.has_validation and "data.val_fraction" not in swept:
        raise UserError(
            "a sweep compares validation losses, and there is no validation split; add --data.val-fraction 0.05"
        )
    return SweepPlan(
        name,
        tuple(flags),
        method,
        methods[method],
        trials,
        given.seeds,
        config.seed,
        given.search_seed,
        given.prune,
        prune_from=config.optim.warmup_steps,
        prune_every=config.eval_every,
        steps=config.steps,
    )
