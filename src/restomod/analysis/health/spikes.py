"""Loss spikes: steps far above those before. Needs no torch."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SPIKE_BEFORE = 128  # steps that a spike is compared with
SPIKE_ENOUGH = 64
SPIKE_SIGMAS = 11.0  # the spike guard of training has 10; steps that it skips do not change the weights
SPIKE_WIDTHS = (1, 4, 16)  # steps
SMALLEST_SPIKE = 0.25  # nats
NORMAL_KURTOSIS = 3.0  # of normal noise
USUAL_KURTOSIS = 4.0  # of losses of small batches, at most; above it, the threshold rises
ASSUMED_KURTOSIS = 6.0  # while few losses are known: that of Laplace noise
ASSUMED_STEPS = 128  # weight of this assumption
LARGEST_SQUARE = 6.0**2  # squared deviations; larger ones are clipped, so that spikes do not count as kurtosis


@dataclass(frozen=True)
class Spike:
    """One spike, and the losses of the at most `SPIKE_BEFORE` steps before it."""

    step: int
    rise: float
    """Nats above the mean of the steps before, other spikes excluded."""
    mean: float
    deviation: float
    count: int


class SpikeFinder:
    """Finds spikes in a loss given in parts. The result does not depend on how it is divided."""

    def __init__(self) -> None:
        self.found: list[Spike] = []
        self._at = 0  # the next step to look at, as an index
        self._usual: deque[float] = deque(maxlen=SPIKE_BEFORE)  # spikes are not among them
        self._total = self._squares = 0.0
        # sums of squares and fourth powers of differences between one loss and the next, which have little of the trend
        self._squared = self._fourths = 0.0
        self._measured = 0
        self._over_below: float | None = None  # within a spike: the loss at which it is over

    def scan(self, step: NDArray[np.float64], loss: NDArray[np.float64], to_the_end: bool = False) -> None:
        """Scan on to the last step at which every width fits; with ``to_the_end``, to the newest step.

        Args:
            step: (n,) the steps so far, without those dropped by `forget`.
            loss: (n,) their losses.
            to_the_end: no further call may follow.
        """
        first, new = self._at, loss[self._at :].tolist()
        end = len(loss) if to_the_end else len(loss) - max(SPIKE_WIDTHS) + 1
        while self._at < end:
            i = self._at
            value = new[i - first]
            self._at += 1
            if self._over_below is not None:
                if value > self._over_below:
                    continue  # the same one, on its way down
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
        """Adjust to arrays whose first ``steps`` entries, already scanned, are removed."""
        self._at -= steps

    def _rise(self, losses: list[float], mean: float, deviation: float) -> tuple[float, int]:
        """Height and width of the spike that ``losses`` begin with; width 0 if there is none.

        Where the noise has heavy tails, single losses lie far above the others without any fault, and means of several
        less so.
        """
        n, m = self._measured, ASSUMED_STEPS
        # of a difference of two independent numbers it is half of theirs
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
