"""Fuzzing of the commands with damaged files of every format that restomod reads.

    python -m tests.fuzz                          500 mutations of each format, 2 processes
    python -m tests.fuzz --mutations 5000 --seed 7 --formats sweep-journal,prices
    python -m tests.fuzz --case run-config:123    repeat one case, with its damage and the output of each command
    python -m tests.fuzz --out tests/fuzz.md      also write the table to a file

A case is a format and a number, which is the seed of the damage. Allowed outcomes: the command refuses the file in one
line with exit code 2 ("refused by name" if the line names the file), omits it, or reads it as another valid file (same
or other output). Faults: an uncaught exception or another exit code, a hang (over 10 s), over 1 GB of memory, control
characters in the output, new or changed files, more or less than one line of error.

The commands run in child processes forked from this one, which has imported everything. A child works through several
cases and is replaced if it must be killed. Network connections are refused.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import ctypes
import dataclasses
import datetime
import faulthandler
import gc
import gzip
import hashlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from restomod.utils.process_memory import status_bytes
from tests.mutations import mutated

CASES_OF_A_CHILD = 250
CPU_SECONDS = 10.0  # limit of one command
WALL_SECONDS = 60.0  # limit on a busy machine, and for a command that waits forever
MEMORY = 10**9  # bytes in addition to the memory before the command
ADDRESS_SPACE = 4 * 10**9  # limit enforced by the system, in bytes
LARGE = 100_000  # bytes; larger files are linked into the folders of children, not copied
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
FAULTS = ("traceback", "hang", "memory", "control characters", "left over", "changed", "not one line")
RIGHT = ("other", "refused", "refused by name", "same")
OUTCOMES = (*FAULTS, *RIGHT)  # if commands differ, the first outcome in this order counts

ON_CPU = "--device cpu --precision fp32"
MODEL_FLAGS = "--model.n-layer 1 --model.n-head 2 --model.n-embd 8 --model.n-positions 32"
RUN_FLAGS = f"--sequence-length 32 --batch-tokens 64 --eval-every 6 --sample-every 6 --sampling.max-tokens 2 {ON_CPU}"
CHECKPOINT = "run/checkpoints/step_000012"
RECORD = f"{CHECKPOINT}/COMPLETE"


@dataclasses.dataclass(frozen=True)
class Command:
    """Command that reads a file."""

    line: str
    """Arguments of `restomod`, separated by spaces, or the name of a function of this module."""
    every: int = 1
    """Only cases whose number is a multiple of this are tried."""
    writes: bool = False
    """Whether a successful command may change its input files."""
    exact: bool = False
    """Whether the output contains a model's text, which may be arbitrary."""
    made: str | None = None
    """Text file that the command writes, checked like its output; None: no file."""


REPORT = Command("report run --out page.html --markdown page.md", made="page.md")
VERDICT = Command("verdict run --no-weights", every=2)
COMPARE = Command("compare run run2", every=3)
INSPECT = Command("inspect run")
RESUME = Command("train --resume run --steps 13", every=50, writes=True, exact=True)
OFTEN = dataclasses.replace(RESUME, every=10)  # for files that few other commands read
EVAL = Command(
    f"eval run --tasks validation --data data --context 16 {ON_CPU} --json result.json", every=40, writes=True
)
SAMPLE = Command(f"sample run --prompt a --max-tokens 1 --num-samples 1 {ON_CPU}", every=20, exact=True)
OTHER, GPT2 = (
    (dataclasses.replace(SAMPLE, line=SAMPLE.line.replace("run", name), every=1),) for name in ("other", "model")
)
DATA = Command("data data")
DEDUPLICATED = Command("prepare FIXTURES/text/documents.jsonl --out deduplicated --dedup --workers 1", writes=True)
PROMPTS = Command(f"sample model --prompt-file prompts.txt --max-tokens 1 --num-samples 1 {ON_CPU}", exact=True)
BEGUN = Command(
    "prepare FIXTURES/text/documents.jsonl --out begun --workers 1", writes=True
)  # a plan has absolute paths
SWEEP = Command("sweep quickstart --grid optim.lr=1e-3,2e-3,4e-3 --steps 3 --out sweep", writes=True)


def prepare(source: str) -> tuple[Command, ...]:
    return (Command(f"prepare {source} --out made --workers 1", writes=True),)


