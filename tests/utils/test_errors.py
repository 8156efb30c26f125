from __future__ import annotations

from restomod.utils.errors import did_you_mean


def test_the_nearest_name_is_suggested() -> None:
    assert did_you_mean("trian", ["sample", "train"]) == "; did you mean 'train'?"


def test_only_one_name_is_suggested() -> None:
    assert did_you_mean("save_evry", ["save_every", "eval_every"]) == "; did you mean 'save_every'?"


def test_where_none_is_near_all_are_listed_in_order() -> None:
    assert did_you_mean("xyzzy", ["train", "sample", "eval"]) == "; known: eval, sample, train"


def test_names_may_come_from_any_iterable() -> None:
    assert did_you_mean("b", iter({"beta": 1, "alpha": 2})) == "; known: alpha, beta"
