"""Loads the batches of coming steps in a background thread while the device computes."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from restomod.data.batches import Batches

STEPS_AHEAD = 2

MicroBatches = list[tuple[Tensor, Tensor]]


class Prefetch:
    """The micro-batches of a run's steps, asked for in any order and quick where the order is that of the steps."""

    def __init__(
        self,
        batches: Batches,
        micro_batch: int,
        steps: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
    ) -> None:
        """Nothing is loaded before the first step is asked for.

        Args:
            batches: of the run.
            micro_batch: sequences of one forward pass.
            steps: of the run; nothing is loaded beyond its last.
            rank, world_size: this process among those that share the batch.
            device: where the batches go; for a GPU they are loaded into page-locked memory, from which it copies while
                it computes.
        """
        self.batches, self.micro_batch, self.steps = batches, micro_batch, steps
        self.rank, self.world_size = rank, world_size
        self.pin_memory = device is not None and device.type == "cuda"
        self._loading: dict[int, Future[MicroBatches]] = {}
        # a new thread uses GPU 0, on which pinning would create a CUDA context for every process of the machine
        one_of_several = self.pin_memory and device is not None and device.index is not None
        choose = (torch.cuda.set_device, (device,)) if one_of_several else (None, ())
        self._thread = ThreadPoolExecutor(1, "prefetch", *choose)

    def get(self, step: int) -> tuple[MicroBatches, float]:
        """The micro-batches of ``step`` (see `Batches.micro_batches`), and the seconds that were waited for them.

        Raises:
            UserError: as loading does.
        """
        start = time.perf_counter()
        for ahead in range(step, max(step + 1, min(step + 1 + STEPS_AHEAD, self.steps))):
            if ahead not in self._loading:
                self._loading[ahead] = self._thread.submit(self._load, ahead)
        micro_batches = self._loading.pop(step).result()
        return micro_batches, time.perf_counter() - start

    def _load(self, step: int) -> MicroBatches:
        micro_batches = self.batches.micro_batches(step, self.micro_batch, self.rank, self.world_size)
        if self.pin_memory:
            return [(tokens.pin_memory(), targets.pin_memory()) for tokens, targets in micro_batches]
        return micro_batches

    def close(self) -> None:
        """Load nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._loading.clear()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
