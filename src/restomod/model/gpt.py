"""GPT-2, exactly: pre-norm blocks, learned positions, tanh-GELU, biases, and a head tied to the token embedding.
Every one of these parts can be exchanged for a modern one when a model is made (`ModelConfig` says which).

Sources: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3 (GPT-2); Su et al.,
"RoFormer", 2021 (rotary positions); Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; Shazeer, "GLU
Variants Improve Transformer", 2020 (SwiGLU); So et al., "Primer", 2021 (squared ReLU); Dehghani et al., "Scaling
Vision Transformers to 22 Billion Parameters", 2023 (norms of queries and keys).

Parameter names are those of `transformers`' GPT2LMHeadModel; shapes too, but for the linear weights, which are
(out, in) here.

Shapes: B = sequences, T = tokens of each, D = n_embd, H = n_head, K = head_size, I = n_inner, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from restomod.config.run import ModelConfig
from restomod.model.attention import attention
from restomod.model.flops import padded_parameters
from restomod.utils.process_memory import available_bytes

NORM_EPS = 1e-6  # of RMS norms, as in `transformers`' Llama and Qwen3; layer norms have torch's 1e-5, as GPT-2's

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of a position's angles, (T, K / 2) or (B, 1, T, K / 2)."""


class Beside(NamedTuple):
    """What every block is given beside the residual stream."""

    turn: Rotation | None = None
    mask: Tensor | None = None
    embedded: Tensor | None = None
    """(B, T, D), the stream as it was before the first block."""
    values: Tensor | None = None
    """(B, T, H K), the tokens' value embeddings."""


