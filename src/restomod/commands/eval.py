"""Command `eval`: evaluate a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from restomod.commands.flags import ModelArguments
from restomod.commands.parsing import parse
from restomod.config.model import require_size
from restomod.evals.tasks.registry import TASKS, VALIDATION
from restomod.utils.errors import reported_once

MEMORY_HINT = "lower --batch or --context"
TASKS_HELP = (
    f"Comma-separated names: {', '.join([VALIDATION, *TASKS])}. NAME=FILE reads a task's data from a file. "
    f"Default: {VALIDATION} (where there is data) and hellaswag."
)


@dataclass(frozen=True, kw_only=True)
class EvalArguments(ModelArguments):
    tasks: Annotated[str | None, tyro.conf.arg(help=TASKS_HELP)] = None
    task: str | None = None
    """Your own questions: a .jsonl file with query (or ctx), choices (or endings) and gold (or label) in every line."""
    limit: int | None = None
    """Evaluate on the first N examples of each task only."""
    data: str | None = None
    """Folder of token shards for the validation loss. Default: the validation split of the run's data."""
    context: int | None = None
    """Tokens per window of the validation loss. Default: the sequence length of the run's training."""
    batch: int | None = None
    """Contexts (windows) per forward pass. It changes the speed and not the results. Default: chosen automatically."""
    json: Path | None = None
    """Write all results to this file. Results of a run's model are also written to its folder evals/."""
    cache: Path = Path("data")
    """Folder for HellaSwag's file. Other data sets go into the cache of the Hugging Face client."""


def run(arguments: list[str]) -> int:
    """Evaluate. Returns the exit code."""
    with reported_once():
        parsed = parse(EvalArguments, arguments, "restomod eval")
        for flag in ("limit", "context", "batch"):
            require_size(f"--{flag}", getattr(parsed, flag))

    from restomod.evals.suite import EvalRequest, run_eval
    from restomod.evals.tasks.registry import task_names

    tasks = [] if parsed.tasks is None else task_names(parsed.tasks)
    tasks += [] if parsed.task is None else [parsed.task]
    what = parsed.limit, parsed.data, parsed.context, parsed.batch
    request = EvalRequest(parsed.model, tuple(tasks), *what, parsed.device, parsed.precision, parsed.cache)
    return run_eval(request, parsed.json)
