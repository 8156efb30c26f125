"""The report page in a browser: charts, controls, phone layout, no network access, no execution of a run's text.

The extra `browser` and a separately installed Chromium are needed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from restomod.analysis.report import watch as watching
from restomod.analysis.report.write import report
from restomod.runs.reader import open_run
from tests.analysis.report.test_watch import served
from tests.runs.made_runs import HOSTILE, add_error_analysis, add_task, make_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")

LOAD_MS = 60_000  # a slow machine unpacks and runs five megabytes of JavaScript
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Open a page without network access; any console message or request fails the test at the end."""
    contexts: list[Any] = []
    wrong: list[str] = []

    def opened(path: Path, width: int = 1200, dark: bool = False) -> Any:
        scheme = "dark" if dark else "light"
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=LOAD_MS)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def page_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a report of two runs: one with an error analysis, one with other losses and samples."""
    folder = tmp_path_factory.mktemp("two")
    first = make_run(folder / "first", steps=400, data="fineweb-edu")
    second = make_run(folder / "second", steps=300, text="another text", spikes={100: 20.0})
    add_error_analysis(first)
    for run in (first, second):
        add_task(run)
    report([open_run(first), open_run(second)], folder / "two.html", say=lambda line: None)
    return folder / "two.html"


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    run = make_run(folder / "<img src=x onerror=hurt()>", text=HOSTILE, data=HOSTILE)
    other = make_run(folder / "<b>other", text=HOSTILE)
    add_task(run, HOSTILE.replace("/", ""), convention=HOSTILE)
    add_error_analysis(run, HOSTILE)
    report([open_run(run), open_run(other)], folder / "hostile.html", say=lambda line: None)
    return folder / "hostile.html"


def hover(page: Any) -> str:
    """Move the mouse to the middle of the loss chart and return the text of the hover label."""
    area = page.locator("#plot-loss .nsewdrag")
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#plot-loss .hoverlayer text")
    return " ".join(page.locator("#plot-loss .hoverlayer text").all_text_contents())


def until(page: Any, expression: str, value: object) -> None:
    """Wait until an expression has a value. The page's policy does not allow playwright's own function for it."""
    for _ in range(100):
        if page.evaluate(expression) == value:
            return
        page.wait_for_timeout(100)
    pytest.fail(f"{expression} is {page.evaluate(expression)!r}, not {value!r}")


def bright(page: Any, what: str) -> float:
    """Return the mean of red, green and blue of the body's text or background colour, 0 to 255."""
    rgb = page.evaluate(f"getComputedStyle(document.body).{what}.match(/[0-9]+/g).slice(0, 3).map(Number)")
    return sum(rgb) / 3


def test_every_chart_is_drawn(open_page: Open, page_of_two: Path) -> None:
    page = open_page(page_of_two)
    titles = page.locator(".chart h3").all_text_contents()
    assert titles == ["Loss", "HellaSwag", "Learning rate", "Gradient norm", "Tokens per second", "Loss by position"]
    drawn = page.evaluate("[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.trace path').length)")
    assert all(count > 0 for count in drawn)
    assert "GPT-2 124M 3.29" in page.locator("#plot-loss .annotation").all_text_contents()


def test_a_chart_shows_values_under_the_mouse(open_page: Open, page_of_two: Path) -> None:
    page = open_page(page_of_two)
    assert page.locator("#plot-loss .hoverlayer text").count() == 0
    assert "first : 3.0000" in hover(page)


def test_a_click_in_the_legend_hides_a_curve(open_page: Open, page_of_two: Path) -> None:
    page = open_page(page_of_two)
    visible = "document.getElementById('plot-loss')._fullData.filter(t => t.name === 'second').map(t => t.visible)"
    assert page.evaluate(visible) == [True]
    page.locator("#plot-loss .legendtext", has_text="second").locator("xpath=../..").locator(".legendtoggle").click(
        force=True
    )
    until(page, visible, ["legendonly"])


def test_the_selector_shows_another_run(open_page: Open, page_of_two: Path) -> None:
    page = open_page(page_of_two)
    assert page.locator("h1").text_content() == "first"
    assert "a text 20" in page.locator(".sample").first.text_content()
    page.select_option("#run", label="second")
    assert page.locator("h1").text_content() == "second"
    assert "another text 20" in page.locator(".sample").first.text_content()
    assert page.locator("tr.chosen").text_content().startswith("second")
    accent = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--accent').trim()")
    colours = page.evaluate("document.getElementById('plot-lr').data.map(t => [t.name, t.line.color])")
    assert [name for name, colour in colours if colour == accent] == ["second"]


