"""Decoding with a key/value cache: prefill with the contexts, then one position per new token.

The rows of a batch have different lengths. Each is stored from index 0 on, so that the index of a token is its
position; no row is padded on the left, and a mask hides what lies behind a row's length.

Shapes: B = active rows, n = distinct contexts, T = tokens of the longest of these, H = heads, K = head size,
V = vocabulary.
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

CACHE_BYTES = 2**30  # keys and values at once; more prompts are generated in several batches
COLUMN_MAJOR_ROWS = 8  # on a CPU, matmuls with fewer rows are faster with row-major weights
COLUMN_MAJOR_BYTES = 2**30  # largest model whose weights are copied for it
CACHE_TOLERANCE = 1e-3  # relative to the largest logit, in fp32: with and without a cache


class Prompt(NamedTuple):
    """A prompt, and which of its samples to generate."""

    tokens: Sequence[int]
    """Token ids, at least one."""
    sample: int
    """Index of the sample: each is drawn from its own random numbers."""


class RowCache(KVCache):
    """Cache of rows of different lengths: row i holds ``lengths[i]`` tokens; the first ``len(lengths)`` are in use."""

    def __init__(
        self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype, capacity: int
    ) -> None:
        super().__init__(config, batch, device, dtype, capacity)
        self.keys.zero_()  # masked values have weight 0 in attention, and 0 * NaN is NaN
        self.values.zero_()
        self.lengths = [0] * batch

    def fill(self, row: int, source: KVCache, source_row: int, length: int) -> None:
        """Copy the first ``length`` tokens of a row of ``source`` into ``row``."""
        self.keys[:, row, :, :length] = source.keys[:, source_row, :, :length]
        self.values[:, row, :, :length] = source.values[:, source_row, :, :length]
        self.lengths[row] = length

    def remove(self, row: int) -> None:
        """Remove a row; the last one takes its index."""
        last = len(self.lengths) - 1
        if row != last:
            self.fill(row, self, last, self.lengths[last])
        self.lengths.pop()

    def begin_step(self) -> tuple[Tensor, Tensor | None]:
        """Prepare for one more token per row.

        Returns:
            Its position, (B, 1), and which keys it attends to, (B, 1, 1, longest), None for all.
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
        """Append a key and a value, (B, H, 1, K), to each row; return those of all positions, (B, H, longest, K)."""
        keys, values = (whole[layer, : len(self.lengths)] for whole in (self.keys, self.values))
        keys[self._rows, :, self._positions] = k.squeeze(2)
        values[self._rows, :, self._positions] = v.squeeze(2)
        return keys[:, :, : self._end], values[:, :, : self._end]


class Decoder:
    """A model prepared for decoding: weights that autocast would cast for every token are cast once.

    For many ``rows`` on a CPU in fp32 the weights are column-major, where MKL's matmuls are faster (by a third with 8).
    """

    def __init__(self, model: GPT, dtype: torch.dtype, rows: int = 1) -> None:
        self.config, self.dtype, self.device = model.config, dtype, model.head.device
        size = sum(p.nbytes for p in model.parameters())
        column_major = rows >= COLUMN_MAJOR_ROWS and size <= COLUMN_MAJOR_BYTES
        column_major = column_major and self.device.type == "cpu" and dtype == model.head.dtype == torch.float32
        self.head = _cast(model.head[: model.config.vocab_size], dtype, column_major)  # without the padded rows
        as_it_is = dtype == model.head.dtype and not column_major
        self.transformer = (model if as_it_is else _cast_linear_layers(model, dtype, column_major)).transformer

    def prefill(self, contexts: Sequence[Sequence[int]], cache: RowCache, rows: Sequence[int]) -> None:
        """Fill ``rows`` of the cache with ``contexts``; equal ones are computed once, logits not at all."""
        distinct = {tuple(context): i for i, context in enumerate(dict.fromkeys(map(tuple, contexts)))}
        T = max(map(len, distinct))
        # right padding: causal attention does not see it
        tokens = torch.tensor([[*context, *[0] * (T - len(context))] for context in distinct], device=self.device)
        filled = KVCache(self.config, len(distinct), self.device, self.dtype, T)
        with autocast(self.device, self.dtype):
            self.transformer.forward(tokens, filled)  # (n, T); .forward: see GPT.forward
        for row, context in zip(rows, contexts, strict=True):
            cache.fill(row, filled, distinct[tuple(context)], len(context))

    def step(self, tokens: list[int], cache: RowCache) -> Tensor:
        """Append a token to each row; return the logits of the next one, (B, V)."""
        positions, mask = cache.begin_step()
        with autocast(self.device, self.dtype):
            new = torch.tensor(tokens, device=self.device)[:, None]  # (B, 1)
            hidden = self.transformer.forward(new, cache, positions, mask)  # (B, 1, D)
            logits = soft_cap(F.linear(hidden[:, 0], self.head), self.config.softcap)
        cache.lengths = [length + 1 for length in cache.lengths]
        return logits


