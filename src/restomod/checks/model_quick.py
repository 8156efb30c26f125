"""Quick sanity checks of a model, run before the first step of every new run.

Each check takes a `CheckedModel`, does not change it, and returns a `CheckResult`. Slower checks are in
`restomod.checks.model_slow`. Most are from Karpathy, "A Recipe for Training Neural Networks", 2019.

Shapes: T = sequence length, n = tokens per checked sequence, V = vocabulary size, D = embedding width, K = head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restomod.data.batches import Batches
from restomod.engine.optimizer import Optimizers
from restomod.engine.step import ComputeConfig, batch_loss
from restomod.model.flops import parameter_count
from restomod.model.gpt import GPT
from restomod.utils.console import CheckResult, CheckStatus

INITIAL_LOSS_TOLERANCE = 0.3  # nats around ln(V); repetitive text causes such differences
WRONG_INITIAL_LOSS = 1.5  # nats around ln(V); larger differences are a fail
INITIAL_LOSS_TOKENS = 4096  # in shorter texts, a few repeated words change the mean
FEW_TOKENS = 64  # tokens of each of the two sequences in the other checks
LOSS_TOLERANCE = 1e-4  # nats between two computations of a fp32 loss; padding in the softmax would add 9e-4
CAUSALITY_TOLERANCE = 1e-5  # change before a token, relative to the change after it; rounding causes 1e-7


@dataclass(frozen=True)
class CheckedModel:
    """Model to check, with the data and settings of its training."""

    model: GPT
    """Model to check."""
    batches: Batches
    """Training data."""
    compute: ComputeConfig
    """Device, compute dtype and micro-batch size."""
    optimizer: Optimizers
    """Optimizer of the training."""
    fresh: bool
    """True for initial weights, False for trained ones."""

    def few_tokens(self) -> tuple[Tensor, Tensor]:
        """Return the first tokens and targets of two windows, (2, n) each, with n at most `FEW_TOKENS`."""
        last = self.batches.n_windows - 1
        tokens, targets = self.batches.load(np.array([0, last]))
        return tokens[:, :FEW_TOKENS], targets[:, :FEW_TOKENS]

    @property
    def fp32(self) -> ComputeConfig:
        """Settings with compute dtype fp32."""
        return ComputeConfig(self.compute.device, torch.float32, self.compute.micro_batch)


def quick_checks(subject: CheckedModel) -> list[CheckResult]:
    """Run all quick checks of a model."""
    return [check(subject) for check in QUICK]


@torch.no_grad()
def initial_loss(subject: CheckedModel) -> CheckResult:
    """Check that the loss of initial weights is ln(V), the loss of a uniform prediction."""
    batches, compute = subject.batches, subject.compute
    windows = min(batches.n_windows, max(1, INITIAL_LOSS_TOKENS // batches.T))
    spread = np.arange(windows) * batches.n_windows // windows
    total = 0.0
    for start in range(0, windows, compute.micro_batch):
        tokens, targets = batches.load(spread[start : start + compute.micro_batch])
        total += batch_loss(subject.model, tokens, targets, compute).item() * len(tokens)
    loss, V = total / windows, subject.model.config.vocab_size
    uniform = f"ln({V}) = {math.log(V):.2f}"
    if not subject.fresh:
        if not math.isfinite(loss):
            return CheckResult("loss", "fail", f"{loss} on the data: the weights are damaged")
        found = f"{loss:.2f} on the data, below {uniform} of a uniform prediction"
        if loss < math.log(V):
            return CheckResult("loss", "pass", found)
        found = found.replace("below", "not below")
        return CheckResult("loss", "warn", f"{found}: the model may have another tokenizer")
    off = loss - math.log(V)
    # logits with variance D * 0.02^2 raise the mean of log(sum(exp(logits))) by half of that
    if -INITIAL_LOSS_TOLERANCE <= off <= INITIAL_LOSS_TOLERANCE + subject.model.config.n_embd * 0.02**2 / 2:
        return CheckResult("initial loss", "pass", f"{loss:.2f}, expected {uniform} for a uniform prediction")
    status: CheckStatus = "warn" if abs(off) <= WRONG_INITIAL_LOSS else "fail"
    why = "the text may be repetitive" if status == "warn" else "the initialisation is wrong"
    return CheckResult("initial loss", status, f"{loss:.2f}, expected {uniform} for a uniform prediction: {why}")


@torch.no_grad()
def next_token_targets(subject: CheckedModel) -> CheckResult:
    """Check that the targets are the next tokens, and that the loss is their cross-entropy."""
    name, model = "targets", subject.model
    T = subject.batches.T
    tokens, targets = subject.batches.load(np.array([0]))
    text = torch.from_numpy(subject.batches.streams[0].read(0, T + 1).astype(np.int64))
    for what, row, expected in (("tokens", tokens[0], text[:-1]), ("targets", targets[0], text[1:])):
        if not torch.equal(row, expected):
            ahead = [k for k in (-1, 0, 2) if what == "targets" and _is_shift(row, text, k)]
            found = f"they are shifted by {ahead[0]} tokens, expected 1" if ahead else "they differ from the text"
            return CheckResult(name, "fail", f"the {what} of the first window are wrong: {found}")
    tokens, targets = subject.few_tokens()
    ours = batch_loss(model, tokens, targets, subject.fp32).item()
    logits = model(tokens.to(subject.compute.device)).float()  # (2, n, V)
    plain = F.cross_entropy(logits.flatten(0, 1), targets.to(logits.device).flatten()).item()
    if not abs(ours - plain) <= LOSS_TOLERANCE:
        return CheckResult(
            name, "fail", f"the training loss is {ours:.4f}, the cross-entropy of the next tokens {plain:.4f}"
        )
    return CheckResult(name, "pass", "next tokens; the training loss is their cross-entropy")


def _is_shift(row: Tensor, text: Tensor, ahead: int) -> bool:
    """Return whether ``row`` (T,) equals ``text`` (T + 1,) shifted by ``ahead`` tokens, where they overlap."""
    first, end = max(0, -ahead), min(len(row), len(text) - ahead)
    return bool(end > first) and torch.equal(row[first:end], text[first + ahead : end + ahead])


@torch.no_grad()
def causality(subject: CheckedModel) -> CheckResult:
    """Check that a changed token changes logits at its own and later positions only."""
    name = "causality"
    tokens = subject.few_tokens()[0].to(subject.compute.device)
    n = tokens.shape[1]
    if n < 2:
        return CheckResult(name, "skip", "the sequence length is 1")
    t = n // 2
    changed = tokens.clone()
    changed[:, t] = (changed[:, t] + 1) % subject.model.config.vocab_size
    difference = (subject.model(changed) - subject.model(tokens)).abs().amax((0, 2))  # (n,)
    before, after = difference[:t].max().item(), difference[t:].max().item()
    if not math.isfinite(before + after):
        return CheckResult(name, "fail", "the logits are not finite")
    if after == 0:
        return CheckResult(name, "fail", f"changing token {t} of {n} changes no logits")
    if before > CAUSALITY_TOLERANCE * after:
        return CheckResult(
            name, "fail", f"changing token {t} of {n} changes earlier logits by {before:.2g}: attention is not causal"
        )
    return CheckResult(name, "pass", f"changing token {t} of {n} leaves earlier logits unchanged")


def gradients(subject: CheckedModel) -> CheckResult:
    """Check that every parameter has a finite gradient and belongs to the optimizer."""
    model = subject.model
    reached = loss_gradients(model, batch_loss(model, *subject.few_tokens(), subject.compute))
    held = {id(p) for group in subject.optimizer.param_groups for p in group["params"]}
    problems, squares = [], 0.0
    for name, p in model.named_parameters():
        norm = reached[name].norm().item() if name in reached else 0.0
        squares += norm**2
        if not p.requires_grad:
            problems.append(f"{name} is frozen")
        elif not math.isfinite(norm):
            problems.append(f"{name} has gradient norm {norm}")
        elif norm == 0 and not (subject.fresh and model.config.zero_init_projections and ".h." in name):
            problems.append(f"{name} has no gradient")
        elif id(p) not in held:
            problems.append(f"{name} is missing in the optimizer")
    if problems:
        more = f" and {len(problems) - 2} more" if len(problems) > 2 else ""
        return CheckResult("gradients", "fail", "; ".join(problems[:2]) + more)
    return CheckResult("gradients", "pass", f"all {len(reached)} tensors have one, norm {math.sqrt(squares):.2f}")


def loss_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Compute the gradients of ``loss`` by parameter name, without changing `Tensor.grad`.

    Parameters that do not influence the loss are absent.
    """
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not loss.requires_grad:
        return {}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(wanted, found, strict=True) if gradient is not None}


