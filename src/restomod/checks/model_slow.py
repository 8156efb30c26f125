"""Implementation of `check`: all sanity checks of a model, including slow ones, on the source code of this package."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from restomod.checks.model_quick import LOSS_TOLERANCE, QUICK, CheckedModel, loss_gradients
from restomod.config.run import Device, OptimConfig, Optimizer, Precision
from restomod.data.batches import Batches
from restomod.data.dataset import TokenStream
from restomod.data.find_files import find_files
from restomod.data.readers import read_documents
from restomod.data.tokenizer import gpt2_tokenizer
from restomod.engine.device import autocast, choose_device, choose_dtype
from restomod.engine.loss import linear_cross_entropy
from restomod.engine.memory import FP32, state_bytes
from restomod.engine.optimizer import build_optimizer, changed_by_nan, gradient_norm
from restomod.engine.step import ComputeConfig, batch_loss
from restomod.model.flops import padded_parameters
from restomod.model.gpt import ScaledResidual, initial_std
from restomod.runs.open_model import open_or_build
from restomod.utils.console import CheckResult
from restomod.utils.errors import one_line
from restomod.utils.process_memory import available_bytes
from restomod.utils.text import gigabytes

OVERFIT_STEPS = 200
OVERFIT_WARMUP_STEPS = 10  # without it, the first steps of deep, narrow models diverge
OVERFIT_LOSS = 0.05  # nats
BF16_TOLERANCE = 0.05  # nats between the bf16 and the fp32 loss
LARGEST_STD = 10.0  # maximum of the initial residual stream; about 0.3 after the last block of GPT-2 124M
DEAD_STD = 1e-3  # minimum of the initial residual stream
DEAD_UNITS = 0.01  # maximum share of MLP units that are initially 0 on all tokens
CONTEXT = 1024
KNOWN_INITIALISATION = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, ScaledResidual)


def check(name: str, seed: int, device: Device, precision: Precision) -> Iterator[CheckResult]:
    """Check a model, and yield each result when it is known.

    Args:
        name: preset (checked with its initial weights), run, model folder or hub name.
        seed: seed of the initial weights and of the batches.
        device: device of the model.
        precision: compute dtype.

    Raises:
        UserError: the model or the device does not exist.
    """
    target = choose_device(device)
    model, fresh = open_or_build(name, target, seed)
    T = min(model.config.n_positions, CONTEXT)
    batches = Batches(source_tokens(model.config.vocab_size), T, 1, seed)
    compute = ComputeConfig(target, choose_dtype(precision, target), micro_batch=1)
    subject = CheckedModel(model, batches, compute, build_optimizer(model, OptimConfig()), fresh)
    for one in (*QUICK, *SLOW):
        yield one(subject)


def source_tokens(vocab_size: int) -> TokenStream:
    """Tokenize the source code of this package, a text that every installation has."""
    files = find_files(Path(__file__).parent.parent, "**/*.py")
    texts = ("".join(document.parts()) for file in files for document in read_documents(file))
    tokens = np.concatenate([gpt2_tokenizer().encode(text) for text in texts])
    return TokenStream([tokens % vocab_size if vocab_size < 2**16 else tokens])


@torch.no_grad()
def initial_weights(subject: CheckedModel) -> CheckResult:
    """Check the mean and standard deviation of all initial tensors, within four standard errors."""
    name, config = "initial weights", subject.model.config
    if not subject.fresh:
        return CheckResult(name, "skip", "the weights are trained")
    tables = set(map(id, subject.model.vocabulary_matrices()))
    problems = []
    for parameter, value in subject.model.named_parameters():
        if not isinstance(subject.model.get_submodule(parameter.rpartition(".")[0]), KNOWN_INITIALISATION):
            continue
        if value.ndim < 2:
            constant = 1.0 if parameter.endswith("weight") else 0.0
            if not bool((value == constant).all()):
                problems.append(f"{parameter} is not all {constant:.0f}")
            continue
        real = value[: config.vocab_size] if id(value) in tables else value
        expected = initial_std(config, parameter)
        if expected == 0:
            if bool((value != 0).any()):
                problems.append(f"{parameter} is not all 0")
            continue
        std, mean, n = real.std(correction=0).item(), real.mean().item(), real.numel()
        if not abs(std / expected - 1) < 0.02 + 4 / math.sqrt(2 * n):  # four standard errors
            problems.append(f"{parameter} has std {std:.4f}, expected {expected:.4f}")
        elif not abs(mean / expected) < 0.02 + 4 / math.sqrt(n):
            problems.append(f"{parameter} has mean {mean:.4f}, expected 0")
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        return CheckResult(name, "fail", problems[0] + more)
    added, embedded = (initial_std(config, n) for n in ("transformer.h.0.mlp.c_proj.weight", "transformer.wte.weight"))
    scale = f"0.02 / √{2 * config.n_layer} = {added:.4f}" if added else "0"
    found = f"std 0.02; {scale} for residual projections"
    found += f"; {embedded:.4f} for the token embedding" if embedded != 0.02 else ""
    return CheckResult(name, "pass", found)


@torch.no_grad()
def activations(subject: CheckedModel) -> CheckResult:
    """Check that the residual stream neither vanishes nor explodes with depth, and that few MLP units are dead."""
    name, model = "activations", subject.model
    stds, dead = residual_stds(subject)
    shown = stds[:: max(1, len(stds) // 6)]
    values = " ".join(f"{std:.2g}" for std in (shown if shown[-1] == stds[-1] else [*shown, stds[-1]]))
    found = f"std of the residual stream, from embedding to last block: {values}"
    if not all(math.isfinite(std) for std in stds):
        return CheckResult(name, "fail", f"{found}: not finite")
    if not subject.fresh:
        found += f"; dead MLP units: {dead:.1%}"
        return CheckResult(name, "fail" if min(stds) < 1e-6 else "pass", found)
    if max(stds) > LARGEST_STD or min(stds) < DEAD_STD or dead > DEAD_UNITS:
        what = "exploding" if max(stds) > LARGEST_STD else "dead"
        return CheckResult(name, "fail", f"{what}: {found}; dead MLP units: {dead:.1%}")
    if model.config.zero_init_projections:
        return CheckResult(name, "pass", found)
    depth = 2 * model.config.n_layer
    unscaled = residual_stds(subject, projection_scale=math.sqrt(depth))[0][-1]
    return CheckResult(name, "pass", f"{found}; {unscaled:.2g} without 1/√{depth} scaling")


def residual_stds(subject: CheckedModel, projection_scale: float = 1.0) -> tuple[list[float], float]:
    """Compute the standard deviations of the residual stream, and the share of dead MLP units.

    Args:
        subject: model to run once in eager mode, and its tokens.
        projection_scale: factor for the output of every residual projection.

    Returns:
        Standard deviations before the first block and after each block, n_layer + 1 values; share of hidden MLP units
        that are 0 on every token, from 0 to 1.
    """
    stds: list[float] = []
    dead: list[Tensor] = []
    hooks: list[RemovableHandle] = []

    def scaled(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * projection_scale

    def record_std(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not stds:
            stds.append(inputs[0].float().std().item())
        stds.append(output.float().std().item())

    def record_units(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        dead.append(inputs[0].float().abs().amax((0, 1)) < 1e-6)  # (4D,)

    for name, module in subject.model.named_modules():
        if re.fullmatch(r"transformer\.h\.\d+", name):
            hooks.append(module.register_forward_hook(record_std))
        if name.endswith("mlp.c_proj"):
            hooks.append(module.register_forward_pre_hook(record_units))
        if name.endswith("c_proj"):
            hooks.append(module.register_forward_hook(scaled))
    try:
        with torch.no_grad(), autocast(subject.compute.device, subject.compute.dtype):
            subject.model.transformer.forward(subject.few_tokens()[0].to(subject.compute.device))
    finally:
        for hook in hooks:
            hook.remove()
    # no hook runs if the projections are not called as modules
    return stds, torch.cat(dead).float().mean().item() if dead else 0.0


@torch.no_grad()
def precision_agreement(subject: CheckedModel) -> CheckResult:
    """Check that the losses in bf16 and fp32 are equal, up to rounding."""
    tokens, targets = subject.few_tokens()
    bf16 = ComputeConfig(subject.compute.device, torch.bfloat16, 1)
    losses = [batch_loss(subject.model, tokens, targets, compute).item() for compute in (bf16, subject.fp32)]
    agree = abs(losses[0] - losses[1]) <= BF16_TOLERANCE
    reason = f"loss {losses[0]:.4f} in bf16, {losses[1]:.4f} in fp32"
    return CheckResult(
        "bf16", "pass" if agree else "fail", reason if agree else f"{reason}: differ by more than {BF16_TOLERANCE}"
    )


def compiled_agreement(subject: CheckedModel) -> CheckResult:
    """Check that torch.compile changes neither the loss nor the gradients."""
    model = subject.model

    def loss_and_norm(transformer: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        tokens, targets = (x.to(subject.compute.device) for x in subject.few_tokens())
        hidden = transformer(tokens).flatten(0, 1)
        loss = linear_cross_entropy(
            hidden,
            model.head,
            targets.flatten(),
            model.config.vocab_size,
            torch.float32,
            cap=model.config.softcap,
        )
        gradients = loss_gradients(model, loss).values()
        return loss.item(), math.sqrt(sum(g.norm().item() ** 2 for g in gradients))

    loss, norm = loss_and_norm(model.transformer.forward)
    try:
        compiled_loss, compiled_norm = loss_and_norm(torch.compile(model.transformer))
    except torch._dynamo.exc.TorchDynamoException as e:
        reason = one_line(e)
        return CheckResult(
            "compiled", "skip", f"torch.compile fails on this machine ({reason:.120}); train with --compile off"
        )
    reason = f"loss {compiled_loss:.4f}, gradient norm {compiled_norm:.3f}; eager {loss:.4f}, {norm:.3f}"
    agree = abs(compiled_loss - loss) <= LOSS_TOLERANCE and abs(compiled_norm - norm) <= 0.01 * norm
    return CheckResult("compiled", "pass" if agree else "fail", reason)


def nan_gradients(subject: CheckedModel) -> CheckResult:
    """Check that NaN gradients change neither weights nor optimizer state, with every optimizer."""
    device, dtype = subject.compute.device, subject.compute.dtype
    for name in get_args(Optimizer):
        config = OptimConfig(optimizer=name)
        changed = changed_by_nan(lambda model, config=config: build_optimizer(model, config, dtype), device)  # type: ignore[misc]
        if changed:
            return CheckResult("NaN gradients", "fail", f"optimizer {name} changes {changed[0]}")
    return CheckResult("NaN gradients", "pass", f"weights and state unchanged ({', '.join(get_args(Optimizer))})")


def memorises_batch(subject: CheckedModel) -> CheckResult:
    """Check that the model memorises one short sequence. This check changes the weights, so it is the last one."""
    name, model = "overfit batch", subject.model
    more = state_bytes(model.config, OptimConfig()) - FP32 * padded_parameters(model.config)  # without the weights
    free = available_bytes(subject.compute.device)
    if free is not None and more > free:
        return CheckResult(name, "skip", f"needs {gigabytes(more)} of memory, {gigabytes(free)} available")
    # AdamW trains narrow models fastest at higher learning rates: 6e-4 at GPT-2's 768
    lr = min(0.02, 0.46 / model.config.n_embd)
    optimizer = build_optimizer(model, OptimConfig(lr=lr, weight_decay=0.0))
    # a single sequence, because two may have equal starts and different continuations
    tokens, targets = (x[:1] for x in subject.few_tokens())
    first = loss = math.nan
    for step in range(OVERFIT_STEPS + 1):
        batch = batch_loss(model, tokens, targets, subject.compute)
        loss = batch.item()
        first = loss if step == 0 else first
        if not loss > OVERFIT_LOSS or step == OVERFIT_STEPS or not batch.requires_grad:
            break
        batch.backward()
        clip = torch.clamp(gradient_norm(model), min=1.0)
        optimizer.update(min(1.0, (step + 1) / OVERFIT_WARMUP_STEPS), clip, torch.isnan(clip))
    passed = loss <= OVERFIT_LOSS
    reason = f"{tokens.numel()} tokens: loss {first:.2f} → {loss:.2f} in {step} steps"
    return CheckResult(name, "pass" if passed else "fail", reason if passed else f"{reason}, expected {OVERFIT_LOSS}")


SLOW: tuple[Callable[[CheckedModel], CheckResult], ...] = (
    initial_weights,
    activations,
    precision_agreement,
    compiled_agreement,
    nan_gradients,
    memorises_batch,
)
