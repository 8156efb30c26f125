"""The GPT model: GPT-2 by default, with modern parts where `ModelConfig` asks for them.

GPT-2 has pre-norm blocks, learned position embeddings, tanh-GELU, biases, and an lm_head tied to the token embedding.
Norms are in `restomod.model.norms`, activations in `restomod.model.activations`, one file each.

Sources: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3 (GPT-2); Su et al.,
"RoFormer", 2021 (rotary position embeddings); Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters",
2023 (norms of queries and keys).

Parameter names are those of `transformers`' GPT2LMHeadModel. Shapes are too, except that linear weights are (out, in)
here and (in, out) there.

Shapes: B = sequences, T = tokens of each, D = n_embd, H = n_head, K = head_size, I = n_inner, V = vocab_size.
"""

from __future__ import annotations

import importlib
import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from restomod.config.run import ModelConfig
from restomod.model.attention import attention
from restomod.model.norms.rmsnorm import NORM_EPS
from restomod.utils.process_memory import available_bytes

RopeCache = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary angles, each (T, K / 2) or (B, 1, T, K / 2), fp32."""


class BlockInputs(NamedTuple):
    """Inputs that all blocks share, besides the residual stream."""

    rope: RopeCache | None = None
    """Angles of rotary positions; None: positions are learned."""
    mask: Tensor | None = None
    """(B or 1, 1, T, S) bool, True where a query attends to a key; None: causal."""
    embeddings: Tensor | None = None
    """(B, T, D), the residual stream before the first block."""
    value_embeddings: Tensor | None = None
    """(B, T, H K), the value embeddings of the tokens."""


class KVCache:
    """Keys and values of the tokens so far, so that only new tokens are computed."""

    def __init__(
        self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype, capacity: int | None = None
    ) -> None:
        shape = (config.n_layer, batch, config.n_head, capacity or config.n_positions, config.head_size)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held; the caller advances it after each forward pass

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens, (B, H, T, K); return those of all tokens, (B, H, length + T, K)."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def rope_cache(positions: Tensor, head_size: int, theta: float) -> RopeCache:
    """Cosines and sines of the angles p * theta^(-2i / K) of position p and pair i.

    Args:
        positions: (T,) or (B, T) int64.
        head_size: K, even.
        theta: the base of the angles.
    """
    frequencies = theta ** (-torch.arange(0, head_size, 2, device=positions.device) / head_size)  # (K / 2,)
    angles = positions[..., None] * frequencies  # (T, K / 2) or (B, T, K / 2)
    angles = angles if positions.ndim == 1 else angles[:, None]
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, rope: RopeCache) -> Tensor:
    """Rotate each pair (x[i], x[i + K / 2]) of queries or keys, (B, H, T, K), by its angle."""
    (cos, sin), (a, b) = rope, x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Cap * tanh(logits / cap): no logit beyond ± ``cap``. Source: Gemma team, "Gemma 2", 2024, section 2."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


class ScaledResidual(nn.Module):
    """weight * x + skip * other, with learned factors per channel; initially x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.skip = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.skip)

    def forward(self, x: Tensor, other: Tensor | None) -> Tensor:
        assert other is not None
        return self.weight * x + self.skip * other


