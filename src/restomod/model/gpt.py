"""The GPT model: GPT-2 by default, with modern parts selected in `ModelConfig`.

GPT-2 has pre-norm blocks, learned position embeddings, tanh-GELU, biases, and weight tying (lm_head is the token
embedding). Norms are in `restomod.model.norms`, activations in `restomod.model.activations`, one file each.

Parameter names and shapes are those of `transformers`' GPT2LMHeadModel, except that linear weights are (out, in) here
and (in, out) there.

Shapes:
    B = sequences, T = tokens per sequence, P = tokens in the key/value cache, S = P + T = keys
    D = n_embd, H = n_head, K = head_size, I = inner_size (hidden units of the MLP), V = vocab_size

Sources:
    GPT-2: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3.
    RoPE: Su et al., "RoFormer", 2021, section 3.2.2.
    QK-norm: Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters", 2023, section 2.
    Weight tying: Press and Wolf, "Using the Output Embedding to Improve Language Models", 2017.
    Gradient checkpointing: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    Embedding skip and value embeddings: Jordan et al., "modded-nanogpt", 2024.
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
"""Cosines and sines of the RoPE angles, each (T, K / 2) or (B, 1, T, K / 2), fp32."""


class BlockInputs(NamedTuple):
    """Inputs shared by all blocks, in addition to the residual stream."""

    rope: RopeCache | None = None
    """RoPE cosines and sines; None: learned positions."""
    mask: Tensor | None = None
    """Attention mask, (B or 1, 1, T, S) bool, True where a query attends to a key; None: causal mask."""
    embeddings: Tensor | None = None
    """Residual stream before the first block, (B, T, D), input of the embedding skips."""
    value_embeddings: Tensor | None = None
    """Value embeddings of the tokens, (B, T, H K); None: the model has no value embedding."""


class KVCache:
    """Key/value cache for generation, with which a forward pass computes new tokens only.

    Args:
        config: model configuration.
        batch: B, sequences.
        device: device of the model.
        dtype: dtype of keys and values.
        capacity: maximum number of tokens per sequence; None: ``n_positions``.
    """

    def __init__(
        self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype, capacity: int | None = None
    ) -> None:
        shape = (config.n_layer, batch, config.n_head, capacity or config.n_positions, config.head_size)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # P, cached tokens; the caller advances it after each forward pass

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens, and return those of all tokens.

        Args:
            layer: index of the block.
            k, v: keys and values of the new tokens, (B, H, T, K).

        Returns:
            Keys and values of cached and new tokens, (B, H, S, K), views into the cache.
        """
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def rope_cache(positions: Tensor, head_size: int, theta: float) -> RopeCache:
    """Compute the RoPE angles p * theta^(-2i / K) of position p and channel pair i. Source: RoFormer, section 3.2.2.

    Args:
        positions: token positions, (T,) or (B, T) int64.
        head_size: K, even.
        theta: base of the frequencies.

    Returns:
        Cosines and sines of the angles, each (T, K / 2) or (B, 1, T, K / 2), fp32.
    """
    frequencies = theta ** (-torch.arange(0, head_size, 2, device=positions.device) / head_size)  # (K / 2,)
    angles = positions[..., None] * frequencies  # (T, K / 2) or (B, T, K / 2)
    angles = angles if positions.ndim == 1 else angles[:, None]  # (B, 1, T, K / 2)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, rope: RopeCache) -> Tensor:
    """Rotate each channel pair (x[i], x[i + K / 2]) of queries or keys by its RoPE angle.

    Args:
        x: queries or keys, (B, H, T, K).
        rope: result of `rope_cache`.

    Returns:
        Rotated queries or keys, (B, H, T, K), in the wider dtype of ``x`` and ``rope``.
    """
    (cos, sin), (a, b) = rope, x.chunk(2, -1)  # a, b: (B, H, T, K / 2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Apply the logit soft cap, cap * tanh(logits / cap), which bounds logits to ± ``cap``; None: no cap.

    Source: Gemma team, "Gemma 2", 2024, section 2.
    """
    return logits if cap is None else cap * torch.tanh(logits / cap)


class ScaledResidual(nn.Module):
    """Weighted sum weight * x + skip * other, with learned factors per channel; initially x.

    Args:
        width: channels of ``x`` and ``other``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.skip = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set ``weight`` to 1 and ``skip`` to 0, so that the module is the identity."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.skip)

    def forward(self, x: Tensor, other: Tensor | None) -> Tensor:
        """Compute weight * x + skip * other, both inputs (..., width); the factors are fp32."""
        assert other is not None
        return self.weight * x + self.skip * other


