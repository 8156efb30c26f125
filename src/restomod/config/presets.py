"""Presets: functions that return a complete `RunConfig` and set only the fields that differ from the defaults."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from restomod.config.run import DataConfig, ModelConfig, OptimConfig, RunConfig, SamplingConfig
from restomod.utils.errors import UserError, did_you_mean


def quickstart() -> RunConfig:
    """Small GPT-2 (7.7M parameters) on the source code of Python's standard library: minutes on a laptop CPU."""
    return RunConfig(
        model=ModelConfig(n_layer=6, n_head=4, n_embd=128, n_positions=256),
        optim=OptimConfig(lr=2e-3, warmup_steps=45),
        steps=900,
        batch_tokens=512,  # 2 sequences * 256 tokens: with few training tokens, many small steps learn most
        sequence_length=256,
        eval_every=300,
        eval_tokens=32_768,
        sample_every=300,
        save_every=300,
        sampling=SamplingConfig(
            prompts=("def read(self", "class Error(Exception):\n", "import os\nimport sys\n"), max_tokens=64
        ),
    )


def tinyshakespeare() -> RunConfig:
    """GPT-2 124M that memorises TinyShakespeare: training loss below 0.09, as in the public reproduction."""
    return RunConfig(
        data=DataConfig(source="tinyshakespeare", val_fraction=0.0),  # train on all 338,025 tokens
        optim=OptimConfig(lr=6e-4, warmup_steps=100),
        steps=3600,
        batch_tokens=4096,  # 64 sequences * 64 tokens
        sequence_length=64,
        target_loss=0.09,
        sampling=SamplingConfig(prompts=("ROMEO:", "First Citizen:\n")),
    )


def gpt2_124m() -> RunConfig:
    """GPT-2 124M with the batch size, learning rate and schedule of the GPT-3 paper, on your own text (--data.path)."""
    return gpt2_of(12)  # 19,073 steps, of which 715 warm up


def gpt2_355m() -> RunConfig:
    """GPT-2 medium with GPT-3 Medium's batch size and learning rate, on your own text (--data.path)."""
    return _gpt2(ModelConfig(n_layer=24, n_head=16, n_embd=1024), lr=3e-4, batch_tokens=2**19)


def gpt2_774m() -> RunConfig:
    """GPT-2 large with GPT-3 Large's batch size and learning rate, on your own text (--data.path)."""
    return _gpt2(ModelConfig(n_layer=36, n_head=20, n_embd=1280), lr=2.5e-4, batch_tokens=2**19)


def gpt2_1558m() -> RunConfig:
    """GPT-2 XL with GPT-3 XL's batch size and learning rate, on your own text (--data.path)."""
    return _gpt2(ModelConfig(n_layer=48, n_head=25, n_embd=1600), lr=2e-4, batch_tokens=2**20)


def llama_124m() -> RunConfig:
    """Llama's architecture in GPT-2 124M's size: 20B tokens, 3x the learning rate, on your own text (--data.path)."""
    return llama_of(12)


def modern_124m() -> RunConfig:
    """Qwen3's architecture in GPT-2 124M's size, trained with Muon, on your own text (--data.path)."""
    return modern_of(12)


def speedrun_124m() -> RunConfig:
    """modern-124m with relu², untied lm_head, value embeddings: lowest loss per token; transformers cannot load it."""
    return speedrun_of(12)


def shape_of(layers: int) -> ModelConfig:
    """Return GPT-2's architecture with ``layers`` layers, as many heads, and 64 channels per head."""
    return ModelConfig(n_layer=layers, n_head=layers, n_embd=64 * layers)


def gpt2_of(layers: int) -> RunConfig:
    """Return `gpt2-124m` with another number of layers.

    The learning rate of AdamW is proportional to 1 / n_embd, which fits table 2.1 of the GPT-3 paper (Brown et al.,
    2020).
    """
    return _gpt2(shape_of(layers), lr=6e-4 * 12 / layers, batch_tokens=2**19)


def llama_of(layers: int) -> RunConfig:
    """Return `llama-124m` with another number of layers.

    Source of the hyperparameters: PersonalRec/reproduce-gpt2, results/050226, 20B tokens.
    """
    gpt2 = gpt2_of(layers)
    optim = dataclasses.replace(gpt2.optim, lr=3 * gpt2.optim.lr, warmup_steps=285)
    return dataclasses.replace(gpt2, model=llama_parts(gpt2.model), optim=optim, steps=2 * gpt2.steps)


