"""Comparison of the tokens of folders, independent of shard boundaries."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from restomod.data import same_tokens
from restomod.data.dataset import MANIFEST, Dataset, ShardWriter, mix, open_dataset, open_published, write_shard
from restomod.data.same_tokens import token_difference, with_hashes
from restomod.utils.files import write_json_atomically

TOKENS = np.random.default_rng(0).integers(50257, size=5000).astype(np.uint16)


def published(folder: Path, kind: str, cuts: list[int], tokens: np.ndarray = TOKENS) -> Dataset:
    """Create shards without a manifest: a validation shard of 500 tokens, and training shards."""
    folder.mkdir()
    parts = {f"web_train_{i:06d}": part for i, part in enumerate(np.split(tokens[500:], cuts))}
    for name, part in ({"web_val_000000": tokens[:500]} | parts).items():
        if kind == "bin":
            write_shard(folder / f"{name}.bin", part)
        else:
            np.save(folder / f"{name}.npy", part)
    return open_published(folder)


def prepared(folder: Path, shard_tokens: int) -> Dataset:
    """Create shards with a manifest."""
    folder.mkdir()
    splits: dict[str, Any] = {}
    for split, part in (("train", TOKENS[500:]), ("val", TOKENS[:500])):
        writer = ShardWriter(folder, split, shard_tokens)
        writer.add(part)
        splits[split] = {"tokens": len(part), "shards": writer.close()}
    manifest = {"format": "restomod-tokens-1", "name": "web", "fingerprint": str(shard_tokens), "documents": 1}
    write_json_atomically(
        folder / MANIFEST,
        manifest | {"tokenizer": {"name": "gpt2", "sha256": "x"}, "tokens": len(TOKENS), "splits": splits},
    )
    return open_dataset(folder, "x")


def test_borders_and_kinds_of_files_do_not_matter(tmp_path: Path) -> None:
    datasets = [
        published(tmp_path / "a", "bin", [1000, 3000]),
        published(tmp_path / "b", "npy", [2500]),
        published(tmp_path / "c", "npy", []),
        prepared(tmp_path / "d", 700),
        prepared(tmp_path / "e", 10_000),
    ]
    assert len({dataset.fingerprint for dataset in datasets}) == len(datasets)
    for before in datasets:
        for now in datasets:
            assert token_difference(with_hashes(before), now) is None


@pytest.mark.parametrize("at", [500, 3210, 4999, 0])
def test_one_other_token_is_found_and_its_place_named(at: int, tmp_path: Path) -> None:
    other = TOKENS.copy()
    other[at] ^= 1
    before = with_hashes(published(tmp_path / "a", "bin", [1000, 2000, 3000]))
    difference = token_difference(before, published(tmp_path / "b", "npy", [1500], other))
    assert difference is not None
    split, first = ("val", 0) if at < 500 else ("train", min((at - 500) // 1000, 3) * 1000)
    assert f"in the {split} split, tokens {first:,} to" in difference


def test_another_number_of_tokens_is_reported(tmp_path: Path) -> None:
    before = with_hashes(published(tmp_path / "a", "bin", []))
    assert token_difference(before, published(tmp_path / "b", "bin", [], TOKENS[:-1])) == (
        "in the train split, the number of tokens is 4,499, not 4,500"
    )


def test_the_sources_of_a_mix_are_compared_one_by_one(tmp_path: Path) -> None:
    a, b = published(tmp_path / "a", "bin", [1000]), published(tmp_path / "b", "npy", [7], TOKENS[::-1].copy())
    a2, b2 = published(tmp_path / "a2", "npy", [4000]), prepared(tmp_path / "b2", 900)
    third = Fraction(1, 3)
    before = with_hashes(mix([(a, third), (b, 1 - third)]))
    assert token_difference(before, mix([(a2, third), (b, 1 - third)])) is None
    assert "shares" in str(token_difference(before, mix([(a2, 1 - third), (b, third)])))
    assert "shares" in str(token_difference(before, a2))
    assert "b2, tokens" in str(token_difference(before, mix([(a2, third), (b2, 1 - third)])))


def test_a_run_without_hashes_cannot_be_compared(tmp_path: Path) -> None:
    dataset = published(tmp_path / "a", "bin", [])
    assert "no hashes" in str(token_difference(dataset.manifest, dataset))
    assert "data.json" in str(token_difference({}, dataset))


def test_progress_is_reported_while_published_shards_are_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(same_tokens, "REPORT_SECONDS", -1.0)
    said: list[str] = []
    with_hashes(published(tmp_path / "a", "bin", [1000, 2000, 3000]), said.append)
    assert [text.partition(" shards")[0].rpartition(": ")[2] for text in said] == [f"{n} of 4" for n in (1, 2, 3)]
