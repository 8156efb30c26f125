"""Error analysis of a checkpoint: validation loss by kind of token, position, source and passage. Imports torch.

The result is written to `error_analysis.json` in the run's folder. Reports read it without torch.

Shapes: B = windows per batch, T = tokens per window, V = vocabulary size.
"""

from __future__ import annotations

import codecs
import heapq
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from restomod.analysis.report.data import ERRORS_FILE, ERRORS_FORMAT, read_error_analysis
from restomod.config.run import Device, Precision
from restomod.data.batches import Batches
from restomod.data.dataset import Dataset, Part
from restomod.data.prepare.text_cache import prepare_text
from restomod.data.tokenizer import END_OF_TEXT, Tokenizer, gpt2_tokenizer
from restomod.engine.device import EVAL_TOKENS, choose_device, choose_dtype, keep_freed_memory, tokens_on
from restomod.evals.validation import token_losses, validation_windows
from restomod.model.gpt import GPT
from restomod.model.hf_io import load_model
from restomod.runs.open_model import find_model
from restomod.runs.reader import Run
from restomod.utils.errors import NOT_FINITE, UserError, reason
from restomod.utils.files import write_json_atomically
from restomod.utils.run_files import step_of
from restomod.utils.text import visible

PASSAGE = 64  # tokens
PASSAGES = 5  # number of best passages, and of worst passages
BEFORE = 24  # tokens of context shown before a passage
POSITIONS = 30  # maximum number of ranges of positions

KINDS = {
    "word after a space": "complete word or its first part",
    "word without a space": "later part of a word, or word at the start of a line or after punctuation",
    "number": "token with a digit",
    "punctuation": "punctuation and symbols, with or without a space",
    "white space": "spaces, tabs, line breaks",
    "end of text": "end of a document",
    "part of a character": "bytes of an incomplete UTF-8 character",
}


def kind_of_token(piece: bytes, is_end: bool = False) -> str:
    """Return the kind of a token, a key of `KINDS`.

    Args:
        piece: bytes of the token.
        is_end: whether the token is `<|endoftext|>`.
    """
    if is_end:
        return "end of text"
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return "part of a character"
    bare = text.strip()
    if not bare:
        return "white space"
    if any(c.isdigit() for c in bare):
        return "number"
    if any(c.isalpha() for c in bare):
        return "word after a space" if text[0] == " " else "word without a space"
    return "punctuation"


Passage = tuple[float, int, list[int], list[float]]
"""Score, index (to break ties), tokens of context and passage, and losses of the passage's tokens, which come last."""


@dataclass
class _Sums:
    """Sums over the evaluated windows."""

    by_token: np.ndarray
    """Sum of losses and count of each target token, (V, 2) float64."""
    by_position: np.ndarray
    """Sum of losses and count at each position, (T, 2) float64."""
    passages: int = 0
    """Number of passages so far."""
    best: list[Passage] = field(default_factory=list)
    """Heap of the best passages; the scores are negative mean losses."""
    worst: list[Passage] = field(default_factory=list)
    """Heap of the worst passages; the scores are mean losses."""


def analyse_errors(
    run: Run,
    max_tokens: int,
    device: Device = "auto",
    precision: Precision = "auto",
    say: Callable[[str], None] = print,
) -> None:
    """Analyse the errors of a run's newest checkpoint and write the result. A current result is kept.

    Errors are reported through ``say`` and not raised, so that the report is written without the analysis.

    Args:
        run: run to analyse.
        max_tokens: number of validation tokens, spread evenly over the split.
        device: device of the model.
        precision: compute dtype.
        say: function that prints a line.
    """
    try:
        checkpoint = find_model(str(run.folder))
        known = read_error_analysis(run)
        if known is not None and (known.get("checkpoint"), known.get("asked")) == (checkpoint.name, max_tokens):
            say(f"{run.folder}: {ERRORS_FILE} already contains the error analysis of {checkpoint.name}")
            return
        if not os.access(run.folder, os.W_OK):
            raise UserError(f"the folder is not writable, so {ERRORS_FILE} cannot be saved")
        where = choose_device(device)
        if where.type == "cpu":
            keep_freed_memory()
        dataset = prepare_text(run.config.data)
        trained_on = run.manifest.get("fingerprint")
        if trained_on is not None and trained_on != dataset.fingerprint:
            raise UserError("the data has changed since training")
        found = _analyse(run, load_model(checkpoint, where), dataset, max_tokens, where, choose_dtype(precision, where))
    except UserError as e:
        say(f"{run.folder}: no error analysis: {e}")
        return
    about = {"format": ERRORS_FORMAT, "checkpoint": checkpoint.name, "step": step_of(checkpoint), "asked": max_tokens}
    try:
        write_json_atomically(run.folder / ERRORS_FILE, about | found, run.folder)
    except (OSError, UserError) as e:
        say(f"{run.folder}: no error analysis: {ERRORS_FILE} cannot be written ({reason(e)})")
        return
    say(f"written: {run.folder / ERRORS_FILE}")


