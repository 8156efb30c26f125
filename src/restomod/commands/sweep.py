"""Command `sweep`: train one run for every point of a grid, or for points that a sampler chooses."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from restomod.commands.catalog import heading
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
    """Flags of `restomod sweep` itself; `restomod train` has the flags of its trials."""

    grid: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Grid search: settings as NAME=VALUE,VALUE, for example --grid optim.lr=6e-4,1.2e-3 model.n-layer=2,4. A run is
    trained for every combination."""
    random: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Random search: settings as NAME=LOW..HIGH or NAME=VALUE,VALUE; needs --trials. A positive range with
    HIGH / LOW >= 10 is sampled log-uniformly; LOW..HIGH:log and LOW..HIGH:linear override this."""
    tpe: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Search with Optuna's TPE sampler, which uses the results of earlier trials. Settings are as in --random."""
    trials: int | None = None
    """Number of configurations; required with --random and --tpe. None: not set."""
    seeds: int = 1
    """Number of seeds per configuration: the value of --seed and the integers after it."""
    search_seed: int = 0
    """Random seed of --random and --tpe."""
    prune: Pruning = "none"
    """Pruning: stop bad trials early. none: never; median: if the validation loss is above the median of earlier trials
    at the same step (from the sixth trial on, after the warm-up); hyperband: with the Hyperband algorithm."""
    max_hours: float | None = None
    """Limit in hours for all trials on all machines. A trial is not started if, judged by the finished ones, it would
    exceed the limit. At the limit, the running trial is stopped with a checkpoint. None: no limit."""
    max_dollars: float | None = None
    """Limit in US dollars for all trials on all GPUs, enforced like --max-hours; needs --price. None: no limit."""
    price: float | None = None
    """Price in US dollars of one GPU for one hour (on a CPU: of one process for one hour). None: no cost."""
    then: str | None = None
    """Shell command to run after the sweep, also after an error, such as --then "sudo shutdown now". None: no
    command."""
    out: str
    """Folder of the sweep. The same command resumes the sweep, and several processes can work on it in parallel."""


RARE = ("search_seed", "then")
SPACES = ("--grid", "--random", "--tpe")
USAGE = f"""\
usage: restomod sweep PRESET --grid NAME=VALUE,VALUE [FLAGS]               train all combinations of values
       restomod sweep PRESET --random NAME=LOW..HIGH --trials N [FLAGS]    random search (--tpe: TPE sampler)
       restomod sweep PRESET --help                                        list the flags of sweep; the flags of
                                                                           `restomod train PRESET` are accepted too

{heading("sweep")}"""
OWN = {field.name for field in dataclasses.fields(SweepArguments)}


def run(arguments: list[str]) -> int:
    """Train the trials of a sweep, and return the exit code."""
    name, rest = preset_first("sweep", arguments, USAGE)
    base = preset(name)
    own, others = split(rest)
    given = parse(SweepArguments, own, f"restomod sweep {name}", SweepArguments(out=f"sweeps/{name}"), RARE)
    plan = build_plan(name, base, given, others)
    refuse_ignored(own, {"--search-seed": "with --grid"} if given.grid else {})
    for flag in ("max_hours", "max_dollars", "price"):
        require_number(f"--{flag.replace('_', '-')}", getattr(given, flag), above_0=True)
    if given.max_dollars is not None and given.price is None:
        raise UserError("--max-dollars needs the price of one GPU for one hour; add --price DOLLARS")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "a sweep trains each trial with one process and does not support torchrun; start the same command once per "
            "GPU, each with its own CUDA_VISIBLE_DEVICES"
        )
    if importlib.util.find_spec("optuna") is None:
        raise UserError("a sweep needs the package optuna: pip install -c constraints.txt -e '.[sweep]'")

    from restomod.experiments.sweep.worker import Limits, sweep

    return sweep(plan, Path(given.out), Limits(given.max_hours, given.max_dollars, given.price))


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments of the sweep itself, and those of its trials."""
    own: list[str] = []
    others: list[str] = []
    target, again = others, False
    for argument in arguments:
        if is_flag(argument):
            flag = argument.lstrip("-").partition("=")[0].replace("-", "_")
            target = own if flag in {*OWN, "h", "help"} else others
            target.append(argument)
        else:  # --grid A B equals --grid A --grid B
            repeated = [own[-2]] if again and target is own and len(own) > 1 and own[-2] in SPACES else []
            target += [*repeated, argument]
        again = target is own and not is_flag(argument)
    return own, others


def build_plan(name: str, base: RunConfig, given: SweepArguments, flags: list[str]) -> SweepPlan:
    """Build the plan of a sweep.

    Args:
        name: name of the preset.
        base: configuration of the preset.
        given: flags of the sweep itself.
        flags: flags of its trials.

    Raises:
        UserError: flags are out of range or contradict each other.
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
            raise UserError(f"{field} is swept twice; combine its values in one list")
        flag = f"--{field.replace('_', '-')}"
        if any(f.partition("=")[0].replace("_", "-") == flag for f in flags):
            raise UserError(f"{field} is swept and fixed by {flag}; omit one of them")
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
        raise UserError("seed is swept; omit --seeds")
    require_seed("--search-seed", given.search_seed)
    longest: dict[str, Value] = {d.name: d.greatest for d in dimensions if d.name in ("steps", "optim.warmup_steps")}
    of_trials = TrainArguments(base, out=given.out)
    config = parse_run(of_trials, [*flags, *space.flags(longest)], f"restomod sweep {name}").config
    ignored = ignored_by_run(config)
    decided = {flag for flag, why in ignored.items() if why.split()[1][2:].replace("-", "_") not in swept}
    refuse_ignored(flags, {flag: ignored[flag] for flag in decided})
    require_seed("the last seed", config.seed + given.seeds - 1)
    if not config.data.has_validation and "data.val_fraction" not in swept:
        raise UserError("a sweep compares validation losses and needs a validation split; add --data.val-fraction 0.05")
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
