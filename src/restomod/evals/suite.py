"""Evaluation of a model: validation loss and tasks, printed next to published results and written as JSON.

Example, without printing or writing::

    from restomod.evals.suite import EvalRequest, evaluate_model

    results = evaluate_model(EvalRequest("runs/mine", tasks=("validation", "hellaswag"), limit=200))
    results["hellaswag"].metrics["acc_norm"].value
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
from restomod.engine.distributed import SINGLE, Processes, device_of, join_processes
from restomod.evals.likelihood import LanguageModel
from restomod.evals.models import ScoredGPT, ScoredTransformers, open_language_model
from restomod.evals.scoring import Estimate, format_estimate, score_task
from restomod.evals.tasks.registry import VALIDATION, LoadedTask, load_task, references
from restomod.evals.tasks.task import Reference
from restomod.evals.validation import ValidationLoss, dataset_loss
from restomod.runs.folder import environment
from restomod.runs.open_model import find_model, is_run
from restomod.utils.console import Display
from restomod.utils.errors import NOT_FINITE, UserError, reason, reported_once
from restomod.utils.files import short_name, write_json_atomically, write_text_atomically
from restomod.utils.output_files import Output, require_outputs, write_outputs
from restomod.utils.run_files import STEP_FOLDER, step_of
from restomod.utils.text import duration

COLUMNS = ("loss", "perplexity", "bits_per_byte", "acc", "acc_norm", "acc_token")


@dataclass(frozen=True)
class EvalRequest:
    """Settings of an evaluation."""

    model: str
    """Run, model folder or name on the Hugging Face hub; any causal language model."""
    tasks: tuple[str, ...] = ()
    """Tasks as in `restomod.evals.tasks.registry.load_task`, or "validation" for the validation loss. Empty: HellaSwag
    and, if data is known, the validation loss."""
    limit: int | None = None
    """Maximum number of examples per task, the first ones; None: all."""
    data: str | None = None
    """Folder of token shards for the validation loss; None: the data of the run."""
    context: int | None = None
    """Tokens per window of the validation loss; None: the sequence length of the run or, without a run, the context
    length of the model."""
    batch: int | None = None
    """Contexts (tasks) or windows (validation loss) per forward pass; None: chosen automatically."""
    device: Device = "auto"
    precision: Precision = "auto"
    """Compute dtype."""
    cache: Path = Path("data")
    """Folder for downloads."""


@dataclass(frozen=True)
class EvalResult:
    """Result of a model on one task, or its validation loss."""

    task: str
    metrics: dict[str, Estimate]
    scope: str
    """Evaluated examples or tokens, and the convention, as text."""
    values: dict[str, Any]
    """All measured values, as JSON values."""
    file_stem: str
    """Name of the result files in `evals/`, without step and suffix; differs for other data or fewer examples."""
    references: tuple[Reference, ...] = ()
    """Published results on the same data."""
    notes: list[str] = field(default_factory=list)
    """Lines printed above the table."""
    validation: ValidationLoss | None = None
    """Validation loss; None for other tasks."""


@dataclass(frozen=True)
class OpenEvaluation:
    """Loaded model and tasks of an evaluation."""

    request: EvalRequest
    folder: Path
    """Folder of the model."""
    run: Path | None
    """Run that the checkpoint belongs to; None: the model is not a checkpoint of a run."""
    step: int | None
    """Step of the checkpoint; None: the model is not a checkpoint of a run."""
    model: LanguageModel
    tasks: list[LoadedTask]
    dataset: Dataset | None
    """Data of the validation loss; None: the validation loss is not requested."""
    config: RunConfig | None
    """Configuration of the run; None: the model is not a checkpoint of a run."""
    device: torch.device
    dtype: torch.dtype
    processes: Processes
    skipped: str = ""
    """Task that is skipped, and why; "" if none is."""

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """Model and environment as JSON values."""
        here = environment(describe_device(self.device), dtype_name(self.dtype))
        here["processes"] = self.processes.world_size
        return {"model": self.request.model, "folder": str(self.folder), "step": self.step, "environment": here}

    def results(self) -> Iterator[EvalResult]:
        """Yield the result of each task in order. All ranks must iterate and get the same results.

        Raises:
            UserError: an example cannot be scored, or the model's output is not finite.
        """
        if self.dataset is not None:
            dataset = self.dataset
            loss = self.processes.run_on_all_ranks(lambda: self._validation_loss(dataset))
            yield self._validation_result(loss, dataset)
        for loaded in self.tasks:
            yield self._task_result(loaded)

    def _validation_loss(self, dataset: Dataset) -> ValidationLoss:
        model, batch = self.model, self.request.batch
        if isinstance(model, ScoredTransformers) and not model.opened.reads_gpt2:
            raise UserError("the validation loss needs a model with GPT-2's tokens; select other tasks with --tasks")
        T = self.request.context or (self.config.sequence_length if self.config else model.max_length)
        if model.max_length < T:
            raise UserError(f"--context {T} is longer than the model's context length of {model.max_length}")
        if not isinstance(model, ScoredGPT):
            batch = batch or max(1, model.tokens_per_forward // T)
        scored = model.model if isinstance(model, ScoredGPT) else model
        tokenizer = gpt2_tokenizer()
        loss = dataset_loss(scored, dataset, T, self.device, self.dtype, None, batch, self.processes, tokenizer)
        assert loss is not None
        if not math.isfinite(loss.loss):
            raise UserError(f"{VALIDATION}: {NOT_FINITE}")
        return loss

    def _validation_result(self, loss: ValidationLoss, dataset: Dataset) -> EvalResult:
        of_run = self.run is not None and read_run_data(self.run).get("fingerprint") == dataset.fingerprint
        other_data = self.request.data is not None and not of_run
        published = is_fineweb_edu(dataset.manifest)
        values = {"loss": loss.loss, "perplexity": loss.perplexity, "bits_per_byte": loss.bits_per_byte}
        return EvalResult(
            VALIDATION,
            {name: Estimate(value, None) for name, value in values.items() if value is not None},
            f"{loss.tokens:,} tokens, windows of {len(loss.by_position):,}",
            loss.to_dict() | {"data": {"name": dataset.manifest["name"], "fingerprint": dataset.fingerprint}},
            f"{VALIDATION}-of-{dataset.fingerprint[:8]}" if other_data else VALIDATION,
            references(VALIDATION) if published else (),
            []
            if published
            else ["published losses are not shown: they were measured on FineWeb-Edu, not on this data"],
            loss,
        )

    def _task_result(self, loaded: LoadedTask) -> EvalResult:
        task, result = loaded.task, score_task(self.model, loaded, self.request.batch, self.processes)
        n = len(result.gold)
        notes = [f"{task.name}: {n:,} examples in {duration(result.seconds)}, {n / result.seconds:.1f} examples/s"]
        if result.truncated:
            notes.append(
                f"warning: {task.name}: {result.truncated:,} of {n:,} examples are longer than the context length of "
                f"{self.model.max_length:,} tokens; the beginning of their contexts was cut"
            )
        published = task.references if n == task.size else ()
        if task.references and not published:
            notes.append(f"published results are not shown: they were measured on all {task.size:,} examples")
        asked = f"the first {n:,}" if loaded.limited else f"all {n:,}"
        return EvalResult(
            task.name,
            result.metrics,
            f"{asked}: {task.convention}",
            result.to_dict() | {"convention": task.convention},
            f"{task.name}-first{n}" if loaded.limited else task.name,
            published,
            notes,
        )


def evaluate_model(request: EvalRequest, processes: Processes = SINGLE) -> dict[str, EvalResult]:
    """Evaluate a model and return its results by task, without printing or writing.

    Raises:
        UserError: see `open_evaluation` and `OpenEvaluation.results`.
    """
    return {result.task: result for result in open_evaluation(request, processes).results()}


def open_evaluation(request: EvalRequest, processes: Processes = SINGLE) -> OpenEvaluation:
    """Load the model and the data of its tasks. Missing files are downloaded.

    Args:
        request: settings of the evaluation.
        processes: ranks that share the work.

    Raises:
        UserError: the model, a task or its data cannot be used, or a setting would have no effect.
    """
    device = device_of(choose_device(request.device), processes)
    if device.type == "cpu":
        keep_freed_memory()
    dtype = choose_dtype(request.precision, device)
    folder = processes.run_on_all_ranks(lambda: find_model(request.model), one_first=True)
    is_checkpoint = STEP_FOLDER.fullmatch(folder.name) is not None and is_run(folder.parent.parent)
    run, step = (folder.parent.parent, step_of(folder)) if is_checkpoint else (None, None)
    config = read_config(run) if run is not None else None
    has_data = config is not None or request.data is not None
    wanted = request.tasks or (*([VALIDATION] if has_data else []), "hellaswag")
    _refuse_unused(request, wanted)
    skipped = ""
    try:
        tasks = processes.run_on_all_ranks(
            lambda: [load_task(task, request.cache, request.limit) for task in wanted if task != VALIDATION],
            one_first=True,
        )
    except UserError as e:
        if request.tasks or not has_data:
            raise
        wanted, tasks, skipped = (VALIDATION,), [], f"hellaswag is skipped: {e}"  # only the default task fails
    names = [loaded.task.name for loaded in tasks]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"two tasks have the name {twice[0]}, so one result would replace the other: rename a file")
    dataset = None
    if VALIDATION in wanted:
        dataset = processes.run_on_all_ranks(lambda: _open_data(request, config), one_first=True)
    # training may save a new checkpoint during this function; all ranks evaluate the same one
    found = Path(processes.gather(str(folder))[0]) if Path(request.model).is_dir() else folder
    model = processes.run_on_all_ranks(lambda: open_language_model(request.model, device, dtype, found), one_first=True)
    return OpenEvaluation(request, folder, run, step, model, tasks, dataset, config, device, dtype, processes, skipped)


def _refuse_unused(request: EvalRequest, wanted: tuple[str, ...]) -> None:
    """Raise UserError for flags that would have no effect."""
    for flag, value in (("--data", request.data), ("--context", request.context)):
        if value is not None and VALIDATION not in wanted:
            raise UserError(f"{flag} needs the validation loss: add {VALIDATION} to --tasks, or remove {flag}")
    if request.limit is not None and set(wanted) == {VALIDATION}:
        raise UserError("--limit applies to the examples of tasks, not to the validation loss; remove --limit")


def _open_data(request: EvalRequest, config: RunConfig | None) -> Dataset:
    if request.data is not None:
        source = DataConfig(source="tokens", path=request.data)
    elif config is not None:
        source = config.data
    else:
        raise UserError(
            f"{request.model} is not a checkpoint of a run, so its data is unknown; name token shards with --data DIR"
        )
    dataset = prepare_text(source)
    if not len(dataset.val):
        name = request.data or request.model
        raise UserError(f"{name}: the data has no validation split; name other data with --data DIR")
    return dataset


def run_eval(request: EvalRequest, json_file: Path | None = None, display: Display | None = None) -> int:
    """Evaluate a model, print each result and write it. Under torchrun, all ranks share the work.

    Results of a checkpoint of a run are written into the run's folder `evals/`. A write error there is a warning.

    Args:
        request: settings of the evaluation.
        json_file: additional file for all results; None: no such file.
        display: output; None: the console of the main process.

    Returns:
        Exit code 0.

    Raises:
        UserError: see `evaluate_model`; or ``json_file`` cannot be written.
    """
    with reported_once():
        files = {f"the task {task}": Path(task.partition("=")[2] or task) for task in request.tasks}
        require_outputs({"--json": json_file}, {task: path for task, path in files.items() if path.is_file()})
    with join_processes() as processes:
        display = display or Display(muted=not processes.main)
        evaluation = open_evaluation(request, processes)
        folder = _result_folder(evaluation, display)
        if evaluation.skipped:
            display.warn(evaluation.skipped)
        results = {}
        for result in evaluation.results():
            show_result(result, evaluation, display)
            results[result.task] = result.values
            if folder is not None:
                _write_result(result, evaluation, folder, display)
        if processes.main:
            if json_file is not None:
                content = evaluation.about | {"results": results}
                write_outputs([Output(json_file, lambda path: write_json_atomically(path, content))], display.line)
            display.require_printed()
    return 0


def show_result(result: EvalResult, evaluation: OpenEvaluation, display: Display) -> None:
    """Print a table of this model's result and published results, each with its convention."""
    at = f", step {evaluation.step}" if evaluation.step is not None else ""
    names = [name for name in COLUMNS if name in result.metrics]
    mine = [f"{evaluation.request.model}{at}", *(format_estimate(result.metrics[name]) for name in names), result.scope]
    published: dict[tuple[str, str], dict[str, str]] = {}
    for r in result.references:
        published.setdefault((r.model, r.convention), {})[r.metric] = f"{r.value:.4g}"
    others = [[model, *(v.get(name, "") for name in names), convention] for (model, convention), v in published.items()]
    display.lines(result.notes)
    display.line("")
    display.grid([result.task, *names, ""], [mine, *others])


