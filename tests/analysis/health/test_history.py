"""Curves of runs of any length: bounded memory, and the same symptoms as in short runs."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from restomod.analysis.health.history import RECENT, ROWS, Curves, History, curves_from_records
from restomod.analysis.health.noise import period
from restomod.analysis.health.symptoms import Finding, failures, find_symptoms
from restomod.runs.metrics import append_jsonl, keep_records, read_jsonl
from restomod.train.evaluate import Health
from tests.runs.made_runs import QUICKSTART, quickstart_records, train, val

LONG = 40_000
LONG_RUN = dataclasses.replace(QUICKSTART, steps=LONG)
TRUTH = 3 + 7 * (1 + np.arange(LONG + 1) / 300) ** -0.5


def long_run(seed: int = 0, sigma: float = 0.1, every: int = 2000) -> dict[str, np.ndarray]:
    """Return loss and time of each step and the loss of each validation of a healthy run of `LONG` steps."""
    rng = np.random.default_rng(seed)
    loss = TRUTH[:-1] + sigma * rng.standard_normal(LONG)
    return {"loss": loss, "ms": 200 * np.exp(0.05 * rng.standard_normal(LONG)), "val": TRUTH[::every].copy()}


def records(run: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return the records in the order in which training writes them."""
    every = LONG // (len(run["val"]) - 1)
    found = []
    for s, (loss, ms) in enumerate(zip(run["loss"].tolist(), run["ms"].tolist(), strict=True)):
        if s % every == 0:
            found.append(val(s, float(run["val"][s // every])))
        found.append(train(s, loss, ms, lr=2e-3 * min(1, (s + 1) / 45)))
    return [*found, val(LONG, float(run["val"][-1]))]


def findings(run: dict[str, np.ndarray], lengths: dict[str, float] | None = None) -> dict[str, Finding]:
    return {finding.symptom: finding for finding in find_symptoms(LONG_RUN, records(run), lengths)}


def assert_equal(a: Curves, b: Curves) -> None:
    for field in dataclasses.fields(Curves):
        first, second = getattr(a, field.name), getattr(b, field.name)
        if isinstance(first, np.ndarray):
            assert np.array_equal(first, second, equal_nan=True), field.name
        else:
            assert first == second, field.name


# --- what is gathered ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pauses", [(), (100, 9000, 9001, 25_000), tuple(range(0, LONG, 2000))])
def test_intermediate_curves_do_not_change_the_result(pauses: tuple[int, ...]) -> None:
    run = long_run()
    run["loss"][[300, 20_000, LONG - 5]] += 5
    together, one_by_one = records(run), History()
    for i, record in enumerate(together):
        if i in pauses:
            one_by_one.curves()
        one_by_one.add(record)
    assert_equal(one_by_one.curves(), curves_from_records(together))


def test_rows_are_means_of_their_steps_and_the_newest_steps_are_unmerged() -> None:
    run = long_run()
    seen = curves_from_records(records(run))
    width = seen.row_steps
    assert width == 8
    assert ROWS // 2 <= len(seen.loss) == LONG // width <= ROWS
    assert seen.loss == pytest.approx(run["loss"].reshape(-1, width).mean(axis=1))
    assert seen.step.tolist() == list(range(0, LONG, width))
    assert np.isin(seen.ms, run["ms"]).all()
    assert np.median(seen.ms) == pytest.approx(np.median(run["ms"]), rel=0.01)
    assert seen.recent_loss.tolist() == run["loss"][-RECENT:].tolist()
    assert seen.updates == LONG


def test_periodic_times_are_sampled_in_proportion() -> None:
    run = long_run()
    run["ms"][:] = np.where(np.arange(LONG) % 8 == 0, 900, 100)  # eight steps per row
    assert np.mean(curves_from_records(records(run)).ms == 900) == pytest.approx(1 / 8, abs=0.03)


def test_the_training_loss_at_early_validations_stays_known() -> None:
    seen = curves_from_records(records(long_run()))
    assert len(seen.val_step) == 21
    inner = (seen.val_step > 0) & (seen.val_step < LONG)
    off = (seen.val_level - TRUTH[seen.val_step.astype(int)])[inner] / seen.val_level_error[inner]
    assert np.abs(off).max() < 5


def test_memory_grows_neither_with_steps_nor_with_validations() -> None:
    history, sizes = History(), []
    tracemalloc.start()
    for step in range(40_000):
        if step % 4 == 0:
            history.add(val(step, 5.0))
        history.add(train(step, 5.0 + step % 7))
        if step in (20_000, 39_999):
            history.curves()
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[1] < 1.1 * sizes[0] < 5e6


def test_a_period_is_looked_for_in_linear_memory() -> None:
    values = 3 + np.random.default_rng(0).standard_normal(40_000)
    tracemalloc.start()
    assert period(values) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400 * len(values)


# --- symptoms in long runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.02, 0.6])
def test_a_long_healthy_run_is_healthy(sigma: float) -> None:
    assert {finding.status for finding in findings(long_run(1, sigma)).values()} == {"ok"}


@pytest.mark.parametrize("seed", range(5))
def test_learning_rate_decay_is_not_a_wave(seed: int) -> None:
    run = long_run(seed, sigma=0.02)
    run["loss"] -= 0.3 * np.maximum(0, np.arange(LONG) / LONG - 0.8) / 0.2
    assert findings(run)["periodic loss"].status == "ok"


def test_an_early_spike_is_remembered() -> None:
    run = long_run()
    run["loss"][300:304] += 4
    finding = findings(run)["spike"]
    assert (finding.status, "at step 300" in finding.reason) == ("warning", True)


@pytest.mark.parametrize("length", [120, 2500, 9000])  # found in the newest steps, and only in rows
def test_repeated_batches_are_found(length: int) -> None:
    run = long_run()
    run["loss"] += np.resize(0.2 * np.random.default_rng(7).standard_normal(length), LONG)
    finding = findings(run, {"an epoch": float(length)})["periodic loss"]
    assert finding.status == "fail"
    assert "the length of an epoch" in finding.reason


@pytest.mark.parametrize(
    ("symptom", "name", "change"),
    [
        ("throughput drop", "ms", lambda s: 200.0 * (s > 0.85 * LONG)),
        ("divergence", "loss", lambda s: 0.4 * np.maximum(0, s / LONG - 0.8) / 0.2),
        ("validation below training", "val", lambda s: -0.6 * (s > 0)),
        ("overfitting", "val", lambda s: 0.5 * np.maximum(0, s / LONG - 0.3) / 0.7),
    ],
)
def test_planted_symptoms_are_the_only_ones(symptom: str, name: str, change: Any) -> None:
    run = long_run(2)
    steps = np.linspace(0, LONG, len(run[name])) if name == "val" else np.arange(LONG)
    run[name] = run[name] + change(steps)
    assert {f.symptom for f in findings(run).values() if f.status == "fail"} == {symptom}


# --- while a run trains --------------------------------------------------------------------------------------


def test_a_run_that_continues_and_rolls_back_is_judged_like_its_file(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    training: Any = SimpleNamespace(
        run=SimpleNamespace(folder=tmp_path), config=QUICKSTART, processes=SimpleNamespace(main=True)
    )
    shown: list[str] = []
    display: Any = SimpleNamespace(warn=shown.append)

    def symptoms() -> list[str]:
        shown.clear()
        health.print_warnings(display)
        return [text.split(": ")[0] for text in shown]

    def write(some: list[dict[str, Any]]) -> None:
        for record in some:
            append_jsonl(log, record)

    usual = quickstart_records()
    risen = [r | {"loss": r["loss"] + 3 * (r["step"] >= 500)} for r in usual]
    write([r for r in risen if r["step"] < 400])
    health = Health(training)
    assert symptoms() == []
    write([r for r in risen if 400 <= r["step"] < 700])
    assert symptoms() == ["spike", "divergence"]
    keep_records(log, lambda record: record["step"] < 450)
    write([{"kind": "rollback", "step": 450}, *(r for r in usual if r["step"] >= 450)])
    assert (
        symptoms() == ["skipped updates"] == [f.symptom for f in failures(find_symptoms(QUICKSTART, read_jsonl(log)))]
    )
    training.processes.main = False
    assert symptoms() == []
    assert Health(training).verdict().startswith("healthy")