class KVCache:
    """The keys and values of the tokens seen so far, so that each new token is computed alone."""

    def __init__(
        self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype, capacity: int | None = None
    ) -> None:
        places = capacity or config.n_positions  # tokens of a row
        shape = (config.n_layer, batch, config.n_head, places, config.head_size)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held; the caller advances it after each forward pass

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, K) keys and values of new tokens; return those of all, (B, H, length + T, K)."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def rotation(positions: Tensor, head_size: int, theta: float) -> Rotation:
    """The angles p * theta^(-2i / K) by which position p turns pair i of a query's or key's numbers, in fp32."""
    frequencies = theta ** (-torch.arange(0, head_size, 2, device=positions.device) / head_size)  # (K / 2,)
    angles = positions[..., None] * frequencies  # (T, K / 2) or (B, T, K / 2)
    angles = angles if positions.ndim == 1 else angles[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn the pairs (x[i], x[i + K / 2]) of (B, H, T, K) queries or keys."""
    (cos, sin), (a, b) = by, x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap): no logit beyond ± ``cap``. Source: Gemma team, "Gemma 2", 2024, section 2."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


class Skip(nn.Module):
    """weight * x + skip * beside, number by number: x at first, and as much of the other as training finds useful."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.skip = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, beside: Tensor | None) -> Tensor:
        assert beside is not None
        return self.weight * x + self.skip * beside


class NoSkip(nn.Module):
    """x"""

    def forward(self, x: Tensor, beside: Tensor | None) -> Tensor:
        return x


class HeadNorm(nn.RMSNorm):
    """The RMS norm of queries and keys, in their own type: torch's kernel wants that of the weight to be the same."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_size = layer, config.head_size
        width = config.n_head * config.head_size
        self.c_attn = nn.Linear(config.n_embd, 3 * width, bias=config.bias)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)
        self.q_norm = HeadNorm(config.head_size, NORM_EPS) if config.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(config.head_size, NORM_EPS) if config.qk_norm else nn.Identity()
        self.v_skip = Skip(width) if config.value_embedding else NoSkip()

    def forward(self, x: Tensor, beside: Beside, cache: KVCache | None = None) -> Tensor:
        q, k, v = self.c_attn(x).chunk(3, -1)  # each (B, T, H K)
        v = self.v_skip(v, beside.values).type_as(q)  # learned factors are in fp32
        q, k, v = (y.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for y in (q, k, v))  # (B, H, T, K)
        q, k = self.q_norm(q), self.k_norm(k)
        if beside.turn is not None:
            q, k = rotate(q, beside.turn), rotate(k, beside.turn)
        q, k = q.type_as(v), k.type_as(v)  # angles are in fp32
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = attention(q, k, v, causal=cache is None and beside.mask is None, mask=beside.mask)
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)


def gelu(x: Tensor) -> Tensor:
    """GPT-2's, by the hyperbolic tangent."""
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """relu(x)²"""
    return F.relu(x).square()


def swiglu(x: Tensor) -> Tensor:
    """Of (…, 2 I) the first half, through SiLU, times the second."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "relu2": relu2, "swiglu": swiglu}


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        gates = 2 if config.mlp == "swiglu" else 1
        self.c_fc = nn.Linear(config.n_embd, gates * config.inner_size, bias=config.bias)
        self.c_proj = nn.Linear(config.inner_size, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.mlp]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


def build_norm(config: ModelConfig) -> nn.Module:
    """What the residual stream, (B, T, D), goes through before every part and at the end."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, NORM_EPS)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)``, computed in the wider dtype of ``x`` and the norm's weight: a bf16 residual stream in fp32."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return norm(x.to(torch.promote_types(x.dtype, weight.dtype)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.x_skip = Skip(config.n_embd) if config.embedding_skip else NoSkip()
        self.ln_1 = build_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = build_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, beside: Beside, cache: KVCache | None = None) -> Tensor:
        x = self.x_skip(x, beside.embedded).type_as(x)
        x = x + self.attn(normalised(self.ln_1, x), beside, cache)
        return x + self.mlp(normalised(self.ln_2, x))


class Transformer(nn.Module):
    """Everything below the head: tokens in, normalised hidden states out."""

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
        self.ln_f = build_norm(config)
        self.recompute = False  # keep no activations of a block for the backward pass
        self.residual_dtype: torch.dtype | None = None  # of the residual stream in training; None: the embeddings'

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of tokens, (B, T, D).

        Args:
            tokens: (B, T) int64.
            cache: keys and values of the P tokens before; extended in place, its length is the caller's to advance.
            positions: (B, T) or (T,) int64; by default those after the cache's.
            mask: (B, 1, T, P + T) bool, which key each query sees; by default itself and all before it.
        """
        past, T = cache.length if cache is not None else 0, tokens.shape[1]
        if positions is None:
            positions = torch.arange(past, past + T, device=tokens.device)
        if mask is None and cache is not None and T > 1:  # a single new token sees all there is
            mask = torch.ones(T, past + T, dtype=torch.bool, device=tokens.device).tril(past)
        x, turn = self.wte(tokens), None  # (B, T, D)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        else:
            turn = rotation(positions, self.head_size, self.rope_theta)
        x = self.ln_e(x)
        if self.residual_dtype is not None and torch.is_grad_enabled():
            x = x.to(self.residual_dtype)
        beside = Beside(turn, mask, x, self.vte(tokens) if self.vte is not None else None)
        for block in self.h:
            if self.recompute and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, beside, use_reentrant=False, preserve_rng_state=False)  # nothing is random
            else:
                x = block(x, beside, cache)
        return normalised(self.ln_f, x)


class GPT(nn.Module):
    """A language model: GPT-2, or one with other parts.

    Embedding and head have `padded_vocab_size` rows in memory (50304 for 50257), because matrix products are faster
    at multiples of 64. The extra rows are zero, get no gradient, and never take part in logits or loss.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The output matrix, (padded V, D): GPT-2's is the token embedding itself."""
        return self.transformer.wte.weight if self.lm_head is None else self.lm_head.weight

    def vocabulary_matrices(self) -> list[Tensor]:
        """The parameters that have a row per token, and padding."""
        tables = (self.transformer.wte, self.transformer.vte, self.lm_head)
        return [table.weight for table in tables if table is not None]

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens: (B, T) int64, T at most n_positions (with a cache: together with the tokens it holds).
            cache: keys and values of the tokens before; extended in place, its length is the caller's to advance.

        Returns:
            (B, T, V), over the real vocabulary only.
        """
        # .forward: a compiled transformer is for training's fixed shapes; here any length runs without a recompile
        hidden = self.transformer.forward(tokens, cache)  # (B, T, D)
        return soft_cap(F.linear(hidden, self.head[: self.config.vocab_size]), self.config.softcap)


def stacked_matrices(config: ModelConfig, name: str) -> int:
    """How many matrices stand above each other in the weight ``name``: queries, keys, values; SwiGLU's two."""
    if name.endswith("attn.c_attn.weight"):
        return 3
    return 2 if name.endswith("mlp.c_fc.weight") and config.mlp == "swiglu" else 1


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> None:
    """Set the initial weights, GPT-2's unless the configuration says otherwise, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = initial_std(model.config, name)
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    for matrix in model.vocabulary_matrices():
        matrix[model.config.vocab_size :] = 0.0


def initial_std(config: ModelConfig, name: str) -> float:
    """The standard deviation with which the matrix ``name`` is drawn.

    0.02; of the two projections of each block that add to the residual stream 0.02 / sqrt(2 * n_layer), so that its
    variance does not grow with depth (GPT-2's paper, section 2.3), or 0 where ``zero_init_projections`` is set.
    Biases are 0, norms the identity, padded vocabulary rows 0.

    Where blocks begin as the identity, a token's normalised embedding meets itself in a tied head, and its own logit is
    std * D: the embedding is drawn so that this is 1, and not 15 with 768 numbers.
    """
    if name == "transformer.wte.weight" and config.tied and config.zero_init_projections:
        return 1.0 / config.n_embd
    if name.endswith("c_proj.weight"):
        return 0.0 if config.zero_init_projections else 0.02 / math.sqrt(2 * config.n_layer)
    return 0.02


def build_model(config: ModelConfig, seed: int, device: torch.device) -> GPT:
    """A freshly initialised model on ``device``.

    Raises:
        MemoryError: its weights need more memory than is free; to try could end this process.
    """
    needed, free = 4 * padded_parameters(config), available_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(f"its weights need {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free")
    with torch.device("meta"):
        model = GPT(config)
    model = model.to_empty(device=device)
    init_weights(model, seed)
    return model
