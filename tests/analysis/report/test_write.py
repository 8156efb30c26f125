"""Reports of runs with known values, read by independent parsers; text of a run is never parsed as HTML or Markdown."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from restomod.analysis.report.data import SAMPLED_STEPS, changed_settings, preset_of, run_data, run_state, samples
from restomod.analysis.report.evals import evaluation_tables, reference_lines
from restomod.analysis.report.html import as_json, as_page
from restomod.analysis.report.markdown import report_markdown
from restomod.analysis.report.usage import HourlyRates, run_usage
from restomod.analysis.report.write import open_runs, report_data, run_names
from restomod.cli import main
from restomod.config.presets import preset
from restomod.runs.config_diff import trains_on_fineweb_edu
from restomod.runs.reader import open_run
from restomod.utils.text import visible
from tests.runs.made_runs import HOSTILE, START, add_error_analysis, add_task, loss_at, make_run, write


class Page(HTMLParser):
    """Parser of a page that collects its tags, scripts and Content-Security-Policy."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: dict[str, str] = {}
        self.policy = self.title = self._inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self._inside = (given.get("id") or "own") if tag == "script" else tag
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        if tag == "script":
            self.scripts[self._inside] = ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in self.scripts:
            self.scripts[self._inside] += data
        if self._inside == "title":
            self.title += data


def report(*arguments: str) -> None:
    assert main(["report", *arguments]) == 0


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_a_report_is_one_file_in_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "r")
    report(str(folder))
    assert capsys.readouterr().out.startswith(f"written: {folder / 'report.html'} (2.")
    page = read(folder / "report.html")
    data = json.loads(page.scripts["data"])
    (run,) = data["runs"]
    figures = {name: value for name, value, _ in run["figures"]}
    assert page.title == run["name"] == "r"
    assert figures["Validation loss"] == f"{loss_at(40) + 0.1:.4f}"
    assert figures["Tokens"] == "20,480"
    assert figures["Wall clock"] == "45 s"
    assert run["state"] == "finished"
    assert not [tag for tag in page.tags if tag in ("iframe", "object", "embed", "form", "img", "base")]


def test_the_policy_allows_the_pages_own_two_scripts_and_no_other(tmp_path: Path) -> None:
    import gzip

    report(str(make_run(tmp_path / "r")))
    page = read(tmp_path / "r" / "report.html")
    own = page.scripts["own"].encode()
    plotly = gzip.decompress(base64.b64decode(page.scripts["plotly"]))
    allowed = [base64.b64encode(hashlib.sha256(script).digest()).decode() for script in (own, plotly)]
    assert f"script-src 'sha256-{allowed[0]}' 'sha256-{allowed[1]}';" in page.policy
    assert page.policy.startswith("default-src 'none'; ")
    assert "connect-src 'none'" in page.policy
    assert b"Plotly" in plotly


def test_hostile_text_is_text_in_html(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<b>r&", text=HOSTILE, data=HOSTILE)
    add_task(folder, convention=HOSTILE)
    add_error_analysis(folder, HOSTILE)
    report(str(folder))
    harmless = make_run(tmp_path / "harmless")
    add_task(harmless)
    add_error_analysis(harmless)
    report(str(harmless))
    page, other = read(folder / "report.html"), read(harmless / "report.html")
    assert page.tags == other.tags
    assert page.scripts["own"] == other.scripts["own"]
    assert page.title == "<b>r&"
    (run,) = json.loads(page.scripts["data"])["runs"]
    shown = visible(HOSTILE)
    assert not {"\x1b", "\u202e", "\u2028"} & set(shown)
    assert {sample["prompt"] for sample in run["samples"]} == {shown}
    assert run["evaluations"][0]["rows"][0][-1].endswith(shown)


def test_hostile_text_is_text_in_markdown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", text=HOSTILE, data=HOSTILE)
    add_task(folder, convention=HOSTILE)
    add_error_analysis(folder, HOSTILE)
    markdown = report_markdown(report_data([open_run(folder)], HourlyRates()))
    html = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)
    tags = set(Page(html).tags)
    assert tags == {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "br"} - ({"br"} - tags)
    assert html.count("&lt;script&gt;") >= 4


def test_markdown_contains_the_numbers(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    add_task(folder)
    report(str(folder), "--markdown", str(tmp_path / "r.md"), "--png", str(tmp_path / "pictures"))
    markdown = (tmp_path / "r.md").read_text()
    assert "| 40 | 3.2465 |" in markdown  # 3.1 + 8 exp(-4)
    assert "| r, step 40 | 0.2800 ± 0.0100 | 0.3100 ± 0.0200 |" in markdown
    assert "![loss](<pictures/loss.png>)" in markdown
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        *("loss.png", "lr.png", "grad_norm.png", "tokens_per_second.png", "hellaswag.png")
    }


