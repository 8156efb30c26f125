"""Tests of the scripts for a GPU, and a smoke test of all with the packages of a GPU machine only."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks import records, run
from benchmarks.gpu import collect
from benchmarks.harness import BenchPlan
from benchmarks.items import shakespeare
from benchmarks.records import Comparison, Entry, Item, Metric
from restomod.commands.train import parse_arguments
from restomod.experiments.plan.expected_loss import TINYSHAKESPEARE
from tests.benchmarks.made import ENVIRONMENT

ROOT = Path(run.__file__).parents[1]
GPU = ROOT / "benchmarks" / "gpu"
SPEED = Metric("tokens/s", "", "higher")

PARTS = """
set -uo pipefail
source benchmarks/gpu/common.sh
write() { echo "$1" >"$work/$2.json"; }
part shakespeare 9 "$PYTHON" -c "import sys; sys.exit('Error: /x is gone')"
write '{"format": 1, "items": {"step": %s}}' step
part step 9 true
part checkpoint 2 sleep 60
part generation 9 true
LEFT=$SECONDS
part hellaswag 9 true
finish
"""


def item(**values: float) -> Item:
    entries = [Entry(name, {"tokens/s": [value]}) for name, value in values.items()]
    return Item("Step", [Comparison("case", [SPEED], entries, 1)], environment=ENVIRONMENT)


def test_other_parts_continue_after_a_part_that_fails_or_hangs(tmp_path: Path) -> None:
    (tmp_path / "kit").mkdir()
    out = tmp_path / "out"
    text = json.dumps(records.to_dict({"step": item(ours=2.0)})["items"]["step"])
    environment = os.environ | {"OUT": str(out), "KIT": str(tmp_path / "kit"), "PYTHON": sys.executable}
    environment |= {"LEFT": "100", "LEAST": "1"}
    done = subprocess.run(
        ["bash", "-c", PARTS % text, "x"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = records.read(out / "gpu.json")
    assert list(found) == ["step", "shakespeare", "hellaswag", "generation", "checkpoint"]
    assert found["step"].comparisons == item(ours=2.0).comparisons
    assert found["step"].environment["command"] == "benchmarks/gpu/measure.sh"
    assert {name: found[name].left_out for name in found} == {
        "step": [],
        "shakespeare": ["the run: exit code 1: Error: /x is gone"],
        "hellaswag": ["all contenders: no time left"],
        "generation": ["all contenders: no results"],
        "checkpoint": ["all contenders: stopped after the limit of 2 s"],
    }
    assert "not finished: shakespeare checkpoint hellaswag" in done.stdout
    assert "Error: /x is gone" in (out / "log.txt").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "log.txt"]


def test_damaged_results_are_kept_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "kit").mkdir()
    script = 'source benchmarks/gpu/common.sh; echo \'{"half": \' >"$work/step.json"; part step 9 true'
    environment = os.environ | {"OUT": str(tmp_path / "out"), "KIT": str(tmp_path / "kit"), "PYTHON": sys.executable}
    environment |= {"LEFT": "100", "TMPDIR": str(tmp_path)}
    subprocess.run(["bash", "-c", script, "x"], cwd=ROOT, env=environment, timeout=60, check=True)
    assert '{"half": ' in (tmp_path / "out" / "log.txt").read_text()
    (reason,) = records.read(tmp_path / "out" / "gpu.json")["step"].left_out
    assert reason.startswith("compared with build-nanogpt: damaged results")
    assert str(tmp_path) not in reason


def test_a_missing_folder_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OUT"}
    done = subprocess.run([str(GPU / "check.sh")], env=environment, capture_output=True, text=True)
    assert "set the folder of the results" in done.stderr
    environment |= {"OUT": str(tmp_path), "KIT": str(tmp_path / "none")}
    done = subprocess.run([str(GPU / "measure.sh")], env=environment, capture_output=True, text=True)
    assert (done.returncode, "run prepare.sh first" in done.stderr) == (2, True)


def test_every_part_of_the_scripts_is_known() -> None:
    text = (GPU / "check.sh").read_text() + (GPU / "measure.sh").read_text()
    assert re.findall(r"^(?:\S+=\S+ )?(?:part|item|bench) (\S+) \d+", text, re.M) == [
        "tests",
        "variants",
        *(
            name
            for name in collect.PARTS
            if name == "bench" or collect.PARTS[name].item not in ("bench", "variants", "tests")
        ),
        *(name for name in collect.PARTS if name.startswith("bench-")),
    ]


def test_a_benchmark_of_steps_becomes_an_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVISION", "0123abc")  # for a source tree without .git
    found = {
        "step_ms": {"all": [1000.0, 500.0]},
        "tokens_per_step": 524288,
        "flops_per_token": 10**9,
        "peak_flops": 2 * 10**15,
        "peak_memory_bytes": 4 * 10**10,
        "warmup_steps": 2,
        "environment": {"device": "D", "git_revision": None},
    }
    (tmp_path / "bench-eager.json").write_text(json.dumps(found))
    made = collect.collect("bench-eager", tmp_path, None, 0, 45, None)
    (comparison,) = made.comparisons
    (entry,) = comparison.entries
    assert (comparison.case, entry.name) == ("524,288 tokens per step", "micro-batch 64, eager")
    assert entry.values == {
        "tokens/s": [524288.0, 1048576.0],
        "step": [1000.0, 500.0],
        "MFU": pytest.approx([26.2144, 52.4288]),
        "peak memory": [40.0],
    }
    assert made.environment["command"] == "benchmarks/gpu/measure.sh"
    assert made.environment["git_revision"] == "0123abc"


def test_trials_of_recipes_become_an_item(tmp_path: Path) -> None:
    def row(recipe: str, curve: list[list[float]]) -> dict[str, object]:
        about = {"environment": ENVIRONMENT, "seed": 0, "tokens_per_second": 5.0}
        config = {"model": {"n_layer": 12, "n_embd": 768}}
        return about | {"recipe": recipe, "curve": curve, "loss": curve[-1][1], "tokens": 100, "config": config}

    rows = [row("gpt2", [[0, 10.0], [100, 4.0]]), row("modern", [[0, 10.0], [50, 4.0], [100, 2.0]])]
    (tmp_path / "recipe.json").write_text(json.dumps(rows))
    (comparison,) = collect.collect("recipe", tmp_path, None, 0, 45, None).comparisons
    modern, gpt2 = comparison.entries
    assert modern.values == {"tokens to GPT-2's loss": [50.0], "validation loss": [2.0], "tokens/s": [5.0]}
    assert gpt2.values["tokens to GPT-2's loss"] == [100.0]
    (tmp_path / "recipe.json").write_text(json.dumps(rows[:1]))
    unfinished = collect.collect("recipe", tmp_path, None, 124, 160, None)
    assert unfinished.comparisons == []
    assert unfinished.notes == ["gpt2, seed 0: validation loss 4.0000"]
    assert unfinished.left_out == ["modern compared with gpt2: stopped after the limit of 160 s"]


def test_sessions_are_joined(tmp_path: Path) -> None:
    """Later results replace earlier ones, missing results do not; parts of one item share its comparison."""
    bench = collect.PARTS["bench"].title
    first = {
        "step": item(ours=1.0, theirs=2.0),
        "tests": Item("Tests", notes=["40 passed"]),
        "bench": dataclasses.replace(item(a=1.0, b=2.0), title=bench, left_out=["c: no time left", "d: no time left"]),
        "hellaswag": Item("HellaSwag", left_out=["no time left"]),
    }
    again = {
        "step": item(ours=3.0),
        "bench": dataclasses.replace(item(b=4.0, c=5.0), title=bench, left_out=["a: exit code 1"]),
    }
    nothing = {"step": Item("Step", left_out=["all: exit code 1"])}
    paths = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    for path, items in zip(paths, (first, again, nothing), strict=True):
        records.write(path, items)
    out = tmp_path / "out.json"
    assert collect.main(["merge", *map(str, paths), "--out", str(out)]) == 0
    merged = records.read(out)
    assert list(merged) == ["bench", "step", "hellaswag", "tests"]
    assert merged["step"] == again["step"]
    assert merged["hellaswag"] == first["hellaswag"]
    assert merged["tests"] == first["tests"]
    (comparison,) = merged["bench"].comparisons
    assert {e.name: e.values["tokens/s"] for e in comparison.entries} == {"a": [1.0], "b": [4.0], "c": [5.0]}
    assert merged["bench"].left_out == ["d: no time left"]
    text = (tmp_path / "out.md").read_text()
    assert "## HellaSwag\n\n- skipped: no time left\n\n## Tests" in text
    assert collect.main(["merge", str(tmp_path / "none.json"), "--out", str(out)]) == 2


def test_tinyshakespeare_is_saved_at_the_end_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result also has the published curve."""
    asked: list[str] = []

    class Ended:
        returncode = 0

        def poll(self) -> int:
            return 0

    @contextlib.contextmanager
    def training(words: list[str]) -> Iterator[Ended]:
        asked.extend(words)
        folder = Path(words[words.index("--out") + 1])
        folder.mkdir()
        lines = [json.dumps({"kind": "train", "step": step, "loss": 11.0 - step / 1000}) for step in range(1200)]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        yield Ended()

    monkeypatch.setattr(shakespeare, "training", training)
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("First Citizen:\n")
    made = shakespeare.measure(BenchPlan(tmp_path, data=tmp_path, out=tmp_path))
    config, _, _ = parse_arguments(asked[1:])
    assert config.save_every is not None
    assert config.save_every > config.steps
    assert config.save_every_minutes is None
    (curve,) = made.series
    assert curve.published == list(TINYSHAKESPEARE)
    assert (tmp_path / "shakespeare.jsonl").exists()