def published(folder: str) -> tuple[Command, ...]:
    evaluate = dataclasses.replace(EVAL, line=EVAL.line.replace("--data data", f"--data {folder}"))
    return (Command(f"data {folder}"), evaluate)


def model(folder: str) -> tuple[Command, ...]:
    return (
        Command(f"inspect {folder}"),
        Command(f"sample {folder} --prompt a --max-tokens 1 --num-samples 1 {ON_CPU}", every=5, exact=True),
    )


def task(what: str) -> tuple[Command, ...]:
    return (Command(f"eval model {what} {ON_CPU} --json result.json", writes=True),)


@dataclasses.dataclass(frozen=True)
class Format:
    """File and the commands that read it."""

    path: str
    """Path in the folder of fixtures."""
    kind: str
    """Kind of damage, one of `tests.mutations.KINDS`."""
    commands: tuple[Command, ...]
    sealed: str | None = None
    """Record with size and SHA-256 of the file, updated after the damage so that the file is read."""


FORMATS = {
    "run-config": Format("run/config.json", "json", (REPORT, VERDICT, COMPARE, SAMPLE, EVAL, RESUME)),
    "run-environment": Format("run/environment.json", "json", (REPORT, COMPARE, RESUME)),
    "run-metrics": Format("run/metrics.jsonl", "jsonl", (REPORT, VERDICT, COMPARE, RESUME)),
    "run-samples": Format("run/samples.jsonl", "jsonl", (REPORT, RESUME)),
    "run-data": Format("run/data.json", "json", (REPORT, VERDICT, COMPARE, EVAL, RESUME)),
    "run-error-analysis": Format(
        "run/error_analysis.json",
        "json",
        (REPORT, Command("report run --out page.html --error-analysis", 25, writes=True))
    ),
    "run-validation": Format("run/evals/step_000012-validation.json", "json", (REPORT,)),
    "run-task": Format("run/evals/step_000012-questions.json", "json", (REPORT,)),
    "run-track": Format("run/track.json", "json", (Command("trackers", writes=True),)),
    "checkpoint-record": Format(RECORD, "json", (INSPECT, Command("verdict run"), SAMPLE, OFTEN)),
    "checkpoint-state": Format(
        f"{CHECKPOINT}/training_state/state.json", "json", (INSPECT, VERDICT, OFTEN), RECORD
    ),
    "checkpoint-weights": Format(
        f"{CHECKPOINT}/model.safetensors", "safetensors", (INSPECT, Command("verdict run"), OFTEN), RECORD
    ),
    "checkpoint-optimizer": Format(
        f"{CHECKPOINT}/training_state/optimizer.safetensors", "safetensors", (INSPECT, OFTEN), RECORD
    ),
    "data-manifest": Format("data/manifest.json", "json", (DATA, Command("data data --verify"), EVAL, RESUME)),
    "data-verified": Format("data/.verified.json", "json", (Command("open_data", writes=True), EVAL)),
    "data-shard": Format(
        "data/val_00000_000000.bin", "shard", (DATA, Command("data data --verify"), EVAL), "data/manifest.json"
    ),
    "data-begun": Format("begun/.prepare/plan.json", "json", (BEGUN,)),
    "data-unit": Format("begun/.prepare/unit_00000.json", "json", (BEGUN,)),
    "data-hashes": Format("deduplicated/.prepare/hashes_00000.npy", "bytes", (DEDUPLICATED,)),
    "published-bin": Format("published/web_val_000000.bin", "shard", published("published")),
    "published-npy": Format("arrays/web_val_000000.npy", "bytes", published("arrays")),
    "sweep-journal": Format("sweep/journal.jsonl", "jsonl", (SWEEP,)),
    "sweep-plan": Format("sweep/plan.json", "json", (SWEEP,)),
    "sweep-results": Format("sweep/sweep.json", "json", (SWEEP,)),
    "prices": Format("prices.toml", "toml", (Command("plan quickstart --prices prices.toml"),)),
    "task-jsonl": Format("questions.jsonl", "jsonl", task("--task questions.jsonl")),
    "task-json": Format("questions.json", "json", task("--tasks piqa=questions.json")),
    "task-parquet": Format("questions.parquet", "bytes", task("--tasks piqa=questions.parquet")),
    "text-jsonl": Format("text/documents.jsonl", "jsonl", prepare("text/documents.jsonl")),
    "text-json": Format("text/documents.json", "json", prepare("text/documents.json")),
    "text-csv": Format("text/documents.csv", "csv", prepare("text/documents.csv")),
    "text-plain": Format("text/plain.txt", "text", prepare("text/plain.txt")),
    "text-parquet": Format("text/documents.parquet", "bytes", prepare("text/documents.parquet")),
    "text-gzip": Format("text/documents.jsonl.gz", "gz", prepare("text/documents.jsonl.gz")),
    "text-bzip2": Format("text/documents.jsonl.bz2", "bz2", prepare("text/documents.jsonl.bz2")),
    "text-zstd": Format("text/documents.jsonl.zst", "zst", prepare("text/documents.jsonl.zst")),
    "text-tar": Format("text/documents.tar", "bytes", prepare("text/documents.tar")),
    "prompts": Format("prompts.txt", "text", (PROMPTS,)),
    "model-config": Format("model/config.json", "json", model("model")),
    "model-generation": Format("model/generation_config.json", "json", model("model")[:1]),
    "model-weights": Format("model/model.safetensors", "safetensors", model("model")),
    "model-vocabulary": Format("model/vocab.json", "json", GPT2),
    "model-merges": Format("model/merges.txt", "text", model("model")[:1]),
    "model-index": Format("sharded/model.safetensors.index.json", "json", model("sharded")),
    "model-pickle": Format("pickled/pytorch_model.bin", "bytes", model("pickled")),
    "other-config": Format("other/config.json", "json", OTHER),
    "other-tokenizer": Format("other/tokenizer.json", "json", OTHER),
    "other-tokenizer-config": Format("other/tokenizer_config.json", "json", OTHER),
    "other-generation": Format("other/generation_config.json", "json", OTHER),
}  # fmt: skip


