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
    f"Comma-separated tasks: {', '.join([VALIDATION, *TASKS])}. NAME=FILE reads the data of a task from a file. "
    f"None: {VALIDATION} if data is available, and hellaswag."
)
RARE = ("context", "batch", "cache")


@dataclass(frozen=True, kw_only=True)
class EvalArguments(ModelArguments):
    """Flags of `restomod eval`."""

    tasks: Annotated[str | None, tyro.conf.arg(help=TASKS_HELP)] = None
    task: str | None = None
    """File with your own questions (.jsonl): query (or ctx), choices (or endings) and gold (or label) in every line.
    None: no own questions."""
    limit: int | None = None
    """Maximum number of examples per task; the first ones are used. None: all."""
    data: str | None = None
    """Folder of token shards for the validation loss. None: the validation split of the run's data."""
    context: int | None = None
    """Tokens per window of the validation loss. None: the sequence length of the run's training."""
    batch: int | None = None
    """Contexts of questions, or windows of the validation loss, per forward pass. It changes the results only by
    rounding. None: chosen automatically."""
    json: Path | None = None
    """JSON file for all results. The results of a run are always written to its folder evals/ too. None: no file."""
    cache: Path = Path("data")
    """Cache folder for HellaSwag. The other datasets are in the cache of the Hugging Face client."""


def run(arguments: list[str]) -> int:
    """Evaluate a model, and return the exit code."""
    with reported_once():
        parsed = parse(EvalArguments, arguments, "restomod eval", rare=RARE)
        for flag in ("limit", "context", "batch"):
            require_size(f"--{flag}", getattr(parsed, flag))

    from restomod.evals.suite import EvalRequest, run_eval
    from restomod.evals.tasks.registry import task_names

    tasks = [] if parsed.tasks is None else task_names(parsed.tasks)
    tasks += [] if parsed.task is None else [parsed.task]
    what = parsed.limit, parsed.data, parsed.context, parsed.batch
    request = EvalRequest(parsed.model, tuple(tasks), *what, parsed.device, parsed.precision, parsed.cache)
    return run_eval(request, parsed.json)
