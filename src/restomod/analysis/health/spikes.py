"""Loss spikes: losses far above those of the steps before. Does not import torch."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SPIKE_BEFORE = 128  # steps before a spike that it is compared with
SPIKE_ENOUGH = 64  # fewest steps before a spike
SPIKE_SIGMAS = 11.0  # training skips an update from 10 on; skipped steps do not change the weights
SPIKE_WIDTHS = (1, 4, 16)  # steps
SMALLEST_SPIKE = 0.25  # nats
NORMAL_KURTOSIS = 3.0  # normal noise
USUAL_KURTOSIS = 4.0  # maximum for losses of small batches; the threshold rises above it
ASSUMED_KURTOSIS = 6.0  # Laplace noise; assumed while few losses are known
ASSUMED_STEPS = 128  # weight of this assumption, in steps
LARGEST_SQUARE = 6.0**2  # squared deviations are clipped here, so that spikes do not raise the kurtosis


@dataclass(frozen=True)
class Spike:
    """Loss spike."""

    step: int
    """First step of the spike."""
    rise: float
    """Height above the mean of the steps before, without other spikes, in nats."""
    mean: float
    """Mean loss of the steps before, in nats."""
    deviation: float
    """Standard deviation of the loss of the steps before, in nats."""
    count: int
    """Number of steps before, at most `SPIKE_BEFORE`."""


class SpikeFinder:
    """Incremental search for spikes in a loss. The result does not depend on the sizes of the parts.

    Attributes:
        found: spikes so far.
    """

    def __init__(self) -> None:
        self.found: list[Spike] = []
        self._at = 0  # index of the next step to scan
        self._usual: deque[float] = deque(maxlen=SPIKE_BEFORE)  # losses without spikes
        self._total = self._squares = 0.0
        # sums of squares and fourth powers of differences of consecutive losses, which contain little of the trend
        self._squared = self._fourths = 0.0
        self._measured = 0
        self._over_below: float | None = None  # within a spike: the spike ends below this loss

    def scan(self, step: NDArray[np.float64], loss: NDArray[np.float64], to_the_end: bool = False) -> None:
        """Scan new steps, up to the last step at which every width of a spike fits.

        Args:
            step: all steps so far, without those dropped by `forget`, (n,).
            loss: their losses in nats, (n,).
            to_the_end: whether to scan up to the newest step; no further call may follow.
        """
        first, new = self._at, loss[self._at :].tolist()
        end = len(loss) if to_the_end else len(loss) - max(SPIKE_WIDTHS) + 1
        while self._at < end:
            i = self._at
            value = new[i - first]
            self._at += 1
            if self._over_below is not None:
                if value > self._over_below:
                    continue  # still the same spike
                self._over_below = None
            if len(self._usual) >= SPIKE_ENOUGH:
                mean = self._total / len(self._usual)
                deviation = math.sqrt(max(self._squares / len(self._usual) - mean * mean, 1e-12))
                if value - mean > deviation:
                    rise, width = self._rise(new[i - first : i - first + max(SPIKE_WIDTHS)], mean, deviation)
                    if width:
                        before = loss[max(0, i - SPIKE_BEFORE) : i]
                        spike = Spike(int(step[i]), rise, float(before.mean()), float(before.std()), len(before))
                        self.found.append(spike)
                        self._over_below = mean + max(SMALLEST_SPIKE, 3 * deviation)
                        self._at = i + width
                        continue
                square = min((value - self._usual[-1]) ** 2, 2 * LARGEST_SQUARE * deviation**2)
                self._squared += square
                self._fourths += square * square
                self._measured += 1
            gone = self._usual[0] if len(self._usual) == SPIKE_BEFORE else 0.0
            self._usual.append(value)
            self._total += value - gone
            self._squares += value * value - gone * gone

    def forget(self, steps: int) -> None:
        """Adjust the position after the caller has removed the first ``steps`` scanned entries of its arrays."""
        self._at -= steps

    def _rise(self, losses: list[float], mean: float, deviation: float) -> tuple[float, int]:
        """Return height and width of the spike at the start of ``losses``; width 0 if there is none.

        The threshold rises with the kurtosis of the noise, because noise with heavy tails has large single losses. It
        rises less for means of several steps, whose kurtosis is smaller.
        """
        n, m = self._measured, ASSUMED_STEPS
        # the excess kurtosis of a difference of two independent values is half of theirs
        measured = 2 * (self._fourths * n / self._squared**2 - NORMAL_KURTOSIS) if self._squared else 0.0
        excess = (n * measured + m * (ASSUMED_KURTOSIS - NORMAL_KURTOSIS)) / (n + m)
        best = 0.0, 0
        for k in SPIKE_WIDTHS:
            if k <= len(losses):
                rise = sum(losses[:k]) / k - mean
                kurtosis = NORMAL_KURTOSIS + excess / math.sqrt(k)
                sigmas = SPIKE_SIGMAS * max(1.0, kurtosis / USUAL_KURTOSIS) ** 2
                if rise > max(SMALLEST_SPIKE, sigmas * deviation / math.sqrt(k)):
                    best = max(best, (rise, k))
        return best
