"""Datasets on the hub, with the real client and a local hub server: correct, complete files or an error."""

from __future__ import annotations

import errno
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import numpy as np
import pytest

from restomod.config.prepare import PrepareConfig
from restomod.data.dataset import HEADER_BYTES, MAGIC
from restomod.data.hub_datasets import HubFile, _matches, dataset_files, parse_address
from restomod.data.prepare.run import prepare_folder
from restomod.utils.errors import UserError
from tests.fineweb import KEY, REPO, parquet
from tests.hub import DATASETS, Hub

CARD = {  # as FineWeb-Edu's
    "configs": [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
        {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]},
        {"config_name": "CC-MAIN-2013-20", "data_files": [{"split": "train", "path": "data/CC-MAIN-2013-20/*"}]},
    ]
}


def small_file(seed: int) -> bytes:
    return parquet(seed, documents=40, longest=60)


FILES = {
    **{f"sample/10BT/{i:03d}_00000.parquet": small_file(i) for i in (2, 0, 1)},
    "data/CC-MAIN-2013-20/train-00000-of-00001.parquet": small_file(10),
    "data/CC-MAIN-2024-10/train-00000-of-00001.parquet": small_file(11),
    "README.md": b"---\n---\n",
    "eval/results.csv": b"a,b\n",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub({KEY: dict(FILES)}) as hub:
        hub.cards[KEY] = CARD
        hub.adopt_client(tmp_path / "home", monkeypatch)
        yield hub
    huggingface_hub.close_session()


def paths(config: str | None = None, split: str = "train", revision: str = "main", repository: str = REPO) -> list[str]:
    return [file.path for file in dataset_files(repository, config, split, revision)]


# --- selection of files --------------------------------------------------------------------------------------


def test_a_cards_configuration_names_its_files(hub: Hub) -> None:
    assert paths("sample-10BT") == [f"sample/10BT/{i:03d}_00000.parquet" for i in range(3)]
    assert paths("CC-MAIN-2013-20") == ["data/CC-MAIN-2013-20/train-00000-of-00001.parquet"]


def test_without_a_name_the_default_configuration_is_taken(hub: Hub) -> None:
    assert paths() == [name for name in sorted(FILES) if name.startswith("data/")]


def test_files_know_their_commit_and_size(hub: Hub) -> None:
    (file,) = dataset_files(REPO, "CC-MAIN-2013-20", "train", "main")
    assert (file.commit, file.bytes) == (hub.commit(KEY), len(FILES[file.path]))
    assert parse_address(str(file)) == (REPO, file.commit, file.path)


def test_a_commit_is_a_revision(hub: Hub) -> None:
    assert paths("sample-10BT", revision=hub.commit(KEY)) == paths("sample-10BT")


@pytest.mark.parametrize(
    ("names", "config", "split", "expected"),
    [
        (["train.jsonl", "test.jsonl", "README.md"], None, "train", ["train.jsonl"]),
        (["train.jsonl", "test.jsonl"], None, "test", ["test.jsonl"]),
        (["a.parquet", "b.parquet", "validation.parquet"], None, "train", ["a.parquet", "b.parquet"]),
        (["en/train-0.parquet", "de/train-0.parquet"], "de", "train", ["de/train-0.parquet"]),
        (["x.jsonl.zst", "y.jsonl.gz", "z.csv", "img.png"], None, "train", ["x.jsonl.zst", "y.jsonl.gz"]),
    ],
)
def test_without_a_card_folders_and_names_tell_the_files(
    hub: Hub, names: list[str], config: str | None, split: str, expected: list[str]
) -> None:
    hub.repos[KEY] = dict.fromkeys(names, b"x")
    del hub.cards[KEY]
    assert paths(config, split) == expected


@pytest.mark.parametrize("name", ["c4-train.00000-of-01024.json.gz", "train.json", "train.csv", "train.tsv.zst"])
def test_a_card_may_name_json_and_csv(hub: Hub, name: str) -> None:
    hub.repos[KEY] = {f"en/{name}": b"x", "dataset_infos.json": b"{}"}
    hub.cards[KEY] = {"configs": [{"config_name": "en", "data_files": "en/*"}]}
    assert paths() == [f"en/{name}"]


@pytest.mark.parametrize("files", ["all/*.parquet", ["all/*.parquet"], [{"split": "train", "path": ["all/*"]}]])
def test_a_card_may_name_its_files_in_several_ways(hub: Hub, files: Any) -> None:
    hub.repos[KEY] = {"all/a.parquet": b"x", "other/b.parquet": b"x"}
    hub.cards[KEY] = {"configs": [{"config_name": "only", "data_files": files}]}
    assert paths() == ["all/a.parquet"]


@pytest.mark.parametrize(
    ("pattern", "path", "means"),
    [
        ("data/*/*", "data/a/b.parquet", True),
        ("data/*", "data/a/b.parquet", False),
        ("data/**", "data/a/b.parquet", True),
        ("**/*.parquet", "b.parquet", True),
        ("**/*.parquet", "x/y/b.parquet", True),
        ("data", "data/a/b.parquet", True),
        ("data/", "data/b.parquet", True),
        ("./data/b.parquet", "data/b.parquet", True),
        ("dat", "data/b.parquet", False),
        ("data/train-0000[0-2]*", "data/train-00001-of-3.parquet", True),
        ("data/train-0000[0-2]*", "data/train-00003-of-3.parquet", False),
    ],
)
def test_patterns_match_like_globs(pattern: str, path: str, means: bool) -> None:
    assert _matches(path, pattern) is means


def test_a_missing_name_is_refused_with_the_existing_ones(hub: Hub) -> None:
    for call, said in (
        (lambda: paths("sample-10B"), r"no configuration 'sample-10B'; did you mean 'sample-10BT'\?"),
        (lambda: paths(split="test"), r"no split 'test'; known: train"),
        (lambda: paths(revision="v9"), r"no revision 'v9'"),
        (lambda: paths(repository="HuggingFaceFW/nothing"), r"no such public dataset"),
        (lambda: paths(repository="not a name"), r"no such public dataset"),
    ):
        with pytest.raises(UserError, match=said):
            call()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda hub: hub.cards.update({KEY: {"configs": CARD["configs"][1:]}}),
            r"choose one with --hub-config: sample-10BT, CC-MAIN-2013-20",
        ),
        (lambda hub: hub.gated.add(KEY), "is gated: accept its terms"),
        (
            lambda hub: (hub.repos.update({KEY: {"train/1.png": b"x"}}), hub.cards.clear()),
            "no files for the dataset, split train; readable files: none",
        ),
    ],
)
def test_an_unreadable_dataset_is_refused_with_a_fix(hub: Hub, change: Any, said: str) -> None:
    change(hub)
    with pytest.raises(UserError, match=said):
        paths()


