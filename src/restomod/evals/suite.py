"""The verb `eval`: a model, the tasks it is asked, a table beside published results, and JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from restomod.config.run import DataConfig, Device, Precision, RunConfig
from restomod.config.serialize import read_config
from restomod.data.dataset import Dataset
from restomod.data.manifest import is_fineweb_edu
from restomod.data.prepare.text_cache import prepare_text
from restomod.data.same_tokens import read_run_data
from restomod.data.tokenizer import gpt2_tokenizer
from restomod.engine.device import choose_device, choose_dtype, describe_device, dtype_name, keep_freed_memory
from restomod.engine.distributed import Processes, device_of, join_processes
from restomod.evals.likelihood import LanguageModel
from restomod.evals.models import ScoredGPT, ScoredTransformers, open_language_model
from restomod.evals.references import Reference, references
from restomod.evals.scoring import Estimate, TaskResult, score_task, shown
from restomod.evals.tasks import VALIDATION, LoadedTask, load_task
from restomod.evals.validation import ValidationLoss, dataset_loss
from restomod.runs.checkpoint import STEP_FOLDER, step_of
from restomod.runs.folder import environment
from restomod.runs.open_model import find_model, is_run
from restomod.utils.console import Display
from restomod.utils.errors import NOT_FINITE, UserError, reason, reported_once
from restomod.utils.files import short_name, write_json_atomically, write_text_atomically
from restomod.utils.output_files import Output, require_outputs, write_outputs
from restomod.utils.text import duration

SHOWN = ("loss", "perplexity", "bits_per_byte", "acc", "acc_norm", "acc_token")


@dataclass(frozen=True)
class EvaluatedModel:
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
        return self.run / "evals" / f"{short_name(f'{at}-{task}')}{suffix}"


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
        tasks: as `restomod.evals.tasks.load_task` takes them, and "validation" for the validation loss. None: that,
            where there is data, and HellaSwag.
        limit: ask only the first examples of each task.
        data: folder of token shards for the validation loss; None: the run's own.
        context: tokens of its windows; None: as many as the run trained on.
        batch: rows per forward pass.
        device, precision: see `restomod.engine.device`.
        json_file: write all results to this file, too, after they are shown.
        cache: folder for downloads.
        display: where to print.

    Returns:
        0.

    Raises:
        UserError: the model, a task, the data or a file is not usable, or an argument would change nothing.
    """
    with reported_once():
        files = {f"the task {task}": Path(task.partition("=")[2] or task) for task in tasks or ()}
        require_outputs({"--json": json_file}, {task: path for task, path in files.items() if path.is_file()})
    with join_processes() as processes:
        display = display or Display(muted=not processes.main)
        where = device_of(choose_device(device), processes)
        if where.type == "cpu":
            keep_freed_memory()
        dtype = choose_dtype(precision, where)
        subject = processes.run_on_all_ranks(lambda: _subject(name), one_first=True)
        config = read_config(subject.run) if subject.run else None
        wanted = tasks or ([VALIDATION] if config or data else []) + ["hellaswag"]
        _refuse_unused(wanted, data, context, limit)
        loaded = processes.run_on_all_ranks(
            lambda: [load_task(task, cache, limit) for task in wanted if task != VALIDATION], one_first=True
        )
        _refuse_equal_names([task.task.name for task in loaded])
        dataset = (
            processes.run_on_all_ranks(lambda: _dataset(name, data, config), one_first=True)
            if VALIDATION in wanted
            else None
        )
        # a run may have a newer checkpoint meanwhile; all processes evaluate the same one
        found = processes.gather(str(subject.folder))[0] if Path(name).is_dir() else name
        model = processes.run_on_all_ranks(lambda: open_language_model(found, where, dtype), one_first=True)
        here = environment(describe_device(where), dtype_name(dtype)) | {"processes": processes.world_size}
        report = _Report(subject, here, display, processes.main)
        report.warn_if_unwritable()
        if dataset is not None:
            held = processes.run_on_all_ranks(
                lambda: _validation(model, dataset, context, config, where, dtype, batch, processes)
            )
            report.validation(held, dataset, other_data=data is not None and not _is_of_run(dataset, subject))
        for task in loaded:
            report.task(task, score_task(model, task, batch, processes), model)
        report.finish(json_file)
        if processes.main:
            display.require_printed()
    return 0


