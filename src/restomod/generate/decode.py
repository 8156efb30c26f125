"""Generation: `read` puts contexts into a key/value cache, then every new token costs a pass over one position.

The rows of a batch have lengths of their own. Each keeps its keys and values from place 0 of its row on, so that a
token's place is its position, no row is padded on the left, and what lies behind a row's length is hidden by a mask.

Shapes: B = rows that go on, n = contexts read together, T = tokens of the longest of these, V = vocabulary.
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

CACHE_BYTES = 2**30  # of keys and values; what needs more is generated in several batches
COLUMNS_FROM = 8  # rows: products with fewer are quicker, on a CPU, where the weights lie as they are
COLUMNS_BYTES = 2**30  # of weights, that are copied for it
SAME = 1e-3  # of the largest logit, by which two ways to compute logits may differ in fp32


class Prompt(NamedTuple):
    """One text to generate."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    number: int
    """Which sample of this prompt: others are drawn from other random numbers."""


class RowCache(KVCache):
    """A cache whose row i holds ``lengths[i]`` tokens; only the first ``len(lengths)`` rows are in use."""

    def __init__(
        self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype, capacity: int
    ) -> None:
        super().__init__(config, batch, device, dtype, capacity)
        self.keys.zero_()  # a hidden value has weight 0 in attention, and 0 times what is not a number is not one
        self.values.zero_()
        self.lengths = [0] * batch

    def fill(self, row: int, source: KVCache, source_row: int, length: int) -> None:
        """Make ``row`` hold the first ``length`` tokens of another row."""
        self.keys[:, row, :, :length] = source.keys[:, source_row, :, :length]
        self.values[:, row, :, :length] = source.values[:, source_row, :, :length]
        self.lengths[row] = length

    def drop(self, row: int) -> None:
        """Give up a row; the last one takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            self.fill(row, self, last, self.lengths[last])
        self.lengths.pop()

    def begin_step(self) -> tuple[Tensor, Tensor | None]:
        """Get ready for one more token per row: its position, (B, 1), and which keys it sees, (B, 1, 1, places)."""
        device = self.keys.device
        self._rows = torch.arange(len(self.lengths), device=device)
        self._places = torch.tensor(self.lengths, device=device)
        self._end = max(self.lengths) + 1
        positions = self._places[:, None]
        if min(self.lengths) == max(self.lengths):
            return positions, None  # every row sees all there is
        return positions, (torch.arange(self._end, device=device) <= positions)[:, None, None]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add each row's (B, H, 1, K) new key and value behind its own; return those of all, (B, H, places, K)."""
        keys, values = (whole[layer, : len(self.lengths)] for whole in (self.keys, self.values))
        keys[self._rows, :, self._places] = k.squeeze(2)
        values[self._rows, :, self._places] = v.squeeze(2)
        return keys[:, :, : self._end], values[:, :, : self._end]


class Decoder:
    """A model ready to generate: what autocast would cast for every token anew is cast once.

    For many ``rows`` on a CPU in fp32 the weights lie in columns, where MKL's products are quicker (by a third with 8).
    """

    def __init__(self, model: GPT, dtype: torch.dtype, rows: int = 1) -> None:
        self.config, self.dtype, self.device = model.config, dtype, model.head.device
        size = sum(p.nbytes for p in model.parameters())
        columns = rows >= COLUMNS_FROM and size <= COLUMNS_BYTES
        columns = columns and self.device.type == "cpu" and dtype == model.head.dtype == torch.float32
        self.head = _laid(model.head[: model.config.vocab_size], dtype, columns)  # without padding: never drawn
        as_it_is = dtype == model.head.dtype and not columns
        self.transformer = (model if as_it_is else _with_linear(model, dtype, columns)).transformer

    def read(self, contexts: Sequence[Sequence[int]], cache: RowCache, rows: Sequence[int]) -> None:
        """Fill ``rows`` of the cache with ``contexts``; equal ones are computed once. No logits are computed."""
        distinct = {tuple(context): i for i, context in enumerate(dict.fromkeys(map(tuple, contexts)))}
        T = max(map(len, distinct))
        # padded on the right, where no token before can see it
        tokens = torch.tensor([[*context, *[0] * (T - len(context))] for context in distinct], device=self.device)
        filled = KVCache(self.config, len(distinct), self.device, self.dtype, T)
        with autocast(self.device, self.dtype):
            self.transformer.forward(tokens, filled)  # (n, T); .forward: see GPT.forward
        for row, context in zip(rows, contexts, strict=True):
            cache.fill(row, filled, distinct[tuple(context)], len(context))

    def step(self, tokens: list[int], cache: RowCache) -> Tensor:
        """Logits of the next token, (B, V), after one more token of each row."""
        positions, mask = cache.begin_step()
        with autocast(self.device, self.dtype):
            new = torch.tensor(tokens, device=self.device)[:, None]  # (B, 1)
            hidden = self.transformer.forward(new, cache, positions, mask)  # (B, 1, D)
            logits = soft_cap(F.linear(hidden[:, 0], self.head), self.config.softcap)
        cache.lengths = [length + 1 for length in cache.lengths]
        return logits


def _laid(weight: Tensor, dtype: torch.dtype, columns: bool) -> Tensor:
    """The same matrix, (out, in), in ``dtype``, and in memory column after column where that is asked."""
    return weight.to(dtype).t().contiguous().t() if columns else weight.to(dtype)