def tied_lm_head(subject: CheckedModel) -> CheckResult:
    """Check that lm_head and the token embedding are one tensor, and that no block is missing."""
    model, config = subject.model, subject.model.config
    embedding, saved = model.transformer.wte.weight, config.vocab_size * config.n_embd
    blocks, expected = len(model.transformer.h), parameter_count(config)
    if blocks != config.n_layer:
        return CheckResult("tied lm_head", "fail", f"the model has {blocks} blocks, expected {config.n_layer}")
    if not config.tied:
        return CheckResult("tied lm_head", "skip", f"untied lm_head; {expected:,} parameters")
    if model.head is not embedding:
        return CheckResult("tied lm_head", "fail", "lm_head is a copy of the token embedding, or detached from it")
    return CheckResult("tied lm_head", "pass", f"saves {saved:,} of {expected + saved:,} parameters")


def kernel_shapes(subject: CheckedModel) -> CheckResult:
    """Check that dimensions are multiples of 64, for which matmuls are fastest."""
    config, T = subject.model.config, subject.batches.T
    K = config.head_size
    odd = [
        f"{name} {size} is not a multiple of {of}"
        for name, size, of in (
            ("n_embd", config.n_embd, 64),
            ("embedding rows", subject.model.transformer.wte.weight.shape[0], 64),
            ("tokens of a micro-batch", subject.compute.micro_batch * T, 64),
            ("head size", K, 8),  # required by fused attention kernels
        )
        if size % of
    ]
    if odd:
        return CheckResult("kernel shapes", "warn", "; ".join(odd) + ": training is slower")
    rows = config.padded_vocab_size
    return CheckResult(
        "kernel shapes", "pass", f"multiples of 64: width {config.n_embd}, {rows:,} embedding rows; head size {K}"
    )


QUICK: tuple[Callable[[CheckedModel], CheckResult], ...] = (
    initial_loss,
    next_token_targets,
    causality,
    gradients,
    tied_lm_head,
    kernel_shapes,
)
