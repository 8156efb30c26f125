"""Resource usage of a run: FLOPs, time, overhead, energy, cost."""

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
    """Price and power of a machine."""

    per_hour: float | None = None
    """US dollars per GPU hour; None: unknown."""
    watts: float | None = None
    """Mean power of the complete machine in watts; None: unknown."""


@dataclass(frozen=True)
class Usage:
    """Resource usage of a run. A session is the time between two starts of the run."""

    steps: int
    tokens: int
    flops: int
    """FLOPs of the model; see `restomod.model.flops`."""
    in_steps: float
    """Seconds in logged steps."""
    wall: float | None
    """Seconds from the first start to the newest record; None: the records have no times."""
    downtime: float
    """Seconds of ``wall`` between the last record of a session and the next start, including steps lost in a crash."""
    sessions: int
    """Number of sessions."""
    gpu_seconds: float
    """Paid time: seconds of each session multiplied by its number of GPUs (ranks)."""
    overhead_gpu_seconds: float
    """Part of ``gpu_seconds`` outside training steps."""

    @property
    def overhead(self) -> float | None:
        """Seconds of ``wall`` outside training steps; None: the wall clock is unknown."""
        return None if self.wall is None else max(0.0, self.wall - self.in_steps)

    def cost(self, per_hour: float) -> float:
        """Return the cost of all paid time in US dollars, at a price per GPU hour."""
        return self.gpu_seconds / 3600 * per_hour

    def priced(self, per_hour: float) -> str:
        """Format the paid time and the price: "12 GPU hours at $2.5"."""
        return f"{self.gpu_seconds / 3600:,.3g} GPU hours at ${per_hour:g}"

    def energy(self, watts: float) -> float:
        """Return the energy in kilowatt-hours, without downtime, at a mean power in watts."""
        known = self.in_steps if self.wall is None else self.wall
        return (known - self.downtime) / 3.6e6 * watts


def run_usage(run: Run) -> Usage:
    """Compute the resource usage of a run. Steps repeated after a crash count once."""
    took = [(max(0.0, number(r.get("ms"))) / 1000, run.processes_of(r)) for r in run.train]
    took = [(seconds, count) for seconds, count in took if math.isfinite(seconds)]
    in_steps, gpus_in_steps = sum(s for s, _ in took), sum(s * count for s, count in took)
    starts = [start_time(environment) for environment in run.environments]
    times = sorted(at for at in (number(record.get("time")) for record in run.records) if math.isfinite(at))
    wall, downtime, gpu_seconds = None, 0.0, gpus_in_steps
    if starts and starts[0] is not None and times:
        # start times have a resolution of one second
        wall = max(times[-1] - starts[0], in_steps)
        for again in starts[1:]:
            if again is not None and again < times[-1]:
                before = bisect.bisect_left(times, again)
                downtime += again - (times[before - 1] if before else starts[0])
        # the GPUs of a session are paid for until the next start, those of the last session until the last record
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
    """Format a number of FLOPs in scientific notation: 8.55 × 10¹⁸."""
    if flops < 1:
        return "0"
    power = math.floor(math.log10(flops))
    return f"{flops / 10**power:.2f} × 10{str(power).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def usage_rows(used: Usage, rates: HourlyRates) -> list[tuple[str, str, str]]:
    """Return the rows of the table "Compute and cost": name, value, remark."""
    rows = [
        ("Compute", f"{flops_text(used.flops)} FLOPs", f"{short_count(used.tokens)} tokens in {used.steps:,} steps"),
        ("Time in steps", duration(used.in_steps), ""),
    ]
    basis = "total wall-clock time"
    if used.wall is None or used.overhead is None:
        rows.append(("Wall clock", "unknown", "the records have no times"))
        basis = "lower bound, only the time in steps is known"
    else:
        sessions = f", {used.sessions} sessions" if used.sessions > 1 else ""
        rows.append(("Wall clock", duration(used.wall), f"first start to last record{sessions}"))
        share = used.overhead / used.wall if used.wall else 0.0
        rows.append(
            ("Overhead", duration(used.overhead), f"{share:.0%}: startup, validation, sampling, saving, downtime")
        )
        if used.downtime:
            rows.append(("Downtime", duration(used.downtime), "between sessions, and steps lost and repeated"))
    if rates.per_hour is not None:
        rows.append(("Cost", f"${used.cost(rates.per_hour):,.2f}", f"{used.priced(rates.per_hour)}, {basis}"))
        if used.overhead:
            overhead = used.overhead_gpu_seconds / 3600 * rates.per_hour
            rows.append(("Cost of overhead", f"${overhead:,.2f}", "part of the cost"))
    if rates.watts is not None:
        time = basis if used.wall is None else "without downtime"
        rows.append(("Energy", f"{used.energy(rates.watts):,.3g} kWh", f"at {rates.watts:g} W, {time}"))
    else:
        rows.append(("Energy", "unknown", "set the machine's mean power with --watts"))
    return rows
