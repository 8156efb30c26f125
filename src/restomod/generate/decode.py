"""Decoding with a key/value cache: prefill of the contexts, then one step per new token.

The rows of a batch have different lengths. Every row starts at index 0 of the cache, so the index of a token is its
position. There is no left padding; a mask hides the cache entries after the end of a row.

Shapes: B = active rows, n = distinct contexts, T = tokens of the longest context, H = heads, K = head size,
D = embedding width, V = vocabulary size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restomod.config.run import ModelConfig, SamplingConfig
from restomod.data.tokenizer import END_OF_TEXT
from restomod.engine.device import autocast
from restomod.generate.sampling import next_tokens
from restomod.model.gpt import GPT, KVCache, soft_cap
from restomod.model.hf_models import TransformersModel

CACHE_BYTES = 2**30  # maximum size of the keys and values of a batch; more texts need several batches
COLUMN_MAJOR_ROWS = 8  # on a CPU, matmuls with fewer rows are faster with row-major weights
COLUMN_MAJOR_BYTES = 2**30  # maximum size of weights that are copied to column-major order
CACHE_TOLERANCE = 1e-3  # between fp32 logits with and without a cache, relative to the largest logit


class Prompt(NamedTuple):
    """Prompt, and the index of the sample to generate from it."""

    tokens: Sequence[int]
    """Token ids, at least one."""
    sample: int
    """Index of the sample; each sample has its own random numbers."""


class RowCache(KVCache):
    """Key/value cache whose rows have different lengths.

    Row i contains ``lengths[i]`` tokens. The first ``len(lengths)`` rows are in use.
    """

    def __init__(
        self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype, capacity: int
    ) -> None:
        super().__init__(config, batch, device, dtype, capacity)
        self.keys.zero_()  # uninitialised values may be NaN, and attention weight 0 * NaN is NaN
        self.values.zero_()
        self.lengths = [0] * batch

    def fill(self, row: int, source: KVCache, source_row: int, length: int) -> None:
        """Copy the first ``length`` tokens of row ``source_row`` of ``source`` into ``row``."""
        self.keys[:, row, :, :length] = source.keys[:, source_row, :, :length]
        self.values[:, row, :, :length] = source.values[:, source_row, :, :length]
        self.lengths[row] = length

    def remove(self, row: int) -> None:
        """Remove a row; the last row moves to its index."""
        last = len(self.lengths) - 1
        if row != last:
            self.fill(row, self, last, self.lengths[last])
        self.lengths.pop()

    def begin_step(self) -> tuple[Tensor, Tensor | None]:
        """Prepare the cache for one new token per row.

        Returns:
            Positions of the new tokens, (B, 1), and a boolean attention mask, (B, 1, 1, longest row); None instead of a
            mask if all rows have the same length.
        """
        device = self.keys.device
        self._rows = torch.arange(len(self.lengths), device=device)
        self._positions = torch.tensor(self.lengths, device=device)
        self._end = max(self.lengths) + 1
        positions = self._positions[:, None]
        if min(self.lengths) == max(self.lengths):
            return positions, None
        return positions, (torch.arange(self._end, device=device) <= positions)[:, None, None]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append a key and a value to each row of a layer.

        Args:
            layer: index of the block.
            k: new keys, (B, H, 1, K).
            v: new values, (B, H, 1, K).

        Returns:
            Keys and values of all positions, (B, H, longest row, K) each.
        """
        keys, values = (cache[layer, : len(self.lengths)] for cache in (self.keys, self.values))
        keys[self._rows, :, self._positions] = k.squeeze(2)
        values[self._rows, :, self._positions] = v.squeeze(2)
        return keys[:, :, : self._end], values[:, :, : self._end]


