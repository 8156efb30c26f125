"""The verb `eval`: a model, the tasks it is asked, a table beside published results, and JSON."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from restomod.config import DataConfig, Device, Precision, RunConfig
from restomod.config_json import read_config
from restomod.data.prepare import prepare
from restomod.data.shards import Dataset
from restomod.data.tokenizer import gpt2_tokenizer
from restomod.device import choose_device, choose_dtype, describe_device, dtype_name, keep_freed_memory
from restomod.errors import UserError
from restomod.evals.heldout import Heldout, dataset_loss
from restomod.evals.likelihood import LanguageModel
from restomod.evals.models import ScoredGPT, ScoredTransformers, open_language_model
from restomod.evals.references import references
from restomod.evals.scoring import Estimate, Result, evaluate, shown
from restomod.evals.tasks import LoadedTask, load_task
from restomod.files import write_json_atomically, write_text_atomically
from restomod.text import duration
from restomod.train.checkpoint import STEP_FOLDER, step_of
from restomod.train.console import Display
from restomod.train.distributed import Processes, device_of, joined
from restomod.train.find import find_model, is_run
from restomod.train.run import environment

HELDOUT = "heldout"
SHOWN = ("loss", "perplexity", "bits_per_byte", "acc", "acc_norm", "acc_token")


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    name: str
    folder: Path
    """The model's."""
    run: Path | None
    """The run that it is of."""
    step: int | None

    def file(self, task: str, suffix: str) -> Path:
        """Where in its run a result belongs."""
        assert self.run is not None
        at = f"step_{self.step:06d}" if self.step is not None else "model"
        return self.run / "evals" / f"{at}-{task}{suffix}"


def evaluate_model(
    name: str,
    tasks: list[str] | None,
    limit: int | None = None,
    data: str | None = None,
    context: int | None = None,
    batch: int | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
    json_file: Path | None = None,
    cache: Path = Path("data"),
    display: Display | None = None,
) -> int:
    """Evaluate a model; print a table and write JSON into the run that it is of, if it is of one.

    Args:
        name: a run, a model folder, or a name on the hub; not only GPT-2s.
        tasks: as `restomod.evals.tasks.load_task` takes them, and "heldout" for the held-out loss. None: that, where
            there is data, and HellaSwag.
        limit: ask only the first examples of each task.
        data: folder of token shards for the held-out loss; None: the run's own.
        context: tokens of its windows; None: as many as the run trained on.
        batch: rows per forward pass.
        device, precision: see `restomod.device`.
        json_file: write all results to this file, too.
        cache: folder for downloads.
        display: where to print.

    Returns:
        0.

    Raises:
        UserError: the model, a task, the data or a file is not usable.
    """
    if json_file is not None and not json_file.parent.is_dir():
        raise UserError(f"{json_file}: there is no folder {json_file.parent}; make it, or choose another file")
    with joined() as processes:
        display = display or Display(muted=not processes.main)
        where = device_of(choose_device(device), processes)
        if where.type == "cpu":
            keep_freed_memory()
        dtype = choose_dtype(precision, where)
        subject = processes.together(lambda: _subject(name), one_first=True)
        config = read_config(subject.run) if subject.run else None
        wanted = tasks or ([HELDOUT] if config or data else []) + ["hellaswag"]
        loaded = processes.together(
            lambda: [load_task(task, cache, limit) for task in wanted if task != HELDOUT], one_first=True
        )
        dataset = (
            processes.together(lambda: _dataset(name, data, config), one_first=True) if HELDOUT in wanted else None
        )
        # a run may have a newer checkpoint meanwhile; all processes evaluate the same one
        found = processes.gather(str(subject.folder))[0] if Path(name).is_dir() else name
        model = processes.together(lambda: open_language_model(found, where, dtype), one_first=True)
        here = environment(describe_device(where), dtype_name(dtype)) | {"processes": processes.count}
        results: dict[str, dict[str, Any]] = {}
        rows: list[tuple[str, str, dict[str, Estimate], str]] = []
        if dataset is not None:
            held = processes.together(lambda: _heldout(model, dataset, context, config, where, dtype, batch, processes))
            results[HELDOUT] = held.to_dict()
            windows = f"windows of {len(held.by_position):,}"
            rows.append((HELDOUT, windows, _estimates(held), f"{held.tokens:,} tokens"))
            if subject.run:
                processes.from_main(functools.partial(_draw, subject, held, display))  # the others wait for it
        for task in loaded:
            result = evaluate(model, task, batch, processes)
            display.lines(_remarks(task, result, model))
            results[task.task.name] = result.to_dict() | {"convention": task.task.convention}
            rows.append((task.task.name, task.task.convention, result.metrics, _asked(task)))
        if processes.main:
            _write(subject, results, {t.task.name: t for t in loaded}, here, json_file, display)
            for headings, lines in _tables(subject, rows):
                display.line("")
                display.grid(headings, lines)
            display.require_printed()
    return 0


