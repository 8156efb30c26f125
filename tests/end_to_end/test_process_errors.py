"""Errors of one or all ranks are reported in one line, and no rank hangs."""

from __future__ import annotations

import dataclasses
import errno
import functools
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from restomod.config.run import RunConfig
from restomod.data.batches import Batches
from restomod.data.dataset import Dataset, TokenStream
from restomod.engine import step as step_module
from restomod.runs import checkpoint
from restomod.train import setup
from restomod.train.loop import train
from restomod.utils.console import CheckResult
from restomod.utils.errors import UserError
from tests.processes import Ended, error_lines, launch

from .conftest import QUIET, flags
from .test_processes import NEVER, command, new_run, succeeded


def the_one_error(ended: list[Ended]) -> str:
    """Return the only line on standard error of all ranks, which must all have failed."""
    assert all(e.code == 2 for e in ended), [(e.code, e.error) for e in ended]
    (line,) = error_lines(ended)
    assert line.startswith("restomod: error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstrt"], "did you mean 'quickstart'?"),
        (["quickstart", "--optim.lrr", "3"], "--optim.lr"),
        (["quickstart", "--batch-tokens", "1000"], "768 and 1024"),
        (["quickstart", "--parallel", "tensor"], "--parallel"),
        (["--resume", "nowhere"], "nowhere is not a run"),
        (["quickstart", "--data.source", "text", "--data.path", "nowhere"], "nowhere"),
        (["quickstart", "--data.source", "tokens", "--data.path", "nowhere"], "nowhere: no such folder"),
        (["quickstart", "--init", "./nowhere"], "nowhere"),
        (["quickstart", "--out", "/"], "already exists"),
    ],
)
def test_an_error_on_all_ranks_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    if not {"--out", "--resume"} & set(arguments):
        arguments = [*arguments, "--out", str(tmp_path / "run")]
    assert message in the_one_error(launch(2, command, *arguments, timeout=30))


def test_batches_proposed_by_a_message_can_be_shared(shared: RunConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(shared, batch_tokens=16 * 7, steps=1)
    line = the_one_error(new_run(2, config, tmp_path / "run"))
    proposed = [int(n) for n in re.findall(r"\d+", line.split("--batch-tokens")[1].split(",")[0])]
    assert proposed == [16 * 6, 16 * 8]
    for i, tokens in enumerate(proposed):
        succeeded(new_run(2, config, tmp_path / f"tokens{i}", "--batch-tokens", str(tokens)))
    processes = [int(n) for n in re.findall(r"\d+", line.split("or start")[1])]
    assert processes == [1, 7]


def test_micro_batches_proposed_by_a_message_fit(shared: RunConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(shared, batch_tokens=16 * 12, micro_batch=4, steps=1)
    line = the_one_error(new_run(2, config, tmp_path / "run"))
    assert "micro_batch 4 does not divide the 6 sequences" in line
    proposed = [int(n) for n in re.findall(r"\d+", line.split("--micro-batch")[1])]
    assert proposed == [3, 6]
    for micro_batch in proposed:
        succeeded(new_run(2, config, tmp_path / f"run{micro_batch}", "--micro-batch", str(micro_batch)))


def only_in(rank: int, patch: Callable[[pytest.MonkeyPatch], None], *arguments: str) -> None:
    """Run the command line with a fault on one rank."""
    if os.environ["RANK"] == str(rank):
        patch(pytest.MonkeyPatch())
    command(*arguments)


BROKEN: dict[str, tuple[Any, str, Exception]] = {
    "device": (setup, "choose_device", UserError("this device is broken")),
    "data": (setup, "prepare_text", UserError("this data is broken")),
    "memory": (setup, "build_model", RuntimeError("CUDA out of memory: this memory is broken")),
    "disk": (TokenStream, "read", OSError(errno.EIO, "this disk is broken")),
    "full disk": (checkpoint, "save_model", OSError(errno.ENOSPC, "this disk is broken and full")),
    "state": (setup, "load_optimizer", UserError("this state is broken")),
}


def broken(what: str, patch: pytest.MonkeyPatch) -> None:
    owner, name, error = BROKEN[what]

    def refuse(*_: object) -> NoReturn:
        raise error

    patch.setattr(owner, name, refuse)


def insane(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(setup, "quick_checks", lambda _: [CheckResult("all", "fail", "this model is broken")])


def with_other_data(patch: pytest.MonkeyPatch) -> None:
    prepare = setup.prepare_text

    def prepare_another(*arguments: Any) -> Dataset:
        dataset = prepare(*arguments)
        return dataclasses.replace(dataset, manifest=dataset.manifest | {"fingerprint": "another"})

    patch.setattr(setup, "prepare_text", prepare_another)


def without_disk_later(patch: pytest.MonkeyPatch) -> None:
    micro_batches = Batches.micro_batches

    def refuse(self: Batches, step: int, *arguments: Any) -> Any:
        if step == 5:
            raise UserError("these tokens are broken")
        return micro_batches(self, step, *arguments)

    patch.setattr(Batches, "micro_batches", refuse)


def with_infinite_loss(patch: pytest.MonkeyPatch) -> None:
    """The loss is averaged, so an infinite loss on one rank is infinite on all."""
    patch.setattr(step_module, "linear_cross_entropy", lambda hidden, *_: hidden.sum() * math.inf, raising=True)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "patch",
    [*(functools.partial(broken, what) for what in ("device", "data", "memory", "disk")), insane, without_disk_later],
    ids=["device", "data", "memory", "disk", "insane", "disk later"],
)
def test_an_error_on_one_rank_stops_all(
    shared: RunConfig, tmp_path: Path, rank: int, patch: Callable[[pytest.MonkeyPatch], None]
) -> None:
    run = tmp_path / "run"
    arguments = ("quickstart", "--out", str(run), *flags(dataclasses.replace(shared, eval_every=NEVER)))
    assert "broken" in the_one_error(launch(2, only_in, rank, patch, *arguments, timeout=60))
    assert run.exists() == (patch is without_disk_later)


def test_machines_with_different_data_are_refused(shared: RunConfig, tmp_path: Path) -> None:
    arguments = ("quickstart", "--out", str(tmp_path / "run"), *flags(shared))
    line = the_one_error(launch(2, only_in, 1, with_other_data, *arguments, timeout=60))
    assert "found different data" in line
    assert not (tmp_path / "run").exists()


def test_a_full_disk_stops_all_in_one_line(shared: RunConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ("quickstart", "--out", str(run), *flags(shared))
    line = the_one_error(launch(2, only_in, 0, functools.partial(broken, "full disk"), *arguments, timeout=60))
    assert "cannot save" in line


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(shared: RunConfig, tmp_path: Path) -> None:
    arguments = (
        "quickstart",
        "--out",
        str(tmp_path / "run"),
        *flags(shared),
        "--no-sanity-checks",
        "--on-spike",
        "stop",
    )
    line = the_one_error(launch(2, only_in, 1, with_infinite_loss, *arguments, timeout=60))
    assert "step 0: the loss is" in line


@pytest.mark.parametrize("rank", [0, 1])
def test_an_optimizer_that_one_rank_cannot_load_stops_all(shared: RunConfig, tmp_path: Path, rank: int) -> None:
    run = tmp_path / "run"
    train(dataclasses.replace(shared, steps=1), run, display=QUIET)
    ended = launch(
        2, only_in, rank, functools.partial(broken, "state"), "--resume", str(run), "--steps", "2", timeout=60
    )
    assert "this state is broken" in the_one_error(ended)