class Decoder:
    """Model prepared for decoding: its weights are cast to the compute dtype once, not for every token.

    Batches of at least `COLUMN_MAJOR_ROWS` on a CPU in fp32 use column-major weights, because MKL's matmuls are then
    faster (by a third with 8 rows).

    Args:
        model: model to run; it is not changed.
        dtype: compute dtype.
        rows: number of texts in the batch.
    """

    def __init__(self, model: GPT, dtype: torch.dtype, rows: int = 1) -> None:
        self.config, self.dtype, self.device = model.config, dtype, model.head.device
        size = sum(p.nbytes for p in model.parameters())
        column_major = rows >= COLUMN_MAJOR_ROWS and size <= COLUMN_MAJOR_BYTES
        column_major = column_major and self.device.type == "cpu" and dtype == model.head.dtype == torch.float32
        self.head = _cast(model.head[: model.config.vocab_size], dtype, column_major)  # without padding
        unchanged = dtype == model.head.dtype and not column_major
        self.transformer = (model if unchanged else _cast_linear_layers(model, dtype, column_major)).transformer

    def prefill(self, contexts: Sequence[Sequence[int]], cache: RowCache, rows: Sequence[int]) -> None:
        """Compute the keys and values of ``contexts`` into ``rows`` of the cache; equal contexts are computed once."""
        distinct = {tuple(context): i for i, context in enumerate(dict.fromkeys(map(tuple, contexts)))}
        T = max(map(len, distinct))
        # right padding, which causal attention ignores
        tokens = torch.tensor([[*context, *[0] * (T - len(context))] for context in distinct], device=self.device)
        filled = KVCache(self.config, len(distinct), self.device, self.dtype, T)
        with autocast(self.device, self.dtype):
            self.transformer.forward(tokens, filled)  # (n, T); .forward: see GPT.forward
        for row, context in zip(rows, contexts, strict=True):
            cache.fill(row, filled, distinct[tuple(context)], len(context))

    def step(self, tokens: list[int], cache: RowCache) -> Tensor:
        """Append a token to each row; return the logits of the next token, (B, V)."""
        positions, mask = cache.begin_step()
        with autocast(self.device, self.dtype):
            new = torch.tensor(tokens, device=self.device)[:, None]  # (B, 1)
            hidden = self.transformer.forward(new, cache, positions, mask)  # (B, 1, D)
            logits = soft_cap(F.linear(hidden[:, 0], self.head), self.config.softcap)
        cache.lengths = [length + 1 for length in cache.lengths]
        return logits


def _cast(weight: Tensor, dtype: torch.dtype, column_major: bool) -> Tensor:
    """Cast a matrix (out, in), with row-major or column-major memory layout."""
    return weight.to(dtype).t().contiguous().t() if column_major else weight.to(dtype)


def _cast_linear_layers(model: GPT, dtype: torch.dtype, column_major: bool) -> GPT:
    """Copy a model with linear layers in ``dtype``, as under autocast; the other tensors are shared."""
    with torch.device("meta"):
        copy = GPT(model.config)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tensors = {
        name: _cast(tensor.detach(), dtype, column_major and tensor.ndim == 2)
        if name.rpartition(".")[0] in linear
        else tensor.detach()
        for name, tensor in model.named_parameters()
    }
    copy.load_state_dict(tensors, assign=True)
    return copy


def text_rng(seed: int, prompt: Prompt) -> np.random.Generator:
    """Return the random number generator of a text, which depends on the seed, the prompt and the sample index."""
    return np.random.default_rng([seed, prompt.sample, *prompt.tokens])