def _result_folder(evaluation: OpenEvaluation, display: Display) -> Path | None:
    """Return the run's folder for results; None without a run or, after a warning, if the folder is not writable."""
    run = evaluation.run
    if run is None or not evaluation.processes.main:
        return None
    folder = run / "evals"
    if os.access(folder if folder.exists() else run, os.W_OK):
        return folder
    display.line(f"warning: {folder} is not writable, so results are only printed; save them with --json FILE")
    return None


def _write_result(result: EvalResult, evaluation: OpenEvaluation, folder: Path, display: Display) -> None:
    """Write a result as JSON and, for a validation loss, a plot of the loss by position."""
    stem = f"step_{evaluation.step:06d}-{result.file_stem}"
    # one line, because there are thousands of choices
    text = json.dumps({"task": result.task} | evaluation.about | result.values) + "\n"

    def write(suffix: str, done: str, write_to: Callable[[Path], None]) -> None:
        path = folder / f"{short_name(stem)}{suffix}"
        try:
            folder.mkdir(exist_ok=True)
            write_to(path)
        except (OSError, UserError) as e:
            display.line(f"warning: {path} is not {done}: {reason(e)}")
        else:
            display.line(f"{done}: {path}")

    write(".json", "written", lambda path: write_text_atomically(path, text, evaluation.run))
    loss = result.validation
    if loss is not None:
        from restomod.evals.plots import draw_positions  # matplotlib

        write(".png", "drawn", lambda path: draw_positions(loss, evaluation.request.model, path, evaluation.run))
