"""Weight files of a model folder: safetensors, pickles, shards with an index; damaged and unsafe files are refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from restomod.model.hf_io import read_tensors, weights_files
from restomod.utils.errors import UserError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([float("nan"), -0.0]), "c": torch.zeros(1).half()}


def refusal(folder: Path) -> str:
    """Return the one-line error of reading ``folder``, without the folder's name."""
    with pytest.raises(UserError) as caught:
        read_tensors(folder)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(str(folder))
    return said.removeprefix(f"{folder}/")


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Return whether names and bits are equal."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype
        and torch.equal(ours[name].contiguous().view(torch.int16), theirs[name].contiguous().view(torch.int16))
        for name in theirs
    )


def write_index(folder: Path, weight_map: Any, name: str = "model.safetensors") -> None:
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# --- formats -------------------------------------------------------------------------------------------------


def whole_safetensors(folder: Path) -> None:
    save_file(TENSORS, folder / "model.safetensors")


def zipped_pickle(folder: Path) -> None:
    torch.save(TENSORS, folder / "pytorch_model.bin")


def legacy_pickle(folder: Path) -> None:
    torch.save(TENSORS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def sharded_safetensors(folder: Path) -> None:
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    names["c"] = names["a"]
    save_file({"a": TENSORS["a"], "c": TENSORS["c"]}, folder / names["a"])
    save_file({"b": TENSORS["b"]}, folder / names["b"])
    write_index(folder, names)


def sharded_pickle(folder: Path) -> None:
    names = {name: f"pytorch_model-{i}.bin" for i, name in enumerate(TENSORS)}
    for name, file in names.items():
        torch.save({name: TENSORS[name]}, folder / file)
    write_index(folder, names, "pytorch_model.bin")


@pytest.mark.parametrize("save", [whole_safetensors, zipped_pickle, legacy_pickle, sharded_safetensors, sharded_pickle])
def test_tensors_are_read_bit_for_bit(save: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path)
    tensors, where = read_tensors(tmp_path)
    assert same(tensors, TENSORS)
    files = [path for path in tmp_path.iterdir() if path.suffix != ".json"]
    assert where == (files[0] if len(files) == 1 else tmp_path)


def test_parameters_and_views_are_read_from_a_pickle(tmp_path: Path) -> None:
    values = {"a": torch.nn.Parameter(torch.ones(2, 2)), "b": torch.arange(12.0).view(3, 4).t(), "c": torch.ones(1)}
    torch.save(values | {"c": values["c"].expand(5)}, tmp_path / "pytorch_model.bin")
    tensors, _ = read_tensors(tmp_path)
    assert torch.equal(tensors["b"], torch.arange(12.0).view(3, 4).t())
    assert torch.equal(tensors["c"], torch.ones(5))


def test_safetensors_are_preferred_to_a_pickle(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert read_tensors(tmp_path)[0]["a"] == 1
    (tmp_path / "model.safetensors").rename(tmp_path / "1.safetensors")
    write_index(tmp_path, {"a": "1.safetensors"})
    assert read_tensors(tmp_path)[0]["a"] == 1


def test_only_needed_files_are_requested() -> None:
    """A request may be a download."""
    asked: list[str] = []

    def get(name: str) -> Path | None:
        asked.append(name)
        return Path(name) if name == "model.safetensors" else None

    assert weights_files(get) == [Path("model.safetensors")]
    assert asked == ["model.safetensors"]


def test_all_four_formats_are_tried() -> None:
    asked: list[str] = []
    assert weights_files(lambda name: asked.append(name)) is None
    assert sorted(asked) == [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ]


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"model.safetensors is missing: {tmp_path} is not a model folder"


# --- indices -------------------------------------------------------------------------------------------------


def test_a_very_long_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {"long": "a" * 10_000_000})
    assert "its header has 10,000," in refusal(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded_safetensors(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert refusal(tmp_path) == (
        "model.safetensors.index.json lists model-00002-of-00002.safetensors, which is missing from the same folder"
    )


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "."])
def test_a_shard_must_be_in_the_folder_of_its_index(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, tmp_path / "model.safetensors")
    write_index(folder, {"a": name})
    assert refusal(folder).startswith("model.safetensors.index.json is damaged: ")
    assert repr(name) in refusal(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], "a", 5, {"a": 1}, {"a": None}, {"a": ["b"]}])
def test_an_index_without_a_map_to_files_is_refused(tmp_path: Path, weight_map: Any) -> None:
    write_index(tmp_path, weight_map)
    assert refusal(tmp_path).startswith("model.safetensors.index.json is damaged: ")
    assert "weight_map" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "5", '{"weight_map"'])
def test_an_index_that_is_not_an_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(content)
    assert refusal(tmp_path).startswith("pytorch_model.bin.index.json is damaged")


def test_a_shard_without_a_name_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": ""})
    assert "should be the name of a file in the same folder, not ''" in refusal(tmp_path)


