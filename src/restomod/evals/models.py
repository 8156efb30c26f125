"""Models that can be scored: restomod's GPT and causal language models of `transformers`."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restomod.data.tokenizer import END_OF_TEXT, Tokenizer, gpt2_tokenizer
from restomod.engine.device import autocast, tokens_on
from restomod.engine.loss import log_probs_of
from restomod.evals.likelihood import Batch, LanguageModel, Request, gpt_log_probs, log_likelihoods
from restomod.model.gpt import GPT
from restomod.model.hf_models import TransformersModel, open_causal_model
from restomod.runs.open_model import find_model
from restomod.utils.errors import UserError

TOKENS_PER_FORWARD = {"cpu": 1024, "mps": 8192, "cuda": 32768}
SAME = 1e-3  # tolerance in nats between two ways to compute a log-likelihood in fp32


class ScoredGPT:
    """restomod's GPT as a `LanguageModel`. A compiled model runs in eager mode, because row lengths vary."""

    shares_contexts = True
    prefix = END_OF_TEXT

    def __init__(self, model: GPT, dtype: torch.dtype = torch.float32) -> None:
        """Wrap a model.

        Args:
            model: model with GPT-2's vocabulary, on its device.
            dtype: compute dtype.

        Raises:
            UserError: the model has another vocabulary.
        """
        self.model, self.dtype = model, dtype
        self.tokenizer: Tokenizer = gpt2_tokenizer()
        if model.config.vocab_size != self.tokenizer.vocab_size:
            raise UserError(
                f"the model has a vocabulary of {model.config.vocab_size:,} tokens; evaluation on text needs GPT-2's "
                f"vocabulary of {self.tokenizer.vocab_size:,}"
            )
        self.max_length = model.config.n_positions
        device = model.head.device
        self.tokens_per_forward = tokens_on(device, TOKENS_PER_FORWARD)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; `<|endoftext|>` becomes one token."""
        return [int(token) for token in self.tokenizer.encode_special(text)]

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute log-probabilities, (M,) fp32, and whether no other token is likelier, (M,) bool."""
        device = self.model.head.device
        positions = None if batch.positions is None else batch.positions.to(device)
        mask = None if batch.mask is None else batch.mask.to(device)
        with autocast(device, self.dtype):
            hidden = self.model.transformer.forward(batch.tokens.to(device), positions=positions, mask=mask)
        hidden = hidden.flatten(0, 1)[batch.at.to(device)]  # (N, D)
        return gpt_log_probs(self.model, hidden, batch.which.to(device), batch.targets.to(device), self.dtype)


class ScoredTransformers:
    """Causal language model of `transformers` as a `LanguageModel`.

    Continuations share a row if the model accepts position ids and a 4-D attention mask and gives the same
    log-likelihoods as with separate rows. This is tested with a few tokens. Models with sliding-window attention always
    get one row per continuation.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Wrap a model.

        Args:
            model: `AutoModelForCausalLM`; its dtype and device are used.
            tokenizer: `AutoTokenizer` of the model.
        """
        self.opened = TransformersModel(model.eval(), tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.prefix = self.opened.max_length, self.opened.prefix
        # logits of all positions from the first needed one take memory, so use half the tokens
        self.tokens_per_forward = tokens_on(model.device, TOKENS_PER_FORWARD) // 2
        parameters = inspect.signature(model.forward).parameters
        self.keeps_logits = "logits_to_keep" in parameters
        attends_to_all = getattr(model.config.get_text_config(), "sliding_window", None) is None
        self.shares_contexts = "position_ids" in parameters and attends_to_all and self._sharing_is_exact()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens at its ends."""
        return self.opened.encode(text)

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute log-probabilities, (M,) fp32, and whether no other token is likelier, (M,) bool."""
        device, (_, T) = self.model.device, batch.tokens.shape
        first = int((batch.at % T).min())  # no logits are needed before this position
        given: dict[str, Any] = {"input_ids": batch.tokens.to(device), "use_cache": False}
        if self.keeps_logits:
            given["logits_to_keep"] = T - first
        if batch.mask is not None and batch.positions is not None:
            kind = self.model.dtype
            hidden = torch.zeros(batch.mask.shape, dtype=kind).masked_fill(~batch.mask, torch.finfo(kind).min)
            given |= {"attention_mask": hidden.to(device), "position_ids": batch.positions.to(device)}
        logits = self.model(**given).logits  # (B, T - first or T, V)
        logits = logits if self.keeps_logits else logits[:, first:]
        at = batch.at[batch.which].to(device)
        at = at // T * (T - first) + at % T - first
        flat = logits.flatten(0, 1)
        return log_probs_of(lambda part: flat[at[part]], batch.targets.to(device))

    def _sharing_is_exact(self) -> bool:
        """Return whether continuations in a shared row have the same log-likelihoods as in separate rows."""
        context = tuple(range(1, 9))
        requests = [Request(context[:n], (n, *range(9, 9 + n), k)) for n in (5, 8) for k in (1, 2, 3)]
        results: list[list[float]] = []
        for self.shares_contexts in (False, True):
            # the model may reject the mask, lack the tokens or have a shorter context length
            with contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError, UserError):
                results.append([score.log_likelihood for score in log_likelihoods(self, requests)])
        if len(results) < 2:
            return False
        tolerance = SAME if self.model.dtype == torch.float32 else 100 * SAME
        apart, shared = map(torch.tensor, results)
        return bool(torch.allclose(apart, shared, atol=tolerance, rtol=tolerance))


def open_language_model(
    name: str, device: torch.device, dtype: torch.dtype, folder: Path | None = None
) -> LanguageModel:
    """Open a model for scoring.

    Architectures that restomod implements exactly become `ScoredGPT`, all others `ScoredTransformers`; see
    `restomod.model.hf_models.open_causal_model`.

    Args:
        name: run, model folder or name on the Hugging Face hub; see `restomod.runs.open_model.find_model`.
        device: device of the model.
        dtype: compute dtype.
        folder: folder of the model, if ``name`` was resolved before; None: ``name`` is resolved.

    Raises:
        UserError: the model does not exist or is damaged, or `transformers` is needed and is missing or cannot load it.
    """
    opened = open_causal_model(name, folder or find_model(name), device, dtype)
    if isinstance(opened, TransformersModel):
        return ScoredTransformers(opened.model, opened.tokenizer)
    return ScoredGPT(opened, dtype)