def _subject(name: str) -> Subject:
    folder = find_model(name)
    run = folder.parent.parent
    if STEP_FOLDER.fullmatch(folder.name) is None or not is_run(run):
        return Subject(name, folder, None, None)
    return Subject(name, folder, run, step_of(folder))


def _dataset(name: str, data: str | None, config: RunConfig | None) -> Dataset:
    if data is None and config is None:
        raise UserError(f"{name} is not of a run, and has no data of its own: name a folder of tokens with --data DIR")
    source = DataConfig(source="tokens", path=data) if data is not None or config is None else config.data
    dataset = prepare(source, gpt2_tokenizer())
    if not len(dataset.val):
        raise UserError(f"{data or name}: nothing of its data is held out for validation; name another with --data DIR")
    return dataset


def _heldout(
    model: LanguageModel,
    dataset: Dataset,
    context: int | None,
    config: RunConfig | None,
    device: torch.device,
    dtype: torch.dtype,
    batch: int | None,
    processes: Processes,
) -> Heldout:
    if isinstance(model, ScoredTransformers) and not model.opened.reads_gpt2:
        raise UserError("the held-out loss is that of GPT-2's tokens: of this model only tasks can be evaluated")
    T = context or (config.sequence_length if config else model.max_length)
    if model.max_length < T:
        raise UserError(f"--context {T} is longer than the model's {model.max_length} positions")
    if isinstance(model, ScoredGPT):
        held = dataset_loss(model.model, dataset, T, device, dtype, None, batch, processes, gpt2_tokenizer())
    else:
        at_once = batch or max(1, model.tokens_per_forward // T)
        held = dataset_loss(model, dataset, T, device, dtype, None, at_once, processes, gpt2_tokenizer())
    assert held is not None
    return held


def _estimates(held: Heldout) -> dict[str, Estimate]:
    values = {"loss": held.loss, "perplexity": held.perplexity, "bits_per_byte": held.bits_per_byte}
    return {name: Estimate(value, None) for name, value in values.items() if value is not None}


def _asked(loaded: LoadedTask) -> str:
    n = len(loaded.examples)
    return f"the first {n:,}" if loaded.limited else f"all {n:,}"


def _remarks(loaded: LoadedTask, result: Result, model: LanguageModel) -> list[str]:
    n = len(result.gold)
    lines = [f"{loaded.task.name}: {n:,} examples in {duration(result.seconds)}, {n / result.seconds:.1f} a second"]
    if result.truncated:
        lines.append(
            f"warning: {loaded.task.name}: {result.truncated:,} of {n:,} examples do not fit into the model's "
            f"{model.max_length:,} tokens; their contexts lost their beginning"
        )
    return lines


def _write(
    subject: Subject,
    results: dict[str, dict[str, Any]],
    loaded: dict[str, LoadedTask],
    here: dict[str, Any],
    json_file: Path | None,
    display: Display,
) -> None:
    about = {"model": subject.name, "folder": str(subject.folder), "step": subject.step, "environment": here}
    if json_file is not None:
        write_json_atomically(json_file, about | {"results": results})
        display.line(f"written: {json_file}")
    if subject.run is None:
        return
    (subject.run / "evals").mkdir(exist_ok=True)
    for name, result in results.items():
        limited = name in loaded and loaded[name].limited
        path = subject.file(name, f"-first{result['examples']}.json" if limited else ".json")
        # on one line: thousands of choices, one a line, are no easier to read
        write_text_atomically(path, json.dumps({"task": name} | about | result) + "\n")
        display.line(f"written: {path}")


def _draw(subject: Subject, held: Heldout, display: Display) -> None:
    from restomod.evals.plots import draw_positions

    path = subject.file(HELDOUT, ".png")
    path.parent.mkdir(exist_ok=True)
    draw_positions(held, subject.name, path)
    display.line(f"drawn: {path}")


def _tables(
    subject: Subject, rows: list[tuple[str, str, dict[str, Estimate], str]]
) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Headings and rows of a table per task: this model, then what is published, with whose convention it follows."""
    at = f", step {subject.step}" if subject.step is not None else ""
    for task, convention, metrics, asked in rows:
        published = references(task)
        names = [name for name in SHOWN if name in metrics]
        mine = [f"{subject.name}{at}", *(shown(metrics[name]) for name in names), f"{asked}: {convention}"]
        values: dict[tuple[str, str], dict[str, str]] = {}
        for r in published:
            values.setdefault((r.model, r.convention), {})[r.metric] = f"{r.value:.4g}"
        others = [
            [model, *(numbers.get(name, "") for name in names), whose] for (model, whose), numbers in values.items()
        ]
        yield [task, *names, ""], [mine, *others]