class HeadNorm(nn.RMSNorm):
    """RMS norm of queries and keys in their dtype; torch's fused kernel needs a weight of the same dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention, with optional RMS norms of queries and keys, RoPE and value embeddings."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_size = layer, config.head_size
        width = config.n_head * config.head_size
        self.c_attn = nn.Linear(config.n_embd, 3 * width, bias=config.bias)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)
        self.q_norm = HeadNorm(config.head_size, NORM_EPS) if config.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(config.head_size, NORM_EPS) if config.qk_norm else nn.Identity()
        self.v_skip = ScaledResidual(width) if config.value_embedding else None

    def forward(self, x: Tensor, inputs: BlockInputs, cache: KVCache | None = None) -> Tensor:
        q, k, v = self.c_attn(x).chunk(3, -1)  # each (B, T, H K)
        if self.v_skip is not None:
            v = self.v_skip(v, inputs.value_embeddings).type_as(q)  # the factors are in fp32
        q, k, v = (y.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for y in (q, k, v))  # (B, H, T, K)
        q, k = self.q_norm(q), self.k_norm(k)
        if inputs.rope is not None:
            q, k = apply_rope(q, inputs.rope), apply_rope(k, inputs.rope)
        q, k = q.type_as(v), k.type_as(v)  # the angles are in fp32
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = attention(q, k, v, causal=cache is None and inputs.mask is None, mask=inputs.mask)
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)


def build_part(kind: Literal["norms", "activations"], name: str, config: ModelConfig) -> nn.Module:
    """Build the norm or activation of the module ``restomod.model.KIND.NAME``, by its function `build`."""
    part: nn.Module = importlib.import_module(f"restomod.model.{kind}.{name}").build(config)
    return part


class MLP(nn.Module):
    """D to I hidden units (2 I inputs of a gated activation) and back to D."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, (2 if config.gated else 1) * config.inner_size, bias=config.bias)
        self.c_proj = nn.Linear(config.inner_size, config.n_embd, bias=config.bias)
        self.activation = build_part("activations", config.mlp, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


def apply_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)`` in the wider dtype of ``x`` and the norm's parameters: fp32 for a bf16 residual stream."""
    for parameter in norm.parameters():
        x = x.to(torch.promote_types(x.dtype, parameter.dtype))
    return norm(x)


