"""Models with modern parts against `transformers`' Llama and Qwen3: logits, gradients, text, saving and loading."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from restomod.checks.device_parity import random_model
from restomod.config.run import ModelConfig, SamplingConfig
from restomod.engine.step import ComputeConfig, batch_loss
from restomod.generate.decode import Prompt, generate
from restomod.model.gpt import GPT, BlockInputs, build_model
from restomod.model.hf_format import as_saved, family_of
from restomod.model.hf_io import load_model, read_model_config, save_model
from restomod.utils.errors import UserError
from tests.models import CPU, random_tokens

FP32 = ComputeConfig(CPU, torch.float32, micro_batch=1)
GPT2 = ModelConfig(n_layer=2, n_head=4, n_embd=64, n_positions=64, vocab_size=1009)
LLAMA = dataclasses.replace(GPT2, norm="rmsnorm", positions="rope", mlp="swiglu", bias=False)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True)
OTHERS = {
    "llama": LLAMA,
    "llama, untied lm_head": dataclasses.replace(LLAMA, tied=False, rope_theta=5000.0),
    "qwen3": QWEN3,
    "qwen3, wide heads": dataclasses.replace(QWEN3, head_dim=32, n_inner=96),
}
OWN = dataclasses.replace(LLAMA, mlp="relu2", qk_norm=True, tied=False)


@pytest.fixture(params=list(OTHERS), scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, Any]:
    """Return a model of this package, and the model that `transformers` loads from its folder."""
    model, folder = random_model(OTHERS[request.param]), tmp_path_factory.mktemp("model")
    save_model(model, folder)
    return model, AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def test_the_saved_class_has_the_models_parts(pair: tuple[GPT, Any]) -> None:
    model, theirs = pair
    expected = Qwen3ForCausalLM if model.config.qk_norm else LlamaForCausalLM
    assert type(theirs) is expected


def test_logits_equal_those_of_transformers_over_the_whole_context(pair: tuple[GPT, Any]) -> None:
    model, theirs = pair
    tokens = random_tokens(model.config, 2, model.config.n_positions)
    with torch.no_grad():
        assert (model(tokens) - theirs(tokens).logits).abs().max() < 1e-4


def test_every_gradient_equals_that_of_transformers(pair: tuple[GPT, Any]) -> None:
    model, theirs = pair
    tokens = random_tokens(model.config, 3, 24)
    model.zero_grad()
    theirs.zero_grad()
    batch_loss(model, tokens[:, :-1], tokens[:, 1:], FP32).backward()
    theirs(tokens, labels=tokens).loss.backward()
    gradients = GPT(model.config)
    for target, source in zip(gradients.parameters(), model.parameters(), strict=True):
        assert source.grad is not None
        target.data = source.grad
    ours = family_of(model.config).views(gradients)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours[name].detach(), parameter.grad, atol=1e-6, rtol=1e-4)


def test_the_same_text_is_generated(pair: tuple[GPT, Any]) -> None:
    """Prompts of different lengths in one batch, in fp64, so that rounding does not decide between two tokens."""
    config = pair[0].config
    model, theirs = random_model(config).double(), pair[1]
    prompts = [random_tokens(config, 1, n, seed=n)[0].tolist() for n in (3, 20, 9)]
    how = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    sampling, requests = (
        SamplingConfig(max_tokens=20, temperature=0.0),
        [Prompt(prompt, 0) for prompt in prompts],
    )
    steps = list(generate(model, requests, sampling, 0, torch.float64, stop=None))
    theirs.double()
    try:
        for i, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist()
            assert [new[i] for new in steps] == expected
    finally:
        theirs.float()


@pytest.mark.parametrize("kind", [LlamaForCausalLM, Qwen3ForCausalLM])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_saved_by_transformers_is_loaded(kind: Any, tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = kind(
        (LlamaConfig if kind is LlamaForCausalLM else Qwen3Config)(
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=64,
            vocab_size=1009,
            tie_word_embeddings=tied,
            rms_norm_eps=1e-6,
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path, CPU)
    tokens = random_tokens(model.config, 2, 40)
    with torch.no_grad():
        assert (model(tokens) - theirs(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("config", [GPT2, *OTHERS.values(), OWN], ids=["gpt2", *OTHERS, "own"])
def test_a_saved_model_is_loaded_bit_for_bit(config: ModelConfig, tmp_path: Path) -> None:
    model = random_model(config)
    save_model(model, tmp_path)
    again = load_model(tmp_path, CPU)
    assert again.config == as_saved(config) == read_model_config(tmp_path)
    for (name, a), (other, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn'"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be an integer"),
        ({"model_type": "mamba"}, "model_type is 'mamba'; supported types: gpt2, llama, qwen3, restomod"),
    ],
)
def test_unsupported_parts_are_refused_by_name(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_model(random_model(LLAMA), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as e:
        load_model(tmp_path, CPU)
    assert str(path) in str(e.value)
    assert said in str(e.value)


# --- single parts --------------------------------------------------------------------------------------------


def test_zero_initialised_projections_make_every_block_the_identity() -> None:
    model = build_model(dataclasses.replace(QWEN3, zero_init_projections=True), 0, CPU)
    x = torch.randn(1, 7, 64)
    rope = model.transformer.h[0].attn.q_norm.weight.new_ones(7, 8), torch.zeros(7, 8)
    assert torch.equal(model.transformer.h[1](x, BlockInputs(rope)), x)
    assert not torch.equal(random_model(QWEN3).transformer.h[1](x, BlockInputs(rope)), x)


def test_rotary_positions_are_relative() -> None:
    """A constant shift of all positions does not change attention scores."""
    model = random_model(LLAMA).double()
    tokens = random_tokens(LLAMA, 1, 20)
    with torch.no_grad():
        here, there = (model.transformer(tokens, positions=torch.arange(20) + n) for n in (0, 40))
    torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)  # RoPE angles are fp32
    assert not torch.equal(here, there)