def _refuse_unused(wanted: list[str], data: str | None, context: int | None, limit: int | None) -> None:
    """Refuse flags that would change nothing."""
    for flag, value in (("--data", data), ("--context", context)):
        if value is not None and VALIDATION not in wanted:
            raise UserError(f"{flag} is for the validation loss, which is not asked for: add {VALIDATION} to --tasks")
    if limit is not None and set(wanted) == {VALIDATION}:
        raise UserError("--limit is for the examples of tasks, and the validation loss uses all tokens; leave it out")


def _refuse_equal_names(names: list[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"two tasks are called {twice[0]}, and one result would replace the other: rename a file")


def _subject(name: str) -> EvaluatedModel:
    folder = find_model(name)
    run = folder.parent.parent
    if STEP_FOLDER.fullmatch(folder.name) is None or not is_run(run):
        return EvaluatedModel(name, folder, None, None)
    return EvaluatedModel(name, folder, run, step_of(folder))


def _dataset(name: str, data: str | None, config: RunConfig | None) -> Dataset:
    if data is None and config is None:
        raise UserError(f"{name} is not of a run, and has no data of its own: name a folder of tokens with --data DIR")
    source = DataConfig(source="tokens", path=data) if data is not None or config is None else config.data
    dataset = prepare_text(source, gpt2_tokenizer())
    if not len(dataset.val):
        raise UserError(f"{data or name}: nothing of its data is held out for validation; name another with --data DIR")
    return dataset


def _is_of_run(dataset: Dataset, subject: EvaluatedModel) -> bool:
    """Whether tokens are those that the model's run was trained on."""
    return subject.run is not None and read_run_data(subject.run).get("fingerprint") == dataset.fingerprint


def _validation(
    model: LanguageModel,
    dataset: Dataset,
    context: int | None,
    config: RunConfig | None,
    device: torch.device,
    dtype: torch.dtype,
    batch: int | None,
    processes: Processes,
) -> ValidationLoss:
    if isinstance(model, ScoredTransformers) and not model.opened.reads_gpt2:
        raise UserError("the validation loss is that of GPT-2's tokens: of this model only tasks can be evaluated")
    T = context or (config.sequence_length if config else model.max_length)
    if model.max_length < T:
        raise UserError(f"--context {T} is longer than the model's {model.max_length} positions")
    if isinstance(model, ScoredGPT):
        held = dataset_loss(model.model, dataset, T, device, dtype, None, batch, processes, gpt2_tokenizer())
    else:
        at_once = batch or max(1, model.tokens_per_forward // T)
        held = dataset_loss(model, dataset, T, device, dtype, None, at_once, processes, gpt2_tokenizer())
    assert held is not None
    if not math.isfinite(held.loss):
        raise UserError(f"{VALIDATION}: {NOT_FINITE}")
    return held


def _remarks(loaded: LoadedTask, result: TaskResult, model: LanguageModel) -> list[str]:
    n = len(result.gold)
    lines = [f"{loaded.task.name}: {n:,} examples in {duration(result.seconds)}, {n / result.seconds:.1f} a second"]
    if result.truncated:
        lines.append(
            f"warning: {loaded.task.name}: {result.truncated:,} of {n:,} examples do not fit into the model's "
            f"{model.max_length:,} tokens; their contexts lost their beginning"
        )
    return lines


class _Report:
    """Shows every result as soon as it is known, then writes it: a failed write loses none."""

    def __init__(self, subject: EvaluatedModel, here: dict[str, Any], display: Display, main: bool) -> None:
        self.subject, self.display = subject, display
        self.about = {"model": subject.name, "folder": str(subject.folder), "step": subject.step, "environment": here}
        self.run = subject.run if main else None
        self.main = main
        self.results: dict[str, dict[str, Any]] = {}

    def warn_if_unwritable(self) -> None:
        """Warn, before the work is done, that its results can only be shown."""
        if self.run is None:
            return
        folder = self.run / "evals"
        if not os.access(folder if folder.exists() else self.run, os.W_OK):
            self.display.line(
                f"warning: {folder} cannot be written to, so results are only shown; --json FILE keeps them"
            )
            self.run = None

    def validation(self, held: ValidationLoss, dataset: Dataset, other_data: bool) -> None:
        data = {"name": dataset.manifest["name"], "fingerprint": dataset.fingerprint}
        published, why_not = references(VALIDATION), ""
        if not is_fineweb_edu(dataset.manifest):
            published, why_not = [], "published losses are not shown: they are of FineWeb-Edu, and this is other text"
        values = {"loss": held.loss, "perplexity": held.perplexity, "bits_per_byte": held.bits_per_byte}
        estimates = {name: Estimate(value, None) for name, value in values.items() if value is not None}
        windows = f"{held.tokens:,} tokens: windows of {len(held.by_position):,}"
        self._show(VALIDATION, estimates, windows, published, why_not)
        name = f"{VALIDATION}-of-{dataset.fingerprint[:8]}" if other_data else VALIDATION
        self._keep(VALIDATION, name, held.to_dict() | {"data": data})
        if self.run is not None:
            self._try_to(lambda path: self._draw(held, path), self.subject.file(name, ".png"), "drawn")

    def task(self, loaded: LoadedTask, result: TaskResult, model: LanguageModel) -> None:
        task, n = loaded.task, len(result.gold)
        self.display.lines(_remarks(loaded, result, model))
        published, why_not = references(task.name), ""
        if n != task.size and published:
            published, why_not = [], f"published results are not shown: they are of all {task.size:,} examples"
        asked = f"the first {n:,}" if loaded.limited else f"all {n:,}"
        self._show(task.name, result.metrics, f"{asked}: {task.convention}", published, why_not)
        name = f"{task.name}-first{n}" if loaded.limited else task.name
        self._keep(task.name, name, result.to_dict() | {"convention": task.convention})

    def finish(self, json_file: Path | None) -> None:
        """Write all results to one file, where that is asked."""
        if json_file is not None and self.main:
            content = self.about | {"results": self.results}
            write_outputs([Output(json_file, lambda path: write_json_atomically(path, content))], self.display.line)

    def _show(
        self, task: str, metrics: dict[str, Estimate], asked: str, published: list[Reference], why_not: str
    ) -> None:
        """A table: this model, then what is published, with whose convention it follows."""
        at = f", step {self.subject.step}" if self.subject.step is not None else ""
        names = [name for name in SHOWN if name in metrics]
        mine = [f"{self.subject.name}{at}", *(shown(metrics[name]) for name in names), asked]
        values: dict[tuple[str, str], dict[str, str]] = {}
        for r in published:
            values.setdefault((r.model, r.convention), {})[r.metric] = f"{r.value:.4g}"
        others = [
            [model, *(numbers.get(name, "") for name in names), whose] for (model, whose), numbers in values.items()
        ]
        self.display.line("")
        self.display.grid([task, *names, ""], [mine, *others])
        self.display.lines([why_not] if why_not else [])

    def _keep(self, task: str, file: str, result: dict[str, Any]) -> None:
        self.results[task] = result
        if self.run is not None:
            # on one line: thousands of choices, one a line, are no easier to read
            text = json.dumps({"task": task} | self.about | result) + "\n"
            file_of_task = self.subject.file(file, ".json")
            self._try_to(lambda path: write_text_atomically(path, text, self.run), file_of_task, "written")

    def _try_to(self, write: Callable[[Path], None], path: Path, done: str) -> None:
        try:
            path.parent.mkdir(exist_ok=True)
            write(path)
        except (OSError, UserError) as e:
            self.display.line(f"warning: {path} is not {done}: {reason(e)}")
        else:
            self.display.line(f"{done}: {path}")

    def _draw(self, held: ValidationLoss, path: Path) -> None:
        from restomod.evals.plots import draw_positions

        draw_positions(held, self.subject.name, path, self.run)