def trackers() -> int:
    """Read a run's record of its trackers like training, with a tracker that does nothing."""
    from restomod.config.serialize import read_config
    from restomod.runs import trackers as track

    class Nowhere:
        def __init__(self, *_: Any) -> None: ...
        def begin(self, *_: Any) -> None: ...
        def write(self, *_: Any) -> None: ...
        def close(self) -> None: ...

    track.OPENERS = dict.fromkeys(track.OPENERS, Nowhere)  # type: ignore[misc]
    config = dataclasses.replace(read_config(Path("run")), track=("tensorboard", "wandb"))
    with track.Trackers(Path("run"), config, print):
        return 0


def open_data() -> int:
    """Open prepared data like training, which reads the record of verified shards."""
    from restomod.data.dataset import open_dataset
    from restomod.data.tokenizer import gpt2_tokenizer

    print(open_dataset(Path("data"), gpt2_tokenizer().sha256).fingerprint)
    return 0


# --- fixtures ----------------------------------------------------------------------------------------------------


def make_fixtures() -> None:
    """Write one healthy file of each format into the working directory."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from safetensors.torch import load_file, save_file

    from restomod.data.dataset import write_shard

    rng = random.Random(0)
    words = ["the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "was", "with", "be", "by", "on", "not"]
    documents = [{"text": " ".join(rng.choices(words, k=30)) + ".", "id": i} for i in range(120)]
    lines = "".join(json.dumps(document) + "\n" for document in documents).encode()
    few = "".join(json.dumps(document) + "\n" for document in documents[:12]).encode()
    Path("text").mkdir()
    for name, content in (
        ("documents.jsonl", few),
        ("documents.json", json.dumps(documents[:12]).encode()),
        ("documents.csv", "".join(["id,text\n", *(f"{d['id']},{d['text']}\n" for d in documents[:12])]).encode()),
        ("plain.txt", "".join(f"{d['text']}\n" for d in documents[:12]).encode()),
        ("documents.jsonl.gz", gzip.compress(few)),
    ):
        Path("text", name).write_bytes(content)
    Path("text/documents.jsonl.bz2").write_bytes(bz2.compress(few))
    with pa.output_stream("text/documents.jsonl.zst", compression="zstd") as stream:
        stream.write(few)
    with tarfile.open("text/documents.tar", "w") as archive:
        archive.add("text/documents.jsonl")
    pq.write_table(pa.Table.from_pylist(documents[:12]), "text/documents.parquet", write_page_checksum=True)
    Path("all.jsonl").write_bytes(lines)
    _do("prepare all.jsonl --out data --workers 1 --val-fraction 0.1")
    _do(BEGUN.line.replace("FIXTURES", os.getcwd()), stop_before="finish_folder")
    _do(DEDUPLICATED.line.replace("FIXTURES", os.getcwd()), stop_before="assign_splits")
    tokens = np.arange(400, dtype="<u2")
    for folder in ("published", "arrays"):
        Path(folder).mkdir()
    for split in ("train", "val"):
        write_shard(Path(f"published/web_{split}_000000.bin"), tokens)
        np.save(f"arrays/web_{split}_000000.npy", tokens)
    _do(f"train quickstart --out run --steps 12 --data.source tokens --data.path data {MODEL_FLAGS} {RUN_FLAGS}")
    shutil.copytree(CHECKPOINT, "model", ignore=shutil.ignore_patterns("training_state", "COMPLETE"))
    questions = [{"query": "the sky is", "choices": ["blue", "red"], "gold": i % 2} for i in range(3)]
    Path("questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    records = [{"goal": "to see", "sol1": "open it", "sol2": "shut it", "label": i % 2} for i in range(3)]
    Path("questions.json").write_text(json.dumps(records))
    pq.write_table(pa.Table.from_pylist(records), "questions.parquet", write_page_checksum=True)
    Path("prompts.txt").write_text("".join(f"{d['text']}\n" for d in documents[:3]))
    _do(f"eval run --tasks validation --data data {ON_CPU}")
    _do(f"eval run --task questions.jsonl {ON_CPU}")
    _do("report run --out page.html --error-analysis --error-analysis-tokens 200")
    _without_times(Path("run"))
    shutil.copytree("run", "run2", ignore=shutil.ignore_patterns("checkpoints", "error_analysis.json"))
    config = json.loads(Path("run2/config.json").read_text())
    Path("run2/config.json").write_text(json.dumps(config | {"seed": config["seed"] + 1}))
    Path("run/track.json").write_text('{"tensorboard": "0a1b2c3d", "wandb": "4e5f6a7b"}')
    Path("data/.verified.json").unlink(missing_ok=True)
    time.sleep(2.1)  # only files unchanged for two seconds are recorded as verified
    _do(EVAL.line)
    from restomod.experiments.plan import prices

    Path("prices.toml").write_bytes(prices.SHIPPED.read_bytes())
    _do(SWEEP.line)

    tensors = load_file("model/model.safetensors")
    shutil.copytree("model", "sharded", ignore=shutil.ignore_patterns("model.safetensors"))
    shutil.copytree("model", "pickled", ignore=shutil.ignore_patterns("model.safetensors"))
    torch.save(tensors, "pickled/pytorch_model.bin")
    index: dict[str, str] = {}
    for i, name in enumerate(("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
        part = {key: tensors[key] for key in list(tensors)[i::2]}
        save_file(part, Path("sharded", name), metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    Path("sharded/model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    )
    _make_other()
    for name in ("page.html", "result.json"):
        Path(name).unlink(missing_ok=True)


def _without_times(folder: Path) -> None:
    """Replace times by fixed numbers, so that positions of bytes are constant."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        times = {"ms": 10.0, "tokens_per_second": 6400.0, "time": 1_763_700_000.0 + record["step"]}
        record |= {name: value for name, value in times.items() if name in record}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    starts = json.loads((folder / "environment.json").read_text())
    starts = [start | {"command": ["restomod", "train", "quickstart"], "threads": 1} for start in starts]
    (folder / "environment.json").write_text(json.dumps(starts, indent=2))