def wheel(name: str, folder: Path) -> None:
    """Write an importable wheel of an installed distribution."""
    distribution = importlib.metadata.distribution(name)
    with zipfile.ZipFile(folder / f"{name}-{distribution.version}-py3-none-any.whl", "w") as archive:
        for file in distribution.files or []:
            if ".." not in file.parts and file.suffix != ".pyc":
                archive.write(file.locate(), str(file))


def names_in(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(names: Iterable[str]) -> set[str]:
    """Return installed distributions with all their requirements, which depend on the installed versions."""
    found: set[str] = set()
    remaining = [normal(name) for name in names]
    while remaining:
        name = remaining.pop()
        if name in found:
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            needs = map(Requirement, importlib.metadata.requires(name) or [])
            remaining += [normal(n.name) for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})]
            found.add(name)
    return found


def blocked() -> str:
    """Return the modules of installed packages that a GPU machine may not have, separated by commas."""
    expected = required(names_in(GPU / "preinstalled.txt")) | {"restomod"}
    modules = importlib.metadata.packages_distributions()
    return ",".join(m for m, packages in modules.items() if not expected & set(map(normal, packages)))


@pytest.fixture
def kit(tmp_path: Path) -> dict[str, str]:
    """Run prepare.sh on tiny files, and return the environment variables for the other scripts."""
    wheels, data, peer = (tmp_path / name for name in ("wheels", "data", "peer"))
    for folder in (wheels, data / "eval", data / "tinyshakespeare", peer):
        folder.mkdir(parents=True)
    for name in names_in(GPU / "wheels.txt"):
        wheel(name, wheels)
    question = {"ind": 0, "activity_label": "x", "ctx": "A man", "label": 1, "endings": ["is", "was", "sees", "eats"]}
    (data / "eval" / "hellaswag_val.jsonl").write_text(20 * (json.dumps(question) + "\n"))
    (data / "tinyshakespeare" / "input.txt").write_text(200 * "First Citizen:\nBefore we proceed, hear me speak.\n")
    (peer / "train_gpt2.py").write_text(PEER)
    environment = os.environ | {
        "PYTHON": sys.executable,
        "RESTOMOD_SMOKE": "cpu",
        "KIT": str(tmp_path / "kit"),
        "WHEELS": str(wheels),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [str(GPU / "prepare.sh"), str(peer), str(data)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "next: copy the working tree" in done.stdout
    shutil.rmtree(data)
    return environment | {"BLOCKED_MODULES": blocked(), "PYTHONPATH": str(Path(__file__).parent / "blocked")}


PEER = """
import torch
from hellaswag import nothing
from dataclasses import dataclass

@dataclass
class GPTConfig:
    block_size: int = 1
    vocab_size: int = 1
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 1

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def configure_optimizers(self, weight_decay, learning_rate, device_type):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def forward(self, x, y):
        logits = self.embedding(x) @ self.embedding.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_scripts_run_on_a_cpu_with_the_packages_of_a_gpu_machine(kit: dict[str, str], tmp_path: Path) -> None:
    tokens = Path(kit["KIT"]) / "data" / "tokens"
    shutil.move(tokens, tmp_path / "moved")  # makes one part fail
    merged = []
    for script in ("check", "measure"):
        out = tmp_path / script
        done = subprocess.run(
            [str(GPU / f"{script}.sh")], env=kit | {"OUT": str(out)}, capture_output=True, text=True, timeout=800
        )
        assert "done after" in done.stdout, done.stdout + done.stderr
        merged.append(str(out / "gpu.json"))
    assert sorted(path.name for path in (tmp_path / "measure").iterdir()) == [
        "gpu.json",
        "log.txt",
        "shakespeare.jsonl",
    ]
    assert "aten::mm" in (tmp_path / "check" / "kernels.txt").read_text()
    assert collect.main(["merge", *merged, "--out", str(tmp_path / "all.json")]) == 0
    items = records.read(tmp_path / "all.json")
    log = (tmp_path / "check" / "log.txt").read_text() + (tmp_path / "measure" / "log.txt").read_text()
    assert list(items) == list(collect.ITEMS), log
    (missing,) = items.pop("recipe").left_out
    assert missing.startswith("modern compared with gpt2: exit code 1: ")
    assert "no such folder" in missing.lower()
    for name, found in items.items():
        assert found.left_out == [], log
        assert found.comparisons or name == "tests"
        for comparison in found.comparisons:
            for entry in comparison.entries:
                assert entry.absent is None, (name, entry)
                assert entry.values, (name, entry)
        assert name == "tests" or found.environment["smoke"]
    assert len(items["bench"].comparisons[0].entries) == 5
    assert [e.name for e in items["step"].comparisons[0].entries] == ["restomod, eager", "build-nanogpt"]
