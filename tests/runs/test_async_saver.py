"""Asynchronous saving writes the state at the time of the call, and keeps the right checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from restomod.config.run import RunConfig
from restomod.runs import async_saver as module
from restomod.runs.async_saver import Saver, delete_old_checkpoints, steps_to_keep
from restomod.runs.checkpoint import load_checkpoint
from restomod.utils.errors import UserError
from restomod.utils.run_files import list_checkpoints
from tests.trainee import Trainee, assert_identical, make_trainee

CONFIG = RunConfig(steps=9, batch_tokens=8, sequence_length=8, keep_checkpoints=0)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Delays all writes until the event is set."""
    ready, write = threading.Event(), module.write_checkpoint

    def waiting(*arguments: Any) -> Path:
        assert ready.wait(30)
        return write(*arguments)

    monkeypatch.setattr(module, "write_checkpoint", waiting)
    yield ready
    ready.set()


def steps(run: Path) -> list[int]:
    return [int(folder.name[5:]) for folder in list_checkpoints(run)]


def test_a_save_writes_the_state_at_the_time_of_the_call(tmp_path: Path, slow_disk: threading.Event) -> None:
    trainee = make_trainee()
    trainee.train(0, 2)
    then = trainee.tensors()
    with Saver(tmp_path, CONFIG) as saver:
        saver.save(2, trainee.model, trainee.optimizer, data_offset=3)
        trainee.train(2, 5)  # training continues
        assert steps(tmp_path) == []
        slow_disk.set()
        saver.finish()
    restored = make_trainee(seed=2)
    assert load_checkpoint(tmp_path / "checkpoints/step_000002", restored.model, restored.optimizer) == 2
    assert_identical(restored.tensors(), then)


def test_a_save_waits_for_the_previous_one(tmp_path: Path) -> None:
    trainee = make_trainee()
    states = {}
    with Saver(tmp_path, CONFIG) as saver:
        for step in range(1, 5):
            trainee.train(step - 1, step)
            states[step] = trainee.tensors()
            saver.save(step, trainee.model, trainee.optimizer)
    assert steps(tmp_path) == [1, 2, 3, 4]
    for step, folder in zip(states, list_checkpoints(tmp_path), strict=True):
        restored = make_trainee(seed=2)
        load_checkpoint(folder, restored.model, restored.optimizer)
        assert_identical(restored.tensors(), states[step])


def test_the_memory_of_the_copies_is_reused(tmp_path: Path) -> None:
    trainee = make_trainee()
    addresses = []
    with Saver(tmp_path, CONFIG) as saver:
        for step in (1, 2):
            trainee.train(step - 1, step)
            saver.save(step, trainee.model, trainee.optimizer)
            assert saver._model is not None
            held = [*saver._model.parameters(), *saver._state.values()]
            addresses.append([tensor.data_ptr() for tensor in held])
            own = {p.data_ptr() for p in trainee.model.parameters()}
            assert own.isdisjoint(addresses[-1])
    assert addresses[0] == addresses[1]


def failing(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    write, left = module.write_checkpoint, [times]

    def fail(*arguments: Any) -> Path:
        left[0] -= 1
        if left[0] >= 0:
            raise UserError("cannot save: No space left on device")
        return write(*arguments)

    monkeypatch.setattr(module, "write_checkpoint", fail)


def first_step() -> Trainee:
    trainee = make_trainee()
    trainee.train(0, 1)
    return trainee


def test_a_failure_is_reported_once_and_stops_the_run_if_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, 1)
    trainee = first_step()
    with Saver(tmp_path, CONFIG) as saver:
        saver.save(1, trainee.model, trainee.optimizer)
        with pytest.raises(UserError, match="No space left"):
            saver.finish()
        assert "No space left" in str(saver.failure())
        assert saver.failure() is None


def test_the_next_save_raises_the_error_of_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, 1)
    trainee = first_step()
    with Saver(tmp_path, CONFIG) as saver:
        saver.save(1, trainee.model, trainee.optimizer)
        with pytest.raises(UserError, match="No space left"):
            saver.save(2, trainee.model, trainee.optimizer)


def test_a_run_continues_after_a_failed_save_if_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, 1)
    trainee = first_step()
    with Saver(tmp_path, dataclasses.replace(CONFIG, on_save_error="continue")) as saver:
        saver.save(1, trainee.model, trainee.optimizer)
        saver.save(2, trainee.model, trainee.optimizer)
        assert "No space left" in str(saver.failure())
        saver.finish()
    assert steps(tmp_path) == [2]


def test_leaving_waits_for_the_last_write(tmp_path: Path, slow_disk: threading.Event) -> None:
    trainee = first_step()
    threading.Timer(0.3, slow_disk.set).start()
    with contextlib.suppress(ZeroDivisionError), Saver(tmp_path, CONFIG) as saver:
        saver.save(1, trainee.model, trainee.optimizer)
        raise ZeroDivisionError
    assert steps(tmp_path) == [1]


# --- what is kept --------------------------------------------------------------------------------------------

TEN = list(range(100, 1100, 100))


