"""Symptoms are found in runs with planted faults and not in healthy runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from restomod.analysis.health.spikes import SpikeFinder
from restomod.analysis.health.symptoms import Finding, failures, find_symptoms
from restomod.config.run import RunConfig
from tests.analysis.health.healthy_runs import LENGTHS, alarms
from tests.properties import examples
from tests.runs.made_runs import QUICKSTART, healthy, quickstart_records, train, val

Records = list[dict[str, Any]]


def found(
    records: Records, config: RunConfig = QUICKSTART, lengths: dict[str, float] | None = None
) -> dict[str, Finding]:
    return {finding.symptom: finding for finding in find_symptoms(config, records, lengths)}


def changed(records: Records, kind: str, name: str, new: Callable[[int, float], float | None]) -> Records:
    """Return the records with ``name`` of one kind replaced by a function of the step and the old value."""
    return [r | {name: new(r["step"], r[name])} if r["kind"] == kind else r for r in records]


# --- healthy runs --------------------------------------------------------------------------------------------


def test_the_quickstart_is_healthy_and_all_of_it_can_be_judged() -> None:
    statuses = {finding.symptom: finding.status for finding in find_symptoms(QUICKSTART, quickstart_records())}
    assert set(statuses.values()) == {"ok"}
    assert len(statuses) == 11


def test_the_quickstart_is_healthy_at_every_moment() -> None:
    records = quickstart_records()
    for upto in range(0, 900, 45):
        so_far = [r for r in records if r["step"] < upto or (r["step"] == upto and r["kind"] == "val")]
        assert [f for f in find_symptoms(QUICKSTART, so_far) if f.status in ("fail", "warning")] == [], upto


@given(st.integers(0, 10**6), st.sampled_from([60, 100, 130, 150, 200, 300, 400, 900, 1000, 3000]))
@example(611, 150)  # earlier false alarms: one validation, autocorrelated noise, few steps
@example(1493, 150)
@example(1223, 200)
@example(800, 400)
@example(1394, 400)
@example(80, 1000)
@examples(150)
def test_healthy_noise_is_no_symptom(seed: int, steps: int) -> None:
    config = dataclasses.replace(QUICKSTART, steps=steps)
    assert [f for f in find_symptoms(config, healthy(seed, steps)) if f.status in ("fail", "warning")] == []


@pytest.mark.parametrize("steps", LENGTHS)
def test_healthy_runs_of_many_kinds_have_no_symptoms(steps: int) -> None:
    assert alarms(60, steps) == {}


@pytest.mark.slow
@pytest.mark.parametrize("steps", LENGTHS)
def test_thousands_of_healthy_runs_have_no_symptoms(steps: int) -> None:
    assert alarms(3000, steps) == {}


# --- planted faults ------------------------------------------------------------------------------------------


def usual() -> Records:
    return quickstart_records()


def shifted(kind: str, name: str, by: Callable[[int], float], records: Callable[[], Records] = usual) -> Records:
    """Return the records with a number added to each value of ``name``."""
    return changed(records(), kind, name, lambda s, x: x + by(s))


def scaled(name: str, by: Callable[[int], float]) -> Records:
    return changed(usual(), "train", name, lambda s, x: x * by(s))


def spoiled(at: int, losses: int, by: float, records: Callable[[], Records] = usual) -> Records:
    """Return records with ``losses`` losses raised by ``by`` from step ``at``."""
    return shifted("train", "loss", lambda s: by * (at <= s < at + losses), records)


def without(name: str, *steps: int) -> Records:
    """Return records with values that are not finite at some steps."""
    return changed(usual(), "train", name, lambda s, x: None if s in steps else x)


def skipping(steps: range, **values: Any) -> Records:
    return [r | (values if r["kind"] == "train" and r["step"] in steps else {}) for r in usual()]


def uniform(sigma: float, steps: int = 150) -> Records:
    rng = np.random.default_rng(0)
    return [train(s, math.log(50257) + sigma * float(rng.standard_normal())) for s in range(steps)]


def lagging() -> Records:
    """Return records with a validation loss that falls more slowly than the training loss."""
    records = changed(healthy(2, 3000, sigma=0.02), "train", "loss", lambda s, x: x - s * 3e-4)
    return changed(records, "val", "loss", lambda s, x: x - s * 1e-4)


def four_spikes() -> Records:
    return shifted("train", "loss", lambda s: 9.0 * (s in (200, 350, 500, 650)))


def below(tokens: int = 32_768) -> Records:
    records = shifted("val", "loss", lambda s: -1.0 * (s > 0))
    return [r | {"tokens": tokens} if r["kind"] == "val" else r for r in records]


OVERFLOW = "fp16 gradients overflowed, so the loss scale is halved"
SKIPPED = {"skipped": "the loss is 19"}
GUESS = "a uniform prediction gives 10.82"
PLANTED: list[tuple[str, Callable[[], Records], str, str]] = [
    # symptom, records, status, words of the reason
    ("loss not finite", lambda: without("loss", 300, 301), "fail", "2 steps, first at 300"),
    ("loss not finite", lambda: without("grad_norm", 17), "fail", "at step 17;"),
    ("loss not finite", lambda: skipping(range(5), grad_norm=None, skipped=OVERFLOW), "ok", ""),
    ("skipped updates", lambda: skipping(range(5), grad_norm=None, skipped=OVERFLOW), "ok", ""),
    *(
        (
            "skipped updates",
            lambda n=n: skipping(range(500, 500 + n), **SKIPPED),
            status,
            f"{n} of 900 steps, last at step {499 + n} (the loss is 19)",
        )  # type: ignore[misc]
        for n, status in ((1, "warning"), (9, "warning"), (10, "fail"))
    ),
    ("skipped updates", lambda: [*usual(), {"kind": "rollback", "step": 300}], "fail", "1 rollback to a checkpoint"),
    ("stuck near ln(V)", lambda: uniform(0.02), "fail", GUESS),
    ("stuck near ln(V)", lambda: uniform(0.6), "fail", GUESS),
    ("stuck near ln(V)", lambda: uniform(0.6, 99), "unknown", ""),  # too early
    # the quickstart's noise is 0.6
    ("spike", lambda: spoiled(500, 1, 8.0), "warning", "has recovered"),
    ("spike", lambda: spoiled(500, 4, 5.0), "warning", "at step 500, "),
    ("spike", lambda: spoiled(500, 16, 3.0), "warning", "at step 500, "),
    ("spike", lambda: spoiled(700, 900, 3.0), "fail", ""),
    ("divergence", lambda: spoiled(700, 900, 3.0), "fail", ""),
    ("spike", four_spikes, "fail", "4 spikes"),
    ("spike", lambda: spoiled(500, 1, 1.0, lambda: healthy(0, 900, sigma=0.02)), "warning", ""),
    ("spike", lambda: spoiled(500, 1, 0.1, lambda: healthy(0, 900, sigma=0.02)), "ok", ""),
    ("gradient norm growing", lambda: scaled("grad_norm", lambda s: math.exp(max(0, s - 400) / 200)), "fail", ""),
    ("gradient norm growing", lambda: scaled("grad_norm", lambda s: 9 if 400 < s < 500 else 1), "ok", ""),
    ("overfitting", lambda: shifted("val", "loss", lambda s: max(0, s - 300) * 1e-3), "fail", "was 5.2391 at step 300"),
    ("overfitting", lagging, "fail", "minus training loss has grown"),
    ("overfitting", lambda: shifted("val", "loss", lambda s: 1.5 * (s > 0)), "ok", ""),  # constant gap: another text
    ("validation below training", below, "fail", ""),
    ("validation below training", lambda: below(256), "ok", ""),  # a few tokens may be easy
    ("overfitting", lambda: [r for r in usual() if r["kind"] != "val"], "unknown", "the run has no validation"),
    ("validation below training", lambda: [r for r in usual() if r["kind"] != "val"], "unknown", "no validation"),
    ("throughput drop", lambda: scaled("ms", lambda s: 2 if s >= 600 else 1), "fail", ""),
    ("throughput drop", lambda: scaled("ms", lambda s: 9 if s % 5 == 0 else 1), "ok", ""),  # single slow steps
    ("throughput drop", lambda: scaled("ms", lambda s: 0.5 if s >= 600 else 1), "ok", ""),
    ("warm-up", lambda: changed(usual(), "train", "lr", lambda s, x: 2e-3), "fail", ""),  # the recorded rate counts
]


@pytest.mark.parametrize(("symptom", "records", "status", "words"), PLANTED)
def test_what_is_planted_is_found(symptom: str, records: Callable[[], Records], status: str, words: str) -> None:
    finding = found(records())[symptom]
    assert (finding.status, words in finding.reason) == (status, True), finding


@pytest.mark.parametrize("records", [usual, lambda: healthy(1, 900)])
def test_a_loss_that_rises_slowly_has_diverged(records: Callable[[], Records]) -> None:
    finding = found(shifted("train", "loss", lambda s: max(0.0, s - 500) * 0.006, records))["divergence"]
    assert finding.status == "fail"
    assert int(finding.reason.split("step ")[1].split(" ")[0]) == pytest.approx(500, abs=200)


@pytest.mark.parametrize(("gap", "steps", "sigma"), [(0.6, 400, 0.02), (0.6, 3000, 0.1), (1.2, 900, 0.6)])
def test_a_gap_is_found_nearly_always(gap: float, steps: int, sigma: float) -> None:
    """Check the detection rate; for 0.6 nats it was 98 % before correlated noise was considered."""
    config = dataclasses.replace(QUICKSTART, steps=steps)
    lower, grown = 0, 0
    for seed in range(40):
        records = healthy(seed, steps, sigma)
        below = changed(records, "val", "loss", lambda s, x: x - gap * (s > 0))
        lower += found(below, config)["validation below training"].status == "fail"
        above = changed(records, "val", "loss", lambda s, x: x + gap * min(1, max(0, s / steps - 0.25) * 2))
        grown += found(above, config)["overfitting"].status == "fail"
    assert lower >= 38
    assert grown >= 38


def test_single_losses_of_noise_with_heavy_tails_are_no_spikes() -> None:
    steps = np.arange(900.0)
    normal, heavy = (0.3 * noise for noise in (np.random.default_rng(0).standard_normal(900), laplace(900)))
    for noise, expected in ((normal, [700]), (heavy, [])):
        loss = 5 + noise
        loss[700] = 5 + 0.3 * 12.5
        finder = SpikeFinder()
        finder.scan(steps, loss, to_the_end=True)
        assert [spike.step for spike in finder.found] == expected


def laplace(steps: int) -> np.ndarray:
    return np.random.default_rng(0).laplace(0, math.sqrt(0.5), steps)


def test_warm_ups_that_are_missing_or_too_long() -> None:
    none = dataclasses.replace(QUICKSTART, optim=dataclasses.replace(QUICKSTART.optim, warmup_steps=0))
    assert found(quickstart_records(), none)["warm-up"].status == "fail"
    muon = dataclasses.replace(none, optim=dataclasses.replace(none.optim, optimizer="muon"))
    assert found(quickstart_records(), muon)["warm-up"].status == "ok"
    short = dataclasses.replace(QUICKSTART, steps=45)
    finding = found(quickstart_records()[:40], short)["warm-up"]
    assert finding.status == "fail"
    assert "the warm-up of 45 steps covers all 45 steps" in finding.reason
    assert "ends at its highest value, 0.002:" in finding.reason  # step 45 of 45 has the full rate
    shorter = found(quickstart_records()[:9], dataclasses.replace(QUICKSTART, steps=9))["warm-up"]
    assert "ends at its highest value, 0.0004:" in shorter.reason
    one = dataclasses.replace(short, optim=dataclasses.replace(short.optim, warmup_steps=1))
    assert found(quickstart_records()[:40], one)["warm-up"].status == "unknown", "what a preset of 45 steps has"
    assert found(quickstart_records()[:40])["warm-up"].status == "ok", "it is still warming up"


def test_the_period_is_compared_with_epoch_and_shard() -> None:
    order = np.random.default_rng(0).standard_normal(120)
    records = changed(quickstart_records(), "train", "loss", lambda s, x: x + 0.7 * float(order[s % 120]))
    finding = found(records, lengths={"an epoch": 500.0, "a shard": 120.4})["periodic loss"]
    assert finding.status == "fail"
    assert "120 steps, the length of a shard" in finding.reason
    assert "the length" not in found(records)["periodic loss"].reason


def test_planted_faults_are_the_only_symptoms() -> None:
    records = scaled("ms", lambda s: 2 if s >= 600 else 1)
    assert [f.symptom for f in failures(find_symptoms(QUICKSTART, records))] == ["throughput drop"]


# --- any records -------------------------------------------------------------------------------

VALUES = st.none() | st.floats() | st.integers(-5, 10**400) | st.text(max_size=3)
RECORD = st.fixed_dictionaries(
    {"kind": st.sampled_from(["train", "val", "rollback", "task"]), "step": st.integers(-2, 400) | VALUES},
    optional=dict.fromkeys(("loss", "lr", "grad_norm", "ms", "tokens", "skipped"), VALUES),
)


@given(st.lists(RECORD, max_size=60), st.floats(-1e3, 1e300), st.integers(0, 400))
@examples(200)
def test_no_record_raises_an_exception(strange: Records, level: float, steps: int) -> None:
    """Check random records, because an exception here would stop training."""
    usual: Records = [train(s, level, ms=0.0, grad_norm=0.0) for s in range(steps)]
    for finding in find_symptoms(QUICKSTART, [*usual, *strange, val(200, 5.0), val(300, 5.0)]):
        assert finding.status in ("ok", "warning", "fail", "unknown")