def _make_other() -> None:
    """Write a tiny Llama with another tokenizer than GPT-2's, which transformers runs."""
    import tokenizers
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({c: i for i, c in enumerate("?abcdefgh")}, unk_token="?")
    )
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?", eos_token="h").save_pretrained("other")
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=9, num_hidden_layers=1, max_position_embeddings=32, eos_token_id=8, **shape)
    LlamaForCausalLM(config).save_pretrained("other")


def _do(line: str, stop_before: str | None = None) -> None:
    """Run a command that must succeed, or that is stopped before a function of `restomod.data.prepare.run`."""
    from restomod.data.prepare import run as prepare_run

    said = io.StringIO()
    before = {stop_before: getattr(prepare_run, stop_before)} if stop_before else {}
    try:
        for name in before:
            setattr(prepare_run, name, lambda *_: sys.exit(0))
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = _call(line)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    finally:
        for name, function in before.items():
            setattr(prepare_run, name, function)
    if code:
        raise RuntimeError(f"{line}: exit code {code}: {said.getvalue()}")


def _call(line: str) -> int:
    """Return the exit code of a command."""
    if line in globals():
        code: int = globals()[line]()
        return code
    from restomod.cli import main

    return main(line.split())


class Tree:
    """Copy of the fixtures whose first path component is one of ``names``, restored after each command."""

    def __init__(self, original: Path, folder: Path, names: set[str]) -> None:
        self.original, self.folder = original, folder
        folder.mkdir(parents=True)
        wanted = [path for path in self._paths(original) if path.split("/")[0] in names]
        self._states = {path: self._copy(path) for path in wanted}

    @staticmethod
    def _paths(folder: Path) -> list[str]:
        found = []
        for at, folders, files in os.walk(folder):
            found += [os.path.relpath(os.path.join(at, name), folder) for name in (*folders, *files)]
        return sorted(found)

    def _copy(self, path: str) -> object:
        there, here = self.original / path, self.folder / path
        if there.is_dir():
            here.mkdir()
        elif there.stat().st_size > LARGE:
            os.link(there, here)
        else:
            shutil.copyfile(there, here)
        return self._state(path)

    def _state(self, path: str) -> object:
        try:
            status = os.lstat(self.folder / path)
        except OSError:
            return None
        is_folder = os.path.isdir(self.folder / path)
        return "folder" if is_folder else (status.st_size, status.st_mtime_ns, status.st_ino)

    def write(self, path: str, content: bytes) -> None:
        """Replace the content of a file."""
        (self.folder / path).unlink()
        (self.folder / path).write_bytes(content)

    def changes(self, expected: dict[str, object]) -> tuple[list[str], list[str]]:
        """Return new paths, and paths that are missing or differ from ``expected`` (see `states`)."""
        now = set(self._paths(self.folder))
        changed = [path for path, state in expected.items() if self._state(path) != state]
        return sorted(now - expected.keys()), changed

    def states(self) -> dict[str, object]:
        """Return the states of all expected files."""
        return {path: self._state(path) for path in self._states}

    def restore(self) -> None:
        """Restore all files."""
        new, changed = self.changes(self._states)
        for path in (*reversed(new), *changed):
            _delete(self.folder / path)
        for path in changed:
            self._states[path] = self._copy(path)