def _with_linear(model: GPT, dtype: torch.dtype, columns: bool) -> GPT:
    """A copy whose linear layers are in ``dtype``, as autocast makes them; it shares everything else."""
    with torch.device("meta"):
        copy = GPT(model.config)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tensors = {
        name: _laid(tensor.detach(), dtype, columns and tensor.ndim == 2)
        if name.rpartition(".")[0] in linear
        else tensor.detach()
        for name, tensor in model.named_parameters()
    }
    copy.load_state_dict(tensors, assign=True)
    return copy


def random_numbers(seed: int, request: Prompt) -> np.random.Generator:
    """The random numbers of one text: they follow from the seed, its prompt and its number, and from nothing else."""
    return np.random.default_rng([seed, request.number, *request.prompt])


@torch.no_grad()
def generate(
    model: GPT,
    requests: Sequence[Prompt],
    sampling: SamplingConfig,
    seed: int,
    dtype: torch.dtype = torch.float32,
    stop: int | None = END_OF_TEXT,
) -> Iterator[dict[int, int]]:
    """Yield ``sampling.max_tokens`` times the next token of every text that goes on, by its index in ``requests``.

    A context that is longer than the model's positions is cut to its newest half of them and read again, at the
    beginning or on the way. A text does not depend on the others of its batch, but for the rounding of products whose
    shapes differ. Nothing in the model changes, and no random state is touched.

    Args:
        model: computes as it is; a compiled transformer is run uncompiled.
        requests: B texts, of any lengths.
        sampling: how many tokens, and how they are drawn.
        seed: at least 0.
        dtype: of the matrix products.
        stop: a text ends with this token (None: with none). When all have ended, so does the generation.

    Raises:
        UserError: the model computes what is not a number.
    """
    window = model.config.n_positions
    contexts = [list(request.prompt) for request in requests]
    chances = [random_numbers(seed, request) for request in requests]
    decoder = Decoder(model, dtype, len(requests))
    capacity = min(window, max(map(len, contexts)) + sampling.max_tokens)
    cache = RowCache(model.config, len(contexts), decoder.device, dtype, capacity)
    going = list(range(len(contexts)))  # the text in each row of the cache
    for _ in range(sampling.max_tokens):
        for row, text in enumerate(going):
            if len(contexts[text]) > window:
                contexts[text] = contexts[text][-max(1, window // 2) :]
                cache.lengths[row] = 0
        unread = [row for row, text in enumerate(going) if cache.lengths[row] < len(contexts[text]) - 1]
        if unread:
            decoder.read([contexts[going[row]][:-1] for row in unread], cache, unread)
        logits = decoder.step([contexts[text][-1] for text in going], cache)
        drawn = next_tokens(logits, sampling, [chances[text].random() for text in going]).tolist()
        yield dict(zip(going, drawn, strict=True))
        for text, token in zip(going, drawn, strict=True):
            contexts[text].append(token)
        for row in reversed(range(len(going))):
            if drawn[row] == stop:
                cache.drop(row)
                going[row] = going[-1]
                going.pop()
        if not going:
            return


def rows_at_once(config: ModelConfig, longest_prompt: int, max_tokens: int, dtype: torch.dtype) -> int:
    """How many texts, of prompts up to so many tokens, have their keys and values in `CACHE_BYTES`; at least 1."""
    tokens = min(config.n_positions, longest_prompt + max_tokens)
    row = 2 * config.n_layer * config.n_head * config.head_size * tokens * dtype.itemsize
    return max(1, CACHE_BYTES // row)


# --- models that transformers runs ---------------------------------------------------------------------------


@torch.no_grad()
def generate_with_transformers(
    opened: TransformersModel, request: Prompt, sampling: SamplingConfig, seed: int, cached: bool
) -> Iterator[int]:
    """Yield the tokens of one text up to one that ends it, drawn as `generate` draws.

    Args:
        opened: the model.
        request: the text; what is longer than the window is cut to its newest half of it.
        sampling: how many tokens, and how they are drawn.
        seed: at least 0.
        cached: whether its key/value cache can be used (see `cache_is_exact`); else all is read for every token.
    """
    window, ids, cache = opened.max_length, list(request.prompt), None
    chance, is_text, ends = random_numbers(seed, request), opened.text_tokens(), opened.ends()
    for _ in range(sampling.max_tokens):
        if len(ids) > window:
            ids, cache = ids[-max(1, window // 2) :], None
        logits, cache = _step(opened.model, ids if cache is None else ids[-1:], cache, cached)
        logits = logits.masked_fill(~is_text, float("-inf"))  # padding is never drawn
        token = int(next_tokens(logits, sampling, [chance.random()]))
        if token in ends:
            return
        yield token
        ids.append(token)


def _step(model: Any, ids: list[int], cache: Any, cached: bool) -> tuple[Tensor, Any]:
    """Logits of the next token, (1, V), and the cache that holds ``ids``, too."""
    given = {"past_key_values": cache, "use_cache": True} if cached else {}
    result = model(input_ids=torch.tensor([ids], device=model.device), **given)
    return result.logits[:, -1], getattr(result, "past_key_values", None) if cached else None


@torch.no_grad()
def cache_is_exact(model: Any) -> bool:
    """Whether a model of `transformers` computes, token after token with its cache, the logits of the whole context.

    Found out by trying: some have no cache, or one that they are given in another way.
    """
    tokens = [1, 2, 3, 4, 5, 6]
    with contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        logits, cache = _step(model, tokens[:3], None, True)
        for token in tokens[3:]:
            if cache is None:
                return False
            logits, cache = _step(model, [token], cache, True)
        whole, _ = _step(model, tokens, None, False)
        tolerance = (SAME if whole.dtype == torch.float32 else 100 * SAME) * float(whole.abs().max())
        return bool(torch.allclose(logits.float(), whole.float(), atol=tolerance, rtol=0))
    return False