def test_pictures_have_the_accent_and_differ_with_the_curve(tmp_path: Path) -> None:
    for name, spikes in (("a", {}), ("b", {20: 30.0})):
        report(str(make_run(tmp_path / name, spikes=spikes)), "--png", str(tmp_path / f"png-{name}"))
    a, b = (Image.open(tmp_path / f"png-{name}" / "loss.png").convert("RGB") for name in "ab")
    assert a.size == b.size == (1350, 690)
    assert a.tobytes() != b.tobytes()
    assert (0xC2, 0x41, 0x0C) in {colour for _, colour in a.getcolors(1 << 24) or []}


def test_a_hundred_thousand_steps_stay_small_and_keep_their_spikes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", steps=100_000, spikes={54_321: 17.0, 77_777: 0.25})
    report(str(folder))
    assert (folder / "report.html").stat().st_size < 3_000_000
    (run,) = json.loads(read(folder / "report.html").scripts["data"])["runs"]
    loss = dict(zip(run["curves"]["loss"]["x"], run["curves"]["loss"]["y"], strict=True))
    assert (loss[54_321], loss[77_777]) == (17.0, 0.25)
    assert len(loss) < 2000


def test_several_runs_in_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x/r", "y/r", "z"):
        make_run(tmp_path / name)
    report("x/r", "y/r", "z", "z")
    data = json.loads(read(tmp_path / "report.html").scripts["data"])
    assert [run["name"] for run in data["runs"]] == ["x/r", "y/r", "z"]
    assert run_names(open_runs(["x/r", "z"])) == ["r", "z"]


def test_numbers_that_are_not_finite_become_null() -> None:
    text = as_json({"a": [float("nan"), float("inf"), 1.5], "b": "</script>&"})
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "a": [None, None, 1.5],
        "b": "</script>&",
    }
    assert "<" not in text


def test_no_torch_is_needed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    code = f"from restomod.cli import main; main(['report', {str(folder)!r}, '--png', {str(tmp_path / 'p')!r}])\n"
    code += "import sys; assert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- what it says of a run ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shard", "is_it"),
    [
        ("fineweb-edu", "", True),
        ("kjj0/finewebedu10B-gpt2", "", True),
        ("edu_fineweb10B", "", True),
        ("shards", "edufineweb_val_000000.npy", True),
        ("fineweb", "", False),
        ("fineweb10B", "", False),
        ("python-stdlib-3.11.7", "", False),
        ("fineweb-edu+notes.txt", "", False),
    ],
)
def test_gpt2s_line_stands_where_the_data_trains_on_fineweb_edu(
    tmp_path: Path, name: str, shard: str, is_it: bool
) -> None:
    folder = make_run(tmp_path / "r")
    splits = {"val": {"shards": [{"file": shard, "tokens": 5}]}} if shard else {}
    (folder / "data.json").write_text(json.dumps({"name": name, "fingerprint": "0", "splits": splits}))
    run = open_run(folder)
    assert trains_on_fineweb_edu(run) is is_it
    lines = run_data(run, "r", HourlyRates())["lines"].get("loss", [])
    assert lines == ([{"name": "GPT-2 124M", "value": 3.2924}] if is_it else [])


@pytest.mark.parametrize(("name", "is_it"), [("kjj0/finewebedu10B-gpt2", True), ("other", False)])
def test_published_losses_are_shown_with_a_loss_on_their_data(tmp_path: Path, name: str, is_it: bool) -> None:
    """Check a run on other data; the result of `eval --data` contains the evaluated data."""
    folder = make_run(tmp_path / "r", data="python-stdlib-3.11.7")
    data = {"name": name, "fingerprint": "f"}
    (folder / "evals").mkdir(exist_ok=True)
    values = {"task": "validation", "step": 40, "loss": 4.0, "tokens": 5, "data": data}
    (folder / "evals" / "step_000040-validation-of-f.json").write_text(json.dumps(values))
    (table,) = evaluation_tables(open_run(folder))
    assert (["GPT-2 124M", "3.2924"] in [row[:2] for row in table["rows"]]) is is_it
    assert f"other data than the run: {name}" in table["rows"][0][-1]


def test_the_part_of_a_task_has_no_published_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    add_task(folder, examples=200)
    assert reference_lines(open_run(folder))["hellaswag"] == [{"name": "chance", "value": 0.25}]
    assert "0.2955" not in json.dumps(evaluation_tables(open_run(folder)))
    figures = {name: rest for name, *rest in run_data(open_run(folder), "r", HourlyRates())["figures"]}
    assert figures["hellaswag, acc_token"] == ["31.0 %", "step 40, 200 examples"]


def test_settings_that_differ_from_the_preset(tmp_path: Path) -> None:
    base = preset("gpt2-124m")
    config = dataclasses.replace(base, seed=5, optim=dataclasses.replace(base.optim, lr=1e-3))
    assert changed_settings(config, base) == [("optim.lr", "0.001", "0.0006"), ("seed", "5", "1337")]
    folder = make_run(tmp_path / "r", 40, config)
    assert preset_of(open_run(folder)) == "quickstart"  # from its command
    (folder / "environment.json").write_text("[]")
    assert preset_of(open_run(folder)) == "gpt2-124m"  # the most similar preset