def _delete(path: Path) -> None:
    """Remove a file, a link or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- one case ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Said:
    """Result of a command."""

    code: int | None
    """Exit code; None after an uncaught exception."""
    out: str
    err: str
    error: str = ""
    """Last line of the exception and the place where it was raised."""
    memory: int = 0
    """Additional peak memory in bytes."""


def run(line: str, made: str | None = None) -> Said:
    """Run a command in this process with output redirected to files; its file ``made`` is added to the output."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed but cached memory would hide the command's memory
    before = status_bytes("VmRSS") or 0
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    code, error = None, ""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        saved = [os.dup(number) for number in (1, 2)]
        streams = sys.stdout, sys.stderr
        for number, file in ((1, out), (2, err)):
            os.dup2(file.fileno(), number)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8")
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding="utf-8", errors="backslashreplace")
        try:
            code = _call(line)
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        except BaseException as e:
            at = [f for f in traceback.extract_tb(e.__traceback__) if "/restomod/" in f.filename] or [None]
            where = f" ({Path(at[-1].filename).name}:{at[-1].lineno})" if at[-1] else ""
            error = "".join(traceback.format_exception_only(e)).strip().splitlines()[-1][:200] + where
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            sys.stdout, sys.stderr = streams
            for number, file in zip((1, 2), saved, strict=True):
                os.dup2(file, number)
                os.close(file)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "surrogateescape"))
    if made is not None and os.path.exists(made):
        texts[0] += Path(made).read_text(encoding="utf-8", errors="surrogateescape")
    return Said(code, *texts, error, (status_bytes("VmHWM") or 0) - before)