def modern_of(layers: int) -> RunConfig:
    """Return `modern-124m` with another number of layers; with Muon, the learning rates do not depend on n_embd."""
    gpt2 = gpt2_of(layers)
    model = dataclasses.replace(llama_parts(gpt2.model), qk_norm=True, zero_init_projections=True)
    optim = OptimConfig(  # with Muon, AdamW is stable at a higher learning rate; decay over the second half
        optimizer="muon",
        muon_lr=0.02,
        lr=4e-3,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        decay="wsd",
        cooldown=0.5,
        min_lr_ratio=0.0,
        warmup_steps=100,
    )
    return dataclasses.replace(gpt2, model=model, optim=optim)


def speedrun_of(layers: int) -> RunConfig:
    """Return `speedrun-124m` with another number of layers."""
    modern = modern_of(layers)
    model = dataclasses.replace(
        modern.model,
        mlp="relu2",
        tied=False,
        softcap=15.0,
        embedding_norm=True,
        embedding_skip=True,
        value_embedding=True,
    )
    return dataclasses.replace(modern, model=model)


def llama_parts(model: ModelConfig) -> ModelConfig:
    """Return ``model`` with Llama's norm, positions, MLP and without biases, in the same shape."""
    return dataclasses.replace(model, norm="rmsnorm", positions="rope", mlp="swiglu", bias=False)


def _gpt2(model: ModelConfig, lr: float, batch_tokens: int) -> RunConfig:
    """Return a run on 10 billion tokens with the hyperparameters of Brown et al., 2020, table 2.1 and appendix B."""
    return RunConfig(
        model=model,
        data=DataConfig(source="text", val_fraction=0.01),
        optim=OptimConfig(lr=lr, warmup_steps=375 * 10**6 // batch_tokens),
        steps=10**10 // batch_tokens,
        batch_tokens=batch_tokens,  # "0.5M" and "1M": 512 and 1024 sequences * 1024 tokens
        sequence_length=1024,
        eval_tokens=10_485_760,
        sampling=SamplingConfig(prompts=("Hello, I'm a language model,",)),
    )


GPT2_PRESETS = (gpt2_124m, gpt2_355m, gpt2_774m, gpt2_1558m)
PRESETS: dict[str, Callable[[], RunConfig]] = {
    make.__name__.replace("_", "-"): make
    for make in (quickstart, tinyshakespeare, *GPT2_PRESETS, llama_124m, modern_124m, speedrun_124m)
}
SIZES: dict[str, Callable[[int], RunConfig]] = {
    make.__name__.removesuffix("_of"): make for make in (gpt2_of, llama_of, modern_of, speedrun_of)
}
"""Families of presets. `modern-d6` has 6 layers. Width and heads depend on the layers; for gpt2 and llama, lr too."""


def preset(name: str) -> RunConfig:
    """Return a preset: a name in `PRESETS`, or a family in `SIZES` with a number of layers, such as "modern-d6".

    Raises:
        UserError: unknown name; the message suggests the nearest one.
    """
    if not is_preset(name):
        raise UserError(f"unknown preset {name!r}{did_you_mean(name, PRESETS)}")
    return PRESETS[name]() if name in PRESETS else SIZES[name.rpartition("-d")[0]](int(name.rpartition("-d")[2]))


def is_preset(name: str) -> bool:
    """Return whether ``name`` is a preset."""
    sized = re.fullmatch(r"(\w+)-d[1-9]\d?", name)
    return name in PRESETS or (sized is not None and sized[1] in SIZES)


def with_scaled_warmup(config: RunConfig, base: RunConfig) -> RunConfig:
    """Return ``config`` with the warm-up of the preset ``base``, as the same fraction of all steps, rounded up."""
    warmup_steps = -(-base.optim.warmup_steps * config.steps // base.steps)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, warmup_steps=warmup_steps))


def preset_summary(name: str) -> str:
    """Return the first line of a preset's docstring."""
    return (PRESETS[name].__doc__ or "").strip().splitlines()[0]
