"""Comparison of runs: groups of seeds, equal tokens, targets, tables and files."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt

from restomod.analysis.compare.groups import compare_runs, summarize, welch
from restomod.analysis.compare.plot import comparison_figure
from restomod.analysis.compare.tables import comparison_markdown, comparison_tables, newest_tasks, why_not_published
from restomod.cli import main
from restomod.config.run import DataConfig
from restomod.evals.tasks.registry import references
from restomod.runs.reader import Run, open_run
from restomod.utils.errors import UserError
from tests.runs.made_runs import SMALL, simple, train, val, write_run

T = 512  # tokens per step


def run(folder: Path, name: str, losses: dict[int, float], seed: int = 0, lr: float = 2e-3, **changes: Any) -> Run:
    """Write a run with the given validation losses by step and open it."""
    config = dataclasses.replace(SMALL, seed=seed, optim=dataclasses.replace(SMALL.optim, lr=lr), **changes)
    steps = max(losses, default=100)
    return open_run(write_run(folder / name, config, simple(losses, steps)))


@pytest.fixture
def six(tmp_path: Path) -> list[Run]:
    """Return three seeds of each of two learning rates, in mixed order."""
    a = [run(tmp_path, f"a{s}", {0: 10.8, 50: 6.0 + 0.1 * s, 100: 5.0 + 0.1 * s}, s) for s in range(3)]
    b = [run(tmp_path, f"b{s}", {0: 10.8, 50: 5.0 + 0.1 * s, 100: 4.0 + 0.1 * s}, s, lr=3e-3) for s in range(3)]
    return [a[0], b[0], a[1], b[1], b[2], a[2]]


# --- numbers -------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_their_seed_only_are_a_group(six: list[Run]) -> None:
    found = compare_runs(six)
    assert [[r.name for r in g.runs] for g in found.groups] == [["a0", "a1", "a2"], ["b0", "b1", "b2"]]
    assert found.differences() == {"optim.lr": [2e-3, 3e-3]}
    for group, mean in zip(found.groups, (5.1, 4.1), strict=True):
        assert group.final is not None
        assert (group.final.n, group.final.mean, group.final.sd) == (3, pytest.approx(mean), pytest.approx(0.1))


def test_groups_of_sweep_trials_are_named_by_their_common_settings(tmp_path: Path) -> None:
    def trial(folder: str, number: int, lr: float, seed: int) -> Run:
        (tmp_path / folder).mkdir(exist_ok=True)
        return run(tmp_path / folder, f"{number:03}-optim.lr-{lr}-seed-{seed}", {0: 10.8, 100: 5.0}, seed, lr=lr)

    trials = [trial("s", 2 * i + seed, lr, seed) for i, lr in enumerate((1e-3, 2e-3)) for seed in (0, 1)]
    assert [g.name for g in compare_runs(trials).groups] == ["optim.lr-0.001, 2 seeds", "optim.lr-0.002, 2 seeds"]
    assert [g.name for g in compare_runs(trials[1:]).groups] == ["001-optim.lr-0.001-seed-1", "optim.lr-0.002, 2 seeds"]
    longer = [trial("t", seed, 1e-3, seed) for seed in (2, 3)]  # trials of another sweep with the same name
    for other in longer:
        object.__setattr__(other, "config", dataclasses.replace(other.config, batch_tokens=2 * T))
    names = [g.name for g in compare_runs([*trials, *longer]).groups]
    assert names == [
        "000-optim.lr-0.001-seed-0 (+1 run)",
        "optim.lr-0.002, 2 seeds",
        "002-optim.lr-0.001-seed-2 (+1 run)",
    ]


def test_groups_are_tested_against_the_baseline_at_equal_tokens(six: list[Run]) -> None:
    none, b = compare_runs(six).against
    assert none is None
    assert b is not None
    assert b.test is not None
    # 3 and 3 values of equal variance 0.01: t = -1 / sqrt(0.02 / 3), 4 degrees of freedom
    t = 1 / np.sqrt(0.02 / 3)
    tail = 1 - t / np.sqrt(4 + t * t) * (1 + 2 / (4 + t * t))  # P(|T| > t) of Student's distribution with 4
    assert (b.tokens, b.difference) == (100 * T, pytest.approx(-1))
    assert (b.test.t, b.test.df, b.test.p) == pytest.approx((-t, 4.0, tail), rel=1e-4)


def test_the_baseline_may_be_any_run(six: list[Run]) -> None:
    found = compare_runs(six, baseline=six[4])
    assert found.baseline == 1
    assert found.target == pytest.approx(4.1)
    assert found.against[0] is not None
    assert found.against[0].difference == pytest.approx(1)


def test_tokens_to_the_baselines_last_loss(six: list[Run]) -> None:
    found = compare_runs(six)
    assert found.target == pytest.approx(5.1)
    # b's mean is 10.8 at 0 and 5.1 after 50 steps; a's reaches 5.1 at its end
    assert found.to_target == pytest.approx([100 * T, 50 * T])
    assert compare_runs(six, target=6.0).to_target == pytest.approx([50 * T + 0.1 * 50 * T, 50 * T * 4.8 / 5.7])
    assert compare_runs(six, target=1.0).to_target == [None, None]


@pytest.mark.parametrize(
    ("first", "second", "changes", "steps", "baseline", "difference"),
    [
        # the first is on the line from 6 at step 50 to 5 at step 100
        ({0: 10.0, 50: 6.0, 100: 5.0}, {0: 10.0, 70: 5.5}, {"lr": 1.0}, 70, 5.6, -0.1),
        ({0: 10.0, 100: 5.0}, {0: 10.0, 50: 4.0}, {"batch_tokens": 1024}, 100, 5.0, -1.0),
    ],
    ids=["lengths", "batch sizes"],
)
def test_runs_are_compared_at_equal_tokens(
    first: dict[int, float],
    second: dict[int, float],
    changes: dict[str, Any],
    steps: int,
    baseline: float,
    difference: float,
    tmp_path: Path,
) -> None:
    against = compare_runs([run(tmp_path, "first", first), run(tmp_path, "second", second, **changes)]).against[1]
    assert against is not None
    assert against.tokens == steps * T
    assert (against.baseline.mean, against.difference) == pytest.approx((baseline, difference))


# --- runs of every kind --------------------------------------------------------------------------------------


def test_without_a_validation_training_losses_are_compared_with_a_note(tmp_path: Path, six: list[Run]) -> None:
    blind = open_run(write_run(tmp_path / "blind", SMALL, [train(s, 5.0) for s in range(100)]))
    found = compare_runs([*six, blind])
    assert found.measure == "training loss"
    assert any(note.startswith("blind: no validation") for note in found.notes)
    assert found.groups[0].final is not None
    assert found.groups[0].final.mean == 5.0
    assert "not comparable: some runs have no validation loss" in comparison_markdown(found, "tokens")


def test_one_run_alone(tmp_path: Path) -> None:
    found = compare_runs([run(tmp_path, "a", {0: 10.8, 100: 5.0})])
    assert (found.target, found.to_target, found.against) == (5.0, [100 * T], [None])
    assert [t.title for t in comparison_tables(found, "tokens") if t.rows] == ["results", "validation loss by tokens"]


def test_a_run_in_progress_is_noted(tmp_path: Path) -> None:
    found = compare_runs([run(tmp_path, "a", {0: 10.8, 50: 6.0}, steps=1000)])
    assert found.notes == ["a is at step 50 of 1,000: its learning rate is not yet decayed"]


@pytest.mark.parametrize("records", [[], [val(0, 10.8)], [train(0, None)], [train(0, 10.8)]])
def test_a_run_with_at_most_one_record(records: list[dict[str, Any]], tmp_path: Path) -> None:
    begun = open_run(write_run(tmp_path / "begun", dataclasses.replace(SMALL, seed=9), records))
    other = run(tmp_path, "a", {0: 10.8, 100: 5.0}, lr=1.0)
    for runs in ([begun], [begun, other], [other, begun]):
        found = compare_runs(runs)
        json.dumps(found.to_dict(), allow_nan=False)
        assert comparison_tables(found, "time")
        comparison_figure(found, ["tokens"])


def test_notes_name_the_limits_of_a_comparison(tmp_path: Path) -> None:
    a = run(tmp_path, "a", {0: 10.8, 100: 5.0})
    again = run(tmp_path, "again", {0: 10.8, 100: 5.0})
    windows = run(tmp_path, "windows", {0: 10.8, 100: 5.0}, sequence_length=128)
    said = "\n".join(compare_runs([a, again, windows]).notes)
    assert "a (+1 run): runs with the same seed are not independent samples" in said
    assert "sequence_length differs" in said
    assert "needs at least two seeds" in said
    other = {"fingerprint": "ffff", "name": "other"}
    there = open_run(write_run(tmp_path / "there", SMALL, simple({0: 10.8, 100: 5.0}), data=other))
    assert any("the groups have different data" in note for note in compare_runs([a, there]).notes)


def test_a_run_twice_is_refused(six: list[Run]) -> None:
    with pytest.raises(UserError, match="a0 is given twice"):
        compare_runs([six[0], six[1], open_run(six[0].folder)])


# --- published results ---------------------------------------------------------------------------------------


def test_published_losses_are_shown_with_fineweb_edu_only(tmp_path: Path, six: list[Run]) -> None:
    assert "all runs train on other data" in str(why_not_published(six))
    assert "other data: a0" in str(why_not_published(six[:1]))
    config = dataclasses.replace(
        SMALL,
        data=DataConfig(source="tokens", path="fineweb-edu"),
        sequence_length=1024,
        batch_tokens=1024,
        model=dataclasses.replace(SMALL.model, n_positions=1024),
    )
    edu = open_run(write_run(tmp_path / "edu", config, simple({0: 10.8, 100: 3.2}), {"name": "fineweb-edu"}))
    assert why_not_published([edu]) is None
    (table,) = [t for t in comparison_tables(compare_runs([edu]), "tokens") if t.title == "published validation losses"]
    assert {row[1] for row in table.rows} == {f"{r.value:.4f}" for r in references("validation")}
    shorter = dataclasses.replace(edu, config=dataclasses.replace(config, sequence_length=512))
    assert "windows of 1024 tokens" in str(why_not_published([shorter]))


def test_published_results_follow_the_newest_results_of_tasks(tmp_path: Path) -> None:
    asked = [{"kind": "task", "step": s, "task": "hellaswag", "examples": 200, "acc_token": s / 100} for s in (20, 10)]
    folder = write_run(tmp_path / "a", SMALL, [*simple({0: 10.8, 100: 5.0}), *asked])
    assert newest_tasks(open_run(folder)) == {"hellaswag": (20, 200, {"acc_token": 0.2})}
    (table,) = [t for t in comparison_tables(compare_runs([open_run(folder)]), "tokens") if t.title == "hellaswag"]
    assert table.rows == [["a, step 20", "", "", "0.2000", "", "200 examples"]]  # published results need all examples
    assert not table.notes
    (folder / "evals").mkdir()
    metrics = {"acc_token": {"value": 0.31, "stderr": 0.005}}
    answer = {"task": "hellaswag", "step": 100, "examples": 10_042, "metrics": metrics}
    (folder / "evals" / "x.json").write_text(json.dumps(answer))
    (table,) = [t for t in comparison_tables(compare_runs([open_run(folder)]), "tokens") if t.title == "hellaswag"]
    assert table.rows[0] == ["a, step 100", "", "", "0.3100", "", "10,042 examples"]
    assert ["GPT-2 124M", "0.2859", "", "0.2955", "", "build-nanogpt's script, all 10,042"] in table.rows


# --- what is written -----------------------------------------------------------------------------------------


def test_the_command_writes_json_markdown_and_a_picture(
    six: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("json", "md", "png")}
    flags = ["--json", str(files["json"]), "--markdown", str(files["md"]), "--plot", str(files["png"])]
    assert main(["compare", *(str(r.folder) for r in six), "--price", "3600", *flags]) == 0
    said = capsys.readouterr().out
    for expected in ("optim.lr  0.002", "5.1000 ± 0.1000", "-1.0000", "25,600 (0.50×)", "not comparable", "$20.00"):
        assert expected in said, expected
    written = json.loads(files["json"].read_text())
    assert written["groups"][1]["against_baseline"]["test"]["df"] == pytest.approx(4)
    curve = written["groups"][0]["runs"][0]["curve"]
    assert (curve["tokens"], curve["loss"]) == ([0, 50 * T, 100 * T], [10.8, 6.0, 5.0])
    assert curve["dollars"] == pytest.approx([0, 10, 20])  # 100 steps of 0.2 s at one dollar per second
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    headings = [
        token.content for token in MarkdownIt().enable("table").parse(files["md"].read_text()) if token.type == "inline"
    ]
    assert "5.1000 ± 0.1000" in headings
    assert not list(tmp_path.glob(".*tmp"))


def test_names_are_escaped(tmp_path: Path) -> None:
    name = "_a|b *c* <i>$x$ &amp; `d`"
    found = compare_runs([run(tmp_path, name, {0: 10.8, 100: 5.0})])
    parsed = MarkdownIt().enable("table").parse(comparison_markdown(found, "tokens"))
    texts = [
        "".join(child.content for child in token.children or [])
        for token in parsed
        if token.type == "inline" and {child.type for child in token.children or []} <= {"text", "text_special"}
    ]
    assert name in texts
    (legend,) = [a.get_legend() for a in comparison_figure(found, ["tokens"]).axes]
    assert legend is not None
    assert [text.get_text().strip() for text in legend.get_texts()] == [name, "target 5.0000"]
    assert not legend.get_texts()[0].get_parse_math()


def test_a_picture_has_a_panel_for_every_axis_and_a_line_for_every_group(six: list[Run]) -> None:
    figure = comparison_figure(compare_runs(six, price=1.0), ["steps", "tokens", "dollars"])
    assert [axes.get_xlabel() for axes in figure.axes] == ["steps", "tokens", "dollars"]
    line = next(line for line in figure.axes[1].lines if line.get_label() == " b0 (+2 runs)")
    assert np.allclose(np.asarray(line.get_xydata()), [(0, 10.8), (50 * T, 5.1), (100 * T, 4.1)])


def test_a_baseline_that_is_not_among_the_runs_joins_them(six: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(six[1].folder), "--baseline", str(six[0].folder)]) == 0
    assert "a0 (baseline)" in capsys.readouterr().out


# --- statistics ---------------------------------------------------------------------------------------------


def test_a_summary_is_numpys() -> None:
    values = [4.1, 4.3, 3.9, 4.4]
    found = summarize(values)
    assert (found.n, found.mean) == (4, pytest.approx(np.mean(values)))
    assert found.sd == pytest.approx(np.std(values, ddof=1))
    assert found.shown() == "4.1750 ± 0.2217"
    assert summarize([4.25]).sd is None
    assert summarize([4.25]).shown() == "4.2500"


@pytest.mark.parametrize("d", [0.5, -3.0, 40.0])
def test_two_pairs_of_equal_variance_have_a_closed_form(d: float) -> None:
    # variances 2 and 2 of 2 values each: t = d / sqrt(2), 2 degrees of freedom, P(|T| > t) = 1 - t / sqrt(t² + 2)
    found = welch([0.0, 2.0], [d, d + 2.0])
    assert found is not None
    t = d / math.sqrt(2)
    assert (found.difference, found.t, found.df) == pytest.approx((d, t, 2.0))
    assert found.p == pytest.approx(1 - abs(t) / math.sqrt(t * t + 2), rel=1e-6)
    quantile = 0.95 * math.sqrt(2 / (1 - 0.95**2))  # 4.303
    assert (found.low, found.high) == pytest.approx((d - quantile * math.sqrt(2), d + quantile * math.sqrt(2)))


def test_unequal_variances_and_numbers_follow_welchs_formulas() -> None:
    a, b = [3.31, 3.29, 3.30, 3.32, 3.28], [3.20, 3.29, 3.15]
    va, vb = np.var(a, ddof=1) / 5, np.var(b, ddof=1) / 3
    t, df = (np.mean(b) - np.mean(a)) / math.sqrt(va + vb), (va + vb) ** 2 / (va**2 / 4 + vb**2 / 2)
    found = welch(a, b)
    assert found is not None
    assert (found.t, found.df) == pytest.approx((t, df), rel=1e-5)
    assert found.low < found.difference < found.high
    assert (found.low < 0 < found.high) == (found.p > 0.05)


def test_equal_groups_are_significant_as_often_as_the_level() -> None:
    generator, n = np.random.default_rng(0), 2000
    found = [welch(generator.normal(size=4).tolist(), generator.normal(size=6).tolist()) for _ in range(n)]
    false = sum(each is not None and each.p < 0.05 for each in found)
    assert abs(false / n - 0.05) < 3 * math.sqrt(0.05 * 0.95 / n)


@pytest.mark.parametrize(("a", "b"), [([1.0], [2.0, 3.0]), ([1.0, 2.0], [3.0]), ([1.0, 1.0], [2.0, 2.0])])
def test_too_few_or_equal_values_have_no_test(a: list[float], b: list[float]) -> None:
    assert welch(a, b) is None
