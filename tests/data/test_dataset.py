from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import re
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from restomod.data.dataset import ShardWriter, TokenStream, open_dataset, open_published, open_shard, write_shard
from restomod.utils.errors import UserError
from tests.properties import examples

VOCABULARY = "f" * 64


def llm_c(tokens: list[int], magic: int = 20240520, version: int = 1, count: int | None = None) -> bytes:
    """Return a shard in the layout of llm.c's dev/data/data_common.py: 256 int32, then uint16, all little-endian."""
    header = [magic, version, len(tokens) if count is None else count] + [0] * 253
    return struct.pack("<256i", *header) + struct.pack(f"<{len(tokens)}H", *tokens)


def refusal(path: Path, call: Any, *arguments: Any) -> str:
    """Return the error message of a call, which is one line and contains ``path``."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- one shard ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [[7], [0, 1, 50256, 65535], list(range(1000))])
def test_a_shard_has_the_bytes_of_llm_c(tmp_path: Path, tokens: list[int]) -> None:
    entry = write_shard(tmp_path / "a.bin", np.array(tokens, dtype=np.uint16))
    content = (tmp_path / "a.bin").read_bytes()
    assert content == llm_c(tokens)
    assert entry == {"file": "a.bin", "tokens": len(tokens), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_shard_is_mapped_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(llm_c([3, 50256, 65535, 0]))
    tokens = open_shard(tmp_path / "a.bin")
    assert isinstance(tokens, np.memmap)
    assert (tokens.tolist(), tokens.dtype) == ([3, 50256, 65535, 0], np.uint16)


WHOLE = llm_c([1, 2, 3, 4])
BAD_SHARDS = {
    "one token short": (WHOLE[:-2], "is damaged: expected 1,032 bytes for the 4 tokens"),
    "one byte short": (WHOLE[:-1], "is damaged: expected 1,032 bytes for the 4 tokens"),
    "one token long": (WHOLE + b"\x00\x00", "is damaged: expected 1,032 bytes for the 4 tokens"),
    "cut in the header": (WHOLE[:512], "is not a token shard"),
    "cut within a number of the header": (WHOLE[:511], "is not a token shard"),
    "empty": (b"", "is not a token shard"),
    "wrong magic": (llm_c([1, 2], magic=20240521), "is not a token shard: no magic number 20240520"),
    "wrong version": (llm_c([1, 2], version=2), "is not a token shard"),
    "wrong count": (llm_c([1, 2], count=3), "is damaged: expected 1,030 bytes for the 3 tokens"),
    "negative count": (llm_c([1, 2], count=-1), "is damaged: expected 1,022 bytes for the -1 tokens"),
}


@pytest.mark.parametrize("what", BAD_SHARDS)
def test_a_bad_shard_is_refused_by_name(tmp_path: Path, what: str) -> None:
    """The fix for a published shard is another download, not another preparation."""
    content, said = BAD_SHARDS[what]
    path = tmp_path / "x_train_000001.bin"
    path.write_bytes(content)
    assert refusal(path, open_shard, path).startswith(f"{path} {said}")
    message = refusal(path, open_published, tmp_path)
    assert message.startswith(f"{path} {said}")
    assert message.endswith("; download it again")


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    assert "cannot read this token shard (No such file" in refusal(path, open_shard, path)


# --- shard boundaries ---------------------------------------------------------------------------------------


@examples(25)
@given(chunks=st.lists(st.integers(0, 30), max_size=8), shard_tokens=st.integers(1, 20))
def test_the_writer_cuts_a_stream_into_full_shards_and_a_rest(chunks: list[int], shard_tokens: int) -> None:
    stream = np.arange(sum(chunks), dtype=np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(Path(folder), "train", shard_tokens)
        for chunk in np.split(stream, np.cumsum(chunks))[: len(chunks)]:
            writer.add(chunk)
        entries = writer.close()
        written = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    expected = [stream[i : i + shard_tokens].tolist() for i in range(0, len(stream), shard_tokens)]
    assert written == {f"train_{i:06d}.bin": llm_c(tokens) for i, tokens in enumerate(expected)}
    assert [entry["file"] for entry in entries] == sorted(written)
    assert [entry["tokens"] for entry in entries] == [len(tokens) for tokens in expected]
    assert writer.tokens == len(stream)


# --- reading across shards ----------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 200), max_size=6), data=st.data())
def test_a_stream_of_any_shards_reads_like_one_array(lengths: list[int], data: st.DataObject) -> None:
    whole = np.arange(100, 100 + sum(lengths), dtype=np.uint16)
    stream = TokenStream(np.split(whole, np.cumsum(lengths))[: len(lengths)])
    start = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, len(whole) - start))
    part = stream.read(start, length)
    assert part.tolist() == whole[start : start + length].tolist()
    assert part.dtype == np.uint16


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 6), (5, 1), (6, 0), (3, -1)])
def test_a_read_outside_the_stream_is_an_index_error(start: int, length: int) -> None:
    stream = TokenStream([np.arange(3, dtype=np.uint16), np.arange(2, dtype=np.uint16)])
    with pytest.raises(IndexError, match="of a stream of 5"):
        stream.read(start, length)


# --- a prepared folder --------------------------------------------------------------------------------------

SHARDS = {"train": [[1, 2, 3], [4, 5]], "val": [[6, 7]]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Create a prepared folder without the tested code."""
    splits = {}
    for split, shards in SHARDS.items():
        entries = []
        for i, tokens in enumerate(shards):
            name = f"{split}_{i:06d}.bin"
            (tmp_path / name).write_bytes(llm_c(tokens))
            sha256 = hashlib.sha256(llm_c(tokens)).hexdigest()
            entries.append({"file": name, "tokens": len(tokens), "sha256": sha256})
        n = sum(map(len, shards))
        splits[split] = {"tokens": n, "documents": 1, "text_bytes": 9, "shards": entries}
    manifest = {
        "format": "restomod-tokens-1",
        "name": "text",
        "fingerprint": "0" * 64,
        "tokenizer": {"name": "gpt2", "vocab_size": 50257, "sha256": VOCABULARY},
        "documents": 2,
        "tokens": 7,
        "splits": splits,
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_a_prepared_folder_is_opened(folder: Path) -> None:
    dataset = open_dataset(folder, VOCABULARY)
    assert dataset.train.read(0, 5).tolist() == [1, 2, 3, 4, 5]
    assert dataset.val.read(0, 2).tolist() == [6, 7]
    assert (len(dataset.train), len(dataset.val), dataset.fingerprint) == (5, 2, "0" * 64)


SHARD_FILES = pytest.mark.parametrize("name", ["train_000000.bin", "train_000001.bin", "val_000000.bin"])


@SHARD_FILES
@pytest.mark.parametrize("verify", ["sizes", "changed"])
@pytest.mark.parametrize("missing", [False, True])
def test_a_missing_or_truncated_shard_of_a_folder_is_refused(
    folder: Path, name: str, verify: str, missing: bool
) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    if not missing:
        (folder / name).write_bytes(whole[:-2])
    refusal(folder / name, open_dataset, folder, VOCABULARY, verify)


@SHARD_FILES
def test_a_flipped_bit_in_a_shard_of_a_folder_is_refused(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert "its SHA-256 differs from manifest.json" in refusal(folder / name, open_dataset, folder, VOCABULARY)


def test_another_whole_shard_in_a_shards_place_is_refused(folder: Path) -> None:
    (folder / "train_000001.bin").write_bytes(llm_c([4, 5, 6]))
    refusal(folder / "train_000001.bin", open_dataset, folder, VOCABULARY)


def test_a_folder_made_with_another_vocabulary_is_refused(folder: Path) -> None:
    assert "another vocabulary" in refusal(folder, open_dataset, folder, "e" * 64)


def test_a_folder_without_a_manifest_is_refused(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    assert "is missing" in refusal(folder / "manifest.json", open_dataset, folder, VOCABULARY)


@pytest.mark.parametrize("content", ["", '{"format": "restomod-tok', "[]", "3", "{}", '{"format": "another-1"}'])
def test_a_damaged_manifest_is_refused(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    refusal(folder / "manifest.json", open_dataset, folder, VOCABULARY)


KEYS = [
    *("format", "name", "fingerprint", "tokenizer", "documents", "tokens", "splits", "tokenizer.sha256"),
    *("splits.train", "splits.val", "splits.train.shards", "splits.val.shards"),
    *("splits.train.shards.0.file", "splits.train.shards.1.tokens", "splits.val.shards.0.sha256"),
]


def edited(manifest: Any, key: str, change: Any) -> Any:
    """Return a copy of ``manifest`` after ``change(parent, last part of the key)`` at a dotted ``key``."""
    manifest = copy.deepcopy(manifest)
    *above, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    holder = manifest
    for part in above:
        holder = holder[part]
    change(holder, last)
    return manifest


@pytest.mark.parametrize("key", KEYS)
def test_a_manifest_with_a_missing_key_is_refused(folder: Path, key: str) -> None:
    path = folder / "manifest.json"
    manifest = edited(json.loads(path.read_text()), key, lambda holder, last: holder.pop(last))
    path.write_text(json.dumps(manifest))
    assert key.split(".")[-1] in refusal(path, open_dataset, folder, VOCABULARY)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("tokenizer", "splits", "splits.train") for value in (None, 3, [3])),
        *((key, value) for key in ("splits.val.shards", "splits.train.shards.0.file") for value in (None, 3, [3])),
        *(("tokens", value) for value in (-7, 8, 1e400, "x", True, None)),
        *(("documents", value) for value in (-1, "many")),
        *(("splits.train.tokens", value) for value in (6, None)),
        ("splits.train.documents", 1.5),
        ("splits.val.text_bytes", "x"),
        ("splits.train.shards.0", 7),
        *(("splits.val.shards.0.tokens", value) for value in (2**40, -2, None)),
        *(("splits.val.shards.0.file", name) for name in ("../val_000000.bin", "/etc/passwd", "..", "a\0b", "\ud800")),
        ("splits.val.shards.0.file", "train_000000.bin"),
        *(("plan", value) for value in (5, [], {"units": [5]})),
        *(("read", value) for value in ([], {"files": []}, {"files": {"JSON": 3}}, {"left_out": {"empty": "one"}})),
        *(("read", value) for value in ({"files": {"CSV": {".csv": -1}}}, {"end_of_text_literals": None})),
        *(("name", value) for value in (["x"], 3)),
    ],
)
def test_a_value_that_cannot_be_is_refused(folder: Path, key: str, value: Any) -> None:
    path = folder / "manifest.json"
    manifest = edited(json.loads(path.read_text()), key, lambda holder, last: holder.__setitem__(last, value))
    path.write_text(json.dumps(manifest))
    assert "is damaged" in refusal(path, open_dataset, folder, VOCABULARY, "sizes")


def test_keys_that_are_not_known_stay(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | {"licence": ["CC0"]}
    manifest["splits"]["train"]["shards"][0]["quality"] = 3
    path.write_text(json.dumps(manifest))
    assert open_dataset(folder, VOCABULARY).manifest == manifest


# --- unfinished shards --------------------------------------------------------------------------------------


def test_a_shard_gets_its_name_when_it_is_complete(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", 4)
    writer.add(np.array([1, 2, 3], dtype=np.uint16))
    (temporary,) = tmp_path.iterdir()
    assert temporary.suffix == ".tmp"
    writer.add(np.array([4, 5], dtype=np.uint16))
    assert (tmp_path / "train_000000.bin").read_bytes() == llm_c([1, 2, 3, 4])
    writer.close()
    assert (tmp_path / "train_000001.bin").read_bytes() == llm_c([5])
    assert len(list(tmp_path.iterdir())) == 2


def test_a_dropped_shard_leaves_those_before_it(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", 4)
    writer.add(np.arange(6, dtype=np.uint16))
    writer.discard()
    writer.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["train_000000.bin"]


def test_a_writer_without_tokens_writes_no_file(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "val", 4)
    writer.add(np.empty(0, dtype=np.uint16))
    assert writer.close() == []
    assert list(tmp_path.iterdir()) == []


def test_a_shard_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(f"fsync {os.fstat(fd).st_size}"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"name {Path(b).name}"), replace(a, b)))
    write_shard(tmp_path / "a.bin", np.array([1, 2], dtype=np.uint16))
    assert calls == ["fsync 1028", "name a.bin"]


# --- published shards ---------------------------------------------------------------------------------------


def save_npy(path: Path, tokens: Any) -> None:
    """Save tokens like build-nanogpt's fineweb.py."""
    np.save(path, np.array(tokens, dtype=np.uint16))


@pytest.mark.parametrize("suffix", [".bin", ".npy"])
def test_published_shards_are_read_in_place_in_the_order_of_their_names(tmp_path: Path, suffix: str) -> None:
    shards = {
        f"fineweb_train_000002{suffix}": [7, 8],
        f"fineweb_train_000010{suffix}": [9],
        f"fineweb_train_000001{suffix}": [4, 5, 6],
        f"fineweb_val_000000{suffix}": [1, 2, 3],
        f"retrain_notes{suffix}": [99],
    }
    for name, tokens in shards.items():
        if suffix == ".npy":
            save_npy(tmp_path / name, tokens)
        else:
            (tmp_path / name).write_bytes(llm_c(tokens))
    (tmp_path / "train.txt").write_text("not a shard")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    dataset = open_published(tmp_path)
    assert dataset.train.read(0, 6).tolist() == [4, 5, 6, 7, 8, 9]
    assert dataset.val.read(0, 3).tolist() == [1, 2, 3]
    assert (len(dataset.train), len(dataset.val), dataset.manifest["tokens"]) == (6, 3, 9)
    assert [entry["file"][-10:-4] for entry in dataset.manifest["splits"]["train"]["shards"]] == [
        *("000001", "000002", "000010")
    ]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_published_shards_without_validation_are_read(tmp_path: Path) -> None:
    (tmp_path / "tiny_shakespeare_train.bin").write_bytes(llm_c([1, 2]))
    dataset = open_published(tmp_path)
    assert (len(dataset.train), len(dataset.val)) == (2, 0)


def test_the_fingerprint_identifies_published_shards(tmp_path: Path) -> None:
    prints = set()
    for name, tokens in (("a_train_1", [1, 2]), ("a_train_1", [1, 3]), ("a_train_1", [1, 2, 3]), ("a_train_2", [1, 2])):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        (folder / f"{name}.bin").write_bytes(llm_c(tokens))
        assert open_published(folder).fingerprint == open_published(folder).fingerprint
        prints.add(open_published(folder).fingerprint)
    assert len(prints) == 4


def as_npz(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), tokens=np.array([1, 2], dtype=np.uint16))
    path.with_suffix(".npz").rename(path)


BAD_NPY: dict[str, tuple[Callable[[Path], object], str]] = {
    "signed": (lambda path: np.save(path, np.array([1, 2], dtype=np.int16)), "has dtype int16 and shape (2,)"),
    "wide": (lambda path: np.save(path, np.array([1, 2], dtype=np.uint32)), "has dtype uint32 and shape (2,)"),
    "big-endian": (lambda path: np.save(path, np.array([1, 2], dtype=">u2")), "has dtype >u2 and shape (2,)"),
    "two-dimensional": (lambda path: save_npy(path, [[1, 2]]), "has dtype uint16 and shape (1, 2)"),
    "a number": (lambda path: save_npy(path, 3), "has dtype uint16 and shape ()"),
    "objects": (lambda path: np.save(path, np.array([{}]), allow_pickle=True), "is damaged: "),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps([1, 2])), "is damaged: "),
    "an archive": (as_npz, "is an archive of arrays"),
    "truncated": (lambda path: (save_npy(path, [1] * 99), os.truncate(path, 200)), "is damaged: "),
    "empty": (lambda path: path.write_bytes(b""), "is damaged: "),
    "a folder": (lambda path: path.mkdir(), "is damaged: "),
}


