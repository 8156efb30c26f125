"""What a run takes before it is paid for: memory, time, money, and where its loss may end."""

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
from restomod.experiments.plan.expected_loss import Expected, expected_loss
from restomod.experiments.plan.hardware import GPU, GPUS, Speed, find_gpu, not_covered, speeds_on, tokens_per_second
from restomod.experiments.plan.prices import Offer
from restomod.model.flops import flops_per_token, parameter_count
from restomod.utils.errors import UserError

FORWARD = 1 / 3  # of the work of forward and backward: what validation is


@dataclass(frozen=True)
class Measured:
    """What a few steps on this machine took."""

    device: str
    device_type: str
    precision: str
    micro_batch: int
    micro_batch_seconds: float
    """Forward and backward, with waiting for data."""
    update_seconds: float
    peak_bytes: int | None
    predicted_bytes: int
    """What `estimate_memory` predicts for the steps that were measured."""

    def tokens_per_second(self, config: RunConfig) -> float:
        """At the run's own number of micro-batches in a step."""
        count = config.batch_sequences / self.micro_batch
        return config.batch_tokens / (count * self.micro_batch_seconds + self.update_seconds)


@dataclass(frozen=True)
class Quote:
    """An offer, and what the run takes there; None where that is unknown."""

    offer: Offer
    seconds: float | None
    why: str
    """Whose measurement it follows from, or why it is unknown."""
    compiled_only: bool = False
    """Whether that was with torch.compile, and the run is without."""

    @property
    def dollars(self) -> float | None:
        return _dollars(self.seconds, self.offer.gpus, self.offer.price)


@dataclass(frozen=True)
class Plan:
    """A run on some hardware."""

    preset: str
    config: RunConfig
    gpu_name: str | None = None
    """As the user calls it; None where no GPU is named."""
    gpus: int = 1
    price: float | None = None
    """US dollars for one GPU and one hour."""
    measured: Measured | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of the matrix products."""
    device_type: str = "cuda"

    @property
    def gpu(self) -> GPU | None:
        """The GPU, if it is known."""
        return None if self.gpu_name is None else find_gpu(self.gpu_name)

    @property
    def tokens(self) -> int:
        """That the run trains on."""
        return self.config.steps * self.config.batch_tokens

    @property
    def flops_per_token(self) -> int:
        return flops_per_token(self.config.model, self.config.sequence_length)

    @property
    def validations(self) -> int:
        """How often the validation loss is computed: at step 0, every so many steps, and at the end."""
        steps, every, data = self.config.steps, self.config.eval_every, self.config.data
        if data.val_fraction == 0 and data.source != "tokens" and data.mix is None:
            return 0
        return steps // every + 1 + (steps % every != 0)

    @property
    def work_tokens(self) -> float:
        """Tokens whose training would be as much work as the run with its validations, if their size is known."""
        return self.tokens + FORWARD * self.validations * (self.config.eval_tokens or 0)

    @property
    def compiled(self) -> bool:
        """Whether torch.compile compiles the model there."""
        return self.config.compiles_on(self.device_type)

    @property
    def number(self) -> int:
        """Bytes of a number in the matrix products."""
        return 4 if self.precision == "fp32" else 2

    def memory(self, micro_batch: int) -> MemoryEstimate:
        """Memory of one process."""
        total = self.gpu.memory if self.gpu is not None else None
        return estimate_memory(self.config, micro_batch, self.number, self.device_type, self.gpus, total)

    @property
    def fitting(self) -> int | None:
        """The most sequences at once that fit into the GPU's memory (0: not even one); None where it is unknown."""
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
        """Sequences at once: those configured, else as training chooses; at least 1, whether it fits or not."""
        if self.measured is not None:
            return self.measured.micro_batch
        share = sequences_per_process(self.config, self.gpus)
        if self.config.micro_batch is not None:
            return self.config.micro_batch
        fast = FORWARD_TOKENS[self.device_type] // self.config.sequence_length
        return nearest_divisor_below(share, fast if self.fitting is None else min(fast, self.fitting))

    @property
    def fits(self) -> bool | None:
        """Whether a micro-batch fits into the GPU's memory; None where that is unknown."""
        return None if self.fitting is None else self.micro_batch <= self.fitting

    @property
    def speeds(self) -> list[tuple[Speed, float]]:
        """Measurements on this GPU and the tokens/s that they predict, the one that counts first."""
        if self.gpu is None or self.unknown_speed is not None:
            return []
        measured = speeds_on(self.gpu, self.compiled)
        return [(speed, tokens_per_second(speed, self.config, self.gpus)) for speed in measured]

    @property
    def unknown_speed(self) -> str | None:
        """Why nothing is known of the speed, or None where something is."""
        if self.measured is not None:
            return None
        if self.gpu_name is None:
            return "name a GPU with --gpu, or measure this machine with --measure"
        if self.gpu is None:
            return (
                f"no figures for {self.gpu_name!r} (known: {', '.join(gpu.key for gpu in GPUS)}); try --measure on it"
            )
        if self.fits is False:
            return f"a micro-batch of {self.micro_batch} does not fit"
        if not speeds_on(self.gpu, self.compiled):
            return f"nobody's measurement on {self.gpu.key} is at hand; try --measure on it"
        return not_covered(self.config, self.gpu, self.gpus)

    @property
    def tokens_per_second(self) -> float | None:
        """Of all GPUs together."""
        if self.measured is not None:
            return self.measured.tokens_per_second(self.config)
        return self.speeds[0][1] if self.speeds else None

    @property
    def seconds(self) -> float | None:
        """Of training and validation."""
        speed = self.tokens_per_second
        return None if speed is None else self.work_tokens / speed

    @property
    def dollars(self) -> float | None:
        """None where the time or the price is unknown."""
        return _dollars(self.seconds, self.gpus, self.price)

    @property
    def expected(self) -> Expected:
        return expected_loss(self.config)

    def quote(self, offer: Offer) -> Quote:
        """What this run would take on the GPUs of an offer."""
        config = dataclasses.replace(self.config, device="auto")
        gpu = find_gpu(offer.gpu)
        half = gpu.half if gpu is not None else "bf16"
        precision = half if config.precision == "auto" else config.precision
        there = Plan(self.preset, config, offer.gpu, offer.gpus, offer.price, precision=precision)
        try:
            why = there.unknown_speed
        except UserError:  # its batch cannot be shared by so many
            return Quote(offer, None, f"{offer.gpus} GPUs cannot share {config.batch_sequences} sequences evenly")
        if why is not None:
            return Quote(offer, None, why)
        basis = there.speeds[0][0]
        return Quote(offer, there.seconds, basis.software, basis.kind == "compiled" and not there.compiled)

    def to_dict(self, offers: list[Offer]) -> dict[str, Any]:
        """All of it, for JSON. Unknown is null."""
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
            "largest_micro_batch": self.fitting,
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
            "expected_loss": dataclasses.asdict(self.expected),
            "offers": [
                dataclasses.asdict(q.offer)
                | {"date": str(q.offer.date), "seconds": q.seconds, "dollars": q.dollars, "why": q.why}
                for q in map(self.quote, offers)
            ],
            "config": to_dict(self.config),
        }


def _dollars(seconds: float | None, gpus: int, price: float | None) -> float | None:
    return None if seconds is None or price is None else seconds / 3600 * gpus * price
