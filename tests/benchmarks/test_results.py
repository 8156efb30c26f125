"""Tests of the JSON file, the tables and the plot of measurements."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import plot, ratios, readme, records, table
from benchmarks.ratios import Ratio
from benchmarks.records import Item
from benchmarks.table import NOT_PEERS
from restomod.utils.errors import UserError
from tests.benchmarks.made import ENVIRONMENT, SECONDS, SPEED, items


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    assert records.read(path) == {}
    records.write(path, items())
    assert records.read(path) == items()
    raw = json.loads(path.read_text())
    assert raw["items"]["step"]["comparisons"][0]["entries"][1]["values"]["tokens/s"] == [100.0, 110.0, 105.0]


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 0, "items": {}}', '{"format": 1, "items": {"a": {}}}', "{"])
def test_a_damaged_file_is_rejected(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"cpu\.json"):
        records.read(path)


def test_tables_have_medians_ranges_ratios_and_absent_contenders() -> None:
    text = table.page(items())
    assert "| restomod | 210 (200 to 220) |  | 1.00 (1.00 to 1.00) |  |" in text
    assert (
        "| other | 105 (100 to 110) | 2.00 × [2.00, 2.00] | 4.00 (4.00 to 4.00) | 0.250 × [0.250, 0.250] | 83.3% |"
        in text
    )
    assert "- absent: gone: gone cannot be imported" in text
    assert "- a remark" in text
    assert "- skipped: nanogpt: no folder" in text
    assert "| a run: memory, GB by seconds | 8 | 1.00 | 2.00 | 2.00 × |" in text
    assert "revision 0123456789ab and changes, 2026-01-02, `python -m benchmarks.run --only step`, 12 s" in text


def test_the_table_of_peers_has_a_row_per_comparison() -> None:
    lines = table.peer_table(items()).splitlines()
    assert lines[2].startswith("| Step: 4 × 256 tokens, tokens/s | 210 (200 to 220) |")
    assert "other 105 (2.00 × [2.00, 2.00])" in lines[2]
    assert "gone" not in lines[2]
    assert sum("A Processor" in line for line in lines) == 1


def test_the_table_of_peers_has_advantages_over_peers_only() -> None:
    (step,) = items()["step"].comparisons
    swapped = dataclasses.replace(step, metrics=[SECONDS, SPEED])
    (row,) = (
        line
        for line in table.peer_table({"step": Item("Step", [swapped], environment=ENVIRONMENT)}).splitlines()
        if line.startswith("| Step")
    )
    assert "other 4.00 (4.00 × [4.00, 4.00])" in row, "a quarter of the seconds is an advantage of four"
    renamed = dataclasses.replace(
        step, entries=[step.entries[0], dataclasses.replace(step.entries[1], name=NOT_PEERS[0])]
    )
    assert "Step" not in table.peer_table({"step": Item("Step", [renamed], environment=ENVIRONMENT)})


def test_the_summary_has_the_best_peer_and_the_peers_that_are_ahead() -> None:
    (step,) = items()["step"].comparisons
    mine, other, _ = step.entries
    better = dataclasses.replace(
        other, name="better", values={"tokens/s": [180.0, 190.0, 200.0], "load": [0.5, 0.5, 0.5]}
    )
    changed = dataclasses.replace(step, entries=[mine, other, better])
    lines = table.summary({"step": Item("Step", [changed], environment=ENVIRONMENT)}).splitlines()
    assert lines[0].count("|") == 5, "four columns"
    row, ahead = lines[2], next(line for line in lines if " is ahead " in line)
    assert row.startswith("| training step, 124M, 4 × 256 tokens | 210 tokens/s | 190 tokens/s, better | 1.11 × [")
    assert ahead == f"- better is ahead in load (4 × 256 tokens): {ratios.NO_REASON}"
    assert lines[-1] == "*A Processor, 2 threads, 2026-01-02*"


def test_the_summary_has_differences_that_are_not_significant() -> None:
    (step,) = items()["step"].comparisons
    mine, other, _ = step.entries
    unclear = dataclasses.replace(other, values={"tokens/s": [240.0, 200.0, 240.0], "load": [1.01, 1.01, 1.01]})
    changed = dataclasses.replace(step, entries=[mine, unclear])
    lines = table.summary({"step": Item("Step", [changed], environment=ENVIRONMENT)}).splitlines()
    (line,) = [line for line in lines if line.startswith("- ")]
    assert line.startswith("- other may be ahead in tokens/s (4 × 256 tokens): 0.875 × [")


def test_the_summary_of_the_committed_measurements_is_small() -> None:
    found = records.read(readme.ROOT / "benchmarks" / "results" / "cpu.json")
    rows = [line for line in table.summary(found).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(table.SUMMARY) == 10


def test_a_contender_that_is_ahead_is_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    (step,) = items()["step"].comparisons
    assert ratios.ahead(step) == []
    mine, other, gone = step.entries
    other = dataclasses.replace(other, paired={"tokens/s": [50.0, 50.0, 50.0], "load": [3.96, 3.96, 3.96]})
    changed = dataclasses.replace(step, entries=[mine, other, gone])
    assert ratios.ahead(changed) == [("other", "tokens/s", ratios.NO_REASON)]
    monkeypatch.setitem(ratios.REASONS, ("other", "tokens/s"), "it cheats")
    assert "- **other is ahead** in tokens/s: it cheats" in table.section(Item("Step", [changed]))
    nearly = dataclasses.replace(other, paired={"tokens/s": [100.0, 90.0, 120.0], "load": [4.02, 4.02, 4.02]})
    assert ratios.ahead(dataclasses.replace(step, entries=[mine, nearly])) == [], "noise, or below 2 %"


def test_committed_measurements_with_a_peer_ahead_have_a_reason() -> None:
    for file in (readme.ROOT / "benchmarks" / "results").glob("[cg]pu.json"):
        for item in records.read(file).values():
            for comparison in item.comparisons:
                for who, metric, why in ratios.ahead(comparison):
                    assert why != ratios.NO_REASON, f"{file.name}: {comparison.case}: {who} is ahead in {metric}"


def test_without_restomod_the_others_have_no_ratio() -> None:
    step = items()["step"]
    (comparison,) = step.comparisons
    ours, other, gone = comparison.entries
    ours = dataclasses.replace(ours, values={}, absent="no compiler")
    changed = dataclasses.replace(comparison, entries=[ours, dataclasses.replace(other, paired={}), gone])
    text = table.section(dataclasses.replace(step, comparisons=[changed]))
    assert "- absent: restomod: no compiler" in text
    assert "| other | 105 (100 to 110) | 4.00 (4.00 to 4.00) | 83.3% |" in text, "no column for ratios"
    assert plot.advantages({"step": dataclasses.replace(step, comparisons=[changed])}) == []


def test_a_smoke_test_is_marked() -> None:
    smoke = dataclasses.replace(items()["step"], environment=ENVIRONMENT | {"smoke": True})
    assert "meaningless numbers" in table.section(smoke)


def test_format_of_numbers() -> None:
    numbers = (0, 1234.6, 99.94, 9.994, 0.5, 0.9996, 99.97, 9.996, 0.00123)
    shown = ["0", "1,235", "99.9", "9.99", "0.500", "1.00", "100", "10.0", "1.23e-03"]
    assert [table.number(x) for x in numbers] == shown


def test_advantage_if_lower_values_are_better() -> None:
    ratio = Ratio(0.25, 0.2, 0.5)  # restomod needs a quarter of the time
    assert ratios.advantage(ratio, SECONDS) == Ratio(4.0, 2.0, 5.0)
    assert ratios.advantage(ratio, SPEED) == ratio
    assert ratios.advantage(Ratio(0.5, None, None), SECONDS) == Ratio(2.0, None, None)


def test_advantages_of_all_metrics() -> None:
    found = plot.advantages(items())
    assert [ratio.median for _, ratio in found] == [2.0, 4.0]
    assert "load, compared with other" in found[1][0]


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    plot.draw(items(), tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    plot.draw({"nothing": Item("Nothing")}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
