"""What a run has used: floating-point operations, hours, idle time, energy, money."""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass

from restomod.analysis.report.curves import number
from restomod.runs.reader import Run, start_time
from restomod.utils.text import duration


@dataclass(frozen=True)
class Prices:
    """What a report may be told of the machine."""

    per_hour: float | None = None
    """US dollars for one GPU and one hour."""
    watts: float | None = None
    """Mean draw of the whole machine."""


@dataclass(frozen=True)
class Usage:
    """What a run has used."""

    steps: int
    tokens: int
    flops: int
    """Of the model's own arithmetic; see `restomod.model.flops`."""
    in_steps: float
    """Seconds in steps that are logged."""
    wall: float | None
    """Seconds from the first start to the newest record; None where records do not say when they were made."""
    stopped: float
    """Of these, seconds between a session's last record and the next start: the run stood still, or did what was lost
    and had to be done again."""
    sessions: int
    gpu_seconds: float
    """Seconds of each session multiplied by its GPUs (processes), as far as they are known: what is paid for."""
    idle_gpu_seconds: float
    """Of these, those not spent in steps."""

    @property
    def idle(self) -> float | None:
        """Seconds of the wall clock that were not spent in steps."""
        return None if self.wall is None else max(0.0, self.wall - self.in_steps)

    def cost(self, per_hour: float) -> float:
        """US dollars for all hours, idle ones included, at a price of one GPU and one hour."""
        return self.gpu_seconds / 3600 * per_hour

    def priced(self, per_hour: float) -> str:
        """What is paid for, in words: 12.0 GPU hours at $2.50."""
        return f"{self.gpu_seconds / 3600:,.3g} GPU hours at ${per_hour:g}"

    def energy(self, watts: float) -> float:
        """Kilowatt-hours while a session was going on."""
        known = self.in_steps if self.wall is None else self.wall
        return (known - self.stopped) / 3.6e6 * watts


def usage(run: Run) -> Usage:
    """Add up what a run has used. Steps that a crash has made it do again count once: they are logged once."""
    steps = max((r["step"] + 1 for r in run.train), default=0)
    took = [(max(0.0, number(r.get("ms"))) / 1000, run.processes_of(r)) for r in run.train]
    took = [(seconds, count) for seconds, count in took if math.isfinite(seconds)]
    in_steps, gpus_in_steps = sum(s for s, _ in took), sum(s * count for s, count in took)
    starts = [start_time(environment) for environment in run.environments]
    times = sorted(at for at in (number(record.get("time")) for record in run.records) if math.isfinite(at))
    wall, stopped, gpu_seconds = None, 0.0, gpus_in_steps
    if starts and starts[0] is not None and times:
        # the start is known to a second
        wall = max(times[-1] - starts[0], in_steps)
        for again in starts[1:]:
            if again is not None and again < times[-1]:
                before = bisect.bisect_left(times, again)
                stopped += again - (times[before - 1] if before else starts[0])
        # a session's GPUs are paid for until the next start, and those of the last until the last record
        turns = [at for at, _ in run.starts if starts[0] < at < times[-1]]
        parts = itertools.pairwise([starts[0], *turns, starts[0] + wall])
        gpu_seconds = max(gpus_in_steps, sum((end - begin) * run.processes_at(begin) for begin, end in parts))
    return Usage(
        steps,
        run.tokens_at(steps),
        run.flops_at(steps),
        in_steps,
        wall,
        max(0.0, stopped),
        len(run.environments),
        gpu_seconds,
        gpu_seconds - gpus_in_steps,
    )


def quantity(value: float) -> str:
    """A large number in a few letters: 855M, 10.0B, 8.55e18 beyond that."""
    for least, unit in ((1e15, None), (1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= least:
            return f"{value:.3g}" if unit is None else f"{value / least:.3g}{unit}"
    return f"{value:,.0f}"


def flops_text(flops: float) -> str:
    """Floating-point operations as people write them: 8.55 × 10¹⁸."""
    if flops < 1:
        return "0"
    power = math.floor(math.log10(flops))
    return f"{flops / 10**power:.2f} × 10{str(power).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def usage_rows(used: Usage, prices: Prices) -> list[tuple[str, str, str]]:
    """Name, value and remark of everything that is known."""
    rows = [
        ("Compute", f"{flops_text(used.flops)} FLOPs", f"{quantity(used.tokens)} tokens in {used.steps:,} steps"),
        ("Time in steps", duration(used.in_steps), ""),
    ]
    sessions = f", {used.sessions} sessions" if used.sessions > 1 else ""
    if used.wall is None or used.idle is None:
        rows.append(("Wall clock", "unknown", "the records do not say when they were made"))
    else:
        rows.append(("Wall clock", duration(used.wall), f"first start to last record{sessions}"))
        share = used.idle / used.wall if used.wall else 0.0
        rows.append(("Not in steps", duration(used.idle), f"{share:.0%}: starting, validating, sampling, saving"))
        if used.stopped:
            rows.append(("Of that, stopped", duration(used.stopped), "between sessions, or done again"))
    least = "at least: only time in steps is known" if used.wall is None else "for the whole wall clock"
    if prices.per_hour is not None:
        rows.append(("Cost", f"${used.cost(prices.per_hour):,.2f}", f"{used.priced(prices.per_hour)}, {least}"))
        if used.idle:
            idle = used.idle_gpu_seconds / 3600 * prices.per_hour
            rows.append(("Of that, idle", f"${idle:,.2f}", "for time not in steps"))
    if prices.watts is not None:
        while_on = least if used.wall is None else "while a session was going on"
        rows.append(("Energy", f"{used.energy(prices.watts):,.3g} kWh", f"at {prices.watts:g} W, {while_on}"))
    else:
        rows.append(("Energy", "unknown", "give the machine's mean draw with --watts"))
    return rows
