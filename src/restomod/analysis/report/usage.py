"""Resources that a run has used: floating-point operations, hours, overhead, energy, money."""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass

from restomod.analysis.health.history import number
from restomod.runs.reader import Run, start_time
from restomod.utils.text import duration, short_count


@dataclass(frozen=True)
class HourlyRates:
    """Price and power of a machine; None: unknown."""

    per_hour: float | None = None
    """US dollars for one GPU and one hour."""
    watts: float | None = None
    """Mean power of the whole machine."""


@dataclass(frozen=True)
class Usage:
    """Resources that a run has used. A session is the time from one start of the run to the next."""

    steps: int
    tokens: int
    flops: int
    """Work of the model itself; see `restomod.model.flops`."""
    in_steps: float
    """Seconds in logged steps."""
    wall: float | None
    """Seconds from the first start to the newest record; None where records have no times."""
    downtime: float
    """Seconds of ``wall`` between the last record of a session and the next start, including steps lost in a crash."""
    sessions: int
    gpu_seconds: float
    """Seconds of each session multiplied by its GPUs (processes), as far as known: the paid time."""
    overhead_gpu_seconds: float
    """Seconds of ``gpu_seconds`` outside of steps."""

    @property
    def overhead(self) -> float | None:
        """Seconds of ``wall`` outside of steps."""
        return None if self.wall is None else max(0.0, self.wall - self.in_steps)

    def cost(self, per_hour: float) -> float:
        """US dollars for all paid time, overhead included, at a price for one GPU and one hour."""
        return self.gpu_seconds / 3600 * per_hour

    def priced(self, per_hour: float) -> str:
        """The paid time in words: 12.0 GPU hours at $2.50."""
        return f"{self.gpu_seconds / 3600:,.3g} GPU hours at ${per_hour:g}"

    def energy(self, watts: float) -> float:
        """Kilowatt-hours, downtime excluded."""
        known = self.in_steps if self.wall is None else self.wall
        return (known - self.downtime) / 3.6e6 * watts


def run_usage(run: Run) -> Usage:
    """Add up the resources that a run has used. Steps repeated after a crash count once, as they are logged once."""
    took = [(max(0.0, number(r.get("ms"))) / 1000, run.processes_of(r)) for r in run.train]
    took = [(seconds, count) for seconds, count in took if math.isfinite(seconds)]
    in_steps, gpus_in_steps = sum(s for s, _ in took), sum(s * count for s, count in took)
    starts = [start_time(environment) for environment in run.environments]
    times = sorted(at for at in (number(record.get("time")) for record in run.records) if math.isfinite(at))
    wall, downtime, gpu_seconds = None, 0.0, gpus_in_steps
    if starts and starts[0] is not None and times:
        # the start is known to a second
        wall = max(times[-1] - starts[0], in_steps)
        for again in starts[1:]:
            if again is not None and again < times[-1]:
                before = bisect.bisect_left(times, again)
                downtime += again - (times[before - 1] if before else starts[0])
        # a session's GPUs are paid for until the next start, and those of the last until the last record
        turns = [at for at, _ in run.starts if starts[0] < at < times[-1]]
        parts = itertools.pairwise([starts[0], *turns, starts[0] + wall])
        gpu_seconds = max(gpus_in_steps, sum((end - begin) * run.processes_at(begin) for begin, end in parts))
    return Usage(
        run.updates,
        run.tokens_at(run.updates),
        run.flops_at(run.updates),
        in_steps,
        wall,
        max(0.0, downtime),
        len(run.environments),
        gpu_seconds,
        gpu_seconds - gpus_in_steps,
    )


def flops_text(flops: float) -> str:
    """Floating-point operations in scientific notation: 8.55 × 10¹⁸."""
    if flops < 1:
        return "0"
    power = math.floor(math.log10(flops))
    return f"{flops / 10**power:.2f} × 10{str(power).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def usage_rows(used: Usage, rates: HourlyRates) -> list[tuple[str, str, str]]:
    """Name, value and remark of everything that is known."""
    rows = [
        ("Compute", f"{flops_text(used.flops)} FLOPs", f"{short_count(used.tokens)} tokens in {used.steps:,} steps"),
        ("Time in steps", duration(used.in_steps), ""),
    ]
    basis = "the whole wall clock"
    if used.wall is None or used.overhead is None:
        rows.append(("Wall clock", "unknown", "the records have no times"))
        basis = "at least: only the time in steps is known"
    else:
        sessions = f", {used.sessions} sessions" if used.sessions > 1 else ""
        rows.append(("Wall clock", duration(used.wall), f"first start to last record{sessions}"))
        share = used.overhead / used.wall if used.wall else 0.0
        rows.append(
            ("Overhead", duration(used.overhead), f"{share:.0%}: startup, validation, sampling, saving, downtime")
        )
        if used.downtime:
            rows.append(("Downtime", duration(used.downtime), "between sessions, or steps lost and repeated"))
    if rates.per_hour is not None:
        rows.append(("Cost", f"${used.cost(rates.per_hour):,.2f}", f"{used.priced(rates.per_hour)}, {basis}"))
        if used.overhead:
            overhead = used.overhead_gpu_seconds / 3600 * rates.per_hour
            rows.append(("Cost of overhead", f"${overhead:,.2f}", "part of the cost"))
    if rates.watts is not None:
        time = basis if used.wall is None else "downtime excluded"
        rows.append(("Energy", f"{used.energy(rates.watts):,.3g} kWh", f"at {rates.watts:g} W, {time}"))
    else:
        rows.append(("Energy", "unknown", "give the machine's mean power with --watts"))
    return rows
