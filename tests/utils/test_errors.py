"""Suggestions of the most similar known name."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from restomod.utils.errors import did_you_mean


@pytest.mark.parametrize(
    ("name", "known", "suggestion"),
    [
        ("trian", ["sample", "train"], "; did you mean 'train'?"),
        ("save_evry", ["save_every", "eval_every"], "; did you mean 'save_every'?"),
        ("xyzzy", ["train", "sample", "eval"], "; known: eval, sample, train"),
        ("b", iter({"beta": 1, "alpha": 2}), "; known: alpha, beta"),
    ],
)
def test_the_most_similar_name_is_suggested_or_all_are_listed(name: str, known: Iterable[str], suggestion: str) -> None:
    assert did_you_mean(name, known) == suggestion
