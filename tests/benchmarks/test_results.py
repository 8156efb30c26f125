"""From measurements to JSON and back, to tables and to a picture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import plot, ratios, readme, records, table
from benchmarks.ratios import Ratio
from benchmarks.records import Item
from benchmarks.table import NO_RIVALS
from restomod.utils.errors import UserError
from tests.benchmarks.made import ENVIRONMENT, SECONDS, SPEED, items


def test_json_and_back(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    assert records.read(path) == {}
    records.write(path, items())
    assert records.read(path) == items()
    raw = json.loads(path.read_text())
    assert raw["items"]["step"]["comparisons"][0]["entries"][1]["values"]["tokens/s"] == [100.0, 110.0, 105.0]


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 0, "items": {}}', '{"format": 1, "items": {"a": {}}}', "{"])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"cpu\.json"):
        records.read(path)


def test_tables_say_medians_ranges_ratios_and_who_is_absent() -> None:
    text = table.page(items())
    assert "| restomod | 210 (200 to 220) |  | 1.00 (1.00 to 1.00) |  |" in text
    assert (
        "| other | 105 (100 to 110) | 2.00 × [2.00, 2.00] | 4.00 (4.00 to 4.00) | 0.250 × [0.250, 0.250] | 83.3% |"
        in text
    )
    assert "- absent: gone: gone cannot be imported" in text
    assert "- a remark" in text
    assert "- left out: nanogpt: no folder" in text
    assert "| a run: memory, GB by seconds | 8 | 1.00 | 2.00 | 2.00 × |" in text
    assert "revision 0123456789ab and changes, 2026-01-02, `python -m benchmarks.run --only step`, 12 s" in text


def test_headlines_have_a_row_for_each_comparison() -> None:
    lines = table.headlines(items()).splitlines()
    assert lines[2].startswith("| Step: 4 × 256 tokens, tokens/s | 210 (200 to 220) |")
    assert "other 105 (2.00 × [2.00, 2.00])" in lines[2]
    assert "gone" not in lines[2]
    assert sum("A Processor" in line for line in lines) == 1


def test_headlines_are_of_rivals_and_say_how_many_times_better() -> None:
    (step,) = items()["step"].comparisons
    swapped = dataclasses.replace(step, metrics=[SECONDS, SPEED])
    (row,) = (
        line
        for line in table.headlines({"step": Item("Step", [swapped], environment=ENVIRONMENT)}).splitlines()
        if line.startswith("| Step")
    )
    assert "other 4.00 (4.00 × [4.00, 4.00])" in row, "a quarter of the seconds is four times better"
    renamed = dataclasses.replace(
        step, entries=[step.entries[0], dataclasses.replace(step.entries[1], name=NO_RIVALS[0])]
    )
    assert "Step" not in table.headlines({"step": Item("Step", [renamed], environment=ENVIRONMENT)})


def test_who_is_ahead_is_said_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    (step,) = items()["step"].comparisons
    assert ratios.ahead(step) == []
    mine, other, gone = step.entries
    other = dataclasses.replace(other, beside={"tokens/s": [50.0, 50.0, 50.0], "load": [3.96, 3.96, 3.96]})
    changed = dataclasses.replace(step, entries=[mine, other, gone])
    assert ratios.ahead(changed) == [("other", "tokens/s", ratios.NO_REASON)]
    monkeypatch.setitem(ratios.REASONS, ("other", "tokens/s"), "it cheats")
    assert "- **other is ahead** in tokens/s: it cheats" in table.section(Item("Step", [changed]))
    nearly = dataclasses.replace(other, beside={"tokens/s": [100.0, 90.0, 120.0], "load": [4.02, 4.02, 4.02]})
    assert ratios.ahead(dataclasses.replace(step, entries=[mine, nearly])) == [], "noise, and less than 2 %"


def test_every_loss_of_the_committed_measurements_has_a_reason() -> None:
    for file in (readme.ROOT / "benchmarks" / "results").glob("[cg]pu.json"):
        for item in records.read(file).values():
            for comparison in item.comparisons:
                for who, metric, why in ratios.ahead(comparison):
                    assert why != ratios.NO_REASON, f"{file.name}: {comparison.case}: {who} is ahead in {metric}"


def test_ours_absent_leaves_others_without_a_ratio() -> None:
    step = items()["step"]
    (comparison,) = step.comparisons
    ours, other, gone = comparison.entries
    ours = dataclasses.replace(ours, values={}, absent="no compiler")
    changed = dataclasses.replace(comparison, entries=[ours, dataclasses.replace(other, beside={}), gone])
    text = table.section(dataclasses.replace(step, comparisons=[changed]))
    assert "- absent: restomod: no compiler" in text
    assert "| other | 105 (100 to 110) | 4.00 (4.00 to 4.00) | 83.3% |" in text, "no column of empty ratios"
    assert plot.advantages({"step": dataclasses.replace(step, comparisons=[changed])}) == []


def test_a_smoke_test_says_so() -> None:
    smoke = dataclasses.replace(items()["step"], environment=ENVIRONMENT | {"smoke": True})
    assert "the numbers mean nothing" in table.section(smoke)


def test_numbers() -> None:
    numbers = (0, 1234.6, 99.94, 9.994, 0.5, 0.9996, 99.97, 9.996, 0.00123)
    shown = ["0", "1,235", "99.9", "9.99", "0.500", "1.00", "100", "10.0", "1.23e-03"]
    assert [table.number(x) for x in numbers] == shown


def test_less_may_be_better() -> None:
    ratio = Ratio(0.25, 0.2, 0.5)  # ours takes a quarter of the time
    assert ratios.advantage(ratio, SECONDS) == Ratio(4.0, 2.0, 5.0)
    assert ratios.advantage(ratio, SPEED) == ratio
    assert ratios.advantage(Ratio(0.5, None, None), SECONDS) == Ratio(2.0, None, None)


def test_advantages_of_all_metrics() -> None:
    found = plot.advantages(items())
    assert [ratio.median for _, ratio in found] == [2.0, 4.0]
    assert "load, beside other" in found[1][0]


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    plot.draw(items(), tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    plot.draw({"nothing": Item("Nothing")}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
