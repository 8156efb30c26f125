"""Comparison of two models; independent parsers check that no text is interpreted as markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from restomod.checks.device_parity import random_model
from restomod.config.run import ModelConfig, OptimConfig, SamplingConfig
from restomod.engine.optimizer import build_optimizer
from restomod.generate.compare import (
    SampleComparison,
    compare_samples,
    samples_html,
    samples_markdown,
    samples_table,
    samples_writer,
)
from restomod.generate.text import sample_texts
from restomod.model.hf_io import save_model
from restomod.utils.errors import UserError
from tests.trainee import save_checkpoint

SMALL = ModelConfig(n_layer=1, n_head=1, n_embd=16, n_positions=16)
HOSTILE = (
    "a | b `code` ``` <script>alert(1)</script> &amp; &#124; \\| \\",
    "# head\n\n- *item* **b** _u_ __v__ ~~s~~\n> q\n    indented  twice\n\ttab\n|---|\n",
    "</td></table></pre><img src=x onerror=alert(1)> [l](javascript:a) ![i](x) <!-- x",
    "\x1b[2J\r\x00 \x9b31m https://example.org $x$ {{ }} {title} %s ‮rtl 🦜",
    "",
)


def comparison(*texts: str) -> SampleComparison:
    """Comparison that uses each text as a model name, a prompt and both continuations."""
    return SampleComparison((texts[0], texts[-1]), "5 tokens", tuple((text, text[::-1], text) for text in texts))


def shown(text: str) -> str:
    """Visible form of a text, with symbols for control characters."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]",
        lambda m: "�" if m[0] > "\x7f" else "␡" if m[0] == "\x7f" else chr(0x2400 + ord(m[0])),
        text,
    )


class Parsed(HTMLParser):
    """Tags of a page with their attributes, and the text of cells and captions."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.cells: list[str] = []
        self.inside = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag in ("td", "caption", "th"):
            self.inside = True
            self.cells.append("")
        if tag == "br" and self.inside:
            self.cells[-1] += "\n"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "caption", "th"):
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data


def check_html(texts: tuple[str, ...]) -> None:
    parsed = Parsed(samples_html(comparison(*texts)))
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "p", "table", "caption", "tr", "th", "td"}
    assert parsed.tags <= allowed
    assert parsed.attributes <= {"lang", "charset", "http-equiv", "content", "name", "class", "scope", "dir"}
    names = [shown(texts[0]), shown(texts[-1])]
    expected = [[shown(t) or "(a new document)", *names, shown(t[::-1]), shown(t)] for t in texts]
    assert parsed.cells == [cell for cells in expected for cell in cells]


def check_markdown(texts: tuple[str, ...]) -> None:
    markdown = samples_markdown(comparison(*texts))
    rendered = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)
    parsed = Parsed(rendered)
    assert parsed.tags <= {"h1", "p", "table", "thead", "tbody", "tr", "th", "td", "br"}
    assert parsed.attributes == set()
    cells = [cell.replace("\xa0", " ") for cell in parsed.cells]
    seen = [re.sub("\xa0", " ", shown(text).replace("\t", "    ")) for text in texts]
    backwards = [re.sub("\xa0", " ", shown(text[::-1]).replace("\t", "    ")) for text in texts]
    rows = [[t, b, t] for t, b in zip(seen, backwards, strict=True)]
    assert cells == ["prompt", seen[0], seen[-1], *(cell for row in rows for cell in row)]


def test_hostile_text_is_shown_unchanged() -> None:
    check_html(HOSTILE)
    check_markdown(HOSTILE)


UGLY = st.text(alphabet=st.sampled_from("ab1 \n\t|`*_<>&#[]()!\\~-+=:.\"'{}$@/;x\x00\x1b\r🦜"), max_size=40)


@given(st.tuples(UGLY, UGLY))
def test_any_text_is_shown_unchanged(texts: tuple[str, str]) -> None:
    check_html(texts)
    check_markdown(texts)


def test_a_page_has_no_scripts_and_loads_no_files() -> None:
    page = samples_html(comparison("a", "b"))
    assert not re.search(r"https?:|src=|href=|url\(|<script|@import", page)
    assert "default-src 'none'" in page


def test_the_terminal_shows_texts_in_columns_without_markup() -> None:
    table = samples_table(
        SampleComparison(("left", "right"), "5 tokens", (("[bold]p\x1b[0m", "[red]one", "two\nlines"),)), 40
    )
    lines = [line.split() for line in table.splitlines()]
    assert ["1.", "[bold]p␛[0m"] in lines
    assert ["left", "right"] in lines
    assert ["[red]one", "two"] in lines
    assert "\x1b" not in table
    assert max(map(len, table.splitlines())) <= 40


def test_the_texts_are_the_samples_of_each_model(tmp_path: Path) -> None:
    names = []
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        save_model(random_model(SMALL, seed), tmp_path / name)
        names.append(str(tmp_path / name))
    sampling = SamplingConfig(max_tokens=9)
    found = compare_samples(*names, ["one", "two"], sampling, 5, "cpu", "fp32")
    assert found.models == (names[0], names[1])
    assert found.settings == "9 tokens, temperature 0.8, top-k 50, top-p 1, seed 5"
    a, b = (sample_texts(name, ["one", "two"], 1, sampling, 5, "cpu", "fp32") for name in names)
    assert found.rows == (("one", a[0][0], b[0][0]), ("two", a[1][0], b[1][0]))
    assert a != b


def test_a_run_is_named_with_its_checkpoint(tmp_path: Path) -> None:
    model = random_model(SMALL)
    save_checkpoint(tmp_path, 7, model, build_optimizer(model, OptimConfig()))
    found = compare_samples(str(tmp_path), str(tmp_path), ["x"], SamplingConfig(max_tokens=1), 0, "cpu", "fp32")
    assert found.models[0] == f"{tmp_path} (step_000007)"


def test_both_models_are_checked_before_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(random_model(SMALL), tmp_path)
    monkeypatch.setattr("restomod.generate.compare.sample_texts", lambda *a: pytest.fail("computed"))
    with pytest.raises(UserError, match="nowhere: no such run"):
        compare_samples(str(tmp_path), str(tmp_path / "nowhere"), ["x"], SamplingConfig(), 0)


def test_a_report_is_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "samples.md"
    path.write_text("before")
    write = samples_writer(str(path))
    assert path.read_text() == "before"
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(UserError, match="killed"):
            write(comparison("a"))
    assert path.read_text() == "before"
    write(comparison("a"))
    assert path.read_text() == samples_markdown(comparison("a"))
    samples_writer(str(tmp_path / "x.html"))(comparison("a"))
    assert (tmp_path / "x.html").read_text() == samples_html(comparison("a"))


@pytest.mark.parametrize("out", ["samples.txt", "samples", "nowhere/samples.md", "folder.md"])
def test_an_invalid_output_is_refused_immediately(tmp_path: Path, out: str) -> None:
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(UserError, match=out):
        samples_writer(str(tmp_path / out))


def test_a_read_only_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *a: False)  # root has write access everywhere
    with pytest.raises(UserError, match="read-only"):
        samples_writer(str(tmp_path / "samples.md"))
