"""Questions of the user's own: query or ctx, choices or endings, gold or label."""

from __future__ import annotations

from restomod.evals.tasks.example import Example, Record, get_choices, get_index, get_text, question
from restomod.evals.tasks.task import Task


def example(record: Record) -> Example:
    """The query, a space, a choice."""
    query = get_text(record, "query", "ctx")
    return question(query, get_choices(record, "choices", "endings"), get_index(record, "gold", "label"))


def own_task(name: str) -> Task:
    """The task of a file without official data."""
    return Task(name, "query, a space, the choice (your own file)", example, "acc_norm")