@pytest.mark.parametrize(
    ("settings", "losses", "expected"),
    [
        ({"keep_checkpoints": 2}, {}, [900, 1000]),
        ({"keep_checkpoints": 1}, {}, [1000]),
        ({"keep_checkpoints": 0}, {}, TEN),
        ({"keep_checkpoints": 30}, {}, TEN),
        ({"keep_checkpoints": 2}, {300: 3.0, 500: 2.5, 900: 2.6}, [500, 900, 1000]),
        ({"keep_checkpoints": 2, "keep_best": False}, {300: 3.0, 500: 2.5}, [900, 1000]),
        ({"keep_checkpoints": 2}, {300: 2.5, 500: 2.5}, [500, 900, 1000]),  # the newer of two equal losses
        ({"keep_checkpoints": 1, "keep_every": 400}, {}, [400, 800, 1000]),
        ({"keep_checkpoints": 2, "keep_gb": 3.5}, {300: 1.0}, [300, 900, 1000]),
        ({"keep_checkpoints": 2, "keep_gb": 2.5}, {300: 1.0}, [300, 1000]),
        ({"keep_checkpoints": 1, "keep_every": 200, "keep_gb": 3.0}, {}, [600, 800, 1000]),
        ({"keep_checkpoints": 2, "keep_gb": 0.1}, {300: 1.0}, [1000]),
    ],
)
def test_kept_checkpoints(settings: dict[str, Any], losses: dict[int, float], expected: list[int]) -> None:
    config = dataclasses.replace(CONFIG, **settings)
    assert sorted(steps_to_keep(TEN, losses, dict.fromkeys(TEN, 10**9), config)) == expected


def test_without_checkpoints_none_is_kept() -> None:
    assert steps_to_keep([], {}, {}, CONFIG) == set()


def test_checkpoints_are_deleted_by_loss_and_size(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        folder = tmp_path / "checkpoints" / f"step_{step:06d}"
        (folder / "training_state").mkdir(parents=True)
        (folder / "training_state" / "x").write_bytes(bytes(600))
        (folder / "y").write_bytes(bytes(400))
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps(record) + "\n"
            for record in (
                {"kind": "val", "step": 1, "loss": 5.0},
                {"kind": "train", "step": 3, "loss": 1.0},
                {"kind": "val", "step": 2, "loss": 4.0},
                {"kind": "val", "step": 4, "loss": None},
            )
        )
    )
    delete_old_checkpoints(tmp_path, dataclasses.replace(CONFIG, keep_checkpoints=1))
    assert steps(tmp_path) == [2, 4]
    delete_old_checkpoints(tmp_path, dataclasses.replace(CONFIG, keep_checkpoints=1, keep_gb=1.9e-6))
    assert steps(tmp_path) == [4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000004"]


def test_saving_changes_neither_weights_nor_state(tmp_path: Path) -> None:
    trainee = first_step()
    before, random_state = trainee.tensors(), torch.get_rng_state()
    with Saver(tmp_path, CONFIG) as saver:
        saver.save(1, trainee.model, trainee.optimizer)
    assert_identical(trainee.tensors(), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.requires_grad for p in trainee.model.parameters())
    assert torch.is_grad_enabled()


# --- page-locked memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "limit", "asked"), [(True, False, [True]), (True, True, [True, False]), (False, False, [False])]
)
def test_copies_from_a_gpu_use_pinned_memory(
    cuda: bool, limit: bool, asked: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[bool] = []

    def empty_like(tensor: Any, device: str, pin_memory: bool = False) -> torch.Tensor:
        assert device == "cpu"
        pinned.append(pin_memory)
        if pin_memory and limit:
            raise RuntimeError("CUDA error: out of memory")
        return torch.empty(3)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    module.cpu_buffer(SimpleNamespace(is_cuda=cuda))  # type: ignore[arg-type]
    assert pinned == asked


def test_saving_from_a_cpu_does_not_initialise_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*arguments: object) -> None:
        raise AssertionError("CUDA is initialised")

    trainee = make_trainee()
    trainee.train(0, 1)
    for name in ("synchronize", "Event", "is_available", "init"):
        monkeypatch.setattr(torch.cuda, name, touched)
    with Saver(tmp_path, CONFIG) as saver:
        saver.save(1, trainee.model, trainee.optimizer)
    assert steps(tmp_path) == [1]


class Copies(TorchFunctionMode):
    """Records for every copy whether it is asynchronous."""

    def __init__(self) -> None:
        super().__init__()
        self.asynchronous: list[bool] = []

    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(f, "__name__", "") == "copy_":
            self.asynchronous.append(bool((kwargs or {}).get("non_blocking")))
        return f(*args, **(kwargs or {}))


def test_only_copies_from_cuda_are_asynchronous(tmp_path: Path) -> None:
    """MPS has no event to wait for, so an asynchronous copy could be written before it is complete."""
    trainee = make_trainee()
    trainee.train(0, 1)
    with Saver(tmp_path, CONFIG) as saver, Copies() as copies:
        saver.save(1, trainee.model, trainee.optimizer)
    assert len(copies.asynchronous) > 20
    assert not any(copies.asynchronous)
