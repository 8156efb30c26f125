"""Plan of a run as printed text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from restomod.engine.lr_schedule import describe_warmup, schedule_warnings
from restomod.engine.micro_batch import sequences_per_process
from restomod.experiments.plan.estimate import Plan, Quote
from restomod.experiments.plan.hardware import Speed
from restomod.experiments.plan.prices import GpuPrice
from restomod.model.flops import parameter_count
from restomod.utils.text import duration, gigabytes, short_count

WIDTH, LABEL = 120, 20
COMPILED_ONLY = "measured with torch.compile; with --compile off this run is slower"
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "temporary": "loss and lm_head",
    "runtime": "Python and libraries",
    "fragmentation": "fragmentation",
}


def plan_lines(plan: Plan, prices: list[GpuPrice]) -> Iterator[str]:
    """Yield the lines of `restomod plan`: labels with values, wrapped to `WIDTH`, then the table of prices."""
    for label, value in plan_rows(plan):
        wrapped = textwrap.wrap(value, WIDTH - LABEL)
        yield f"{label:<{LABEL}}{wrapped[0]}"
        yield from (" " * LABEL + line for line in wrapped[1:])
    yield ""
    yield from price_lines([plan.quote(price) for price in prices])


def plan_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield label and value of every row of a plan."""
    config, m = plan.config, plan.config.model
    yield "plan", f"{plan.preset}: {m.n_layer} layers, {m.n_head} heads, width {m.n_embd}"
    yield "parameters", f"{parameter_count(m):,}"
    yield "training", f"{config.steps:,} steps × {config.batch_tokens:,} tokens = {short_count(plan.tokens)} tokens"
    yield "warm-up", describe_warmup(config)
    yield from (("warning", warning) for warning in schedule_warnings(config))
    flops = plan.flops_per_token
    yield "compute", f"{flops / 1e6:,.0f} MFLOPs per token, {flops * plan.tokens:.3g} FLOPs in total"
    yield "validation", _validation(plan)
    yield from _memory(plan)
    yield from _speed(plan)
    seconds = plan.seconds
    yield (
        "time",
        "unknown" if seconds is None else f"{duration(seconds)}, without data preparation, checkpoints and samples",
    )
    if plan.price is not None:
        paid = f"{plan.gpus} × ${plan.price:.2f} per hour"
        yield "cost", "unknown" if plan.dollars is None else f"${plan.dollars:,.2f}, at {paid}"
    expected = plan.expected
    if expected.loss is None:
        yield "final loss", expected.basis
    else:
        spread = f" ({expected.low:.2f} to {expected.high:.2f})" if expected.low and expected.high else ""
        yield "final loss", f"about {expected.loss:.2f}{spread}; {expected.basis}"


def _validation(plan: Plan) -> str:
    tokens = plan.config.eval_tokens
    if not plan.validations:
        return "none: the data has no validation split"
    if tokens is None:
        return f"{plan.validations} × the validation split; its size is unknown, so time and cost exclude it"
    more = plan.work_tokens / plan.tokens - 1
    return f"{plan.validations} × {short_count(tokens)} tokens, forward pass only, {more:.1%} of the training compute"


def _memory(plan: Plan) -> Iterator[tuple[str, str]]:
    T, n = plan.config.sequence_length, plan.micro_batch
    where = "per GPU" if plan.gpus > 1 else "on the GPU" if plan.device_type == "cuda" else "on this machine"
    compiled = "; upper bound, torch.compile uses less" if plan.compiled else ""
    yield "peak memory", f"{where}, micro-batch {n} × {T:,} tokens, compute dtype {plan.precision}{compiled}"
    parts = plan.memory(n).to_dict()
    labels = PARTS | ({"runtime": "CUDA context"} if plan.device_type == "cuda" else {})
    yield from ((f"  {label}", gigabytes(parts[key])) for key, label in labels.items())
    total = gigabytes(parts["total"])
    if plan.measured is not None:
        peak = plan.measured.peak_bytes
        found = "an unknown amount" if peak is None else gigabytes(peak)
        total += f"; measured {found}, predicted {gigabytes(plan.measured.predicted_bytes)}"
    elif plan.gpu is not None:
        share = sequences_per_process(plan.config, plan.gpus)
        most = plan.largest_micro_batch
        whole = " (all sequences of a GPU)" if most == share else ""
        largest = f"largest micro-batch {most:,}{whole}" if most else "one sequence does not fit"
        total += f" of {gigabytes(plan.gpu.memory)}; {largest}"
        total += f"; micro-batch {n:,} does not fit" if most and not plan.fits else ""
    elif plan.gpu_name is not None:
        total += "; the memory of this GPU is unknown"
    yield "  total", total


def _speed(plan: Plan) -> Iterator[tuple[str, str]]:
    speed, measured = plan.tokens_per_second, plan.measured
    if speed is None:
        yield "speed", f"unknown: {plan.unknown_speed}"
        return
    if measured is not None:
        yield "speed", f"{speed:,.0f} tokens/s, measured on {measured.device}"
        return
    basis = plan.speeds[0][0]
    yield "speed", f"{speed:,.0f} tokens/s, from the published MFU of {basis.mfu:.0%}: {_source(basis)}"
    for other, predicted in plan.speeds[1:]:
        time = duration(plan.work_tokens / predicted)
        yield "", f"{predicted:,.0f} tokens/s ({other.mfu:.0%}, {time}) from {_source(other)}"
    if basis.kind == "compiled" and not plan.compiled:
        yield "", COMPILED_ONLY
    yield "", "all measured with other software; for a better estimate, run --measure on this GPU"


def _source(speed: Speed) -> str:
    kind = {"unknown": "torch.compile not stated", "kernels": "custom kernels"}.get(speed.kind, speed.kind)
    return f"{speed.software}, {speed.gpus} × {speed.gpu}, {kind} ({speed.source})"


def price_lines(quotes: list[Quote]) -> Iterator[str]:
    """Yield the table of prices, by cost of this run; entries without a known speed are last."""
    yield f"{'provider':<12}{'GPUs':<15}{'$/GPU h':>8}  {'read on':<12}{'time':>12}{'cost':>12}  source"
    for q in sorted(quotes, key=lambda q: (q.dollars is None, q.dollars or 0.0)):
        p = q.price
        time = "unknown" if q.seconds is None else duration(q.seconds) + ("*" if q.compiled_only else " ")
        cost = "unknown" if q.dollars is None else f"${q.dollars:,.2f}"
        source = "; ".join(part for part in (p.source, p.note) if part)
        gpus = f"{p.gpus} × {p.gpu}"
        yield f"{p.provider:<12}{gpus:<15}{p.dollars_per_gpu_hour:>8.2f}  {p.date!s:<12}{time:>12}{cost:>12}  {source}"
    if any(q.compiled_only for q in quotes):
        yield f"* {COMPILED_ONLY}"
    yield from (f"unknown: {why}" for why in sorted({q.why for q in quotes if q.seconds is None}))
