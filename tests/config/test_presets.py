from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from restomod.config.presets import PRESETS, SIZES, preset, preset_summary
from restomod.config.run import ModelConfig
from restomod.engine.step import ComputeConfig, batch_loss
from restomod.model.flops import parameter_count
from restomod.model.gpt import GPT, build_model
from restomod.model.hf_format import family_of
from restomod.utils.errors import UserError


def ours(config: ModelConfig) -> int:
    """Return the number of parameters of this package's model, without the padding of the vocabulary."""
    with torch.device("meta"):
        model = GPT(config)
    padding = (model.head.shape[0] - config.vocab_size) * config.n_embd * len(model.vocabulary_matrices())
    return sum(p.numel() for p in model.parameters()) - padding


def theirs(config: ModelConfig) -> int:
    """Return the number of parameters of the `transformers` model with the same `config.json`."""
    values = family_of(config).to_json(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_equals_transformers_and_the_formula(name: str) -> None:
    config = preset(name).model
    assert ours(config) == parameter_count(config)
    if name != "speedrun-124m":
        assert ours(config) == theirs(config)


def test_parameter_count_of_the_speedrun() -> None:
    """Token embedding, value embedding and lm_head; blocks as in GPT-2, without biases and position embedding."""
    D, V = 768, 50257
    blocks = 12 * (12 * D * D + 2 * D + 2 * 64 + 4 * D)  # matrices, norms, norms of heads, skips
    norms = 2 * D  # of the embedding, and before lm_head
    assert parameter_count(preset("speedrun-124m").model) == 3 * V * D + blocks + norms


# n_layer, n_head, n_embd and parameters of OpenAI's four models; batch size and learning rate of GPT-3 Small, Medium,
# Large and XL in Brown et al., 2020, table 2.1
GPT2_SIZES = {
    "gpt2-124m": (12, 12, 768, 124_439_808, "0.5M", 6.0e-4),
    "gpt2-355m": (24, 16, 1024, 354_823_168, "0.5M", 3.0e-4),
    "gpt2-774m": (36, 20, 1280, 774_030_080, "0.5M", 2.5e-4),
    "gpt2-1558m": (48, 25, 1600, 1_557_611_200, "1M", 2.0e-4),
}


@pytest.mark.parametrize("name", GPT2_SIZES)
def test_the_four_sizes_have_the_published_shapes_and_are_trained_as_in_the_gpt3_paper(name: str) -> None:
    config = preset(name)
    n_layer, n_head, n_embd, parameters, batch, lr = GPT2_SIZES[name]
    assert config.model == ModelConfig(n_layer, n_head, n_embd, n_positions=1024, vocab_size=50257)
    assert ours(config.model) == parameters
    assert (config.batch_tokens, config.optim.lr) == ({"0.5M": 2**19, "1M": 2**20}[batch], lr)
    assert config.steps * config.batch_tokens == pytest.approx(10e9, rel=1e-3)
    assert config.optim.warmup_steps * config.batch_tokens == pytest.approx(375e6, rel=5e-3)  # appendix B
    assert (config.optim.betas, config.optim.eps, config.optim.weight_decay) == ((0.9, 0.95), 1e-8, 0.1)  # appendix B
    assert (config.optim.grad_clip, config.optim.min_lr_ratio) == (1.0, 0.1)  # appendix B
    assert (config.data.source, config.sequence_length) == ("text", 1024)


def test_tinyshakespeare_trains_on_all_of_its_text() -> None:
    config = preset("tinyshakespeare")
    assert config.model == preset("gpt2-124m").model
    assert (config.data.source, config.data.val_fraction, config.target_loss) == ("tinyshakespeare", 0.0, 0.09)


def test_an_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown preset 'tinyshakespear'; did you mean 'tinyshakespeare'"):
        preset("tinyshakespear")


def test_a_name_unlike_any_preset_lists_all() -> None:
    with pytest.raises(UserError, match=f"known: {', '.join(sorted(PRESETS))}$"):
        preset("xyzzy")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_one_line_summary(name: str) -> None:
    assert preset_summary(name).endswith(".") or preset_summary(name).endswith(")")
    assert "\n" not in preset_summary(name)


@pytest.mark.parametrize("name", ["gpt2-124m", "llama-124m", "modern-124m", "speedrun-124m"])
def test_the_initial_loss_is_that_of_a_uniform_prediction(name: str) -> None:
    """The loss of a uniform prediction is ln(V)."""
    model = build_model(dataclasses.replace(preset(name).model, n_layer=2), 0, torch.device("cpu"))
    tokens = torch.randint(50257, (1, 129), generator=torch.Generator().manual_seed(0))
    compute = ComputeConfig(torch.device("cpu"), torch.float32, micro_batch=1)
    with torch.no_grad():
        loss = batch_loss(model, tokens[:, :-1], tokens[:, 1:], compute)
    assert abs(loss.item() - math.log(50257)) < 0.3


# --- any size ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIZES)
def test_twelve_layers_are_the_124m_preset(kind: str) -> None:
    assert preset(f"{kind}-d12") == preset(f"{kind}-124m")


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("layers", [1, 6, 24])
def test_width_and_heads_follow_the_layers(kind: str, layers: int) -> None:
    model = preset(f"{kind}-d{layers}").model
    assert (model.n_layer, model.n_head, model.n_embd, model.head_size) == (layers, layers, 64 * layers, 64)
    assert dataclasses.replace(model, n_layer=12, n_head=12, n_embd=768) == preset(f"{kind}-124m").model


def test_llama_has_the_hyperparameters_of_the_public_run() -> None:
    llama = preset("llama-124m")
    assert (llama.steps, llama.batch_tokens) == (38_146, 524_288)
    assert (llama.optim.lr, llama.optim.warmup_steps) == (pytest.approx(1.8e-3), 285)
    assert (llama.optim.betas, llama.optim.weight_decay, llama.optim.min_lr_ratio) == ((0.9, 0.95), 0.1, 0.1)


def test_the_learning_rate_depends_on_the_width_except_with_muon() -> None:
    """Table 2.1 of the GPT-3 paper: 6e-4 at a width of 768, 2e-4 at 2048 (here: 2.25e-4)."""
    for kind, times in (("gpt2", 1), ("llama", 3)):
        rates = [preset(f"{kind}-d{layers}").optim.lr for layers in (6, 12, 32)]
        assert rates == pytest.approx([times * rate for rate in (12e-4, 6e-4, 2.25e-4)])
    assert preset("speedrun-d6").optim == preset("speedrun-d24").optim
    assert preset("modern-d6").optim == preset("modern-d24").optim == preset("modern-124m").optim


@pytest.mark.parametrize("name", ["modern-d0", "modern-d", "modern-d100", "modern-d6.5", "quickstart-d6", "d6"])
def test_other_sizes_are_unknown_presets(name: str) -> None:
    with pytest.raises(UserError, match=f"unknown preset '{name}'"):
        preset(name)