def test_the_switches_change_the_axes(open_page: Open, page_of_two: Path) -> None:
    page = open_page(page_of_two)
    last = "Math.max(...document.getElementById('plot-lr').data.flatMap(t => t.x))"
    assert page.evaluate(last) == 399
    page.click("button[data-value=tokens]")
    assert page.evaluate(last) == 399 * 512
    page.click("button[data-value=hours]")
    assert page.evaluate(last) == pytest.approx(399 / 3600, rel=1e-3)
    scale = "document.getElementById('plot-loss')._fullLayout.yaxis.type"
    assert page.evaluate(scale) == "log"
    page.click("button[data-value=late]")
    low, high = page.evaluate("document.getElementById('plot-loss')._fullLayout.yaxis.range")
    assert low < 3 < high < 4  # without 11, the loss at the start


@pytest.mark.parametrize("low", [0.05, 1.0, 3.0, 5.2, 9.0, 10.79])
def test_a_logarithmic_axis_has_at_least_three_ticks(open_page: Open, tmp_path: Path, low: float) -> None:
    run = make_run(tmp_path / "run", spikes={step: max(low, 10.8 - step) for step in range(40)})
    records = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in records if '"val"' not in line))
    report([open_run(run)], tmp_path / "page.html", say=lambda line: None)
    assert open_page(tmp_path / "page.html").locator("#plot-loss .ytick text").count() >= 3


def test_samples_through_training(open_page: Open, page_of_two: Path) -> None:
    page = open_page(page_of_two)
    page.locator("#sample").fill("0")
    assert page.locator("output").text_content() == "step 10"
    assert page.locator(".sample").all_text_contents() == ["a texta text 10"]


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_it_without_scrolling_sideways(open_page: Open, page_of_two: Path, dark: bool) -> None:
    page = open_page(page_of_two, 400, dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    for plot in page.locator(".plot").all():
        assert plot.bounding_box()["width"] > 300
    assert page.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 16


def test_dark_mode_follows_the_browser(open_page: Open, page_of_two: Path) -> None:
    light, dark = open_page(page_of_two), open_page(page_of_two, dark=True)
    assert bright(light, "backgroundColor") > 240 > 60 > bright(light, "color")
    assert bright(dark, "backgroundColor") < 60 < 200 < bright(dark, "color")
    tick = "document.querySelector('#plot-loss .xtick text').style.fill"
    assert light.evaluate(tick) != dark.evaluate(tick)
    dark.emulate_media(color_scheme="light")
    until(dark, tick, light.evaluate(tick))


def test_hostile_text_is_shown_and_never_executed(open_page: Open, hostile_page: Path) -> None:
    page = open_page(hostile_page)
    page.select_option("#run", index=1)
    page.select_option("#run", index=0)
    for details in page.locator("details").all():
        details.evaluate("node => { node.open = true; }")
    assert "<b>other : " in hover(page)
    assert page.evaluate("window.hurt") is None
    assert page.locator("main img, main script, main b, .plot a").count() == 0
    assert page.locator("h1").text_content() == "<img src=x onerror=hurt()>"
    assert "<img src=x onerror='window.hurt = 2'>" in page.locator(".sample").first.text_content()
    assert "<b>other" in page.locator("#plot-loss .legendtext").all_text_contents()


def test_the_policy_blocks_other_scripts(browser: Any, page_of_two: Path) -> None:
    page = browser.new_context(offline=True).new_page()
    page.goto(page_of_two.as_uri())
    page.wait_for_selector("html[data-ready]", timeout=LOAD_MS)
    page.evaluate(
        "const s = document.createElement('script'); s.textContent = 'window.hurt = 1'; document.body.append(s)"
    )
    assert page.evaluate("window.hurt") is None
    page.context.close()


def test_a_watched_page_follows_its_run(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "SECONDS", 0.2)
    monkeypatch.setattr(watching, "REST", 0)
    folder, wrong = tmp_path / "r", list[str]()
    page = browser.new_page()
    page.on("console", lambda message: wrong.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    with served(folder) as port:
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("html[data-ready]", timeout=LOAD_MS)
        assert page.locator("#state").text_content() == "waiting for the run to start"
        make_run(folder, steps=20)
        until(page, "document.getElementById('state').textContent", "finished, after 20 steps")
        page.locator("details.settings").evaluate("node => { node.open = true; }")
        page.locator("#plot-loss .legendtoggle").first.click(force=True)
        until(page, "document.getElementById('plot-loss')._fullData[0].visible", "legendonly")
        with open(folder / "metrics.jsonl", "a") as f:
            f.write('{"kind": "train", "step": 20, "loss": 2.5, "ms": 1000.0}\n')
        until(page, "document.getElementById('plot-loss').data[0].y.at(-1)", 2.5)
        assert page.evaluate("document.getElementById('plot-loss')._fullData[0].visible") == "legendonly"
        assert page.locator("details.settings").evaluate("node => node.open") is True
        assert wrong == []
    until(page, "document.getElementById('state').textContent.startsWith('the server does not respond')", True)
    page.close()
