"""Model folders: `transformers` reads ours and we read theirs, without changing a bit, or say what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from restomod.config import ModelConfig
from restomod.errors import UserError
from restomod.model.gpt import GPT
from restomod.model.pretrained import load_model, save_model
from tests.models import CPU, random_model, random_tokens, to_transformers

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, n_positions=12)


@pytest.fixture
def model() -> GPT:
    return random_model(CONFIG)


@pytest.fixture
def folder(model: GPT, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(model, folder)
    return folder


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# --- ours in transformers ------------------------------------------------------------------------------------


def test_transformers_loads_a_saved_model_without_missing_or_unexpected_tensors(folder: Path) -> None:
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(loaded, GPT2LMHeadModel)
    assert not any(report.values()), report


def test_transformers_gives_a_saved_model_the_same_logits(model: GPT, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = random_tokens(CONFIG, 2, CONFIG.n_positions)
    with torch.no_grad():
        theirs = loaded(tokens).logits
        assert theirs.shape[-1] == 50257
        assert (model(tokens) - theirs).abs().max() < 1e-4


def test_transformers_finds_the_tokenizer_of_a_saved_model(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Hello, I'm a language model,").input_ids == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == tokenizer.eos_token_id == 50256


def test_the_file_holds_the_real_vocabulary_only(folder: Path) -> None:
    assert load_file(folder / "model.safetensors")["transformer.wte.weight"].shape == (50257, 16)


# --- theirs here ---------------------------------------------------------------------------------------------


@pytest.fixture
def theirs(model: GPT, tmp_path: Path) -> Path:
    """A model that transformers saved."""
    folder = tmp_path / "theirs"
    to_transformers(model).save_pretrained(folder)
    return folder


def test_a_model_that_transformers_saved_comes_back_with_the_same_weights(model: GPT, theirs: Path) -> None:
    loaded = load_model(theirs, CPU)
    assert loaded.config == CONFIG
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_loading_and_saving_changes_no_bit_of_any_tensor(theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    save_model(load_model(theirs, CPU), tmp_path / "ours")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype == torch.float32
        assert torch.equal(before[name].view(torch.int32), after[name].view(torch.int32)), name


def test_a_loaded_models_padded_rows_are_zero(folder: Path) -> None:
    loaded = load_model(folder, CPU)
    assert loaded.head.shape == (50304, 16)
    assert (loaded.head[50257:] == 0).all()


# --- what cannot be loaded -----------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.bias"))
    with pytest.raises(UserError, match=r"model\.safetensors.*missing transformer\.h\.1\.mlp\.c_fc\.bias"):
        load_model(folder, CPU)


def test_a_tensor_too_many_is_named(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"transformer.h.2.ln_1.bias": torch.zeros(16)}))
    with pytest.raises(UserError, match=r"unexpected transformer\.h\.2\.ln_1\.bias"):
        load_model(folder, CPU)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer.wpe.weight", (13, 16)),
        ("transformer.wte.weight", (50304, 16)),  # padding belongs into memory only
        ("transformer.h.0.attn.c_attn.weight", (48, 16)),  # (out, in), where the file holds (in, out)
    ],
)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    with pytest.raises(UserError, match=re.escape(f"{name} has shape {shape}")):
        load_model(folder, CPU)


def test_many_wrong_tensors_still_make_one_short_line(folder: Path) -> None:
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".h.0." in name])
    with pytest.raises(UserError, match=r"and 9 more$") as caught:
        load_model(folder, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"not safetensors at all" * 100], ids=["empty", "JSON", "text"])
def test_a_file_that_is_no_safetensors_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_model(folder, CPU)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_model(folder, CPU)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{re.escape(name)} is missing"):
        load_model(folder, CPU)


def test_another_kind_of_model_is_refused(folder: Path) -> None:
    change_config(folder, model_type="llama")
    with pytest.raises(UserError, match=r"config\.json: model_type is 'llama'"):
        load_model(folder, CPU)


def test_another_activation_is_refused(folder: Path) -> None:
    change_config(folder, activation_function="relu")
    with pytest.raises(UserError, match="'relu'"):
        load_model(folder, CPU)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"model_type": "gpt2"}', '{"model_type": "gpt2", "n_layer": "twelve"}'],
)
def test_a_damaged_config_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(folder, CPU)
