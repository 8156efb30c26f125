"""Tests of GPU names, of published speeds and of predictions from them."""

from __future__ import annotations

import dataclasses

import pytest

from restomod.cli import main
from restomod.config.presets import preset
from restomod.experiments.plan.hardware import (
    GPUS,
    SPEEDS,
    Speed,
    find_gpu,
    known_gpu,
    not_covered,
    speeds_on,
    tokens_per_second,
)
from restomod.model.flops import PEAK_FLOPS
from restomod.utils.errors import UserError

GPT2 = preset("gpt2-124m")


def speed_of(software: str) -> Speed:
    (found,) = [speed for speed in SPEEDS if speed.software == software]
    return found


@pytest.mark.parametrize("name", ["rtx3090", "RTX 3090", "RTX-3090"])
def test_a_gpu_is_found_in_any_spelling(name: str) -> None:
    gpu = find_gpu(name)
    assert (gpu.key, gpu.memory, gpu.peak) == ("rtx3090", 24 * 2**30, 71e12)


@pytest.mark.parametrize("name", ["gtx1060", "a1000", "", "rtx"])
def test_an_unknown_gpu_is_an_error(name: str) -> None:
    assert known_gpu(name) is None
    with pytest.raises(UserError, match="unknown GPU"):
        find_gpu(name)


@pytest.mark.parametrize(
    ("name", "near"),
    [("h1000", "did you mean 'h100'?"), ("RTX-4900", "did you mean 'rtx4090'?"), ("z", "known: a100,")],
)
def test_plan_rejects_an_unknown_gpu_in_one_line(name: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gpt2-124m", "--gpu", name]) == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert (shown.out, line.startswith("restomod: error: "), f"--gpu {name}" in line) == ("", True, True)
    assert near in line
    assert "--measure" in line


def test_every_speed_has_a_source_and_a_plausible_mfu() -> None:
    for speed in SPEEDS:
        assert speed.gpu in PEAK_FLOPS
        assert 0.1 < speed.mfu < 0.8, speed  # no published run is above 80 %
        assert speed.source
    for gpu in GPUS:
        assert gpu.peak is not None or not speeds_on(gpu, compiled=True), gpu


# runs that publish both tokens/s and MFU
@pytest.mark.parametrize(
    ("software", "published"),
    [("modded-nanogpt, first record", 0.40), ("modded-nanogpt, track 3", 0.42), ("llm.c", 0.60)],
)
def test_mfu_equals_the_published_mfu(software: str, published: float) -> None:
    assert speed_of(software).mfu == pytest.approx(published, abs=0.01)


def test_the_prediction_for_the_measured_gpu_equals_the_measurement() -> None:
    for speed in SPEEDS:
        assert tokens_per_second(speed, GPT2, speed.gpus) == pytest.approx(speed.tokens_per_second)
        assert tokens_per_second(speed, GPT2, 2 * speed.gpus) == pytest.approx(2 * speed.tokens_per_second)


def test_speed_is_inversely_proportional_to_flops() -> None:
    ratio = tokens_per_second(SPEEDS[0], GPT2, 8) / tokens_per_second(SPEEDS[0], preset("gpt2-355m"), 8)
    assert ratio == pytest.approx(2_423 / 855, rel=0.01)  # MFLOPs per token: 6 × (302M + 51.5M) + 12 × 24 × 1024²


def test_gradient_checkpointing_costs_one_forward_pass() -> None:
    again = dataclasses.replace(GPT2, gradient_checkpointing=True)
    assert tokens_per_second(SPEEDS[0], again, 8) == pytest.approx(0.75 * tokens_per_second(SPEEDS[0], GPT2, 8))


def test_the_first_measurement_has_the_kind_of_the_run() -> None:
    a100 = find_gpu("a100")
    assert speeds_on(a100, compiled=True)[0].software == "build-nanogpt in its lecture"
    assert speeds_on(a100, compiled=False)[0].software == "build-nanogpt as shipped"
    assert len(speeds_on(a100, compiled=False)) == 5
    forty = find_gpu("A100-40GB")
    assert speeds_on(forty, True) == speeds_on(a100, True)


@pytest.mark.parametrize(
    ("changed", "gpus", "why"),
    [
        ({}, 8, None),
        ({}, 16, "at most 8 GPUs"),
        ({"precision": "fp32"}, 1, "this run uses fp32"),
        ({"precision": "bf16"}, 1, None),
        ({"document_mask": True}, 1, "document masks"),
        ({"parallel": "fsdp"}, 1, None),
        ({"parallel": "fsdp"}, 2, "only for DDP"),
        ({"sequence_length": 64}, 1, "this run has 64"),
    ],
)
def test_runs_that_measurements_do_not_cover(changed: dict[str, object], gpus: int, why: str | None) -> None:
    a100 = find_gpu("a100")
    said = not_covered(dataclasses.replace(GPT2, **changed), a100, gpus)
    assert said is None if why is None else why in (said or "")


def test_a_narrow_model_is_not_covered() -> None:
    assert "this model has 128" in (not_covered(preset("quickstart"), GPUS[0], 1) or "")