def judged(
    said: Said, command: Command, name: str, healthy: str, new: list[str], changed: list[str]
) -> tuple[str, str]:
    """Return the outcome of a command, one of `OUTCOMES`, and its reason.

    Args:
        said: result of the command.
        command: command that was run.
        name: name of the damaged file.
        healthy: output for the healthy file.
        new: files that the command has created.
        changed: fixtures that the command has changed.
    """
    if said.code is None or said.code not in (0, 1, 2) or "Traceback (most recent call last)" in said.err:
        return "traceback", said.error or f"exit code {said.code}: {said.err[-200:]}"
    errors = [line for line in said.err.splitlines() if line.startswith("restomod: error: ")]
    if said.memory > MEMORY or any("out of memory" in error for error in errors):
        return "memory", f"{said.memory / 1e9:.1f} GB {errors}"
    shown = said.err if command.exact else said.out + said.err
    if found := CONTROL.search(shown):
        return "control characters", repr(shown[max(0, found.start() - 40) : found.end() + 20])
    changed = [path for path in changed if not path.endswith(".verified.json")]  # cache file
    left = [path for path in new if ".tmp" in path or path.startswith("..") or (said.code == 2 and not command.writes)]
    if left:
        return "left over", ", ".join(left[:3])
    if changed and (not command.writes or (said.code == 2 and command.line.startswith(("train", "eval", "report")))):
        return "changed", ", ".join(changed[:3])
    if said.code == 2:
        if len(errors) != 1 or not said.err.endswith(errors[0] + "\n"):
            return "not one line", repr(said.err[-200:])
        return ("refused by name" if name in errors[0] else "refused"), errors[0]
    return ("same" if _plain(said.out + said.err) == healthy else "other"), ""


def _plain(text: str) -> str:
    """Remove times and speeds from output."""
    return re.sub(r"[\d.,]+( (ms|s|MB/s|tokens/s|documents/s|min))", r"#\1", text)


class Child:
    """Runner of the cases of one format."""

    def __init__(self, original: Path, folder: Path, format: str) -> None:
        self.format = FORMATS[format]
        self.name = format
        words = " ".join([self.format.path, *(command.line for command in self.format.commands)])
        names = set(re.split(r"[ =/]", words)) | ({"run", "data"} if "run" in words else set())
        self.tree = Tree(original, folder / "in" / "tree", names)
        os.chdir(self.tree.folder)
        self.healthy = {}
        for command in self.format.commands:
            said = run(self._line(command), command.made)
            self.healthy[command] = _plain(said.out + said.err)
            if said.code not in (0, 1) and self.name != "text-tar":
                raise RuntimeError(f"{command.line}: with healthy files: {said}")
            self.tree.restore()

    def _line(self, command: Command) -> str:
        return command.line.replace("FIXTURES", str(self.tree.original))

    def content(self, number: int) -> bytes:
        """Return the content of the damaged file of a case."""
        healthy = (self.tree.original / self.format.path).read_bytes()
        return mutated(healthy, self.format.kind, random.Random(f"{self.name}:{number}"))

    def case(self, number: int, tell: Callable[[str], None] = lambda text: None) -> tuple[str, str]:
        """Return the outcome of a case and its reason."""
        content = self.content(number)
        found = []
        for command in self.format.commands:
            if number % command.every:
                continue
            self.tree.write(self.format.path, content)
            if self.format.sealed:
                self._seal(content)
            expected = self.tree.states()
            said = run(self._line(command), command.made)
            new, changed = self.tree.changes(expected)
            new += [f"../{name}" for name in os.listdir("..") if name != "tree"]
            name = Path(self.format.path).name
            outcome, why = judged(said, command, name, self.healthy[command], new, changed)
            found.append((OUTCOMES.index(outcome), outcome, f"{command.line.split()[0]}: {why}"))
            tell(f"--- restomod {command.line}\n{said}\n=> {outcome} {why}")
            self.tree.restore()
            for stray in set(os.listdir("..")) - {"tree"}:
                _delete(Path("..", stray))
        return min(found)[1:]

    def _seal(self, content: bytes) -> None:
        assert self.format.sealed is not None
        record = (self.tree.original / self.format.sealed).read_text()
        old = (self.tree.original / self.format.path).read_bytes()
        sizes = json.loads(record.replace(hashlib.sha256(old).hexdigest(), hashlib.sha256(content).hexdigest()))
        if "files" in sizes:
            relative = os.path.relpath(self.format.path, os.path.dirname(self.format.sealed))
            sizes["files"][relative]["bytes"] = len(content)
        self.tree.write(self.format.sealed, json.dumps(sizes).encode())