def _cast(weight: Tensor, dtype: torch.dtype, column_major: bool) -> Tensor:
    """Cast a matrix, (out, in), row-major or column-major in memory."""
    return weight.to(dtype).t().contiguous().t() if column_major else weight.to(dtype)


def _cast_linear_layers(model: GPT, dtype: torch.dtype, column_major: bool) -> GPT:
    """Copy a model with its linear layers in ``dtype``, as autocast casts them; all else is shared."""
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
    """Random number generator of one text: it depends on the seed, the prompt and the sample's index only."""
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
    """Yield the next token of every active text, by its index in ``prompts``, at most ``sampling.max_tokens`` times.

    A context longer than the model's window is cut to its last half window and prefilled again, at any time. A text
    does not depend on the others of its batch, except for rounding: shapes of matmuls differ. The model and the global
    random state are not changed.

    A compiled transformer is run uncompiled. The token ``stop`` ends a text; None: none does.

    Raises:
        UserError: the model's logits are not finite.
    """
    window = model.config.n_positions
    contexts = [list(prompt.tokens) for prompt in prompts]
    rngs = [text_rng(seed, prompt) for prompt in prompts]
    decoder = Decoder(model, dtype, len(prompts))
    capacity = min(window, max(map(len, contexts)) + sampling.max_tokens)
    cache = RowCache(model.config, len(contexts), decoder.device, dtype, capacity)
    active = list(range(len(contexts)))  # index of the text in each row of the cache
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


def rows_at_once(config: ModelConfig, longest_prompt: int, max_tokens: int, dtype: torch.dtype) -> int:
    """Number of texts whose keys and values fit into `CACHE_BYTES`, at least 1."""
    tokens = min(config.n_positions, longest_prompt + max_tokens)
    row = 2 * config.n_layer * config.n_head * config.head_size * tokens * dtype.itemsize
    return max(1, CACHE_BYTES // row)


# --- models that transformers runs ---------------------------------------------------------------------------


@torch.no_grad()
def generate_with_transformers(
    opened: TransformersModel, prompt: Prompt, sampling: SamplingConfig, seed: int, cached: bool
) -> Iterator[int]:
    """Yield the tokens of one text up to one that ends it, drawn as `generate` draws.

    ``cached``: use its key/value cache (see `cache_is_exact`); else the whole context is computed for every token.
    """
    window, ids, cache = opened.max_length, list(prompt.tokens), None
    rng, is_text, ends = text_rng(seed, prompt), opened.text_tokens(), opened.ends()
    for _ in range(sampling.max_tokens):
        if len(ids) > window:
            ids, cache = ids[-max(1, window // 2) :], None
        logits, cache = _step(opened.model, ids if cache is None else ids[-1:], cache, cached)
        logits = logits.masked_fill(~is_text, float("-inf"))  # padding is never drawn
        token = int(next_tokens(logits, sampling, [rng.random()]))
        if token in ends:
            return
        yield token
        ids.append(token)


def _step(model: Any, ids: list[int], cache: Any, cached: bool) -> tuple[Tensor, Any]:
    """Compute the logits of the next token, (1, V), and the cache with ``ids`` appended."""
    given = {"past_key_values": cache, "use_cache": True} if cached else {}
    result = model(input_ids=torch.tensor([ids], device=model.device), **given)
    return result.logits[:, -1], getattr(result, "past_key_values", None) if cached else None


@torch.no_grad()
def cache_is_exact(model: Any) -> bool:
    """Whether a model of `transformers` computes the same logits with its cache as from the whole context.

    Tried on six tokens: some models have no cache, or take it under another name.
    """
    tokens = [1, 2, 3, 4, 5, 6]
    with contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        logits, cache = _step(model, tokens[:3], None, True)
        for token in tokens[3:]:
            if cache is None:
                return False
            logits, cache = _step(model, [token], cache, True)
        whole, _ = _step(model, tokens, None, False)
        tolerance = (CACHE_TOLERANCE if whole.dtype == torch.float32 else 100 * CACHE_TOLERANCE) * float(
            whole.abs().max()
        )
        return bool(torch.allclose(logits.float(), whole.float(), atol=tolerance, rtol=0))
    return False
