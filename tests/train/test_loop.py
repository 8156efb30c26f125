"""Times at which the training loop saves checkpoints."""

from __future__ import annotations

import dataclasses

import pytest

from restomod.config.presets import preset
from restomod.config.run import RunConfig
from restomod.train.loop import save_is_due


@pytest.mark.parametrize(
    ("step", "minutes", "due"),
    [(7, 9.9, False), (7, 10.1, True), (250, 4.9, False), (250, 5.1, True), (251, 5.1, False)],
)
def test_a_save_by_time_is_due_earlier_at_a_validation(step: int, minutes: float, due: bool) -> None:
    config = RunConfig(steps=1000, batch_tokens=64, sequence_length=64, eval_every=250)
    assert save_is_due(config, step, minutes) == due
    assert not save_is_due(dataclasses.replace(config, save_every_minutes=None), step, minutes)


@pytest.mark.parametrize("name", ["tinyshakespeare", "gpt2-124m", "modern-124m"])
def test_presets_for_gpus_save_by_time_only(name: str) -> None:
    """Saving by steps would be too frequent on a fast GPU."""
    config = preset(name)
    assert config.save_every is None
    assert not any(save_is_due(config, step, minutes=0.05) for step in range(1000))