# --- the campaign ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Working:
    """Running child process."""

    process: BaseProcess
    pipe: Connection
    format: str
    cases: list[int]
    """Remaining cases; the first one is running."""
    folder: Path
    since: float = dataclasses.field(default_factory=time.monotonic)
    cpu: float = 0.0


@dataclasses.dataclass
class Result:
    """Outcome of one case."""

    format: str
    number: int
    outcome: str
    why: str
    seconds: float


def campaign(formats: Iterable[str], numbers: range, workers: int, folder: Path) -> Iterator[Result]:
    """Run the cases ``numbers`` of each format; ``folder`` holds the fixtures and their copies."""
    original = folder / "fixtures"
    if not original.exists():
        prepared(original)
    chunks = [numbers[i : i + CASES_OF_A_CHILD] for i in range(0, len(numbers), CASES_OF_A_CHILD)]
    waiting = [(name, list(chunk)) for name in formats for chunk in chunks][::-1]
    working: list[Working] = []
    while waiting or working:
        while waiting and len(working) < workers:
            working.append(_start(original, folder, *waiting.pop()))
        ready = multiprocessing.connection.wait([child.pipe for child in working], 0.5)
        for child in list(working):
            killed = None
            if child.pipe in ready:
                with contextlib.suppress(EOFError):
                    told = child.pipe.recv()
                    child.since, child.cpu = time.monotonic(), _cpu(child.process.pid)
                    if len(told) > 1:
                        child.cases.remove(told[0])
                        yield Result(child.format, *told)
                    continue
            elif killed := _hangs(child):
                with contextlib.suppress(OSError):
                    os.killpg(child.process.pid or 0, signal.SIGKILL)
            else:
                continue
            child.process.join()
            working.remove(child)
            if child.cases:
                number = child.cases.pop(0)
                log = child.folder / "hang.txt"
                at = re.findall(r'restomod/(\S+)", line (\d+)', log.read_text() if log.exists() else "")
                error = (child.folder / "error.txt").read_text()[-300:]
                why = killed or f"ended with code {child.process.exitcode}: {error}"
                why += "".join(f" {name}:{line}" for name, line in at[:2])
                yield Result(child.format, number, "hang" if killed else "traceback", why, CPU_SECONDS)
                if child.cases:
                    waiting.append((child.format, child.cases))
            shutil.rmtree(child.folder, ignore_errors=True)


def prepared(original: Path) -> None:
    """Import all modules of the commands and write the fixtures; later network connections are refused."""
    import restomod.analysis.report.error_analysis
    import restomod.analysis.report.write
    import restomod.experiments.sweep.worker
    import restomod.train.loop

    def refuse(*_: Any) -> None:
        raise OSError(101, "Network is unreachable")

    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_ADDRESS": "nowhere"}
    socket.socket.connect = refuse  # type: ignore[method-assign,assignment]
    socket.getaddrinfo = refuse  # type: ignore[assignment]
    import torch

    torch.set_num_threads(1)
    from tests.experiments.sweep import stand_in

    restomod.experiments.sweep.worker.TRAIN = (sys.executable, stand_in.__file__)  # type: ignore[assignment]
    before = os.getcwd()
    original.mkdir(parents=True)
    os.chdir(original)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            make_fixtures()
    finally:
        os.chdir(before)


def _start(original: Path, folder: Path, format: str, cases: list[int]) -> Working:
    context, home = multiprocessing.get_context("fork"), Path(tempfile.mkdtemp(dir=folder))
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(original, home, format, cases, theirs))
    process.start()
    theirs.close()  # the pipe must close when the child ends
    return Working(process, ours, format, cases, home)


def _work(original: Path, home: Path, format: str, cases: list[int], pipe: Connection) -> None:
    """Run cases in a child process; send the number at the start of a case and its outcome at the end."""
    os.setsid()
    for number in (1, 2):
        os.dup2(os.open(home / "error.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    _limit()
    gc.freeze()  # garbage of the parent, freed during a command, would hide the command's memory
    child = Child(original, home, format)
    with open(home / "hang.txt", "w") as log:
        for number in cases:
            pipe.send((number,))
            log.truncate(0)
            faulthandler.dump_traceback_later(CPU_SECONDS, file=log)
            start = time.perf_counter()
            outcome, why = child.case(number)
            faulthandler.cancel_dump_traceback_later()
            pipe.send((number, outcome, why, time.perf_counter() - start))


def _limit() -> None:
    """Limit memory and CPU time of this process."""
    size = (status_bytes("VmSize") or 0) + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**9, 10**9))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _hangs(child: Working) -> str | None:
    """Return the reason why a child counts as hanging; None if it is working."""
    cpu, wall = _cpu(child.process.pid) - child.cpu, time.monotonic() - child.since
    if cpu > CPU_SECONDS or wall > WALL_SECONDS:
        return f"after {cpu:.0f} s of computing, {wall:.0f} s in all"
    return None


