"""Tests of the generated tables in the pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import readme, records
from benchmarks.records import Item, Series
from tests.benchmarks.made import items

PAGE = """\
# A page

<!-- bench:cpu/step -->
old
<!-- /bench -->

Between.

<!-- bench:cpu -->
<!-- /bench -->
<!-- bench:cpu/peers -->
<!-- /bench -->
<!-- bench:cpu/all -->
<!-- /bench -->
<!-- bench:gpu -->
<!-- /bench -->
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("no tables\n")
    (tmp_path / "docs" / "benchmarks.md").write_text(PAGE)
    records.write(tmp_path / "benchmarks" / "results" / "cpu.json", items())
    return tmp_path


def test_the_pages_of_the_repository_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.main(["--check"]) == 0, capsys.readouterr().out


def test_the_pages_of_the_repository_have_tables() -> None:
    text = "\n".join(page.read_text() for page in readme.pages(readme.ROOT))
    for name in ("cpu", "cpu/peers", "cpu/all", "gpu/all", "scale/steps"):
        assert f"\n<!-- bench:{name} -->\n" in text


def test_tables_are_written_and_then_current(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.main(["--check"], root) == 1
    assert "+| restomod | 210 (200 to 220)" in capsys.readouterr().out
    assert readme.main([], root) == 0
    page = (root / "docs" / "benchmarks.md").read_text()
    assert "| restomod | 210 (200 to 220)" in page
    assert "| training step, 124M, 4 × 256 tokens | 210 tokens/s | 105 tokens/s, other" in page
    assert "| Step: 4 × 256 tokens" in page
    assert "### Long runs" in page
    assert "*Not measured yet: `OUT=measure benchmarks/gpu/measure.sh`.*" in page
    assert "\nold\n" not in page
    assert page.startswith("# A page\n\n<!-- bench:cpu/step -->\n")
    assert "\n\nBetween.\n\n" in page
    assert readme.main(["--check"], root) == 0
    readme.main([], root)
    assert (root / "docs" / "benchmarks.md").read_text() == page, "a second run changes nothing"


@pytest.mark.parametrize("change", ["measurement", "page", "no measurement"])
def test_a_change_of_a_page_or_a_measurement_is_detected(root: Path, change: str) -> None:
    readme.main([], root)
    page, results = root / "docs" / "benchmarks.md", root / "benchmarks" / "results" / "cpu.json"
    if change == "measurement":
        results.write_text(results.read_text().replace("110.0", "160.0"))
    elif change == "page":
        page.write_text(page.read_text().replace("105 (100 to 110)", "95 (90 to 100)"))
    else:
        results.unlink()
    assert readme.main(["--check"], root) == 1


def test_an_item_without_measurement_is_marked(root: Path) -> None:
    records.write(root / "benchmarks" / "results" / "cpu.json", {"step": items()["step"]})
    assert readme.content("cpu/growth", root / "benchmarks" / "results", "x").startswith("*Not measured yet")


def test_a_change_of_gpu_measurements_is_detected(root: Path) -> None:
    page, results = root / "docs" / "benchmarks.md", root / "benchmarks" / "results"
    page.write_text("<!-- bench:gpu/shakespeare -->\n<!-- /bench -->\n<!-- bench:gpu/bench -->\n<!-- /bench -->\n")
    readme.main([], root)
    assert page.read_text().count("*Not measured yet: `OUT=measure benchmarks/gpu/measure.sh`.*") == 2
    curve = Series("A run", "step", "loss", [(0.0, 10.5), (100.0, 6.5)], [(0.0, 10.972), (100.0, 6.61), (200.0, 5.0)])
    records.write(results / "gpu.json", {"shakespeare": Item("A run", [], [curve])})
    assert readme.main(["--check"], root) == 1
    readme.main([], root)
    text = page.read_text()
    assert "| A run: loss by step | restomod | published |" in text
    assert "| 0 | 10.500 | 10.972 |\n| 100 | 6.500 | 6.610 |\n| 200 | – | 5.000 |" in text
    assert readme.main(["--check"], root) == 0
    page.write_text(text.replace("6.500", "6.400"))
    assert readme.main(["--check"], root) == 1


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<!-- bench:cpu -->\n", "line 1: <!-- bench:cpu --> has no <!-- /bench -->"),
        ("\n<!-- /bench -->\n", "line 2: <!-- /bench --> without a begin marker"),
        ("<!-- bench:cpu -->\n<!-- bench:gpu -->\n<!-- /bench -->\n", "line 1: <!-- bench:cpu --> has no"),
        ("<!-- bench:cpu/stepp -->\n<!-- /bench -->\n", "unknown item 'stepp'; did you mean 'step'?"),
        ("<!-- bench:scale/stepp -->\n<!-- /bench -->\n", "unknown part 'stepp'; did you mean 'steps'?"),
        ("<!-- bench:cpu/bench -->\n<!-- /bench -->\n", "unknown item 'bench'"),
        ("<!-- bench:tpu -->\n<!-- /bench -->\n", "unknown results 'tpu'"),
    ],
)
def test_an_invalid_marker_is_an_error_with_its_line(
    root: Path, capsys: pytest.CaptureFixture[str], text: str, error: str
) -> None:
    (root / "README.md").write_text(text)
    assert readme.main(["--check"], root) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks: error: README.md")
    assert error in line