class HeadNorm(nn.RMSNorm):
    """QK-norm: RMS norm over the K channels of each query or key, in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise queries or keys, (B, H, T, K)."""
        # torch's fused kernel requires a weight of the input's dtype
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention with optional QK-norm, RoPE and value embeddings.

    Args:
        config: model configuration.
        layer: index of the block, which selects its part of the key/value cache.
    """

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
        """Compute self-attention.

        Args:
            x: normalised residual stream, (B, T, D).
            inputs: inputs shared by all blocks.
            cache: key/value cache of P earlier tokens, extended in place; None: no earlier tokens.

        Returns:
            Output of attention, (B, T, D), to be added to the residual stream.
        """
        q, k, v = self.c_attn(x).chunk(3, -1)  # each (B, T, H K)
        if self.v_skip is not None:
            v = self.v_skip(v, inputs.value_embeddings).type_as(q)  # the factors are fp32
        q, k, v = (y.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for y in (q, k, v))  # (B, H, T, K)
        q, k = self.q_norm(q), self.k_norm(k)
        if inputs.rope is not None:
            q, k = apply_rope(q, inputs.rope), apply_rope(k, inputs.rope)
        q, k = q.type_as(v), k.type_as(v)  # RoPE returns fp32
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, H, S, K)
        y = attention(q, k, v, causal=cache is None and inputs.mask is None, mask=inputs.mask)  # (B, H, T, K)
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)


def build_part(kind: Literal["norms", "activations"], name: str, config: ModelConfig) -> nn.Module:
    """Build the norm or activation in ``restomod/model/KIND/NAME.py`` by calling its function ``build``."""
    part: nn.Module = importlib.import_module(f"restomod.model.{kind}.{name}").build(config)
    return part


class MLP(nn.Module):
    """Two-layer perceptron, D to I to D. A gated activation has 2 I inputs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, (2 if config.gated else 1) * config.inner_size, bias=config.bias)
        self.c_proj = nn.Linear(config.inner_size, config.n_embd, bias=config.bias)
        self.activation = build_part("activations", config.mlp, config)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the MLP's output, (B, T, D), from the normalised residual stream, (B, T, D)."""
        return self.c_proj(self.activation(self.c_fc(x)))  # (B, T, D) -> (B, T, I or 2 I) -> (B, T, I) -> (B, T, D)


