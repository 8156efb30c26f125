"""`restomod data` prints the same numbers as numpy counts in the files."""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from restomod.config.prepare import PrepareConfig
from restomod.data import overview as module
from restomod.data.overview import overview
from restomod.data.prepare.run import prepare_folder
from restomod.utils import verified
from restomod.utils.errors import UserError

END = 50256  # <|endoftext|>


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Prepare 60 documents of 1 to 60 words, one of them twice, as several training shards and one validation shard."""
    texts = [f"{i}" + " word" * i for i in range(60)] + ["7" + " word" * 7]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = PrepareConfig(val_fraction=0.2, shard_tokens=600, dedup=True)
    prepare_folder((str(tmp_path / "a.jsonl"),), config, tmp_path / "out", workers=1)
    return tmp_path / "out"


def lines(folder: Path, verify: bool = False) -> list[str]:
    return list(overview(folder, verify))


def tokens_of(folder: Path, pattern: str) -> np.ndarray:
    return np.concatenate([np.fromfile(path, dtype="<u2", offset=1024) for path in sorted(folder.glob(pattern))])


def write_bin(path: Path, tokens: list[int]) -> None:
    header = struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253)
    path.write_bytes(header + np.array(tokens, dtype="<u2").tobytes())


def test_the_splits_are_counted(folder: Path) -> None:
    train, val = tokens_of(folder, "train*"), tokens_of(folder, "val*")
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    first, about_train, about_val, origin, duplicates, *_ = lines(folder)
    assert first == f"{folder}: a.jsonl, {len(train) + len(val):,} tokens, vocabulary gpt2"
    assert (train == END).sum() + (val == END).sum() == 60
    for name, said, tokens in (("train", about_train, train), ("val", about_val, val)):
        text_bytes, n = splits[name]["text_bytes"], len(list(folder.glob(f"{name}*")))
        assert said == (
            f"{name:<6}{len(tokens):,} tokens, {n} shard{'s' * (n > 1)}, {(tokens == END).sum()} documents, "
            f"{text_bytes:,} bytes of text, {text_bytes / len(tokens):.2f} per token"
        )
    assert len(list(folder.glob("train*"))) > 1
    assert re.fullmatch(
        r"source: /.*/a\.jsonl \(1 file\), settings: --dedup --shard-tokens 600 --val-fraction 0\.2", origin
    )
    assert duplicates == "duplicates: 1 document dropped"


def test_the_lengths_of_documents_are_counted(folder: Path) -> None:
    train = tokens_of(folder, "train*").tolist()
    lengths = [len(part.split()) for part in " ".join(map(str, train)).split(str(END))[1:]]
    low, middle, high = np.percentile(lengths, [5, 50, 95])
    said = lines(folder)
    assert (
        f"document length: 5th percentile {low:,.0f} tokens, median {middle:,.0f}, 95th percentile {high:,.0f}"
    ) in said
    rows = [re.fullmatch(r" +(\d+) to +(\d+) +(\d+)  (█*)", line) for line in said]
    bars = [(int(row[1]), int(row[2]), int(row[3]), len(row[4])) for row in rows if row]
    counts = [sum(low <= n <= high for n in lengths) for low, high, _, _ in bars]
    assert [count for _, _, count, _ in bars] == counts
    assert sum(counts) == len(lengths)
    assert all(high == 2 * low - 1 for low, high, _, _ in bars)
    assert [length for *_, length in bars] == [round(40 * count / max(counts)) for count in counts]


def test_the_commonest_tokens_are_counted(folder: Path, tiktoken_gpt2: tiktoken.Encoding) -> None:
    train = tokens_of(folder, "train*").tolist()
    rows = [re.fullmatch(r" +([\d.]+)% +(\d+)  (.+)", line) for line in lines(folder)]
    said = [(row[1], int(row[2]), row[3]) for row in rows if row]
    counted = Counter(train)
    assert [share for share, _, _ in said] == [f"{100 * n / len(train):.2f}" for _, n in counted.most_common(20)]
    for share, token, text in said:
        assert share == f"{100 * counted[token] / len(train):.2f}"
        assert text == repr(tiktoken_gpt2.decode([token]))


def test_the_windows_are_the_beginning_the_middle_and_the_end(folder: Path, tiktoken_gpt2: tiktoken.Encoding) -> None:
    train = tokens_of(folder, "train*").tolist()
    said, middle = lines(folder), (len(train) - 64) // 2
    for start in (0, middle, len(train) - 64):
        at = said.index(f"tokens {start:,} to {start + 63:,}:")
        assert said[at + 1] == f"  {tiktoken_gpt2.decode(train[start : start + 64])!r}"


def test_the_statistics_of_a_large_split_name_the_counted_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lines(folder)
    monkeypatch.setattr(module, "READ_TOKENS", 77)
    assert lines(folder) == whole  # the size of the reads does not change the numbers
    monkeypatch.setattr(module, "SAMPLE_TOKENS", 500)
    part = lines(folder)
    (most_common,) = [line for line in part if line.startswith("most common")]
    assert most_common == "most common tokens in the first 500 tokens:"
    share, token, _ = part[part.index(most_common) + 1].split(None, 2)
    first = tokens_of(folder, "train*")[:500]
    assert share == f"{np.bincount(first).max() / 500:.2%}"
    assert int(token) == np.bincount(first).argmax()


# --- verification -------------------------------------------------------------------------------------------


def test_verify_finds_a_flipped_byte_that_is_not_read_without_it(folder: Path) -> None:
    path = folder / "val_00000_000000.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert lines(folder)[-1] == "verified: sizes of all shards; add --verify to compare their SHA-256"
    with pytest.raises(UserError, match=r"val_00000_000000\.bin is damaged: its SHA-256 differs from manifest"):
        lines(folder, verify=True)


@pytest.mark.parametrize("verify", [False, True])
def test_only_verify_hashes(folder: Path, verify: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    read, real = [], verified.sha256_file

    def recording(path: Path) -> str:
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(verified, "sha256_file", recording)
    last = lines(folder, verify)[-1]
    assert sorted(read) == (sorted(path.name for path in folder.glob("*.bin")) if verify else [])
    assert last.startswith("verified: SHA-256" if verify else "verified: sizes")


# --- small folders and published shards ---------------------------------------------------------------------


@pytest.mark.parametrize("verify", [False, True])
def test_published_shards_bring_no_hashes(tmp_path: Path, verify: bool) -> None:
    np.save(tmp_path / "edufineweb_train_000001.npy", np.array([END, 1, 2, 3], dtype=np.uint16))
    said = lines(tmp_path, verify)
    assert said[:3] == [
        f"{tmp_path}: {tmp_path.name}, 4 tokens, vocabulary gpt2",
        "train 4 tokens, 1 shard",
        "val   0 tokens, 0 shards",
    ]
    assert said[-1] == "verified: sizes of all shards (published shards have no SHA-256 to compare)"


@pytest.mark.parametrize(
    ("tokens", "documents"),
    [([17], 0), ([END], 0), ([END, 17], 1), ([17, 18, 19], 0), ([END] * 5, 0), ([17, END, 18, 19], 1)],
)
def test_a_tiny_split_is_shown(
    tmp_path: Path, tokens: list[int], documents: int, tiktoken_gpt2: tiktoken.Encoding
) -> None:
    write_bin(tmp_path / "x_train_0.bin", tokens)
    said = lines(tmp_path)
    assert f"  {tiktoken_gpt2.decode(tokens)!r}" in said
    assert f"tokens 0 to {len(tokens) - 1}:" in said
    bars = [line for line in said if "█" in line]
    assert len(bars) == documents


def test_a_split_without_tokens_is_shown(tmp_path: Path) -> None:
    write_bin(tmp_path / "x_train_0.bin", [])
    assert "train 0 tokens, 1 shard" in lines(tmp_path)


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    write_bin(tmp_path / "x_train_0.bin", [1, 50257])
    with pytest.raises(UserError, match="contains the token 50257, but GPT-2's vocabulary ends at 50256"):
        lines(tmp_path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "no such folder of token shards; create it: restomod prepare SOURCE --out "),
        (lambda folder: folder.mkdir(), "has no token shards"),
        (lambda folder: folder.write_text("a file"), "no such folder of token shards"),
    ],
)
def test_a_path_without_shards_is_refused(tmp_path: Path, make: Callable[[Path], object], said: str) -> None:
    make(tmp_path / "out")
    with pytest.raises(UserError, match=said):
        lines(tmp_path / "out")