def _cpu(pid: int | None) -> float:
    """Return the CPU time of a process in seconds."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def table(results: list[Result], formats: Iterable[str]) -> list[str]:
    """Return Markdown rows: number of cases by outcome for each format, and time per case."""
    shown = ("refused by name", "refused", "same", "other", *FAULTS)
    rows = ["| format | tried | " + " | ".join(shown) + " | ms |", "|---|" + "--:|" * (len(shown) + 2)]
    for name in (*formats, "all"):
        of = [r for r in results if name in ("all", r.format)]
        counts = Counter(r.outcome for r in of)
        ms = sum(r.seconds for r in of) / max(1, len(of)) * 1000
        cells = [str(counts[outcome]) for outcome in shown]
        rows.append(f"| {name} | {len(of)} | {' | '.join(cells)} | {ms:.0f} |")
    return rows


def page(results: list[Result], formats: list[str], command: str, seconds: float, workers: int) -> str:
    """Return the results as Markdown."""
    import torch

    from restomod.engine.device import describe_device

    processor = describe_device(torch.device("cpu")).partition(",")[0]
    used = os.times()
    computed = used.user + used.system + used.children_user + used.children_system
    revision = os.popen("git describe --always --dirty 2>/dev/null").read().strip()
    where = f"revision {revision}, {processor} ({os.cpu_count()} of them), Python {platform.python_version()}"
    took = f"in {seconds:.0f} s ({computed:.0f} s of computing)"
    about = f"`{command}`, {datetime.date.today()}, {where}: {len(results):,} cases with {workers} processes {took}."
    return "\n".join(
        ["# Damaged files", "", f"{about} `tests/fuzz.py` explains the columns.", "", *table(results, formats), ""]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run a campaign or one case. Return 1 if there are faults."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the campaign: which cases are tried (default 0)")
    parser.add_argument("--mutations", type=int, default=500, help="of each format (default 500)")
    parser.add_argument("--formats", help=f"some of: {', '.join(FORMATS)}")
    parser.add_argument("--workers", type=int, default=2, help="child processes at a time (default 2)")
    parser.add_argument("--out", help="write the table into this file, too")
    parser.add_argument("--case", metavar="FORMAT:NUMBER", help="try this one, and show everything")
    given = parser.parse_args(arguments)
    formats = given.formats.split(",") if given.formats else list(FORMATS)
    if unknown := set(formats) - set(FORMATS):
        parser.error(f"unknown formats: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(prefix="restomod-fuzz-") as made:
        folder = Path(made)
        if given.case:
            return _show_case(folder, given.case)
        start, results = time.monotonic(), []
        numbers = range(given.seed * 1_000_000, given.seed * 1_000_000 + given.mutations)
        for result in campaign(formats, numbers, given.workers, folder):
            results.append(result)
            if result.outcome in FAULTS:
                print(f"{result.format}:{result.number}  {result.outcome}: {result.why}", flush=True)
        seconds = time.monotonic() - start
    command = f"python -m tests.fuzz --seed {given.seed} --mutations {given.mutations}"
    text = page(results, formats, command, seconds, given.workers)
    print(text)
    if given.out:
        Path(given.out).write_text(text)
    return int(any(result.outcome in FAULTS for result in results))


def _show_case(folder: Path, case: str) -> int:
    name, _, number = case.partition(":")
    prepared(folder / "fixtures")
    before = os.getcwd()
    try:
        _limit()
        child = Child(folder / "fixtures", folder / "copy", name)
        content = child.content(int(number))
        print(f"{child.format.path}: {content[:3000]!r}{' …' if len(content) > 3000 else ''}")
        outcome, _ = child.case(int(number), print)
    finally:
        os.chdir(before)
    return int(outcome in FAULTS)


if __name__ == "__main__":
    sys.exit(main())