def test_a_hub_that_cannot_be_reached_is_one_line(hub: Hub) -> None:
    hub.close()
    with pytest.raises(UserError, match=r"^HuggingFaceFW/fineweb-edu: the Hugging Face hub cannot be reached \(.*\)$"):
        paths()


# --- prepared shards -----------------------------------------------------------------------------------------


def prepared(out: Path, *sources: str, **settings: Any) -> dict[str, bytes]:
    """Return all files of a folder prepared from ``sources`` in one process."""
    prepare_folder(sources or ("fineweb-edu",), PrepareConfig(val_fraction=0.2, **settings), out, workers=1)
    return {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def shards(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.endswith(".bin")}


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    """Return the shards of the same files from the local disk."""
    local = tmp_path / "local"
    local.mkdir()
    names = sorted(name for name in FILES if name.startswith("sample/"))
    for name in names:
        (local / Path(name).name).write_bytes(FILES[name])
    sources = [str(local / Path(name).name) for name in names]
    return shards(prepared(tmp_path / "expected", *sources))


def test_fineweb_edu_becomes_the_shards_of_its_files(hub: Hub, tmp_path: Path, expected: dict[str, bytes]) -> None:
    files = prepared(tmp_path / "out")
    assert shards(files) == expected
    assert files.keys() - expected.keys() == {"manifest.json"}
    assert not list((tmp_path / "home").rglob("*.parquet"))


def test_any_dataset_may_be_named(hub: Hub, tmp_path: Path, expected: dict[str, bytes]) -> None:
    assert shards(prepared(tmp_path / "out", f"hf:{REPO}", hub_config="sample-10BT")) == expected


def test_downloads_are_kept_where_asked_and_used_again(hub: Hub, tmp_path: Path, expected: dict[str, bytes]) -> None:
    prepared(tmp_path / "out", keep_downloads=True)
    assert len(list((tmp_path / "home").rglob("*.parquet"))) == 3
    hub.requests.clear()
    assert shards(prepared(tmp_path / "again", keep_downloads=True)) == expected
    assert not [request for request in hub.requests if "/cdn/" in request.path]


def sent(hub: Hub) -> list[str]:
    return [request.path for request in hub.requests if request.method == "GET" and "/cdn/" in request.path]


def test_a_broken_connection_is_resumed(hub: Hub, tmp_path: Path, expected: dict[str, bytes]) -> None:
    hub.cut(after=1000, times=3)
    assert shards(prepared(tmp_path / "out")) == expected
    assert len(sent(hub)) == 3 + 3


def test_a_file_with_a_flipped_bit_is_fetched_again(hub: Hub, tmp_path: Path, expected: dict[str, bytes]) -> None:
    hub.flip(bit=12345, times=1)
    assert shards(prepared(tmp_path / "out")) == expected
    assert len(sent(hub)) == 3 + 1


@pytest.mark.parametrize("fault", ["flip", "cut", "answer"])
def test_units_finished_before_a_hub_failure_are_kept(
    hub: Hub, tmp_path: Path, expected: dict[str, bytes], fault: str
) -> None:
    out = tmp_path / "out"
    last = hub.repos[KEY].pop("sample/10BT/002_00000.parquet")
    hub.repos[KEY]["sample/10BT/002_00000.parquet"] = last
    value = {"flip": 77, "cut": 10, "answer": (503, "")}[fault]
    later: Iterator[Any] = itertools.chain([None, None], itertools.repeat(value))  # two downloads pass
    if fault == "answer":
        hub.answers = {"HEAD": later}
    else:
        setattr(hub, f"{fault}s", later)
    with pytest.raises(UserError, match=r"cannot download sample/10BT/002_00000\.parquet"):
        prepared(out)
    assert not (out / "manifest.json").exists()
    assert sorted(shards({path.name: path.read_bytes() for path in out.iterdir() if path.is_file()})) == [
        name for name in sorted(expected) if "_00002_" not in name
    ]
    hub.mend()
    hub.requests.clear()
    assert shards(prepared(out)) == expected
    assert len(sent(hub)) == 1


def test_resuming_keeps_the_commit_and_its_files(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("restomod.data.prepare.units.fetch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepared(tmp_path / "out")
    hub.requests.clear()
    prepared(tmp_path / "out")
    assert not [request for request in hub.requests if "/api/" in request.path]


def test_a_file_that_is_listed_but_missing_is_named(hub: Hub, tmp_path: Path) -> None:
    listed = dataset_files(REPO, "CC-MAIN-2013-20", "train", "main")[0]
    missing = HubFile(REPO, listed.commit, "data/CC-MAIN-2013-20/gone.parquet", 1)
    from restomod.data.hub_datasets import fetch

    with pytest.raises(UserError, match=r"gone\.parquet of HuggingFaceFW/fineweb-edu is missing on the hub"):
        fetch(str(missing), tmp_path)


def test_a_full_disk_is_one_line_and_costs_no_finished_unit(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]
) -> None:
    real, calls = huggingface_hub.hf_hub_download, iter(range(10))

    def full(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device", "blob")
        return real(*arguments, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(UserError, match=r"cannot save sample/10BT/001_00000\.parquet \(No space left on device\)"):
        prepared(tmp_path / "out")
    hub.requests.clear()
    assert shards(prepared(tmp_path / "out")) == expected
    assert len(sent(hub)) == 2


def test_a_missing_column_lists_those_there_are(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"000_00000\.parquet has no column 'txt'; it has: .*text.*; select one"):
        prepared(tmp_path / "out", text_column="txt")


# --- published token shards ----------------------------------------------------------------------------------

POOL = "kjj0/finewebedu10B-gpt2"


def bin_shard(tokens: np.ndarray) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, 1, len(tokens)
    return header.tobytes() + tokens.astype("<u2").tobytes()


def npy_shard(tokens: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tokens.astype(np.uint16))
    return buffer.getvalue()


@pytest.fixture
def tokens() -> dict[str, np.ndarray]:
    chance = np.random.default_rng(0)
    names = ("finewebedu_val_000000", "finewebedu_train_000001", "finewebedu_train_000002")
    return {name: chance.integers(0, 50257, 5000 + i) for i, name in enumerate(names)}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("suffix", [".bin", ".npy"])
def test_published_shards_are_copied_unchanged(
    hub: Hub, tmp_path: Path, tokens: dict[str, np.ndarray], suffix: str, keep: bool
) -> None:
    write = bin_shard if suffix == ".bin" else npy_shard
    files = {name + suffix: write(values) for name, values in tokens.items()}
    hub.repos[DATASETS + POOL] = {**files, "README.md": b"", "other.bin": b""}
    config = PrepareConfig(keep_downloads=keep)
    dataset = prepare_folder((f"pretokenized:{POOL}",), config, tmp_path / "out", workers=1)
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "manifest.json"}
    assert found == files
    train = np.concatenate([tokens["finewebedu_train_000001"], tokens["finewebedu_train_000002"]])
    assert np.array_equal(dataset.train.read(0, len(dataset.train)), train)
    assert np.array_equal(dataset.val.read(0, 5000), tokens["finewebedu_val_000000"])
    assert dataset.manifest["documents"] == sum(int((values == 50256).sum()) for values in tokens.values())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            bin_shard(np.arange(100))[:-2],
            r"finewebedu_train_000001\.bin is damaged: expected 1,224 bytes for the 100 tokens",
        ),
        (b"\0" * (HEADER_BYTES + 20), r"is not a token shard: no magic number"),
        (bin_shard(np.array([1, 50257])), r"finewebedu_train_000001\.bin contains the token 50257"),
    ],
)
def test_a_published_shard_that_is_wrong_is_refused(hub: Hub, tmp_path: Path, content: bytes, said: str) -> None:
    hub.repos[DATASETS + POOL] = {"finewebedu_train_000001.bin": content}
    with pytest.raises(UserError, match=said):
        prepare_folder((f"pretokenized:{POOL}",), PrepareConfig(), tmp_path / "out", workers=1)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_published_shards_cannot_be_searched_for_duplicates(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="remove --dedup"):
        prepare_folder((f"pretokenized:{POOL}",), PrepareConfig(dedup=True), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_a_repository_without_shards_is_refused(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no token shards on the hub, such as fineweb_train_000001\.bin"):
        prepare_folder((f"pretokenized:{REPO}",), PrepareConfig(), tmp_path / "out", workers=1)
