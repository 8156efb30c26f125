"""Sampling: `prefill` reads the prompt, then every new token costs one forward pass over one position.

Shapes: B = samples, T = tokens of a pass, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from restomod.config import Device, Precision, SamplingConfig
from restomod.data.tokenizer import END_OF_TEXT, Tokenizer, gpt2_tokenizer
from restomod.device import autocast, choose_device, choose_dtype
from restomod.errors import UserError
from restomod.model.gpt import GPT, KVCache
from restomod.train.find import open_model


def next_tokens(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """Draw one token per row.

    Args:
        logits: (B, V).
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among this many likeliest tokens (0: all).
        generator: on the CPU, so that a seed gives the same text on every device.

    Returns:
        (B,) int64.
    """
    logits = logits.float().cpu()
    if temperature == 0:
        return logits.argmax(-1)
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = torch.softmax(logits / temperature, -1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


@torch.no_grad()
def generate(
    model: GPT,
    prompt: list[int],
    n_samples: int,
    max_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Tensor]:
    """Yield the next token of each sample, (B,) int64 on the CPU, ``max_tokens`` times.

    A context that has filled the model's positions is cut to its newest half and read again. Nothing in the model
    changes, and no random state but ``seed``'s own is touched.
    """
    device = model.head.device
    generator = torch.Generator().manual_seed(seed)
    context = torch.tensor([prompt] * n_samples)  # (B, T)
    new, cache = context, None
    for _ in range(max_tokens):
        if cache is None or cache.length + new.shape[1] > model.config.n_positions:
            if context.shape[1] > model.config.n_positions:
                context = context[:, -max(1, model.config.n_positions // 2) :]
            new, cache = context, KVCache(model.config, n_samples, device, dtype)
        with autocast(device, dtype):
            logits = model(new.to(device), cache)[:, -1]  # (B, V)
        cache.length += new.shape[1]
        tokens = next_tokens(logits, temperature, top_k, generator)
        yield tokens
        new = tokens[:, None]
        context = torch.cat([context, new], dim=1)


def continuations(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    n_samples: int,
    sampling: SamplingConfig,
    seed: int,
    dtype: torch.dtype,
) -> list[str]:
    """Continue ``prompt`` ``n_samples`` times, each up to ``<|endoftext|>``; an empty prompt starts a document."""
    ids = tokenizer.encode(prompt).tolist() or [END_OF_TEXT]
    steps = generate(model, ids, n_samples, sampling.max_tokens, sampling.temperature, sampling.top_k, seed, dtype)
    rows = torch.stack(list(steps), dim=1).tolist()  # B lists of max_tokens ids
    return [tokenizer.decode(row[: row.index(END_OF_TEXT)] if END_OF_TEXT in row else row) for row in rows]


def sample(
    where: str,
    prompt: str,
    n_samples: int,
    sampling: SamplingConfig,
    seed: int,
    device: Device = "auto",
    precision: Precision = "auto",
) -> list[str]:
    """Continue ``prompt`` with the model that ``where`` names: a run, a model folder, or a name on the hub.

    Raises:
        UserError: there is no such model, it is damaged, or its vocabulary is not GPT-2's.
    """
    target, tokenizer = choose_device(device), gpt2_tokenizer()
    model = open_model(where, target)
    if model.config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{where} has a vocabulary of {model.config.vocab_size:,} tokens, and text is read and written with "
            f"GPT-2's {tokenizer.vocab_size:,}: it cannot be sampled here"
        )
    return continuations(model, tokenizer, prompt, n_samples, sampling, seed, choose_dtype(precision, target))
