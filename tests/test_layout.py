"""docs/layout.md matches the docstrings of the modules."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.layout import PAGE, layout, summary
from tests.test_imports import SOURCE, modules


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == layout(), "write it anew: python -m tests.layout"


def test_every_module_has_a_docstring() -> None:
    assert [module for module, path in modules(SOURCE).items() if not summary(path)] == []
    page = layout()
    assert all(f"`{path.name}`" in page for path in modules(SOURCE).values() if path.name != "__init__.py")


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ('"""One line."""', "One line"),
        ('"""Wrapped\nline. Another\nsentence.\n\nMore."""', "Wrapped line"),
        ('"""A | B"""', "A \\| B"),
        ("import os", ""),
    ],
)
def test_the_first_sentence_is_used(tmp_path: Path, docstring: str, expected: str) -> None:
    (tmp_path / "module.py").write_text(docstring)
    assert summary(tmp_path / "module.py") == expected
