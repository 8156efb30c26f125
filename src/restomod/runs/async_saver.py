"""Saves checkpoints while training continues, and deletes those that are not to be kept.

The training loop waits only while the tensors are copied to CPU memory, which is reused; a thread writes the copy.
For a GPU it is page-locked memory: copies are several times as fast, and asynchronous.
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
    """Writes the checkpoints of a run from its main process; the others take part in gathering what is saved."""

    def __init__(self, run: Path, config: RunConfig, processes: Processes = SINGLE) -> None:
        self.run, self.config, self.processes = run, config, processes
        self._model: GPT | None = None  # copies, on the CPU
        self._state: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "save")
        self._writing: Future[None] | None = None
        self._failure: UserError | None = None
        self._losses = ValidationLosses(run)

    def save(self, step: int, model: GPT, optimizer: Optimizers, data_offset: int = 0) -> None:
        """Start saving the checkpoint of ``step`` updates, after the previous one is written. All processes call this.

        Raises:
            UserError: the previous one could not be written, and ``on_save_error`` is "stop".
        """
        state = optimizer_tensors(model, optimizer) if step > 0 else {}  # before the first step an optimizer has none
        self.finish()
        if is_sharded(model):
            model, state = gather_model_on_main(model, self.processes), gather_on_main(state, self.processes)
        if self.processes.main:
            copied = self._copy(model, state)
            assert self._model is not None
            self._writing = self._thread.submit(self._write, step, self._model, dict(self._state), data_offset, copied)

    @torch.no_grad()
    def _copy(self, model: GPT, state: dict[str, Tensor]) -> torch.cuda.Event | None:
        """Copy everything to the CPU. Returns the event after which copies from a GPU are complete.

        The GPU makes the copies between two steps, so the training loop does not wait for them.
        """
        if self._model is None:
            with torch.device("meta"):
                self._model = GPT(model.config)
            staged = {name: staging(p) for name, p in model.state_dict().items()}
            self._model.load_state_dict(staged, assign=True)
        for copy, parameter in zip(self._model.parameters(), model.parameters(), strict=True):
            copy.copy_(parameter, non_blocking=parameter.is_cuda)
        self._state = {name: self._state[name] for name in state if name in self._state}
        for name, value in state.items():
            if name not in self._state:
                self._state[name] = staging(value)
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
        drop_others(self.run, self.config, self._losses.read())

    def failure(self) -> UserError | None:
        """The error of the last save, once; None if there is none, or the save is in progress."""
        if self._writing is not None and self._writing.done():
            self._wait()
        failure, self._failure = self._failure, None
        return failure

    def finish(self) -> None:
        """Wait until all is written. All processes call this. Raises UserError if ``on_save_error`` is "stop"."""
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


def staging(tensor: Tensor) -> Tensor:
    """CPU memory for a copy of ``tensor``; page-locked for a tensor on a GPU, if the system's limit allows it.

    torch rounds each page-locked block up to a power of two: GPT-2 124M with AdamW takes 2.5 GB for 1.5.
    """
    if tensor.is_cuda:
        with contextlib.suppress(RuntimeError):  # the system's limit on locked memory
            return torch.empty_like(tensor, device="cpu", pin_memory=True)
    return torch.empty_like(tensor, device="cpu")


def drop_others(run: Path, config: RunConfig, losses: Mapping[int, float] | None = None) -> None:
    """Delete checkpoints that ``config`` does not keep; ``losses``: by step, None for those of `metrics.jsonl`."""
    losses = ValidationLosses(run).read() if losses is None else losses
    folders = {step_of(folder): folder for folder in list_checkpoints(run)}
    sizes = {step: _size(folder) for step, folder in folders.items()} if config.keep_gb is not None else {}
    known = {step: losses[step] for step in folders if step in losses}
    for step in folders.keys() - kept(list(folders), known, sizes, config):
        with contextlib.suppress(OSError):  # it is tried again after the next save
            remove_checkpoint(folders[step])


def kept(steps: list[int], losses: dict[int, float], sizes: dict[int, int], config: RunConfig) -> set[int]:
    """Steps of the checkpoints to keep.

    By priority: the newest (always), the best, the ``keep_checkpoints`` newest, one every ``keep_every`` steps, up to
    ``keep_gb`` in total, for which alone ``sizes`` (bytes) are needed. Not every checkpoint has a validation loss.
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
