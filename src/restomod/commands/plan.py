"""Command `plan`: estimate memory, time, cost and final loss of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from restomod.commands.catalog import heading
from restomod.commands.flags import ConfigArguments
from restomod.commands.parsing import ignored_by_run, parse_run, preset_first, refuse_ignored, require_number
from restomod.config.model import require_size
from restomod.config.presets import PRESETS, preset
from restomod.config.run import RunConfig
from restomod.experiments.plan.hardware import find_gpu, precision_on
from restomod.experiments.plan.prices import read_prices
from restomod.utils.errors import UserError
from restomod.utils.files import write_json_atomically
from restomod.utils.output_files import Output, require_outputs, write_outputs

if TYPE_CHECKING:  # these import torch
    from restomod.bench.report import Report
    from restomod.experiments.plan.estimate import MeasuredStep, Plan

MEMORY_HINT = "lower --micro-batch, --batch-tokens or --sequence-length"
RARE = ("prices",)
TIMED_STEPS = 2  # without and with the times of the phases
USAGE = f"""\
usage: restomod plan PRESET [FLAGS]     estimate memory, time, cost and final loss of a run
       restomod plan PRESET --help      list all flags; the flags of `restomod train` are accepted too

{heading("plan")}

presets: {", ".join(PRESETS)}"""


@dataclass(frozen=True)
class PlanArguments(ConfigArguments):
    """Flags of `restomod plan`."""

    gpu: str | None = None
    """GPU of the plan: a100, a100-40gb, h100, h200, l40s, rtx3090, rtx3090ti, rtx4090, ... None: no speed estimate."""
    gpus: int = 1
    """Number of GPUs in the machine."""
    price: float | None = None
    """Price in US dollars of one GPU for one hour. None: only a table of the prices of cloud providers."""
    measure: bool = False
    """Measure a few training steps on this machine and plan for this machine."""
    prices: Path | None = None
    """TOML file of GPU prices. None: the file of restomod, which also documents the format."""
    json: Path | None = None
    """JSON file for the plan. None: no file."""


def run(arguments: list[str]) -> int:
    """Print the plan, write the requested file, and return 0."""
    name, rest = preset_first("plan", arguments, USAGE)
    given = parse_run(PlanArguments(preset(name)), rest, f"restomod plan {name}", RARE)
    _check_flags(given)
    refuse_ignored(rest, ignored_by_run(given.config))
    prices = read_prices(given.prices)

    from restomod.experiments.plan.text import plan_lines

    plan = _plan(name, given)
    print("\n".join(plan_lines(plan, prices)))  # one call, so that an error prints no partial plan
    if given.json is not None:
        print()
        write_outputs([Output(given.json, lambda path: write_json_atomically(path, plan.to_dict(prices)))])
    return 0


def _check_flags(given: PlanArguments) -> None:
    """Raise UserError if flags are out of range or contradict each other, before any measurement."""
    require_size("--gpus", given.gpus)
    require_number("--price", given.price)
    if given.measure and (given.gpu is not None or given.gpus > 1):
        raise UserError("--measure plans for one device of this machine; omit --gpu and --gpus")
    if given.gpu is None and not given.measure and (given.price is not None or given.gpus > 1):
        raise UserError("--price and --gpus need a GPU; add --gpu, for example --gpu a100")
    if given.gpu is not None and given.config.device in ("cpu", "mps"):
        raise UserError(f"--gpu {given.gpu} and --device {given.config.device} exclude each other; omit one of them")
    require_outputs({"--json": given.json}, {"--prices": given.prices})


def _plan(name: str, given: PlanArguments) -> Plan:
    from restomod.experiments.plan.estimate import Plan

    config = given.config
    if given.measure:
        measured = _measure(name, config)
        kind, precision = measured.device_type, measured.precision
        return Plan(name, config, None, 1, given.price, measured, precision, kind)  # type: ignore[arg-type]
    gpu = find_gpu(given.gpu) if given.gpu is not None else None
    if config.device in ("cpu", "mps"):
        import torch

        from restomod.engine.device import choose_dtype, dtype_name

        found = dtype_name(choose_dtype(config.precision, torch.device(config.device)))
        return Plan(name, config, precision=found, device_type=config.device)  # type: ignore[arg-type]
    return Plan(name, config, given.gpu, given.gpus, given.price, precision=precision_on(gpu, config))


def _measure(name: str, config: RunConfig) -> MeasuredStep:
    from restomod.bench.step import measure_micro_batches
    from restomod.utils.console import Display

    display = Display()
    report = measure_micro_batches(config, name, TIMED_STEPS, display)
    display.line("")
    display.require_printed()
    return to_measured_step(report)


def to_measured_step(report: Report) -> MeasuredStep:
    """Convert the report of a benchmark to the time and memory of a step."""
    from restomod.engine.memory import estimate_memory
    from restomod.experiments.plan.estimate import MeasuredStep

    config, phases = report.config, report.phases_ms
    count = config.batch_sequences // report.micro_batch
    repeated = sum(phases[phase].median for phase in ("data", "forward", "backward"))
    precision, kind = report.environment["precision"], report.device_type
    predicted = estimate_memory(config, report.micro_batch, 4 if precision == "fp32" else 2, kind)
    return MeasuredStep(
        report.environment["device"],
        kind,
        precision,
        report.micro_batch,
        repeated / count / 1000,
        phases["update"].median / 1000,
        report.timings.peak_bytes,
        predicted.total,
    )
