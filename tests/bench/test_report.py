"""Tests of the arithmetic of a benchmark report against manual calculations, without device or clock."""

from __future__ import annotations

import dataclasses
import json

import pytest

from restomod.bench.measure import PHASES, Timings
from restomod.bench.report import Report, Spread
from restomod.config.run import RunConfig
from restomod.config.serialize import from_dict

WHOLE = [0.5, 0.25, 1.0]  # seconds
BY_PHASE = [dict(zip(PHASES, seconds, strict=True)) for seconds in ((0.0, 0.2, 0.3, 0.1), (0.1, 0.3, 0.2, 0.2))]


def report(processes: int = 1, peak_flops: float | None = None, peak_bytes: int | None = 3 * 2**20) -> Report:
    """Return a report of GPT-2 124M with 4,096 tokens per step."""
    config = RunConfig(steps=9, batch_tokens=4096, sequence_length=1024)
    timings = Timings(WHOLE, BY_PHASE, peak_bytes)
    return Report("mine", config, "synthetic", 2, 5, timings, {"processes": processes}, "cpu", peak_flops)


def test_speed_is_tokens_per_step_divided_by_seconds() -> None:
    assert report().step_ms == Spread(500, 250, 1000)
    assert report().tokens_per_second == Spread(8192, 4096, 16384)


def test_median_of_an_even_number_of_steps() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 9.0]) == Spread(3.0, 1.0, 9.0)


def test_mfu_follows_the_formula_of_palm() -> None:
    # PaLM, appendix B: 6 × (124,439,808 parameters - 1,024 × 768 positions) + 12 × 12 × 768 × 1,024 for attention
    flops = 6 * (124_439_808 - 786_432) + 113_246_208
    assert report().flops_per_token == flops == 855_166_464
    assert report(peak_flops=100e12).mfu == pytest.approx(8192 * 855_166_464 / 100e12)  # 7.0 %
    assert dict(report(peak_flops=100e12).rows())["MFU"] == "7.0%"
    assert dict(report().rows())["compute"].startswith("7.01 TFLOP/s at 855.2 MFLOPs per token")


def test_mfu_is_unknown_without_a_peak() -> None:
    assert report().mfu is None
    assert dict(report().rows())["MFU"].startswith("unknown")


def test_phases_have_separate_medians_and_shares_of_their_sum() -> None:
    assert report().phases_ms["forward"] == Spread(pytest.approx(250), 200, pytest.approx(300))
    assert report().phased_step_ms == Spread(pytest.approx(700), pytest.approx(600), pytest.approx(800))
    shares = [dict(report().rows())[f"  {phase}"].rpartition(", ")[2] for phase in PHASES]
    assert shares == ["7%", "36%", "36%", "21%"]


@pytest.mark.parametrize(
    ("processes", "peak_bytes", "said"),
    [
        (1, 3 * 2**20, "3 MiB, resident memory of the process"),
        (2, 3 * 2**20, "3 MiB, resident memory of the process, maximum over 2 processes"),
        (1, None, "unknown"),
    ],
)
def test_peak_memory_row(processes: int, peak_bytes: int | None, said: str) -> None:
    assert dict(report(processes, peak_bytes=peak_bytes).rows())["peak memory"] == said


def test_json_has_all_results_and_the_configuration() -> None:
    one = report(peak_flops=100e12)
    read = json.loads(json.dumps(one.to_dict()))
    assert read["tokens_per_second"] == {"median": 8192, "min": 4096, "max": 16384}
    assert read["step_ms"] == {"median": 500, "min": 250, "max": 1000, "all": [500, 250, 1000]}
    assert set(read["phases_ms"]) == set(PHASES)
    assert (read["warmup_steps"], read["timed_steps"], read["micro_batch"]) == (5, 3, 2)
    assert (read["mfu"], read["peak_flops"], read["flops_per_token"]) == (one.mfu, 100e12, 855_166_464)
    assert read["peak_memory_bytes"] == 3 * 2**20
    assert from_dict(read["config"], RunConfig, "here") == one.config
    assert dataclasses.replace(one, peak_flops=None).to_dict()["mfu"] is None
