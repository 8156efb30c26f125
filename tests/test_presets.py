from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from restomod.config import ModelConfig
from restomod.errors import UserError
from restomod.model.flops import parameter_count
from restomod.model.gpt import GPT
from restomod.presets import PRESETS, preset, summary


def ours(config: ModelConfig) -> int:
    """Parameters of our model, without the rows that pad the vocabulary."""
    with torch.device("meta"):
        model = GPT(config)
    padding = (model.head.shape[0] - config.vocab_size) * config.n_embd
    return sum(p.numel() for p in model.parameters()) - padding


def theirs(config: ModelConfig) -> int:
    """Parameters of the `transformers` model of the same shape."""
    shape = GPT2Config(
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        n_positions=config.n_positions,
        vocab_size=config.vocab_size,
    )
    with torch.device("meta"):
        return sum(p.numel() for p in GPT2LMHeadModel(shape).parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_transformers_gpt2_and_of_the_formula(name: str) -> None:
    config = preset(name).model
    assert ours(config) == theirs(config) == parameter_count(config)


@pytest.mark.parametrize("name", ["gpt2-124m", "tinyshakespeare"])
def test_gpt2_has_the_published_number_of_parameters(name: str) -> None:
    assert ours(preset(name).model) == 124_439_808


@pytest.mark.parametrize("name", ["gpt2-124m", "tinyshakespeare"])
def test_gpt2_has_the_published_shape(name: str) -> None:
    shape = ModelConfig(n_layer=12, n_head=12, n_embd=768, n_positions=1024, vocab_size=50257)
    assert preset(name).model == shape


def test_gpt2_124m_is_trained_as_in_the_gpt3_paper() -> None:
    config = preset("gpt2-124m")
    assert config.batch_tokens == 2**19  # "0.5M", table 2.1
    assert config.sequence_length == 1024
    assert config.optim.lr == 6e-4  # table 2.1
    assert (config.optim.betas, config.optim.eps, config.optim.weight_decay) == ((0.9, 0.95), 1e-8, 0.1)  # appendix B
    assert (config.optim.grad_clip, config.optim.min_lr_ratio) == (1.0, 0.1)  # appendix B
    assert config.steps == 10**10 // config.batch_tokens
    assert config.optim.warmup_steps == 375 * 10**6 // config.batch_tokens  # appendix B


def test_tinyshakespeare_trains_on_all_of_its_text() -> None:
    config = preset("tinyshakespeare")
    assert (config.data.source, config.data.val_fraction, config.target_loss) == ("tinyshakespeare", 0.0, 0.09)


def test_quickstart_reads_what_every_python_has() -> None:
    assert preset("quickstart").data.source == "python-stdlib"


def test_an_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown preset 'tinyshakespear'; did you mean 'tinyshakespeare'"):
        preset("tinyshakespear")


def test_a_preset_like_none_lists_all() -> None:
    with pytest.raises(
        UserError, match="known: gpt2-124m, gpt2-1558m, gpt2-355m, gpt2-774m, quickstart, tinyshakespeare"
    ):
        preset("xyzzy")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_one_line_summary(name: str) -> None:
    assert summary(name).endswith(".") or summary(name).endswith(")")
    assert "\n" not in summary(name)
