"""Plan of a run: memory, time, cost and expected final loss.

Times come from a measurement on this machine or from published speeds. A value that neither supports is None, and the
plan gives the reason.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from restomod.config.model import nearest_divisor_below
from restomod.config.run import RunConfig
from restomod.config.serialize import to_dict
from restomod.engine.device import FORWARD_TOKENS
from restomod.engine.memory import MemoryEstimate, estimate_memory
from restomod.engine.micro_batch import sequences_per_process
from restomod.experiments.plan.expected_loss import ExpectedLoss, expected_loss
from restomod.experiments.plan.hardware import (
    GPU,
    GPUS,
    Speed,
    known_gpu,
    not_covered,
    precision_on,
    speeds_on,
    tokens_per_second,
)
from restomod.experiments.plan.prices import GpuPrice
from restomod.model.flops import flops_per_token, parameter_count
from restomod.utils.errors import UserError

FORWARD = 1 / 3  # FLOPs of a forward pass divided by FLOPs of forward and backward


@dataclass(frozen=True)
class MeasuredStep:
    """Time and memory of a few training steps on this machine."""

    device: str
    """Name of the device."""
    device_type: str
    """Type of the torch device: cpu, cuda or mps."""
    precision: str
    """Compute dtype: bf16, fp16 or fp32."""
    micro_batch: int
    """Sequences per micro-batch."""
    micro_batch_seconds: float
    """Seconds of one micro-batch: data loading, forward and backward."""
    update_seconds: float
    """Seconds of one optimizer update."""
    peak_bytes: int | None
    """Measured peak memory in bytes; None if the system does not report it."""
    predicted_bytes: int
    """Peak memory in bytes that `estimate_memory` predicts for the measured steps."""

    def tokens_per_second(self, config: RunConfig) -> float:
        """Return the training speed of ``config``, with its number of micro-batches per step."""
        count = config.batch_sequences / self.micro_batch
        return config.batch_tokens / (count * self.micro_batch_seconds + self.update_seconds)


@dataclass(frozen=True)
class Quote:
    """Time and cost of a run on the GPUs of one price entry."""

    price: GpuPrice
    """Price entry."""
    seconds: float | None
    """Seconds of training and validation; None if the speed is unknown."""
    why: str
    """Software of the published speed, or the reason why the speed is unknown."""
    compiled_only: bool = False
    """Whether the speed was measured with torch.compile while the run does not use it."""

    @property
    def dollars(self) -> float | None:
        """Cost in US dollars; None if the time is unknown."""
        return _dollars(self.seconds, self.price.gpus, self.price.dollars_per_gpu_hour)


@dataclass(frozen=True)
class Plan:
    """Estimates for one run on given hardware."""

    preset: str
    """Name of the preset."""
    config: RunConfig
    """Run configuration."""
    gpu_name: str | None = None
    """GPU name given by the user; None if no GPU is named."""
    gpus: int = 1
    """Number of GPUs."""
    price: float | None = None
    """US dollars per GPU and hour; None if no price is given."""
    measured: MeasuredStep | None = None
    """Measurement on this machine; None to use published speeds."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Compute dtype of matmuls."""
    device_type: str = "cuda"
    """Type of the torch device: cpu, cuda or mps."""

    @property
    def gpu(self) -> GPU | None:
        """Data of the GPU; None if no GPU is named or the name is unknown."""
        return None if self.gpu_name is None else known_gpu(self.gpu_name)

    @property
    def tokens(self) -> int:
        """Number of training tokens."""
        return self.config.steps * self.config.batch_tokens

    @property
    def flops_per_token(self) -> int:
        """FLOPs of forward and backward per token."""
        return flops_per_token(self.config.model, self.config.sequence_length)

    @property
    def validations(self) -> int:
        """Number of validations: at step 0, every ``eval_every`` steps, and after the last step."""
        steps, every = self.config.steps, self.config.eval_every
        if not self.config.data.has_validation:
            return 0
        return steps // every + 1 + (steps % every != 0)

    @property
    def work_tokens(self) -> float:
        """Training tokens plus validation tokens, the latter weighted by `FORWARD`.

        A validation of unknown size counts as 0.
        """
        return self.tokens + FORWARD * self.validations * (self.config.eval_tokens or 0)

    @property
    def compiled(self) -> bool:
        """Whether the model is compiled with torch.compile."""
        return self.config.compiles_on(self.device_type)

    @property
    def dtype_bytes(self) -> int:
        """Bytes per element of the compute dtype of matmuls."""
        return 4 if self.precision == "fp32" else 2

    def memory(self, micro_batch: int) -> MemoryEstimate:
        """Estimate the peak memory of one process with ``micro_batch`` sequences per micro-batch."""
        total = self.gpu.memory if self.gpu is not None else None
        return estimate_memory(self.config, micro_batch, self.dtype_bytes, self.device_type, self.gpus, total)

    @property
    def largest_micro_batch(self) -> int | None:
        """Largest micro-batch, in sequences, that fits into the GPU's memory.

        0 if one sequence does not fit; None if the GPU is unknown.
        """
        if self.gpu is None:
            return None
        low, high = 0, sequences_per_process(self.config, self.gpus) + 1
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.memory(middle).total <= self.gpu.memory
            low, high = (middle, high) if fits else (low, middle)
        return low

    @property
    def micro_batch(self) -> int:
        """Sequences per micro-batch: the configured number, or else the number that training chooses.

        At least 1, also if that does not fit.
        """
        if self.measured is not None:
            return self.measured.micro_batch
        share = sequences_per_process(self.config, self.gpus)
        if self.config.micro_batch is not None:
            return self.config.micro_batch
        fast = FORWARD_TOKENS[self.device_type] // self.config.sequence_length
        largest = self.largest_micro_batch
        return nearest_divisor_below(share, fast if largest is None else min(fast, largest))

    @property
    def fits(self) -> bool | None:
        """Whether the micro-batch fits into the GPU's memory; None if the GPU is unknown."""
        return None if self.largest_micro_batch is None else self.micro_batch <= self.largest_micro_batch

    @property
    def speeds(self) -> list[tuple[Speed, float]]:
        """Published measurements on this GPU, each with the tokens/s it predicts.

        The plan uses the first. Empty if the speed is measured or unknown.
        """
        if self.gpu is None or self.unknown_speed is not None:
            return []
        measured = speeds_on(self.gpu, self.compiled)
        return [(speed, tokens_per_second(speed, self.config, self.gpus)) for speed in measured]

    @property
    def unknown_speed(self) -> str | None:
        """Reason why the speed is unknown; None if it is known."""
        if self.measured is not None:
            return None
        if self.gpu_name is None:
            return "name a GPU with --gpu, or measure this machine with --measure"
        if self.gpu is None:
            return f"unknown GPU {self.gpu_name!r} (known: {', '.join(gpu.key for gpu in GPUS)}); run --measure on it"
        if self.fits is False:
            return f"a micro-batch of {self.micro_batch} does not fit"
        if not speeds_on(self.gpu, self.compiled):
            return f"no published measurement on {self.gpu.key}; run --measure on it"
        return not_covered(self.config, self.gpu, self.gpus)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of all GPUs together; None if unknown."""
        if self.measured is not None:
            return self.measured.tokens_per_second(self.config)
        return self.speeds[0][1] if self.speeds else None

    @property
    def seconds(self) -> float | None:
        """Seconds of training and validation; None if the speed is unknown."""
        speed = self.tokens_per_second
        return None if speed is None else self.work_tokens / speed

    @property
    def dollars(self) -> float | None:
        """Cost in US dollars; None if the time or the price is unknown."""
        return _dollars(self.seconds, self.gpus, self.price)

    @property
    def expected(self) -> ExpectedLoss:
        """Expected final loss."""
        return expected_loss(self.config)

    def quote(self, price: GpuPrice) -> Quote:
        """Estimate time and cost of this run on the GPUs of a price entry."""
        config = dataclasses.replace(self.config, device="auto")
        precision = precision_on(known_gpu(price.gpu), config)
        plan = Plan(self.preset, config, price.gpu, price.gpus, price.dollars_per_gpu_hour, precision=precision)
        try:
            why = plan.unknown_speed
        except UserError:  # the batch is not divisible by the number of GPUs
            return Quote(price, None, f"{config.batch_sequences} sequences are not divisible by {price.gpus} GPUs")
        if why is not None:
            return Quote(price, None, why)
        basis = plan.speeds[0][0]
        return Quote(price, plan.seconds, basis.software, basis.kind == "compiled" and not plan.compiled)

    def to_dict(self, prices: list[GpuPrice]) -> dict[str, Any]:
        """Return the plan as JSON values, with a quote per price entry; unknown values are None."""
        gpu = self.gpu
        return {
            "plan": self.preset,
            "parameters": parameter_count(self.config.model),
            "flops_per_token": self.flops_per_token,
            "tokens": self.tokens,
            "flops": self.flops_per_token * self.tokens,
            "validations": self.validations,
            "device": self.measured.device if self.measured else self.gpu_name,
            "gpus": self.gpus,
            "gpu_memory_bytes": gpu.memory if gpu else None,
            "gpu_peak_flops": gpu.peak if gpu else None,
            "precision": self.precision,
            "micro_batch": self.micro_batch,
            "largest_micro_batch": self.largest_micro_batch,
            "fits": self.fits,
            "memory_bytes": self.memory(self.micro_batch).to_dict(),
            "tokens_per_second": self.tokens_per_second,
            "speeds": [
                dataclasses.asdict(speed) | {"mfu": speed.mfu, "predicted_tokens_per_second": predicted}
                for speed, predicted in self.speeds
            ],
            "unknown_speed": self.unknown_speed,
            "measured": dataclasses.asdict(self.measured) if self.measured else None,
            "seconds": self.seconds,
            "dollars_per_gpu_hour": self.price,
            "dollars": self.dollars,
            "final_loss": dataclasses.asdict(self.expected),
            "prices": [
                dataclasses.asdict(q.price)
                | {"date": str(q.price.date), "seconds": q.seconds, "dollars": q.dollars, "why": q.why}
                for q in map(self.quote, prices)
            ],
            "config": to_dict(self.config),
        }


def _dollars(seconds: float | None, gpus: int, price: float | None) -> float | None:
    return None if seconds is None or price is None else seconds / 3600 * gpus * price