def apply_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a norm in the wider dtype of ``x`` and the norm's parameters: fp32 for a bf16 residual stream."""
    for parameter in norm.parameters():
        x = x.to(torch.promote_types(x.dtype, parameter.dtype))
    return norm(x)


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each added to the residual stream.

    Args:
        config: model configuration.
        layer: index of the block.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.x_skip = ScaledResidual(config.n_embd) if config.embedding_skip else None
        self.ln_1 = build_part("norms", config.norm, config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = build_part("norms", config.norm, config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, inputs: BlockInputs, cache: KVCache | None = None) -> Tensor:
        """Apply the block to the residual stream, (B, T, D); other arguments as in `CausalSelfAttention.forward`."""
        if self.x_skip is not None:
            x = self.x_skip(x, inputs.embeddings).type_as(x)
        x = x + self.attn(apply_norm(self.ln_1, x), inputs, cache)
        return x + self.mlp(apply_norm(self.ln_2, x))


class Transformer(nn.Module):
    """Transformer without lm_head: tokens to hidden states after the last norm.

    Attributes:
        gradient_checkpointing: whether the backward pass recomputes each block instead of storing its activations.
        residual_dtype: dtype of the residual stream in training; None: the dtype of the embeddings.
    """

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
        self.gradient_checkpointing = False
        self.residual_dtype: torch.dtype | None = None

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Compute hidden states after the last norm.

        Args:
            tokens: token ids, (B, T) int64.
            cache: key/value cache of P earlier tokens, extended in place. The caller advances its length.
            positions: token positions, (B, T) or (T,) int64; None: P to P + T - 1.
            mask: attention mask, (B, 1, T, S) bool, True where a query attends to a key; None: causal mask.

        Returns:
            Hidden states, (B, T, D).
        """
        past, T = cache.length if cache is not None else 0, tokens.shape[1]
        if positions is None:
            positions = torch.arange(past, past + T, device=tokens.device)
        if mask is None and cache is not None and T > 1:  # a single new token attends to all keys
            mask = torch.ones(T, past + T, dtype=torch.bool, device=tokens.device).tril(past)  # (T, S)
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
                x = checkpoint(block, x, inputs, use_reentrant=False, preserve_rng_state=False)  # there is no dropout
            else:
                x = block(x, inputs, cache)
        return apply_norm(self.ln_f, x)


class GPT(nn.Module):
    """GPT language model: the transformer and its lm_head.

    With weight tying (``config.tied``) lm_head is the token embedding.

    Token embeddings and lm_head have `padded_vocab_size` rows in memory (50304 for 50257), because matmuls are faster
    at multiples of 64. The padding rows are zero, get no gradient, and do not affect logits or loss.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """Weight of lm_head, (padded V, D); with weight tying, the token embedding."""
        return self.transformer.wte.weight if self.lm_head is None else self.lm_head.weight

    def vocabulary_matrices(self) -> list[Tensor]:
        """Return the parameters with one row per token of the padded vocabulary: wte, vte and lm_head, as present."""
        tables = (self.transformer.wte, self.transformer.vte, self.lm_head)
        return [table.weight for table in tables if table is not None]

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Compute logits of the next token at every position.

        Args:
            tokens: token ids, (B, T) int64; S = P + T is at most ``n_positions``.
            cache: key/value cache of P earlier tokens, extended in place. The caller advances its length.

        Returns:
            Logits, (B, T, V), without the padding of the vocabulary.
        """
        # `.forward` bypasses torch.compile, which would recompile for every new length
        hidden = self.transformer.forward(tokens, cache)  # (B, T, D)
        return soft_cap(F.linear(hidden, self.head[: self.config.vocab_size]), self.config.softcap)


def stacked_matrices(config: ModelConfig, name: str) -> int:
    """Return the number of matrices stacked in a weight.

    Args:
        config: model configuration.
        name: parameter name, such as ``transformer.h.0.attn.c_attn.weight``.

    Returns:
        3 for ``c_attn`` (queries, keys, values), 2 for ``c_fc`` of a gated MLP (gate, up), 1 otherwise.
    """
    if name.endswith("attn.c_attn.weight"):
        return 3
    return 2 if name.endswith("mlp.c_fc.weight") and config.gated else 1


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> None:
    """Initialise all weights; the values are equal on all devices.

    Linear and embedding weights are normal with mean 0 and standard deviation `initial_std`, drawn on the CPU in the
    order of `named_modules`. Linear biases and the padding rows of the vocabulary are 0. All other modules with
    parameters initialise them in `reset_parameters`.

    Args:
        model: model on any device.
        seed: seed of the random numbers.

    Raises:
        TypeError: a module has parameters but no `reset_parameters`.
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
    """Return the standard deviation of the initial values of a linear or embedding weight.

    The default is 0.02. The two output projections of each block (``c_proj``) have 0.02 / sqrt(2 * n_layer), so that
    the variance of the residual stream does not grow with depth (GPT-2 paper, section 2.3), or 0 with
    ``zero_init_projections``.

    With ``zero_init_projections`` and weight tying, the initial logit of the input token is std * D. The token
    embedding has 1 / D, so that this logit is 1; with 0.02 and D = 768 it would be 15.

    Args:
        config: model configuration.
        name: parameter name, such as ``transformer.h.0.mlp.c_proj.weight``.
    """
    if name == "transformer.wte.weight" and config.tied and config.zero_init_projections:
        return 1.0 / config.n_embd
    if name.endswith("c_proj.weight"):
        return 0.0 if config.zero_init_projections else 0.02 / math.sqrt(2 * config.n_layer)
    return 0.02


def build_model(config: ModelConfig, seed: int, device: torch.device) -> GPT:
    """Build a model with initial weights.

    Args:
        config: model configuration.
        seed: seed of the initial weights.
        device: device of the model.

    Returns:
        Model with fp32 weights on ``device``.

    Raises:
        MemoryError: the weights need more memory than is free. This is checked first, because the system may kill a
            process that runs out of memory.
    """
    with torch.device("meta"):
        model = GPT(config)
    needed, free = sum(p.numel() * p.element_size() for p in model.parameters()), available_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(f"the weights need {needed / 1e9:,.1f} GB, but only {free / 1e9:,.1f} GB are free")
    model = model.to_empty(device=device)
    init_weights(model, seed)
    return model
