"""GPT-2, exactly: pre-norm blocks, learned positions, tanh-GELU, biases, and a head tied to the token embedding.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3. Parameter names are
those of `transformers`' GPT2LMHeadModel; shapes too, but for the linear weights, which are (out, in) here.

Shapes: B = sequences, T = tokens of each, D = n_embd, H = n_head, K = D / H, V = vocab_size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from restomod.config import ModelConfig

PLAIN_ATTENTION_TOKENS = 256


class KVCache:
    """The keys and values of the tokens seen so far, so that each new token is computed alone."""

    def __init__(
        self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype, capacity: int | None = None
    ) -> None:
        K = config.n_embd // config.n_head
        shape = (config.n_layer, batch, config.n_head, capacity or config.n_positions, K)  # capacity: tokens of a row
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held; the caller advances it after each forward pass

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, K) keys and values of new tokens; return those of all, (B, H, length + T, K)."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(K)) v, (B, H, T, K); ``causal``: each query sees itself and what is before it."""
    T, K = q.shape[-2:]
    if causal and q.device.type == "cpu" and q.dtype.itemsize == 2 and T <= PLAIN_ATTENTION_TOKENS:
        # the backward pass of torch's fused kernel takes twice to four times as long as these products
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        scores = (q * K**-0.5) @ k.mT  # (B, H, T, T)
        return torch.softmax(scores.masked_fill(later, float("-inf")), -1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.layer = config.n_head, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        B, T, D = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, D // self.n_head)  # (B, T, 3, H, K)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, K)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = attention(q, k, v, causal=cache is None and mask is None, mask=mask)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Everything below the head: tokens in, normalised hidden states out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.recompute = False  # keep no activations of a block for the backward pass

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
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, D)
        for block in self.h:
            if self.recompute and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, None, mask, use_reentrant=False)
            else:
                x = block(x, cache, mask)
        return self.ln_f(x)


class GPT(nn.Module):
    """A GPT-2 language model.

    The embedding matrix has `padded_vocab_size` rows in memory (50304 for 50257), because matrix products are faster
    at multiples of 64. The extra rows are zero, get no gradient, and never take part in logits or loss.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)

    @property
    def head(self) -> Tensor:
        """The output matrix, (padded V, D): GPT-2's is the token embedding itself."""
        return self.transformer.wte.weight

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
        return F.linear(hidden, self.head[: self.config.vocab_size])


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> None:
    """Set GPT-2's initial weights, the same on every device.

    Matrices and embeddings: normal, standard deviation 0.02. The two projections of each block that add to the
    residual stream: 0.02 / sqrt(2 * n_layer), so that its variance does not grow with depth (the paper, section 2.3).
    Biases 0, layer norms the identity, padded vocabulary rows 0.
    """
    generator = torch.Generator().manual_seed(seed)
    residual_std = 0.02 / math.sqrt(2 * model.config.n_layer)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = residual_std if name.endswith("c_proj.weight") else 0.02
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    model.transformer.wte.weight[model.config.vocab_size :] = 0.0


def build_model(config: ModelConfig, seed: int, device: torch.device) -> GPT:
    """A freshly initialised model on ``device``."""
    with torch.device("meta"):
        model = GPT(config)
    model = model.to_empty(device=device)
    init_weights(model, seed)
    return model
