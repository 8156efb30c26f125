"""Words that `docs/glossary.md` replaces do not appear in the package, its pages and its benchmarks."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GLOSSARY = ROOT / "docs/glossary.md"


def replaced_words() -> list[str]:
    """The last column of the glossary's tables."""
    rows = [line.strip("|").split("|") for line in GLOSSARY.read_text().splitlines() if line.startswith("|")]
    cells = [row[-1].strip() for row in rows]
    return [word for cell in cells if cell not in ("", "not") and set(cell) != {"-"} for word in cell.split(", ")]


def pages() -> list[Path]:
    """Everything that users read, and the source."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for folder, ending in (("src", "*.py"), ("src", "*.js"), ("src", "*.toml"), ("benchmarks", "*.py")):
        found += (ROOT / folder).rglob(ending)
    return sorted(path for path in found if path != GLOSSARY)


@pytest.mark.parametrize("word", replaced_words())
def test_a_replaced_word_does_not_appear(word):
    phrase = r"\s+".join(map(re.escape, word.split()))  # it may be broken over two lines
    pattern = re.compile(rf"(?<![\w-]){phrase}(?![\w-])", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}"
        for path in pages()
        for text in [path.read_text(encoding="utf-8")]
        for match in pattern.finditer(text)
    ]
    assert not found, f"docs/glossary.md has another word for {word!r}: {' '.join(found)}"
