"""Typical programming errors, which tests plant into a correct GPT-2."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restomod.data.batches import Batches
from restomod.engine.loss import linear_cross_entropy
from restomod.engine.optimizer import AdamW, Optimizers
from restomod.engine.optimizers.muon import Muon
from restomod.model.gpt import GPT, MLP, Block, BlockInputs, CausalSelfAttention, KVCache, Transformer

Plant = Callable[[pytest.MonkeyPatch], None]
Alter = Callable[[GPT], None]

sound_init = GPT.__init__


def _initialise(std: float, mean: float = 0.0, residual_scale: bool = True, bias: float = 0.0) -> Plant:
    """GPT-2's initialisation with other constants."""

    @torch.no_grad()
    def init_weights(model: GPT, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            scaled = residual_scale and name.endswith("c_proj.weight")
            if p.ndim == 2:
                p.normal_(mean, std / math.sqrt(2 * model.config.n_layer) if scaled else std, generator=generator)
            else:
                p.fill_(1.0 if name.endswith("weight") else bias)
        model.transformer.wte.weight[model.config.vocab_size :] = 0.0

    return lambda patch: patch.setattr("restomod.model.gpt.init_weights", init_weights)


def _attend(kind: str) -> Plant:
    """Attention with another mask, or without a gradient."""

    def forward(self: CausalSelfAttention, x: Tensor, *_: object) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.c_attn(x).unflatten(-1, (3, -1, self.head_size)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = {
            "all": torch.ones(T, T, dtype=torch.bool),
            "one ahead": torch.ones(T, T, dtype=torch.bool).tril(1),
            "backwards": torch.ones(T, T, dtype=torch.bool).triu(),
        }.get(kind, torch.ones(T, T, dtype=torch.bool).tril())
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(B, T, D)
        return self.c_proj(y.detach() if kind == "detached" else y)

    return lambda patch: patch.setattr(CausalSelfAttention, "forward", forward)


def _embed(kind: str) -> Plant:
    """Forward pass of the transformer with an error."""

    def forward(self: Transformer, tokens: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        x, positions = self.wte(tokens), self.wpe(torch.arange(tokens.shape[1]))
        x = x if kind == "no positions" else x + positions
        for block in self.h:
            x = block(x.detach() if kind == "detached" else x, BlockInputs(), cache)
        if kind == "ignores its input":
            x = torch.zeros_like(x) + self.wpe(torch.zeros_like(tokens))
        return self.ln_f(x)

    return lambda patch: patch.setattr(Transformer, "forward", forward)


def _mlp(function: Callable[[MLP, Tensor], Tensor]) -> Plant:
    return lambda patch: patch.setattr(MLP, "forward", function)


def _residual_stream(scale: float) -> Plant:
    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        x = x + self.attn(self.ln_1(x), *others)
        return (x + self.mlp(self.ln_2(x))) * scale

    return lambda patch: patch.setattr(Block, "forward", forward)


def _untied(patch: pytest.MonkeyPatch) -> None:
    """An untied lm_head."""

    def __init__(self: GPT, config: Any) -> None:
        sound_init(self, config)
        self.own_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)

    patch.setattr(GPT, "__init__", __init__)
    patch.setattr(GPT, "head", property(lambda self: self.own_head.weight))


def _head(head: Callable[[Tensor], Tensor]) -> Plant:
    """An lm_head computed from the token embedding."""
    return lambda patch: patch.setattr(GPT, "head", property(lambda self: head(self.transformer.wte.weight)))


def _built(alter: Alter) -> Plant:
    """A model that is altered after its construction."""

    def __init__(self: GPT, config: Any) -> None:
        sound_init(self, config)
        alter(self)

    return lambda patch: patch.setattr(GPT, "__init__", __init__)


def _load(tokens_ahead: int, targets_ahead: int) -> Plant:
    """A loader with shifted tokens and targets."""

    def load(self: Batches, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        text = self.streams[0].read(0, len(self.streams[0])).astype(np.int64)

        def rows(ahead: int) -> Tensor:
            at = windows[:, None] * self.T + np.arange(self.T)[None, :] + ahead
            return torch.from_numpy(text[at % len(text)])

        return rows(tokens_ahead), rows(targets_ahead)

    return lambda patch: patch.setattr(Batches, "load", load)


def _loss(error: Callable[[Tensor, int], tuple[Tensor, int]]) -> Plant:
    """A loss in `batch_loss` with other targets (N,) or another vocabulary size."""

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, *how: Any) -> Tensor:
        targets, vocab_size = error(targets, vocab_size)
        return linear_cross_entropy(hidden, weight, targets, vocab_size, *how)

    return lambda patch: patch.setattr("restomod.engine.step.linear_cross_entropy", loss)


def _differs_in_bf16(patch: pytest.MonkeyPatch) -> None:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, V: int, dtype: torch.dtype, *how: Any) -> Tensor:
        right = linear_cross_entropy(hidden, weight, targets, V, dtype, *how)
        return right * 1.02 if dtype == torch.bfloat16 else right

    patch.setattr("restomod.engine.step.linear_cross_entropy", loss)


def _optimizer(keep: Callable[[list[dict[str, Any]]], Iterable[dict[str, Any]]]) -> Plant:
    """AdamW with a part of the parameter groups."""
    return lambda patch: patch.setattr(
        "restomod.engine.optimizers.adamw.AdamW", lambda groups, **settings: AdamW(list(keep(groups)), **settings)
    )


def _compiled(scale: float) -> Plant:
    """A compiler whose code returns scaled results."""
    return lambda patch: patch.setattr("torch.compile", lambda module: lambda tokens: module.forward(tokens) * scale)


def _compiled_without_gradient(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("torch.compile", lambda module: lambda tokens: module.forward(tokens).detach())


def _nothing_is_learned(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Optimizers, "update", lambda self, *_: self.zero_grad())


def _takes_nan(patch: pytest.MonkeyPatch) -> None:
    step = Muon.step
    patch.setattr(Muon, "step", lambda self: (setattr(self, "found_inf", None), step(self)))


def _relu_far_below_zero(self: MLP, x: Tensor) -> Tensor:
    return self.c_proj(F.relu(self.c_fc(x) - 5))


def _without_bias(self: MLP, x: Tensor) -> Tensor:
    return F.linear(F.gelu(self.c_fc(x), approximate="tanh"), self.c_proj.weight)


QUICK_FAULTS: dict[str, tuple[Plant, str, str]] = {
    # name of the fault: function that plants it, name of the check that must fail, part of its reason
    "20 times the std, no residual scaling": (  # far enough from 1.5 nats for any text
        _initialise(0.4, residual_scale=False),
        "initial loss",
        "the initialisation is wrong",
    ),
    "a mask that hides nothing": (_attend("all"), "causality", "attention is not causal"),
    "a mask that is off by one": (_attend("one ahead"), "causality", "attention is not causal"),
    "a mask that is transposed": (_attend("backwards"), "causality", "attention is not causal"),
    "logits that do not depend on the tokens": (_embed("ignores its input"), "causality", "changes no logits"),
    "a head with its own weights": (_untied, "tied lm_head", "a copy"),
    "a head that is a detached copy": (_head(lambda w: w.detach().clone()), "tied lm_head", "a copy"),
    "a head that is detached": (_head(torch.Tensor.detach), "tied lm_head", "detached"),
    "a block too few": (
        _built(lambda model: model.transformer.h.__delitem__(1)),
        "tied lm_head",
        "1 blocks, expected 2",
    ),
    "a loader with targets 0 ahead": (_load(0, 0), "targets", "shifted by 0 tokens, expected 1"),
    "a loader with targets 2 ahead": (_load(0, 2), "targets", "shifted by 2 tokens, expected 1"),
    "a loader with targets behind": (_load(0, -1), "targets", "shifted by -1 tokens, expected 1"),
    "a loader with targets far off": (_load(0, 7), "targets", "the targets of the first window are wrong: they differ"),
    "a loader that skips the first token": (_load(1, 2), "targets", "the tokens of the first window are wrong"),
    "a loss of targets 0 ahead": (_loss(lambda y, V: (y.roll(1), V)), "targets", "cross-entropy of the next tokens"),
    "a loss of targets 2 ahead": (_loss(lambda y, V: (y.roll(-1), V)), "targets", "cross-entropy of the next tokens"),
    "a loss over the padding": (
        _loss(lambda y, V: (y, 64 * math.ceil(V / 64))),
        "targets",
        "cross-entropy of the next",
    ),
    "a frozen matrix": (
        _built(lambda model: model.transformer.wpe.weight.requires_grad_(False)),
        "gradients",
        "transformer.wpe.weight is frozen",
    ),
    "all parameters frozen": (_built(lambda model: model.requires_grad_(False)), "gradients", "wte.weight is frozen"),
    "blocks cut off by .detach()": (_embed("detached"), "gradients", "wpe.weight has no gradient"),
    "attention cut off by .detach()": (
        _attend("detached"),
        "gradients",
        "h.0.ln_1.weight has no gradient",
    ),
    "no positions": (_embed("no positions"), "gradients", "wpe.weight has no gradient"),
    "a missing bias": (_mlp(_without_bias), "gradients", "h.0.mlp.c_proj.bias has no gradient"),
    "an optimizer without biases and norms": (
        _optimizer(lambda groups: groups[:1]),
        "gradients",
        "h.0.ln_1.weight is missing in the optimizer",
    ),
}

SLOW_FAULTS: dict[str, tuple[Plant, str, str]] = {
    "no residual scaling": (
        _initialise(0.02, residual_scale=False),
        "initial weights",
        "transformer.h.0.attn.c_proj.weight has std",
    ),
    "10 times the std": (_initialise(0.2, residual_scale=False), "initial weights", "wte.weight has std"),
    "a tenth of the std": (_initialise(0.002), "initial weights", "wte.weight has std 0.002"),
    "weights around another mean": (_initialise(0.02, mean=0.02), "initial weights", "has mean 0.0"),
    "biases that are not 0": (_initialise(0.02, bias=0.1), "initial weights", "ln_1.bias is not all 0"),
    "a residual stream that explodes": (_residual_stream(100.0), "activations", "exploding"),
    "a residual stream that dies": (_residual_stream(0.01), "activations", "dead"),
    "a residual stream that overflows": (_residual_stream(1e30), "activations", "not finite"),
    "dead hidden units": (_mlp(_relu_far_below_zero), "activations", "dead MLP units: 100.0%"),
    "another loss in bf16": (_differs_in_bf16, "bf16", "differ by more than 0.05"),
    "a compiler's other loss": (_compiled(1.05), "compiled", "eager"),
    "a compiler without gradients": (_compiled_without_gradient, "compiled", "gradient norm"),
    "an optimizer that applies NaN": (_takes_nan, "NaN gradients", "optimizer muon changes transformer"),
    "an optimizer without updates": (_nothing_is_learned, "overfit batch", " steps"),
}
