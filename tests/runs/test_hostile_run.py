"""A malicious run folder: no command runs its contents, sends control characters or leaks secrets."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from restomod.cli import main
from restomod.config.presets import preset
from restomod.config.run import DataConfig, SamplingConfig
from restomod.utils.text import VISIBLE
from tests.analysis.report.test_page import CHROMIUM, LOAD_MS
from tests.analysis.report.test_watch import data, served
from tests.runs.made_runs import HOSTILE, add_error_analysis, add_task, make_run

TOKEN = "hf_" + "aB3xYz9Q" * 4
SECRETS = (TOKEN, "letmein", "of-then", "mallory", "foreign-value")
TEXT = (
    f"{HOSTILE} \x9b31m \u2066 \ufeff \udcff /home/mallory/x C:\\Users\\mallory\\x "
    f"https://mallory:letmein@example.org/ --hub-token letmein {TOKEN} <a href='javascript:window.hurt=3'>a</a> "
    "<svg onload=window.hurt=4> [m](javascript:x)"
)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with markup, escape sequences, secrets and unknown keys in all its texts."""
    config = dataclasses.replace(
        preset("quickstart"),
        data=DataConfig(source="tokens", path=TEXT.replace("\0", "")),
        sampling=SamplingConfig(prompts=(TEXT,)),
    )
    name = "<img src=x onerror=window.hurt=5>\x1b[2J\u202e" + TOKEN
    folder = make_run(tmp_path_factory.mktemp("hostile") / name, config=config, text=TEXT, data=TEXT)
    add_task(folder, "validation", convention=TEXT)
    add_task(folder, "<b>task\x1b[2J", convention=TEXT)
    add_error_analysis(folder, TEXT)
    starts = json.loads((folder / "environment.json").read_text())
    starts[0]["command"] += [
        "--then",
        "curl of-then",
        "--then=of-then",
        "--api-key",
        "letmein",
        "--data.path",
        "/root/d",
    ]
    starts[0] |= {"foreign": "foreign-value", "device": TEXT, "auths": {"x": "foreign-value"}}
    (folder / "environment.json").write_text(json.dumps([*starts, {**starts[0], "started": TEXT}]))
    with open(folder / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"kind": "train", "step": 41, "skipped": TEXT, "loss": None, TEXT: TEXT}) + "\n")
        f.write(json.dumps({"kind": "task", "step": 40, "task": TEXT, "acc": 0.5, "examples": 9}) + "\n")
        f.write(json.dumps({"kind": "val", "step": 41, "loss": 2.0, "x": "y" * 2_000_000}) + "\n")
    with open(folder / "samples.jsonl", "a") as f:
        f.write(json.dumps({"step": 30, "prompt": TEXT, "text": "long " + "z" * 500_000}) + "\n")
    return folder


def assert_harmless(text: str, *allowed: str) -> None:
    """Checks for control characters and secrets; the string ``allowed``, such as the run's path, may occur."""
    assert sorted({hex(ord(c)) for c in text if ord(c) in VISIBLE}) == []
    assert [secret for secret in SECRETS if secret in text and secret not in allowed] == []


@pytest.mark.parametrize("command", ["compare", "verdict", "eval", "sample", "inspect", "data"])
def test_no_command_prints_control_characters(hostile: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(hostile)]) in (0, 1, 2)
    shown = capsys.readouterr()
    assert_harmless(shown.out + shown.err, *SECRETS)
    assert "Traceback" not in shown.err
    assert "[2J" in shown.out + shown.err


@pytest.mark.parametrize("more", [(), ("--help",)])
def test_resuming_prints_no_control_characters(
    hostile: Path, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(["train", "--resume", str(hostile), *more])
    except SystemExit as e:
        code = e.code
    shown = capsys.readouterr()
    assert code == (0 if more else 2)
    assert_harmless(shown.out + shown.err, *SECRETS)


@pytest.fixture(scope="module")
def written(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with all files that are meant for sharing."""
    folder = tmp_path_factory.mktemp("written")
    assert main(["report", str(hostile), "--out", str(folder / "r.html"), "--markdown", str(folder / "r.md")]) == 0
    assert main(["compare", str(hostile), "--markdown", str(folder / "c.md")]) == 0
    return folder


def test_shared_files_contain_no_secrets(written: Path) -> None:
    page = (written / "r.html").read_text()
    (values,) = re.findall(r'(?s)<script type="application/json" id="data">(.*?)</script>', page)
    shown = "\n".join(texts(json.loads(values)))
    assert "~/x" in shown
    assert "~/d" in shown
    assert "--api-key [redacted]" in shown
    for text in (shown, (written / "r.md").read_text(), (written / "c.md").read_text()):
        assert_harmless(text)
    assert "<img" not in (written / "r.md").read_text()


def texts(value: Any) -> Iterator[str]:
    """All texts and names of a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts([*value.keys(), *value.values()])
    elif isinstance(value, list):
        for part in value:
            yield from texts(part)


def test_served_pages_contain_no_secrets(hostile: Path) -> None:
    with served(hostile) as port:
        shown = "\n".join(texts(data(port)))
    assert "~/x" in shown
    assert_harmless(shown)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
@pytest.mark.parametrize("live", [False, True])
def test_no_script_of_the_run_runs_in_a_browser(hostile: Path, written: Path, live: bool) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    with served(hostile) as port, sync_api.sync_playwright() as playwright:
        address = f"http://127.0.0.1:{port}/" if live else (written / "r.html").as_uri()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page, wrong = browser.new_page(), list[str]()
        page.on("console", lambda message: wrong.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda asked: wrong.append(asked.url) if not asked.url.startswith(address) else None)
        page.goto(address)
        page.wait_for_selector("html[data-ready]", timeout=LOAD_MS)
        for details in page.locator("details").all():
            details.evaluate("node => { node.open = true; }")
        assert page.locator(".plot .trace path").count() > 0
        assert page.evaluate("window.hurt") is None
        assert page.locator("main img, main script, main svg[onload], main a, .plot a").count() == 0
        assert_harmless(page.locator("main").inner_text())
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert wrong == []
        browser.close()
