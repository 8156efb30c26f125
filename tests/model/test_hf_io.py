"""Model folders: exchange with `transformers` without a changed bit, and messages for damaged or unsupported ones."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from restomod.checks.device_parity import random_model
from restomod.config.run import ModelConfig
from restomod.model.flops import parameter_count
from restomod.model.gpt import GPT, build_model
from restomod.model.hf_io import (
    canonical_names,
    hf_tensors,
    load_model,
    read_model_config,
    save_model,
)
from restomod.utils.errors import UserError
from tests.models import CPU, random_tokens, to_transformers

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


# --- our folders in transformers -----------------------------------------------------------------------------


def test_transformers_loads_a_saved_model_without_missing_or_unexpected_tensors(folder: Path) -> None:
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(loaded, GPT2LMHeadModel)
    assert not any(report.values()), report


def test_transformers_computes_the_same_logits(model: GPT, folder: Path) -> None:
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
    assert tokenizer.model_max_length == CONFIG.n_positions


def test_the_file_contains_no_padding_of_the_vocabulary(folder: Path) -> None:
    assert load_file(folder / "model.safetensors")["transformer.wte.weight"].shape == (50257, 16)


# --- padding -------------------------------------------------------------------------------------------------


def test_a_loaded_models_padded_rows_are_zero(folder: Path) -> None:
    loaded = load_model(folder, CPU)
    assert loaded.head.shape == (50304, 16)
    assert (loaded.head[50257:] == 0).all()


# --- layouts of published checkpoints -------------------------------------------------------------------------

OPENAIS_CONFIG = """{
  "activation_function": "gelu_new",
  "architectures": ["GPT2LMHeadModel"],
  "attn_pdrop": 0.1,
  "bos_token_id": 50256,
  "embd_pdrop": 0.1,
  "eos_token_id": 50256,
  "initializer_range": 0.02,
  "layer_norm_epsilon": 1e-05,
  "model_type": "gpt2",
  "n_ctx": 1024,
  "n_embd": 768,
  "n_head": 12,
  "n_layer": 12,
  "n_positions": 1024,
  "resid_pdrop": 0.1,
  "summary_activation": null,
  "summary_first_dropout": 0.1,
  "summary_proj_to_labels": true,
  "summary_type": "cls_index",
  "summary_use_proj": true,
  "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}},
  "vocab_size": 50257
}"""  # openai-community/gpt2


def test_openais_config_is_that_of_gpt2_124m(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(OPENAIS_CONFIG)
    config = read_model_config(tmp_path)
    assert config == ModelConfig(n_layer=12, n_head=12, n_embd=768, n_positions=1024, vocab_size=50257)
    assert parameter_count(config) == 124_439_808


def masks(prefix: str = "") -> dict[str, Tensor]:
    """Build the attention buffers that old versions of transformers saved."""
    n = SMALL.n_positions
    buffers = {}
    for layer in range(SMALL.n_layer):
        buffers[f"{prefix}h.{layer}.attn.bias"] = torch.ones(n, n, dtype=torch.uint8).tril().view(1, 1, n, n)
        buffers[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return buffers


SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=16, n_positions=12, vocab_size=97)


def old_style(theirs: GPT2LMHeadModel) -> dict[str, Tensor]:
    """Return tensors in the old layout: names of GPT2LMHeadModel, attention buffers and lm_head."""
    return {**theirs.state_dict(), **masks("transformer.")}


def openai_style(theirs: GPT2LMHeadModel) -> dict[str, Tensor]:
    """Return tensors in the layout of OpenAI's files: names of GPT2Model, attention masks, no lm_head."""
    return {**theirs.transformer.state_dict(), **masks()}


def save_safetensors(theirs: GPT2LMHeadModel, folder: Path) -> None:
    theirs.save_pretrained(folder)


def save_shards(theirs: GPT2LMHeadModel, folder: Path) -> None:
    theirs.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def save_openai(theirs: GPT2LMHeadModel, folder: Path) -> None:
    theirs.config.save_pretrained(folder)
    change_config(folder, **{**json.loads(OPENAIS_CONFIG), **vars_of(SMALL), "n_ctx": SMALL.n_positions})
    save_file({k: v.contiguous() for k, v in openai_style(theirs).items()}, folder / "model.safetensors")


def save_pickle(theirs: GPT2LMHeadModel, folder: Path) -> None:
    theirs.config.save_pretrained(folder)
    torch.save(old_style(theirs), folder / "pytorch_model.bin")