@pytest.mark.parametrize("what", BAD_NPY)
def test_a_bad_npy_shard_is_refused_by_name(tmp_path: Path, what: str) -> None:
    make, said = BAD_NPY[what]
    path = tmp_path / "x_train_000001.npy"
    make(path)
    assert refusal(path, open_published, tmp_path).startswith(f"{path} {said}")


@pytest.mark.parametrize("names", [[], ["x_val_0.bin"], ["xtrain.bin"], ["train.txt"]])
def test_a_folder_without_training_shards_is_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(llm_c([1]))
    assert "has no token shards: neither manifest.json nor files such as" in refusal(tmp_path, open_published, tmp_path)


def test_random_reads_are_expected_of_every_shard_and_change_no_token(tmp_path: Path) -> None:
    tokens = np.arange(50_000, dtype=np.uint16)
    write_shard(tmp_path / "a.bin", tokens[:30_000])
    np.save(tmp_path / "b.npy", tokens[30_000:])
    stream = TokenStream([open_shard(tmp_path / "a.bin"), open_shard(tmp_path / "b.npy"), tokens[:10]])
    stream.expect_random_reads()
    assert stream.read(0, 50_010).tolist() == [*range(50_000), *range(10)]
    if Path("/proc/self/smaps").exists():  # "rr": random reads
        maps = maps_of(tmp_path)
        assert all(any(name in m for m in maps) for name in ("a.bin", "b.npy"))
        assert all(re.search(r"VmFlags:.* rr ", m + " ") for m in maps)


