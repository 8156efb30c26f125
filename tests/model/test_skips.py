"""Parts that `transformers` lacks (soft cap, skips, embedding norm, value embedding) against a plain reference."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from restomod.checks.device_parity import random_model
from restomod.config.run import ModelConfig, SamplingConfig
from restomod.engine.step import ComputeConfig, batch_loss
from restomod.generate.decode import Decoder, Prompt, RowCache, generate
from restomod.model.gpt import GPT, KVCache
from restomod.model.hf_io import load_model, save_model
from restomod.utils.errors import UserError
from tests.models import CPU, random_tokens

PLAIN = ModelConfig(
    n_layer=3, n_head=2, n_embd=32, n_positions=48, vocab_size=101, norm="rmsnorm", positions="rope", mlp="relu2",
    bias=False, tied=False,
)  # fmt: skip
PARTS = {
    "softcap": 3.0,
    "embedding_norm": True,
    "embedding_skip": True,
    "value_embedding": True,
}
ALL = dataclasses.replace(PLAIN, **PARTS)
EACH = [dataclasses.replace(PLAIN, **{name: value}) for name, value in PARTS.items()]
CONFIGS = pytest.mark.parametrize("config", [*EACH, ALL], ids=[*PARTS, "all"])


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def plain_logits(model: GPT, tokens: Tensor) -> Tensor:
    """Compute logits of one sequence, (T, V), head by head with full attention matrices, in the weights' dtype."""
    c, w, T = model.config, dict(model.named_parameters()), len(tokens)
    K = c.n_embd // c.n_head
    x = w["transformer.wte.weight"][tokens]
    if c.embedding_norm:
        x = rms(x, w["transformer.ln_e.weight"])
    first = x
    angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, K, 2) / K)
    turn = torch.polar(torch.ones(T, K // 2), angles.float()).to(x.dtype.to_complex())
    for layer in range(c.n_layer):
        p = f"transformer.h.{layer}."
        if c.embedding_skip:
            x = w[p + "x_skip.weight"] * x + w[p + "x_skip.skip"] * first
        y = rms(x, w[p + "ln_1.weight"])
        q, k, v = (y @ part.T for part in w[p + "attn.c_attn.weight"].split(c.n_embd))
        if c.value_embedding:
            v = w[p + "attn.v_skip.weight"] * v
            v = v + w[p + "attn.v_skip.skip"] * w["transformer.vte.weight"][tokens]
        heads = []
        for h in range(c.n_head):
            qh, kh, vh = (z[:, h * K : (h + 1) * K] for z in (q, k, v))
            qh, kh = (torch.complex(z[:, : K // 2], z[:, K // 2 :]) * turn for z in (qh, kh))
            scores = (qh @ kh.mH).real / K**0.5
            scores = scores.masked_fill(torch.ones(T, T).triu(1) > 0, float("-inf"))
            heads.append(scores.softmax(-1) @ vh)
        x = x + torch.cat(heads, -1) @ w[p + "attn.c_proj.weight"].T
        y = rms(x, w[p + "ln_2.weight"]) @ w[p + "mlp.c_fc.weight"].T
        x = x + (y.clamp(min=0) ** 2) @ w[p + "mlp.c_proj.weight"].T
    z = rms(x, w["transformer.ln_f.weight"]) @ w["lm_head.weight"][: c.vocab_size].T
    return z if c.softcap is None else c.softcap * torch.tanh(z / c.softcap)


def drawn(config: ModelConfig) -> GPT:
    """Build a random model in which every part has an effect: skip factors are not 0, and logits are large."""
    model = random_model(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".skip"):
                p.normal_(generator=generator)
        assert model.lm_head is not None
        model.lm_head.weight.mul_(4)
    return model


@CONFIGS
def test_logits_match_the_reference(config: ModelConfig) -> None:
    model, tokens = drawn(config).double(), random_tokens(config, 2, 40)
    with torch.no_grad():
        expected = torch.stack([plain_logits(model, row) for row in tokens])
        assert (model(tokens) - expected).abs().max() < 1e-5 * expected.abs().max()
        others = [c for c in (PLAIN, *EACH) if c != config]
        assert all((plain_logits_as(model, c, tokens[0]) - expected[0]).abs().max() > 1e-3 for c in others)


def plain_logits_as(model: GPT, config: ModelConfig, tokens: Tensor) -> Tensor:
    """Compute reference logits with another configuration, from the parameters that both models have."""
    other = drawn(config).double()
    other.load_state_dict(model.state_dict(), strict=False)
    return plain_logits(other, tokens)


@CONFIGS
def test_loss_uses_capped_logits_and_has_a_gradient_for_every_parameter(config: ModelConfig) -> None:
    model, tokens = drawn(config), random_tokens(config, 2, 40)
    loss = batch_loss(model, tokens[:, :-1], tokens[:, 1:], ComputeConfig(CPU, torch.float32, micro_batch=2))
    expected = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert p.grad.any(), name
        torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-4)


@CONFIGS
def test_a_key_value_cache_does_not_change_logits(config: ModelConfig) -> None:
    model, tokens = drawn(config).double(), random_tokens(config, 2, 30)
    cache, parts = KVCache(config, 2, CPU, torch.float64), []
    with torch.no_grad():
        for part in tokens.split([7, 1, 1, 21], 1):
            parts.append(model(part, cache))
            cache.length += part.shape[1]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens))


@CONFIGS
def test_generation_matches_the_reference(config: ModelConfig) -> None:
    model, prompt = drawn(config).double(), random_tokens(config, 1, 6)[0].tolist()
    sampling = SamplingConfig(max_tokens=12, temperature=0.0)
    new = [step[0] for step in generate(model, [Prompt(prompt, 0)], sampling, 0, torch.float64, stop=None)]
    tokens = list(prompt)
    for token in new:
        with torch.no_grad():
            assert plain_logits(model, torch.tensor(tokens))[-1].argmax().item() == token
        tokens.append(token)


def test_tokens_are_sampled_from_capped_logits() -> None:
    model, tokens = drawn(ALL).double(), random_tokens(ALL, 1, 8)[0].tolist()
    decoder, cache = Decoder(model, torch.float64), RowCache(ALL, 1, CPU, torch.float64, 48)
    with torch.no_grad():
        decoder.prefill([tokens[:-1]], cache, [0])
        torch.testing.assert_close(decoder.step(tokens[-1:], cache)[0], plain_logits(model, torch.tensor(tokens))[-1])


@CONFIGS
def test_saving_and_loading_does_not_change_logits(config: ModelConfig, tmp_path: Path) -> None:
    model, tokens = drawn(config), random_tokens(config, 1, 30)
    save_model(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path, CPU)(tokens), model(tokens))


@pytest.mark.parametrize("cap", [0.0, -1.0, float("nan"), float("inf")])
def test_an_invalid_soft_cap_is_refused(cap: float) -> None:
    with pytest.raises(UserError, match=r"model\.softcap is .*; it must be above 0"):
        dataclasses.replace(PLAIN, softcap=cap)