def test_a_tensor_in_two_shards_is_named_with_both(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "1.safetensors")
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "2.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    assert refusal(tmp_path) == f"2.safetensors repeats a, which another file of {tmp_path} contains too"


def test_pickles_in_an_index_of_safetensors_are_read_safely(tmp_path: Path) -> None:
    torch.save({"a": Payload(tmp_path / "ran")}, tmp_path / "1.bin")
    write_index(tmp_path, {"a": "1.bin"})
    assert "is refused" in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()


# --- pickles -------------------------------------------------------------------------------------------------


class Payload:
    """Object that runs a command when it is unpickled unsafely."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.made}'",)


def test_the_payload_runs_when_unpickled_unsafely(tmp_path: Path) -> None:
    """This validates the tests below."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_a_command_is_refused(tmp_path: Path, zipped: bool) -> None:
    values = {"a": torch.zeros(1), "b": Payload(tmp_path / "ran")}
    torch.save(values, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert (
        refusal(tmp_path)
        == f"pytorch_model.bin is refused: it contains {os.system.__module__}.system, which is not a tensor"
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_is_refused(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol))
    assert refusal(tmp_path).startswith("pytorch_model.bin is ")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        ({"a": np.zeros(2)}, "multiarray._reconstruct"),
    ],
    ids=["module", "numpy"],
)
def test_a_pickle_of_another_type_is_refused_by_the_types_name(tmp_path: Path, values: Any, named: str) -> None:
    torch.save(values, tmp_path / "pytorch_model.bin")
    said = refusal(tmp_path)
    assert named in said
    assert "weights_only" not in said  # torch's message suggests the unsafe mode


@pytest.mark.parametrize("values", [torch.zeros(1), [torch.zeros(1)], 5, None, "text", {0: torch.zeros(1)}])
def test_a_pickle_other_than_a_dictionary_of_tensors_is_refused(tmp_path: Path, values: Any) -> None:
    torch.save(values, tmp_path / "pytorch_model.bin")
    assert refusal(tmp_path) == "pytorch_model.bin does not contain model weights: it must be a dictionary of tensors"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: {"a": torch.zeros(1)},
        lambda: 5,
        lambda: None,
        lambda: torch.zeros(3, device="meta"),
        lambda: torch.zeros(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)]),
    ],
    ids=["dictionary", "number", "nothing", "meta", "sparse", "sparse rows", "nested"],
)
def test_an_entry_other_than_a_dense_tensor_is_named(tmp_path: Path, make: Callable[[], Any]) -> None:
    torch.save({"fine": torch.zeros(1), "odd": make()}, tmp_path / "pytorch_model.bin")
    said = refusal(tmp_path)
    assert said.startswith("pytorch_model.bin ")
    # torch 2.15 does not load a nested tensor at all
    assert said.endswith(("weights: odd must be a dense tensor", "_rebuild_nested_tensor, which is not a tensor"))


def test_a_torchscript_archive_is_refused_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "pytorch_model.bin")
        said.clear()
        assert refusal(tmp_path).startswith("pytorch_model.bin is damaged")
    assert said == []


GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"not weights " * 99, b"\0" * 99, GIT_LFS_POINTER],
    ids=["empty", "JSON", "text", "0", "LFS"],
)
def test_a_file_of_another_format_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path).startswith(f"{name} is damaged")


@pytest.mark.parametrize("save", [whole_safetensors, zipped_pickle, legacy_pickle])
def test_a_truncated_file_is_refused(save: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for length in [*range(0, len(content) - 1, 7), len(content) - 1]:
        path.write_bytes(content[:length])
        assert re.match(rf"{path.name} is (damaged|refused: it contains)", refusal(tmp_path))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_pickle_with_changed_bytes_is_read_or_refused(tmp_path: Path, zipped: bool) -> None:
    """torch raises about a dozen error classes, including struct.error and AssertionError."""
    buffer, chance = io.BytesIO(), random.Random(0)
    torch.save(TENSORS, buffer, _use_new_zipfile_serialization=zipped)
    refusals = []
    for _ in range(400):
        content = bytearray(buffer.getvalue())
        for _ in range(chance.choice([1, 1, 3, 30])):
            content[chance.randrange(len(content))] = chance.randrange(256)
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        try:
            read_tensors(tmp_path)
        except UserError as e:
            refusals.append(str(e))
    assert len(refusals) > 100
    said = re.compile(
        rf"{re.escape(str(tmp_path))}/pytorch_model\.bin (is damaged|is refused|does not contain model weights): "
    )
    assert all(said.match(refusal) for refusal in refusals)


def test_an_unreadable_file_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    zipped_pickle(tmp_path)
    monkeypatch.setattr(torch, "load", load)
    assert refusal(tmp_path) == "pytorch_model.bin: cannot read the weights: Permission denied"