class Block(nn.Module):
    """A pre-norm transformer block: attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.x_skip = ScaledResidual(config.n_embd) if config.embedding_skip else None
        self.ln_1 = build_part("norms", config.norm, config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = build_part("norms", config.norm, config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, inputs: BlockInputs, cache: KVCache | None = None) -> Tensor:
        if self.x_skip is not None:
            x = self.x_skip(x, inputs.embeddings).type_as(x)
        x = x + self.attn(apply_norm(self.ln_1, x), inputs, cache)
        return x + self.mlp(apply_norm(self.ln_2, x))


class Transformer(nn.Module):
    """The model without the lm_head: from tokens to hidden states after the last norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_size, self.rope_theta = config.head_size, config.rope_theta
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd) if config.positions == "learned" else None
        self.vte = (
            nn.Embedding(config.padded_vocab_size, config.n_head * config.head_size) if config.value_embedding else None
        )
        self.ln_e = nn.RMSNorm(config.n_embd, NORM_EPS) if config.embedding_norm else nn.Identity()
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = build_part("norms", config.norm, config)
        self.gradient_checkpointing = False  # recompute each block in the backward pass
        self.residual_dtype: torch.dtype | None = None  # of the residual stream in training; None: the embeddings'

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Compute hidden states, (B, T, D).

        Args:
            tokens: (B, T) int64.
            cache: keys and values of the P tokens before; extended in place. The caller advances its length.
            positions: (B, T) or (T,) int64; by default those after the cache's.
            mask: (B, 1, T, P + T) bool, True where a query attends to a key; causal by default.
        """
        past, T = cache.length if cache is not None else 0, tokens.shape[1]
        if positions is None:
            positions = torch.arange(past, past + T, device=tokens.device)
        if mask is None and cache is not None and T > 1:  # a single new token attends to all
            mask = torch.ones(T, past + T, dtype=torch.bool, device=tokens.device).tril(past)
        x, rope = self.wte(tokens), None  # (B, T, D)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        else:
            rope = rope_cache(positions, self.head_size, self.rope_theta)
        x = self.ln_e(x)
        if self.residual_dtype is not None and torch.is_grad_enabled():
            x = x.to(self.residual_dtype)
        inputs = BlockInputs(rope, mask, x, self.vte(tokens) if self.vte is not None else None)
        for block in self.h:
            if self.gradient_checkpointing and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, inputs, use_reentrant=False, preserve_rng_state=False)  # nothing is random
            else:
                x = block(x, inputs, cache)
        return apply_norm(self.ln_f, x)


class GPT(nn.Module):
    """A language model: the transformer and its lm_head.

    Token embeddings and lm_head have `padded_vocab_size` rows in memory (50304 for 50257), because matmuls are faster
    at multiples of 64. The padding rows are zero, get no gradient, and take no part in logits or loss.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The lm_head's matrix, (padded V, D): the token embedding where they are tied."""
        return self.transformer.wte.weight if self.lm_head is None else self.lm_head.weight

    def vocabulary_matrices(self) -> list[Tensor]:
        """Parameters with a row per token and padding rows."""
        tables = (self.transformer.wte, self.transformer.vte, self.lm_head)
        return [table.weight for table in tables if table is not None]

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Compute logits of the next token at every position.

        Args:
            tokens: (B, T) int64, T at most n_positions (with a cache: together with the tokens it holds).
            cache: keys and values of the tokens before; extended in place. The caller advances its length.

        Returns:
            (B, T, V), without the padding of the vocabulary.
        """
        # .forward skips torch.compile, which would recompile for every new length
        hidden = self.transformer.forward(tokens, cache)  # (B, T, D)
        return soft_cap(F.linear(hidden, self.head[: self.config.vocab_size]), self.config.softcap)


def stacked_matrices(config: ModelConfig, name: str) -> int:
    """Number of matrices stacked in the weight ``name``: 3 of queries, keys, values; 2 of a gated MLP; else 1."""
    if name.endswith("attn.c_attn.weight"):
        return 3
    return 2 if name.endswith("mlp.c_fc.weight") and config.gated else 1


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> None:
    """Set the initial weights, the same on every device.

    Linear and embedding weights are normal with `initial_std`, in the order of `named_parameters`; linear biases and
    the padding rows of the vocabulary are 0. Every other module with parameters sets its own in `reset_parameters`.

    Raises:
        TypeError: a module has parameters and no `reset_parameters`.
    """
    generator = torch.Generator().manual_seed(seed)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            std = initial_std(model.config, f"{path}.weight")
            module.weight.copy_(torch.empty(module.weight.shape).normal_(0.0, std, generator=generator))
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        elif next(module.parameters(recurse=False), None) is not None:
            if not hasattr(module, "reset_parameters"):
                raise TypeError(f"{path} ({type(module).__name__}) needs a method reset_parameters")
            module.reset_parameters()
    for matrix in model.vocabulary_matrices():
        matrix[model.config.vocab_size :] = 0.0


def initial_std(config: ModelConfig, name: str) -> float:
    """Standard deviation of the initial linear or embedding weight ``name``.

    0.02, and 0.02 / sqrt(2 * n_layer) for the two projections of each block that add to the residual stream, so that
    its variance does not grow with depth (GPT-2's paper, section 2.3), or 0 with ``zero_init_projections``.

    With ``zero_init_projections`` and a tied lm_head, a token's own logit is initially std * D: the embedding has a
    std of 1 / D, so that this logit is 1, and not 15 with D = 768.
    """
    if name == "transformer.wte.weight" and config.tied and config.zero_init_projections:
        return 1.0 / config.n_embd
    if name.endswith("c_proj.weight"):
        return 0.0 if config.zero_init_projections else 0.02 / math.sqrt(2 * config.n_layer)
    return 0.02


def build_model(config: ModelConfig, seed: int, device: torch.device) -> GPT:
    """Build a freshly initialised model on ``device``.

    Raises:
        MemoryError: its weights need more memory than is free. (Trying could end this process.)
    """
    with torch.device("meta"):
        model = GPT(config)
    needed, free = sum(p.numel() * p.element_size() for p in model.parameters()), available_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(f"its weights need {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free")
    model = model.to_empty(device=device)
    init_weights(model, seed)
    return model