@torch.no_grad()
def _analyse(
    run: Run, model: GPT, dataset: Dataset, max_tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    T, tokenizer = run.config.sequence_length, gpt2_tokenizer()
    if model.config.vocab_size != tokenizer.vocab_size:
        raise UserError(f"the model's vocabulary of {model.config.vocab_size:,} tokens is not GPT-2's")
    sources = [source for source in dataset.sources if len(source.dataset.val) > T]
    if not sources:
        raise UserError("the data has no validation split, or one shorter than a window")
    sums = _Sums(np.zeros((tokenizer.vocab_size, 2)), np.zeros((T, 2)))
    by_source = []
    for source in sources:
        before = sums.by_position.sum(0)
        for tokens, targets in _windows(source, T, max(T, int(float(source.share) * max_tokens)), device):
            losses = token_losses(model, tokens, targets, device, dtype).numpy()
            if not np.isfinite(losses).all():
                raise UserError(NOT_FINITE)
            _add(sums, targets.numpy(), losses)
        loss, count = sums.by_position.sum(0) - before
        by_source.append({"name": visible(source.name), "loss": loss / count, "tokens": int(count)})
    total, count = sums.by_position.sum(0)
    return {
        "tokens": int(count),
        "loss": total / count,
        "kinds": _kinds(sums.by_token, tokenizer),
        "positions": _positions(sums.by_position),
        "sources": by_source,
        "best": [_passage(entry, tokenizer) for entry in sorted(sums.best, reverse=True)],
        "worst": [_passage(entry, tokenizer) for entry in sorted(sums.worst, reverse=True)],
    }


def _windows(
    source: Part, T: int, max_tokens: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield tokens and targets, (B, T) each, of windows spread over a source's validation split."""
    batches = Batches(source.dataset.val, T, 1, seed=0, split="validation")
    windows = validation_windows(batches.n_windows, T, max_tokens)
    B = max(1, tokens_on(device, EVAL_TOKENS) // T)
    for start in range(0, len(windows), B):
        yield batches.load(windows[start : start + B])


def _add(sums: _Sums, targets: np.ndarray, losses: np.ndarray) -> None:
    """Add the targets and losses of a batch of windows, (B, T) each."""
    T = targets.shape[1]
    np.add.at(sums.by_token[:, 0], targets.ravel(), losses.ravel().astype(np.float64))
    np.add.at(sums.by_token[:, 1], targets.ravel(), 1)
    sums.by_position[:, 0] += losses.sum(0, dtype=np.float64)
    sums.by_position[:, 1] += len(losses)
    length = min(PASSAGE, T // 2)
    for row, row_losses in zip(targets, losses, strict=True):
        for start in range(T - length, T // 4 - 1, -length):  # the first quarter of a window lacks context
            part = row_losses[start : start + length]
            mean, sums.passages = float(part.mean()), sums.passages + 1
            entry = (sums.passages, row[max(0, start - BEFORE) : start + length].tolist(), part.tolist())
            for heap, score in ((sums.best, -mean), (sums.worst, mean)):
                heapq.heappush(heap, (score, *entry))
                if len(heap) > PASSAGES:
                    heapq.heappop(heap)


def _kinds(by_token: np.ndarray, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return loss, share of tokens and share of the total loss of each kind of token, highest loss first."""
    sums: dict[str, np.ndarray] = {name: np.zeros(2) for name in KINDS}
    for token in np.flatnonzero(by_token[:, 1]).tolist():
        is_end = token == END_OF_TEXT
        sums[kind_of_token(b"" if is_end else tokenizer.decode_bytes([token]), is_end)] += by_token[token]
    loss, count = by_token.sum(0)
    found = [
        {"name": name, "meaning": KINDS[name], "loss": s / n, "share": n / count, "of_loss": s / loss if loss else 0.0}
        for name, (s, n) in sums.items()
        if n
    ]
    return sorted(found, key=lambda kind: kind["loss"], reverse=True)


def _positions(by_position: np.ndarray) -> dict[str, list[float]]:
    """Return the mean loss by position in the window, over ranges whose width grows with the position."""
    T = len(by_position)
    edges = np.unique(np.geomspace(1, T + 1, min(POSITIONS, T + 1)).round().astype(int))
    ranges = list(itertools.pairwise(edges.tolist()))
    sums = [by_position[a - 1 : b - 1].sum(0) for a, b in ranges]
    return {"x": [(a + b - 1) / 2 for a, b in ranges], "y": [float(s / n) for s, n in sums]}


def _passage(entry: Passage, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a passage as JSON values: text and loss of each token, and the text before the passage."""
    _, _, tokens, losses = entry
    texts = list(_pieces(tokens, tokenizer))
    n = len(tokens) - len(losses)
    return {
        "loss": sum(losses) / len(losses),
        "before": "".join(texts[:n]),
        "tokens": [[text, round(loss, 3)] for text, loss in zip(texts[n:], losses, strict=True)],
    }


def _pieces(tokens: list[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text of each token; a character that spans several tokens belongs to the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i, token in enumerate(tokens):
        is_end, last = token == END_OF_TEXT, i == len(tokens) - 1
        text = decoder.decode(b"" if is_end else tokenizer.decode_bytes([token]), final=last or is_end)
        yield visible(text) + ("<|endoftext|>" if is_end else "")
