"""A plan for people, as lines."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from restomod.engine.lr_schedule import describe_warmup, schedule_warnings
from restomod.engine.micro_batch import sequences_per_process
from restomod.experiments.plan.estimate import Plan, Quote
from restomod.experiments.plan.hardware import Speed
from restomod.experiments.plan.prices import Offer
from restomod.model.flops import parameter_count

WIDTH, LABEL = 120, 20
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "temporary": "loss and head",
    "runtime": "Python and libraries",
    "fragmentation": "fragmentation",
}


def lines(plan: Plan, offers: list[Offer]) -> Iterator[str]:
    """What `restomod plan` prints."""
    for label, value in rows(plan):
        wrapped = textwrap.wrap(value, WIDTH - LABEL)
        yield f"{label:<{LABEL}}{wrapped[0]}"
        yield from (" " * LABEL + line for line in wrapped[1:])
    yield ""
    yield from offer_lines([plan.quote(offer) for offer in offers])


def rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """Labels and values."""
    config, m = plan.config, plan.config.model
    yield "plan", f"{plan.preset}: {m.n_layer} layers, {m.n_head} heads, {m.n_embd} wide"
    yield "parameters", f"{parameter_count(m):,}"
    yield "training", f"{config.steps:,} steps × {config.batch_tokens:,} tokens = {_count(plan.tokens)} tokens"
    yield "warm-up", describe_warmup(config)
    yield from (("warning", warning) for warning in schedule_warnings(config))
    flops = plan.flops_per_token
    yield "work", f"{flops / 1e6:,.0f} million FLOPs a token, {flops * plan.tokens:.3g} in all"
    yield "validation", _validation(plan)
    yield from _memory(plan)
    yield from _speed(plan)
    seconds = plan.seconds
    yield "time", "unknown" if seconds is None else _hours(seconds) + ", without preparing data, saving and sampling"
    if plan.price is not None:
        paid = f"{plan.gpus} × ${plan.price:.2f} an hour"
        yield "cost", "unknown" if plan.dollars is None else f"${plan.dollars:,.2f}, at {paid}"
    expected = plan.expected
    if expected.loss is None:
        yield "final loss", expected.of
    else:
        spread = f" ({expected.low:.2f} to {expected.high:.2f})" if expected.low and expected.high else ""
        yield "final loss", f"about {expected.loss:.2f}{spread}; {expected.of}"


def _validation(plan: Plan) -> str:
    tokens = plan.config.eval_tokens
    if not plan.validations:
        return "none: nothing is held out"
    if tokens is None:
        return f"{plan.validations} times the whole validation part, whose size is not known yet and not counted below"
    more = plan.work_tokens / plan.tokens - 1
    return f"{plan.validations} times {_count(tokens)} tokens, forward only: {more:.1%} more work"


def _memory(plan: Plan) -> Iterator[tuple[str, str]]:
    T, n = plan.config.sequence_length, plan.micro_batch
    one = "of each GPU" if plan.gpus > 1 else "of the GPU" if plan.device_type == "cuda" else "of this machine"
    compiled = "; torch.compile needs less" if plan.compiled else ""
    when = "when a step needs most"
    yield "memory", f"{one} {when}, with {n} × {T:,} tokens at once, {plan.precision} products{compiled}"
    parts = plan.memory(n).to_dict()
    labels = PARTS | ({"runtime": "CUDA context"} if plan.device_type == "cuda" else {})
    for key, label in labels.items():
        yield f"  {label}", _gb(parts[key])
    total = _gb(parts["total"])
    if plan.measured is not None:
        peak = plan.measured.peak_bytes
        found = "not told" if peak is None else _gb(peak)
        total += f"; the steps measured here needed {found}, predicted {_gb(plan.measured.predicted_bytes)}"
    elif plan.gpu is not None:
        share = sequences_per_process(plan.config, plan.gpus)
        most = f"up to {plan.fitting:,} sequences at once fit" if plan.fitting else "not even one sequence fits"
        most = f"all {share:,} sequences of its step fit at once" if plan.fitting == share else most
        total += f" of {_gb(plan.gpu.memory)}; {most}" + ("" if plan.fits else "; this does not fit")
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
    yield "speed", f"{speed:,.0f} tokens/s at {basis.mfu:.0%} MFU, which is what this had: {_source(basis)}"
    for other, predicted in plan.speeds[1:]:
        hours = _hours(plan.work_tokens / predicted)
        yield "", f"{predicted:,.0f} tokens/s ({other.mfu:.0%}, {hours}) as {_source(other)}"
    if basis.kind == "compiled" and not plan.compiled:
        yield "", "measured with torch.compile, which --compile off switches off: this run will be slower"
    yield "", "all of other software than this one; --measure on the GPU itself tells more"


def _source(speed: Speed) -> str:
    kind = {"unknown": "compiled or not", "kernels": "its own kernels"}.get(speed.kind, speed.kind)
    return f"{speed.software}, {speed.gpus} × {speed.gpu}, {kind} ({speed.source})"


def offer_lines(quotes: list[Quote]) -> Iterator[str]:
    """The table of offers, the cheapest for this run first, those of which nothing is known last."""
    yield f"{'offer':<12}{'GPUs':<15}{'$/GPU h':>8}  {'read on':<12}{'time':>10}{'cost':>11}  source"
    for q in sorted(quotes, key=lambda q: (q.dollars is None, q.dollars or 0.0)):
        o = q.offer
        time = "unknown" if q.seconds is None else _hours(q.seconds) + ("*" if q.compiled_only else " ")
        cost = "unknown" if q.dollars is None else f"${q.dollars:,.2f}"
        said = "; ".join(part for part in (o.source, o.note) if part)
        gpus = f"{o.gpus} × {o.gpu}"
        yield f"{o.provider:<12}{gpus:<15}{o.price:>8.2f}  {o.date!s:<12}{time:>10}{cost:>11}  {said}"
    if any(q.compiled_only for q in quotes):
        yield "* measured with torch.compile, which --compile off switches off: this run will be slower"
    unknown = {q.why for q in quotes if q.seconds is None}
    yield from (f"unknown: {why}" for why in sorted(unknown))


def _count(tokens: float) -> str:
    """Tokens for people: 10.0 billion, 10.5 million, 32,768."""
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if tokens >= size:
            return f"{tokens / size:.1f} {name}"
    return f"{tokens:,.0f}"


def _hours(seconds: float) -> str:
    """Seconds for people: 1.9 h, 12 min, 40 s."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"