@torch.no_grad()
def generate(
    model: GPT,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    seed: int,
    dtype: torch.dtype = torch.float32,
    stop: int | None = END_OF_TEXT,
) -> Iterator[dict[int, int]]:
    """Generate one batch of texts.

    A context that exceeds the context length is cut to its newest tokens, half the context length, and prefilled again.
    A text does not depend on the other texts of the batch, except for rounding: matmuls of other shapes round
    differently. The model and the global random state do not change. A compiled model runs in eager mode.

    Args:
        model: model to sample from.
        prompts: prompts of the batch.
        sampling: sampling settings.
        seed: seed of the random numbers.
        dtype: compute dtype.
        stop: token that ends a text; None never ends a text early.

    Yields:
        Next token of every active text, by its index in ``prompts``; at most ``sampling.max_tokens`` times.

    Raises:
        UserError: the logits are not finite.
    """
    window = model.config.n_positions
    contexts = [list(prompt.tokens) for prompt in prompts]
    rngs = [text_rng(seed, prompt) for prompt in prompts]
    decoder = Decoder(model, dtype, len(prompts))
    capacity = min(window, max(map(len, contexts)) + sampling.max_tokens)
    cache = RowCache(model.config, len(contexts), decoder.device, dtype, capacity)
    active = list(range(len(contexts)))  # text index of each row of the cache
    for _ in range(sampling.max_tokens):
        for row, text in enumerate(active):
            if len(contexts[text]) > window:
                contexts[text] = contexts[text][-max(1, window // 2) :]
                cache.lengths[row] = 0
        stale = [row for row, text in enumerate(active) if cache.lengths[row] < len(contexts[text]) - 1]
        if stale:
            decoder.prefill([contexts[active[row]][:-1] for row in stale], cache, stale)
        logits = decoder.step([contexts[text][-1] for text in active], cache)
        drawn = next_tokens(logits, sampling, [rngs[text].random() for text in active]).tolist()
        yield dict(zip(active, drawn, strict=True))
        for text, token in zip(active, drawn, strict=True):
            contexts[text].append(token)
        for row in reversed(range(len(active))):
            if drawn[row] == stop:
                cache.remove(row)
                active[row] = active[-1]
                active.pop()
        if not active:
            return


def max_rows(config: ModelConfig, longest_prompt: int, max_tokens: int, dtype: torch.dtype) -> int:
    """Return the number of texts whose keys and values fit into `CACHE_BYTES`, at least 1."""
    tokens = min(config.n_positions, longest_prompt + max_tokens)
    row = 2 * config.n_layer * config.n_head * config.head_size * tokens * dtype.itemsize
    return max(1, CACHE_BYTES // row)


# --- models of transformers ----------------------------------------------------------------------------------


@torch.no_grad()
def generate_with_transformers(
    opened: TransformersModel, prompt: Prompt, sampling: SamplingConfig, seed: int, cached: bool
) -> Iterator[int]:
    """Yield the tokens of one text from a model of `transformers`, with the sampling of `generate`.

    Args:
        opened: model and its tokenizer.
        prompt: prompt and sample index.
        sampling: sampling settings.
        seed: seed of the random numbers.
        cached: use the model's key/value cache (see `cache_is_exact`); otherwise recompute the context for every token.
    """
    window, ids, cache = opened.max_length, list(prompt.tokens), None
    rng, is_text, ends = text_rng(seed, prompt), opened.text_tokens(), opened.ends()
    for _ in range(sampling.max_tokens):
        if len(ids) > window:
            ids, cache = ids[-max(1, window // 2) :], None
        logits, cache = _step(opened.model, ids if cache is None else ids[-1:], cache, cached)
        logits = logits.masked_fill(~is_text, float("-inf"))  # exclude padding of the vocabulary
        token = int(next_tokens(logits, sampling, [rng.random()]))
        if token in ends:
            return
        yield token
        ids.append(token)


def _step(model: Any, ids: list[int], cache: Any, cached: bool) -> tuple[Tensor, Any]:
    """Return the logits of the next token, (1, V), and the cache with ``ids`` appended."""
    given = {"past_key_values": cache, "use_cache": True} if cached else {}
    result = model(input_ids=torch.tensor([ids], device=model.device), **given)
    return result.logits[:, -1], getattr(result, "past_key_values", None) if cached else None


@torch.no_grad()
def cache_is_exact(model: Any) -> bool:
    """Return whether a model of `transformers` computes the same logits with and without its key/value cache.

    The test uses six tokens. Some models have no cache, or use another argument name for it.
    """
    tokens = [1, 2, 3, 4, 5, 6]
    with contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        logits, cache = _step(model, tokens[:3], None, True)
        for token in tokens[3:]:
            if cache is None:
                return False
            logits, cache = _step(model, [token], cache, True)
        uncached, _ = _step(model, tokens, None, False)
        tolerance = CACHE_TOLERANCE if uncached.dtype == torch.float32 else 100 * CACHE_TOLERANCE
        largest = float(uncached.abs().max())
        return bool(torch.allclose(logits.float(), uncached.float(), atol=tolerance * largest, rtol=0))
    return False
