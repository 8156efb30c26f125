"""Models by name on the command line, with the real client and a simulated hub.

tests/model/test_hub.py has fast tests of failing downloads.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from restomod.checks.device_parity import random_model
from restomod.config.run import ModelConfig, RunConfig, SamplingConfig
from restomod.model.hf_io import save_model
from restomod.runs.metrics import read_jsonl
from tests.hub import Hub

from .conftest import flags

GPT2 = "openai-community/gpt2"
SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=16, n_positions=32)
SAMPLE = ("--prompt", "the cat", "--num-samples", "1", "--max-tokens", "4", "--device", "cpu", "--precision", "fp32")

# several commands in one process, because importing torch is slow
COMMANDS = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from restomod.cli import main
outcomes = []
for arguments in json.loads(sys.argv[1]):
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as error:
        code = main(arguments)
    outcomes.append((code, output.getvalue(), error.getvalue()))
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of a published model."""
    folder = tmp_path_factory.mktemp("model")
    save_model(random_model(SHAPE), folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with Hub({GPT2: dict(files)}) as hub:
        yield hub


def run(hub: Hub, here: Path, *commands: tuple[str, ...], **environment: str) -> list[list[int | str]]:
    """Return exit code, output and errors of each command, run by one process in ``here`` with its cache there."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        cwd=here,
        env={**hub.environment(here / "hf"), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def is_refused(outcome: list[int | str], said: str) -> bool:
    """Return whether a command ended with exit code 2 and one line with this beginning."""
    code, output, error = outcome
    assert isinstance(error, str)
    return (code, output) == (2, "") and error.startswith(f"restomod: error: {said}") and error.count("\n") == 1


def test_gpt2_is_downloaded_once(hub: Hub, tmp_path: Path) -> None:
    sample = ("sample", "gpt2", *SAMPLE)
    first, (code, inspected, error) = run(hub, tmp_path, sample, ("inspect", GPT2))
    assert [request.method for request in hub.requests].count("GET") == 3, "configuration, vocabulary, weights"
    assert (first[0], first[2], code, error) == (0, "", 0, "")
    assert str(first[1]).startswith("--- 1 of 1 ---\nthe cat")
    assert "50257 × 16" in str(inspected)

    hub.requests.clear()
    hub.close()
    again, other = run(hub, tmp_path, sample, ("sample", "someone/other"))
    assert again == first
    assert is_refused(other, "someone/other: the Hugging Face hub cannot be reached (")


def test_a_failed_download_is_one_line_and_invalid_names_are_not_requested(hub: Hub, tmp_path: Path) -> None:
    hub.gated = {"owner/gated"}
    hub.repos["owner/empty"] = {"config.json": b"{}"}
    hub.repos["owner/llama"] = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights"}
    (tmp_path / "runs" / "quickstart" / "checkpoints").mkdir(parents=True)
    expected = {
        "runs/quikstart": "runs/quikstart: no such run or model folder; did you mean 'quickstart'?",
        "./gpt2": "./gpt2: no such run or model folder; did you mean 'gpt2'?",
        "nobody/nothing": "nobody/nothing: no such local folder, and no such public model on the Hugging Face hub; ",
        "owner/gated": "owner/gated on the hub is gated: accept its terms on the website, then run `hf auth login`",
        "owner/empty": "owner/empty on the hub has no weights: ",
        "owner/llama": f"{tmp_path}/hf/hub/models--owner--llama/snapshots/",
    }
    outcomes = run(hub, tmp_path, *(("sample", name) for name in expected))
    for outcome, said in zip(outcomes, expected.values(), strict=True):
        assert is_refused(outcome, said), outcome
    asked = {request.path.partition("/resolve/")[0] for request in hub.requests if "/resolve/" in request.path}
    assert asked == {"/nobody/nothing", "/owner/gated", "/owner/empty", "/owner/llama"}


def test_a_run_starts_from_a_model_of_the_hub(hub: Hub, tiny: RunConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny, model=SHAPE, steps=1, sampling=SamplingConfig(("the",), max_tokens=1))
    start = ("train", "quickstart", *flags(config), "--no-sanity-checks")
    hub.repos["owner/tiny"] = hub.repos.pop(GPT2)
    outcomes = run(
        hub,
        tmp_path,
        (*start, "--init", "owner/tiny", "--out", "by name"),
        (*start, "--init", "hf/hub/models--owner--tiny/snapshots/" + hub.commit("owner/tiny"), "--out", "by folder"),
    )
    assert [(code, error) for code, _, error in outcomes] == [(0, ""), (0, "")]
    assert "from owner/tiny" in str(outcomes[0][1])
    by_name, by_folder = (
        [(r["kind"], r["loss"]) for r in read_jsonl(tmp_path / name / "metrics.jsonl")]
        for name in ("by name", "by folder")
    )
    assert by_name == by_folder
