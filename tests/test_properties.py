"""Property tests try the same examples in every run, so that results are reproducible."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.properties import USUAL, examples

TESTS = Path(__file__).parent


def tried(number: int) -> list[int]:
    """Return the examples of a property test with a number of examples."""
    found = []

    @examples(number)
    @given(st.integers(0, 10**9))
    def a_property(n: int) -> None:
        found.append(n)

    a_property()
    return found


def test_examples_are_the_same_every_time() -> None:
    assert len(tried(7)) == 7
    assert tried(7) == tried(7)
    assert settings.default is not None
    assert (settings.default.deadline, settings.default.max_examples) == (None, USUAL)


def test_fuzzing_tries_other_and_more_examples() -> None:
    usual = tried(7)
    try:
        settings.load_profile("fuzz")
        assert len(tried(7)) >= 10 * len(usual)
        assert tried(7)[:7] != tried(7)[:7]
    finally:
        settings.load_profile("restomod")


def test_all_tests_set_their_examples_by_the_decorator() -> None:
    own = [path.name for path in TESTS.rglob("*.py") if "settings" in imported_from_hypothesis(path.read_text())]
    assert sorted(own) == ["conftest.py", "properties.py", "test_properties.py"]


def imported_from_hypothesis(source: str) -> set[str]:
    lines = [line for line in source.splitlines() if line.startswith("from hypothesis import ")]
    return {name.strip() for line in lines for name in line.removeprefix("from hypothesis import ").split(",")}