def save_legacy_pickle(theirs: GPT2LMHeadModel, folder: Path) -> None:
    theirs.config.save_pretrained(folder)
    torch.save(openai_style(theirs), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def save_pickle_shards(theirs: GPT2LMHeadModel, folder: Path) -> None:
    theirs.config.save_pretrained(folder)
    tensors = old_style(theirs)
    names = {name: f"pytorch_model-{i % 3}.bin" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        torch.save({name: tensors[name] for name in tensors if names[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))


def vars_of(config: ModelConfig) -> dict[str, int]:
    return {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")}


Save = Callable[[GPT2LMHeadModel, Path], None]
LAYOUTS: list[Save] = [
    save_safetensors,
    save_shards,
    save_openai,
    save_pickle,
    save_legacy_pickle,
    save_pickle_shards,
]


@pytest.fixture(scope="module")
def reference() -> GPT2LMHeadModel:
    return to_transformers(random_model(SMALL))


@pytest.mark.parametrize("save", LAYOUTS)
def test_every_layout_is_loaded_and_saved_without_a_changed_bit(
    save: Save, reference: GPT2LMHeadModel, tmp_path: Path
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    save(reference, theirs)
    loaded = load_model(theirs, CPU)
    assert not loaded.training
    save_model(loaded, ours)
    back = AutoModelForCausalLM.from_pretrained(ours)
    before, after = reference.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name].view(torch.int32), after[name].view(torch.int32)), name
    first, second = AutoConfig.from_pretrained(theirs), AutoConfig.from_pretrained(ours)
    for key in ("n_inner", "activation_function", "layer_norm_epsilon", "tie_word_embeddings", *vars_of(SMALL)):
        assert getattr(first, key) == getattr(second, key), key
    assert (second.bos_token_id, second.eos_token_id) == (50256, 50256)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_are_converted_to_fp32(
    reference: GPT2LMHeadModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    theirs = copy.deepcopy(reference).to(dtype)
    theirs.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["transformer.wpe.weight"].dtype == dtype
    ours = hf_tensors(load_model(tmp_path, CPU))
    for name, value in theirs.state_dict().items():
        if name != "lm_head.weight":
            assert ours[name].dtype == torch.float32
            assert torch.equal(ours[name], value.float()), name


def test_biases_are_distinguished_from_attention_masks(reference: GPT2LMHeadModel) -> None:
    expected = reference.state_dict().keys()
    for tensors in (old_style(reference), openai_style(reference)):
        named = canonical_names(tensors)
        assert named.keys() | {"lm_head.weight"} == expected
    assert "transformer.h.0.attn.c_attn.bias" in named


def test_names_without_the_prefix_may_come_with_a_head(reference: GPT2LMHeadModel) -> None:
    tensors = {**reference.transformer.state_dict(), "lm_head.weight": reference.lm_head.weight}
    assert canonical_names(tensors).keys() == reference.state_dict().keys()


def refusal(tensors: dict[str, Tensor], reference: GPT2LMHeadModel, folder: Path) -> str:
    """Return the error message for a folder with the reference's config and the given tensors."""
    reference.config.save_pretrained(folder)
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        load_model(folder, CPU)
    beginning = f"{folder}/pytorch_model.bin does not fit its config.json: "
    assert str(caught.value).startswith(beginning)
    return str(caught.value).removeprefix(beginning)


@pytest.mark.parametrize("shape", [None, (97,), (98, 16), (0,)])
def test_a_head_that_is_not_the_embedding_is_refused(
    reference: GPT2LMHeadModel, shape: tuple[int, ...] | None, tmp_path: Path
) -> None:
    head = reference.lm_head.weight.detach() + 1e-3 if shape is None else torch.zeros(shape)
    said = refusal({**reference.state_dict(), "lm_head.weight": head}, reference, tmp_path)
    assert said.startswith("lm_head.weight differs from transformer.wte.weight")


def test_hf_tensors_are_views_of_the_models_weights(model: GPT) -> None:
    """`inspect` must not copy a large model."""
    tensors = hf_tensors(model)
    assert tensors["transformer.wte.weight"].shape == (50257, 16)
    assert tensors["transformer.h.0.mlp.c_fc.weight"].shape == (16, 64)  # (in, out)
    storages = {parameter.data_ptr() for parameter in model.parameters()}
    assert {value.data_ptr() for value in tensors.values()} == storages
    assert not any(value.requires_grad for value in tensors.values())


# --- tensors that do not fit -----------------------------------------------------------------------------------

WTE, FC = "transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("transformer.ln_f.bias"), "missing transformer.ln_f.bias"),
        (lambda t: t.update({"transformer.h.2.ln_1.bias": torch.zeros(16)}), "unexpected transformer.h.2.ln_1.bias"),
        (lambda t: t.update({"score.weight": torch.zeros(2, 16)}), "unexpected score.weight"),
        (lambda t: t.update({FC: torch.zeros(64, 16)}), f"{FC} has shape (64, 16), not (16, 64)"),
        (lambda t: t.update({FC: torch.zeros(1024)}), f"{FC} has shape (1024,), not (16, 64)"),
        (lambda t: t.update({FC: torch.zeros(16, 64, 1)}), f"{FC} has shape (16, 64, 1), not (16, 64)"),
        (lambda t: t.update({FC: torch.tensor(0.0)}), f"{FC} has shape (), not (16, 64)"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.zeros(1)}), "has shape (1,), not (16,)"),
        (lambda t: t.update({WTE: torch.zeros(128, 16)}), f"{WTE} has shape (128, 16), not (97, 16)"),
        (lambda t: t.update({FC: torch.zeros(16, 64, dtype=torch.int8)}), f"{FC} has dtype int8, not float"),
        (lambda t: t.update({FC: torch.zeros(16, 64, dtype=torch.bool)}), f"{FC} has dtype bool, not float"),
        (lambda t: t.update({FC: torch.zeros(16, 64, dtype=torch.complex64)}), f"{FC} has dtype complex64, not float"),
        (lambda t: t.update({FC: torch.zeros(16, 64).to(torch.float8_e4m3fn)}), f"{FC} has dtype float8_e4m3fn, not"),
        (lambda t: [t.pop(name) for name in list(t)[:5]], " and 2 more"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    reference: GPT2LMHeadModel, change: Callable[[dict[str, Tensor]], Any], said: str, tmp_path: Path
) -> None:
    tensors = {name: value for name, value in reference.state_dict().items() if name != "lm_head.weight"}
    change(tensors)
    assert said in refusal(tensors, reference, tmp_path)


def test_a_config_of_a_larger_model_is_refused_before_memory_is_allocated(folder: Path) -> None:
    """An allocation of 10^15 bytes could end the process."""
    change_config(folder, n_embd=2 * 10**5, n_positions=2 * 10**8)
    with pytest.raises(UserError, match=r"model\.safetensors does not fit its config\.json"):
        load_model(folder, CPU)


@pytest.mark.parametrize(
    "values",
    [
        {"n_layer": 10**9},
        {"n_layer": 4000},
        {"n_layer": 10**400},
        {"n_embd": 10**9},
        {"vocab_size": 10**9},
        {"n_layer": [2]},
        {"n_head": "2"},
        {"n_positions": -1},
        {"model_type": "restomod", "n_layer": 2, "mlp": 5},
        {"model_type": "llama", "num_hidden_layers": 10**9, "num_attention_heads": 2},
        {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2, "rope_parameters": [1]},
    ],
)
def test_a_config_that_does_not_fit_is_refused_before_a_model_is_built(
    folder: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("restomod.model.hf_io.GPT", None)
    change_config(folder, **values)
    with pytest.raises(UserError, match=re.escape(str(folder))):
        load_model(folder, CPU)


def test_a_new_model_larger_than_the_free_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("restomod.model.gpt.available_bytes", lambda device: 10**6)
    with pytest.raises(MemoryError, match=r"need 0\.5 GB"):
        build_model(ModelConfig(), 0, CPU)


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_safetensors_header_is_a_user_error(folder: Path, seed: int) -> None:
    generator, path = random.Random(seed), folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    for _ in range(3):
        at = generator.randrange(8 + length)
        content[at : at + generator.choice((0, 1, 4))] = generator.randbytes(generator.choice((0, 1, 4)))
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        load_model(folder, CPU)


# --- damaged and unsupported configs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [None, "", "{", "[]", "null", '{"model_type": "gpt2"}', '{"model_type": "gpt2", "n_layer": "twelve"}'],
)
def test_a_missing_or_damaged_config_is_named(folder: Path, content: str | None) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(folder, CPU)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"n_inner": 100}, "n_inner is 100; this package supports only None"),
        ({"n_inner": 0}, "n_inner is 0"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is True; this package supports only False",
        ),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06; this package supports only 1e-05"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu'; this package supports only 'gelu_new'"),
        ({"activation_function": ["gelu_new"]}, "activation_function is ['gelu_new']"),
        ({"model_type": None}, "model_type is None; supported types: gpt2, "),
        ({"n_head": 3}, "model.n_embd 16 is not a multiple of model.n_head 3"),
        ({"n_head": 0}, "model.n_head is 0; it must be at least 1"),
        ({"n_layer": -1}, "model.n_layer is -1; it must be at least 1"),
        ({"n_layer": None}, "is damaged: n_layer must be an integer, not None"),
        ({"n_layer": 2.0}, "is damaged: n_layer must be an integer, not 2.0"),
        ({"n_layer": True}, "is damaged: n_layer must be an integer, not True"),
        ({"n_embd": "16"}, "is damaged: n_embd must be an integer, not '16'"),
        ({"vocab_size": [97]}, "is damaged: vocab_size must be an integer, not [97]"),
    ],
)
def test_a_config_of_another_model_is_refused_with_the_files_name(
    folder: Path, values: dict[str, Any], said: str
) -> None:
    change_config(folder, **values)
    with pytest.raises(UserError, match=f"^{re.escape(str(folder / 'config.json'))}") as caught:
        load_model(folder, CPU)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values", [{"n_inner": 64}, {"n_inner": None}, {"activation_function": "gelu_pytorch_tanh"}, {"n_ctx": 12}]
)
def test_equivalent_config_values_are_accepted(folder: Path, values: dict[str, Any]) -> None:
    change_config(folder, **values)
    assert read_model_config(folder) == CONFIG


@pytest.mark.parametrize("key", ["n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "model_type"])
def test_a_config_without_a_needed_key_is_refused_by_that_key(folder: Path, key: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    with pytest.raises(UserError, match=rf"config\.json.*{key}"):
        load_model(folder, CPU)


def test_missing_config_values_default_to_gpt2s(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **vars_of(CONFIG)}))
    assert load_model(folder, CPU).config == CONFIG
