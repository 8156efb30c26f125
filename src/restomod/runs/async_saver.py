"""Asynchronous saving of checkpoints, and deletion of old ones.

The tensors are copied to CPU memory, and a thread writes the copy to disk while training continues. The CPU memory is
reused by the next save. For tensors on a GPU it is pinned: copies are faster, and the GPU makes them before its
next step, without the training loop waiting for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from restomod.config.run import RunConfig
from restomod.engine.distributed import SINGLE, Processes
from restomod.engine.gather import gather_model_on_main, gather_on_main, is_sharded
from restomod.engine.optimizer import Optimizers, optimizer_tensors
from restomod.model.gpt import GPT
from restomod.runs.checkpoint import remove_checkpoint, write_checkpoint
from restomod.runs.metrics import ValidationLosses
from restomod.utils.errors import UserError
from restomod.utils.run_files import list_checkpoints, step_of


class Saver:
    """Writer of a run's checkpoints, as a context manager.

    The main process writes. The other ranks only take part in gathering sharded tensors.

    Args:
        run: run folder.
        config: run configuration, with the rules for keeping checkpoints.
        processes: ranks of the training.
    """

    def __init__(self, run: Path, config: RunConfig, processes: Processes = SINGLE) -> None:
        self.run, self.config, self.processes = run, config, processes
        self._model: GPT | None = None  # copy on the CPU
        self._state: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "save")
        self._writing: Future[None] | None = None
        self._failure: UserError | None = None
        self._losses = ValidationLosses(run)

    def save(self, step: int, model: GPT, optimizer: Optimizers, data_offset: int = 0) -> None:
        """Wait for the previous save, then start saving a checkpoint. All ranks call this.

        Args:
            step: number of updates made so far.
            model: model to save.
            optimizer: optimizer to save.
            data_offset: number of batches skipped by rollbacks.

        Raises:
            UserError: the previous checkpoint could not be written, and ``on_save_error`` is "stop".
        """
        state = optimizer_tensors(model, optimizer) if step > 0 else {}  # the optimizer creates it in the first step
        self.finish()
        if is_sharded(model):
            model, state = gather_model_on_main(model, self.processes), gather_on_main(state, self.processes)
        if self.processes.main:
            copied = self._copy(model, state)
            assert self._model is not None
            self._writing = self._thread.submit(self._write, step, self._model, dict(self._state), data_offset, copied)

    @torch.no_grad()
    def _copy(self, model: GPT, state: dict[str, Tensor]) -> torch.cuda.Event | None:
        """Start copying the model and optimizer state to the CPU.

        Copies from a GPU are asynchronous, but made before the next step changes the tensors.

        Returns:
            Event that marks the end of the copies from a GPU; None without CUDA.
        """
        if self._model is None:
            with torch.device("meta"):
                self._model = GPT(model.config)
            staged = {name: cpu_buffer(p) for name, p in model.state_dict().items()}
            self._model.load_state_dict(staged, assign=True)
        for copy, parameter in zip(self._model.parameters(), model.parameters(), strict=True):
            copy.copy_(parameter, non_blocking=parameter.is_cuda)
        self._state = {name: self._state[name] for name in state if name in self._state}
        for name, value in state.items():
            if name not in self._state:
                self._state[name] = cpu_buffer(value)
            self._state[name].copy_(value, non_blocking=value.is_cuda)
        if not torch.cuda.is_initialized():
            return None
        copied = torch.cuda.Event()
        copied.record()
        return copied

    def _write(
        self, step: int, model: GPT, state: dict[str, Tensor], data_offset: int, copied: torch.cuda.Event | None
    ) -> None:
        if copied is not None:
            copied.synchronize()
        write_checkpoint(self.run, step, model, state, data_offset)
        delete_old_checkpoints(self.run, self.config, self._losses.read())

    def failure(self) -> UserError | None:
        """Return the error of the last save, and clear it.

        Returns:
            None if the save succeeded or is still in progress.
        """
        if self._writing is not None and self._writing.done():
            self._wait()
        failure, self._failure = self._failure, None
        return failure

    def finish(self) -> None:
        """Wait until the last checkpoint is written. All ranks call this.

        Raises:
            UserError: the checkpoint could not be written, and ``on_save_error`` is "stop".
        """
        self.processes.run_on_all_ranks(self._finish)

    def _finish(self) -> None:
        self._wait()
        if self._failure is not None and self.config.on_save_error == "stop":
            raise self._failure

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                writing.result()
            except UserError as e:
                self._failure = e

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)


def cpu_buffer(tensor: Tensor) -> Tensor:
    """Allocate CPU memory for a copy of ``tensor``.

    The memory is pinned if the tensor is on a GPU and the system's limit on locked memory allows it. torch rounds
    pinned blocks up to powers of two: 1.5 GB of GPT-2 124M with AdamW take 2.5 GB.
    """
    if tensor.is_cuda:
        with contextlib.suppress(RuntimeError):  # the limit on locked memory is reached
            return torch.empty_like(tensor, device="cpu", pin_memory=True)
    return torch.empty_like(tensor, device="cpu")


def delete_old_checkpoints(run: Path, config: RunConfig, losses: Mapping[int, float] | None = None) -> None:
    """Delete the checkpoints that ``config`` does not keep.

    Args:
        run: run folder.
        config: run configuration.
        losses: validation loss by step; None reads them from `metrics.jsonl`.
    """
    losses = ValidationLosses(run).read() if losses is None else losses
    folders = {step_of(folder): folder for folder in list_checkpoints(run)}
    sizes = {step: _size(folder) for step, folder in folders.items()} if config.keep_gb is not None else {}
    known = {step: losses[step] for step in folders if step in losses}
    for step in folders.keys() - steps_to_keep(list(folders), known, sizes, config):
        with contextlib.suppress(OSError):  # the next save tries again
            remove_checkpoint(folders[step])


def steps_to_keep(steps: list[int], losses: dict[int, float], sizes: dict[int, int], config: RunConfig) -> set[int]:
    """Select the checkpoints to keep.

    The order of priority is: the newest checkpoint (always kept), the one with the lowest validation loss, the
    ``keep_checkpoints`` newest (0: all), one every ``keep_every`` steps. ``keep_gb`` limits the total size.

    Args:
        steps: steps of all checkpoints.
        losses: validation loss by step; checkpoints without a validation are absent.
        sizes: bytes by step; used only with ``keep_gb``.
        config: run configuration.

    Returns:
        Steps of the checkpoints to keep.
    """
    newest = sorted(steps, reverse=True)
    best = [min(losses, key=lambda step: (losses[step], -step))] if losses and config.keep_best else []
    periodic = [step for step in newest if config.keep_every and step % config.keep_every == 0]
    last = newest[: config.keep_checkpoints] if config.keep_checkpoints else newest
    wanted = dict.fromkeys([*newest[:1], *best, *last, *periodic])
    if config.keep_gb is None:
        return set(wanted)
    room, keep = config.keep_gb * 1e9, set[int]()
    for step in wanted:
        if not keep or sizes[step] <= room:
            keep.add(step)
            room -= sizes[step]
    return keep


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