def maps_of(folder: Path) -> list[str]:
    """Return the mappings of a folder's files in this process."""
    maps = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    return [m for m in maps if f"{folder}/" in m]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what is mapped")
def test_the_number_of_mapped_shards_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("restomod.data.dataset.MAX_MAPPED_SHARDS", 3)
    tokens = np.arange(10_000, dtype=np.uint16)
    for i, part in enumerate(np.split(tokens, 10)):
        write_shard(tmp_path / f"a_train_{i:06d}.bin", part)
    stream = open_published(tmp_path).train
    stream.expect_random_reads()
    assert maps_of(tmp_path) == []
    for start in (9_000, 500, 3_500, 8_990, 0, 6_000):
        assert stream.read(start, 1_000).tolist() == tokens[start : start + 1_000].tolist()
        mapped = maps_of(tmp_path)
        assert 1 <= len(mapped) <= 3
        assert all(re.search(r"VmFlags:.* rr ", m + " ") for m in mapped)


def test_a_bad_header_in_a_shard_of_the_right_size_is_found_when_it_is_read(folder: Path) -> None:
    path = folder / "train_000001.bin"
    path.write_bytes(bytes(1024) + path.read_bytes()[1024:])
    stream = open_dataset(folder, VOCABULARY, verify="sizes").train
    stream.read(0, 3)
    assert "is not a token shard" in refusal(path, stream.read, 3, 1)


def test_a_shard_that_has_shrunk_since_it_was_opened_is_refused(folder: Path) -> None:
    stream = open_dataset(folder, VOCABULARY).train
    (folder / "train_000001.bin").write_bytes(llm_c([4]))
    assert "is damaged: 1 tokens, expected 2" in refusal(folder / "train_000001.bin", stream.read, 3, 2)