def test_published_results_follow_evaluations(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    for step, examples in ((20, 500), (40, 10_042)):
        add_task(folder, step=step, examples=examples)
    add_task(folder, "mine", examples=7)
    add_task(folder, "piqa", examples=200)
    (folder / "evals" / "odd.json").write_text('{"task": "odd", "metrics": {"acc": null}, "step": null}')
    mine, odd = (next(t for t in evaluation_tables(open_run(folder)) if t["task"] == name) for name in ("mine", "odd"))
    hellaswag = next(t for t in evaluation_tables(open_run(folder)) if t["task"] == "hellaswag")
    assert [row[0] for row in hellaswag["rows"][:2]] == ["r, step 40", "r, step 20"]
    assert ["GPT-2 124M", "0.2859", "0.2955"] in [row[:3] for row in hellaswag["rows"]]
    piqa = next(t for t in evaluation_tables(open_run(folder)) if t["task"] == "piqa")
    assert len(piqa["rows"]) == piqa["own"] == 1, "published results are of all examples"
    assert reference_lines(open_run(folder))["hellaswag"][0] == {"name": "GPT-2 124M", "value": 0.2955}
    assert reference_lines(open_run(folder))["piqa"] == [{"name": "chance", "value": 0.5}]
    assert mine["rows"] == [["r, step 40", "0.2800 ± 0.0100", "0.3100 ± 0.0200", "7 examples; as it is"]]
    assert odd["rows"][0][0] == "r"


@pytest.mark.parametrize(
    ("steps", "of", "after", "state"),
    [(40, 40, 1, "finished"), (40, 80, 1, "running"), (40, 80, 1000, "stopped"), (0, 80, 1, "waiting")],
)
def test_the_state_of_a_run(tmp_path: Path, steps: int, of: int, after: float, state: str) -> None:
    folder = make_run(tmp_path / "r", steps=steps or 40)
    if not steps:
        (folder / "metrics.jsonl").unlink()
    config = json.loads((folder / "config.json").read_text()) | {"steps": of}
    (folder / "config.json").write_text(json.dumps(config))
    run = open_run(folder)
    assert run_state(run, run_usage(run), START + 45 + after)[0] == state


def test_events_are_listed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", spikes={3: float("nan")})
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"kind": "rollback", "step": 20, "failed_step": 33, "data_offset": 14}\n')
    found = run_data(open_run(folder), "r", HourlyRates())["events"]
    assert [3, "the loss is not finite"] in found
    assert [20, "rollback from step 33; the data in between is skipped"] in found


def test_samples_of_a_long_run_are_spread_over_it(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    write(folder / "samples.jsonl", [{"step": s, "prompt": "p", "text": "t"} for s in range(0, 5001, 10)])
    steps = [sample["step"] for sample in samples(open_run(folder))]
    assert (len(steps), steps[0], steps[-1]) == (SAMPLED_STEPS, 0, 5000)


def test_a_run_with_nothing_but_a_configuration(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    page = as_page(report_data([open_run(folder)], HourlyRates()))
    assert json.loads(Page(page).scripts["data"])["runs"][0]["state"] == "waiting"


def test_invalid_records_are_skipped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    odd = [
        {"kind": "train", "step": 50},
        {"kind": "val", "step": 50, "loss": "x"},
        {"kind": "task", "step": 1, "task": 5},
    ]
    with open(folder / "metrics.jsonl", "a") as f:
        f.write("".join(json.dumps(record) + "\n" for record in odd) + '{"kind": "train", "st')
    write(folder / "samples.jsonl", [{"step": 1}, {"step": "a", "text": "b"}, {"step": 2, "text": 7}])
    run = run_data(open_run(folder), "r", HourlyRates())
    assert run["samples"] == []
    assert run["curves"]["loss"]["y"][-1] is None


# --- damage ---------------------------------------------------------------------------------------------------

SIDE_FILES = ["environment.json", "samples.jsonl", "error_analysis.json", "evals/x.json"]


@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_damaged_side_file_is_left_out_with_a_warning(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_run(tmp_path / "first") / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('["s3cr3t"]\n')
    report(str(tmp_path / "first"))
    (warning,) = capsys.readouterr().err.splitlines()
    assert name in warning
    assert "s3cr3t" not in (tmp_path / "first" / "report.html").read_text()


@pytest.mark.parametrize("name", ["config.json", "data.json"])
def test_a_damaged_configuration_or_manifest_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_run(tmp_path / "first") / name
    path.write_text("{")
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", str(tmp_path / "first")]) == 2
    assert sorted(tmp_path.rglob("*")) == before
    error = capsys.readouterr().err
    assert error.startswith(f"restomod: error: {path} is damaged")
    assert error.count("\n") == 1
