"""Report of a benchmark, with throughput and MFU, as a table and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from restomod.bench.measure import PHASES, Timings
from restomod.config.run import RunConfig
from restomod.config.serialize import to_dict
from restomod.model.flops import flops_per_token, mfu, parameter_count


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    """Median."""
    low: float
    """Minimum."""
    high: float
    """Maximum."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Compute median and range of ``values``, at least one."""
        return cls(statistics.median(values), min(values), max(values))

    def to_dict(self) -> dict[str, float]:
        """Return the spread as JSON values."""
        return {"median": self.median, "min": self.low, "max": self.high}


@dataclass(frozen=True)
class Report:
    """Results of `restomod bench step`."""

    preset: str
    """Name of the preset."""
    config: RunConfig
    """Run configuration."""
    tokens: str
    """Kind of tokens: "synthetic" or "real"."""
    micro_batch: int
    """Sequences per micro-batch."""
    warmup: int
    """Number of warm-up steps."""
    timings: Timings
    """Measured times and memory."""
    environment: dict[str, Any]
    """Environment from `restomod.runs.folder.environment`, plus the number of processes."""
    device_type: str
    """Type of the torch device: cpu, cuda or mps."""
    peak_flops: float | None
    """Peak FLOP/s of all devices together; None if unknown."""

    @property
    def step_ms(self) -> Spread:
        """Milliseconds per step."""
        return Spread.of([1000 * seconds for seconds in self.timings.whole])

    @property
    def tokens_per_second(self) -> Spread:
        """Training speed over all processes."""
        return Spread.of([self.config.batch_tokens / seconds for seconds in self.timings.whole])

    @property
    def phases_ms(self) -> dict[str, Spread]:
        """Milliseconds per phase of a step."""
        return {phase: Spread.of([1000 * step[phase] for step in self.timings.phases]) for phase in PHASES}

    @property
    def phased_step_ms(self) -> Spread:
        """Milliseconds per step, of steps timed by phase."""
        return Spread.of([1000 * sum(step.values()) for step in self.timings.phases])

    @property
    def flops_per_token(self) -> int:
        """FLOPs of forward and backward per token."""
        return flops_per_token(self.config.model, self.config.sequence_length)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, 0 to 1; None if the peak is unknown."""
        return mfu(self.tokens_per_second.median, self.flops_per_token, self.peak_flops)

    @property
    def memory_is(self) -> str:
        """Kind of memory that the peak refers to."""
        return {"cuda": "allocated on the GPU", "mps": "memory of the process"}.get(
            self.device_type, "resident memory of the process"
        )

    def rows(self) -> list[tuple[str, str]]:
        """Return the rows of the printed table: label and value."""
        speed, step, phased = self.tokens_per_second, self.step_ms, self.phased_step_ms
        processes = self.environment["processes"]
        rows = [
            ("tokens/s", f"{speed.median:,.0f} ({speed.low:,.0f} to {speed.high:,.0f})"),
            ("step", f"{_ms(step)}, median and range of {len(self.timings.whole)} steps"),
        ]
        total = sum(spread.median for spread in self.phases_ms.values())
        for phase, spread in self.phases_ms.items():
            rows.append((f"  {phase}", f"{_ms(spread)}, {spread.median / total:.0%}"))
        rows.append(("  total", f"{_ms(phased)}, with a device synchronisation after every phase"))
        most = f", maximum over {processes} processes" if processes > 1 else ""
        peak = self.timings.peak_bytes
        rows.append(("peak memory", f"{peak / 2**20:,.0f} MiB, {self.memory_is}{most}" if peak else "unknown"))
        achieved = speed.median * self.flops_per_token
        mflops = self.flops_per_token / 1e6
        rows.append(("compute", f"{achieved / 1e12:,.2f} TFLOP/s at {mflops:,.1f} MFLOPs per token"))
        share = "unknown: no peak FLOP/s for this device" if self.mfu is None else f"{self.mfu:.1%}"
        return [*rows, ("MFU", share)]

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON values."""
        return {
            "benchmark": "step",
            "preset": self.preset,
            "tokens": self.tokens,
            "parameters": parameter_count(self.config.model),
            "tokens_per_step": self.config.batch_tokens,
            "micro_batch": self.micro_batch,
            "warmup_steps": self.warmup,
            "timed_steps": len(self.timings.whole),
            "tokens_per_second": self.tokens_per_second.to_dict(),
            "step_ms": self.step_ms.to_dict() | {"all": [1000 * seconds for seconds in self.timings.whole]},
            "phases_ms": {phase: spread.to_dict() for phase, spread in self.phases_ms.items()},
            "phased_step_ms": self.phased_step_ms.to_dict(),
            "peak_memory_bytes": self.timings.peak_bytes,
            "peak_memory_is": self.memory_is,
            "flops_per_token": self.flops_per_token,
            "peak_flops": self.peak_flops,
            "mfu": self.mfu,
            "environment": self.environment,
            "config": to_dict(self.config),
        }


def _ms(spread: Spread) -> str:
    digits = 1 if spread.median < 1000 else 0
    return f"{spread.median:,.{digits}f} ms ({spread.low:,.{digits}f} to {spread.high:,.{digits}f})"
