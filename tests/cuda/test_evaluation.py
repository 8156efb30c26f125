"""Scores, validation loss and generated text equal those of the CPU; masked attention has finite, exact gradients."""

from __future__ import annotations

import copy
import functools
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from restomod.checks import device_parity
from restomod.checks.model_quick import loss_gradients
from restomod.config.run import SamplingConfig
from restomod.data.dataset import TokenStream
from restomod.data.tokenizer import END_OF_TEXT
from restomod.engine.step import ComputeConfig, batch_loss
from restomod.evals.likelihood import Request as Question
from restomod.evals.likelihood import log_likelihoods
from restomod.evals.models import ScoredGPT
from restomod.evals.validation import validation_loss
from restomod.generate.decode import Prompt, generate
from restomod.model.attention import attention
from restomod.model.gpt import GPT
from tests.cuda.common import CPU, DEVICE, REAL, exact, random_text, relative_errors, small, worst

pytestmark = pytest.mark.cuda

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@pytest.mark.parametrize("family", ["gpt2-124m", "modern-124m", "speedrun-124m"])
def test_greedy_text_equals_that_of_the_cpu(family: str) -> None:
    """Prompts have unequal lengths. The longest one exceeds the context length within 40 tokens."""
    model = device_parity.random_model(small(family))
    requests = [Prompt([5, 6, 7], 0), Prompt([9] * 100, 0), Prompt([1], 0)]
    sampling = SamplingConfig(max_tokens=40, temperature=0)
    here = list(generate(model, requests, sampling, 0, stop=None))
    assert list(generate(model.to(DEVICE), requests, sampling, 0, stop=None)) == here
    assert len({token for step in here for token in step.values()}) >= 10  # not a repetition of one token


def test_time_of_decoding() -> None:
    """Also prints the time of attention with cuDNN, which builds a plan for every number of keys, and without it."""
    model = device_parity.random_model(small("modern-124m")).to(DEVICE)
    for attempt in (1, 2):
        start = time.perf_counter()
        made = list(generate(model, [Prompt([5] * 7, 0)], SamplingConfig(max_tokens=60), 0, torch.bfloat16, stop=None))
        print(f"\n60 tokens in bf16, attempt {attempt}: {time.perf_counter() - start:.2f} s")
        assert len(made) == 60
    q = torch.randn(1, 12, 1, 64, device=DEVICE, dtype=torch.bfloat16)
    keys = torch.randn(1, 12, 100, 64, device=DEVICE, dtype=torch.bfloat16)
    if REAL:
        print("torch's choice:", SDPBackend(torch._fused_sdp_choice(q, keys, keys)))
    for name, backends in (("without cuDNN", WITHOUT_CUDNN), ("with cuDNN alone", [SDPBackend.CUDNN_ATTENTION])):
        start = time.perf_counter()
        try:
            with sdpa_kernel(backends):
                for length in range(40, 100):
                    F.scaled_dot_product_attention(q, keys[:, :, :length], keys[:, :, :length])
        except RuntimeError as e:  # this backend does not support the inputs
            print(f"attention {name}: {str(e).splitlines()[0]}")
            continue
        if REAL:
            torch.cuda.synchronize()
        print(f"attention {name}: {1000 * (time.perf_counter() - start) / 60:.2f} ms per new length")


@pytest.mark.parametrize("family", ["gpt2-124m", "speedrun-124m"])
def test_scores_equal_those_of_the_cpu(family: str) -> None:
    """Several continuations share a context through a mask. Lengths are close to multiples of 64."""
    model = device_parity.random_model(small(family, vocab_size=50257))
    questions = [Question(tuple(range(1, 2 + n)), (7 + k, 8, 9)) for n in (1, 5, 50, 63, 70) for k in range(4)]
    here = [score.log_likelihood for score in log_likelihoods(ScoredGPT(model), questions)]
    model.to(DEVICE)
    for dtype, tolerance in ((torch.float32, 2e-3), (torch.bfloat16, 0.2)):
        there = [score.log_likelihood for score in log_likelihoods(ScoredGPT(model, dtype), questions)]
        off = float(np.abs(np.array(there) - np.array(here)).max())
        print(f"\n{family} {dtype}: log-likelihoods: error {off:.1e} nats, maximum {np.abs(here).max():.1f}")
        assert off < tolerance


def test_validation_loss_equals_that_of_the_cpu() -> None:
    model = device_parity.random_model(small("gpt2-124m"))
    tokens = np.random.default_rng(0).integers(1009, size=40 * 128 + 70).astype(np.uint16)  # the last window is short
    stream = TokenStream([tokens])
    here = validation_loss(model, stream, 128, CPU, torch.float32)
    there = validation_loss(model.to(DEVICE), stream, 128, DEVICE, torch.float32)
    assert there.tokens == here.tokens == len(tokens) - 1
    assert there.loss == pytest.approx(here.loss, rel=1e-6)
    assert there.by_position == pytest.approx(here.by_position, rel=1e-5)


def masked_inputs(T: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return bf16 queries, keys and values, (1, 1, T, 64), and a causal mask, (1, 1, T, T).

    Scores are close to -120, so that the logsumexp of each row is below -88.7.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, T, 64, generator=generator) for _ in range(3))
    q, k = q * 0.1, k * 0.1
    q[..., 0], k[..., 0] = 1.0, -120 * 8.0
    mask = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    q, k, v = (x.to(DEVICE, torch.bfloat16) for x in (q, k, v))
    return q, k, v, mask.to(DEVICE)


@pytest.mark.parametrize("T", [64, 192, 704, 1024])
def test_masked_attention_has_finite_gradients(T: int) -> None:
    """CuDNN must not be used for masked training.

    Its backward pass returns NaN if T % 128 is 64 and scores are very negative (pytorch issue 196678).
    """
    q, k, v, mask = masked_inputs(T)
    if REAL:
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        try:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                F.scaled_dot_product_attention(*inputs, attn_mask=mask).float().sum().backward()
            print(
                f"\nT {T}: cuDNN's gradients finite:",
                [bool(x.grad.isfinite().all()) for x in inputs if x.grad is not None],
            )
        except RuntimeError as e:
            print(f"\nT {T}: cuDNN: {str(e).splitlines()[0]}")
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    attention(*inputs, causal=False, mask=mask).float().sum().backward()
    found = [x.grad for x in inputs]
    assert all(g is not None and bool(g.isfinite().all()) for g in found)

    exact_inputs = [x.cpu().double().requires_grad_() for x in (q, k, v)]
    scores = (exact_inputs[0] @ exact_inputs[1].mT / 8).masked_fill(~mask.cpu(), float("-inf"))
    (torch.softmax(scores, -1) @ exact_inputs[2]).sum().backward()
    # gradients of queries are not compared, because of cancellation by the large number in the keys
    assert worst(relative_errors({"v": found[2]}, {"v": exact_inputs[2].grad}))[1] < 0.02  # type: ignore[dict-item]


@functools.cache
def masked_case(family: str) -> tuple[GPT, Tensor, Tensor, float, dict[str, Tensor]]:
    """Return a CPU model, tokens and targets (2, 192) of several documents, and their exact loss and gradients."""
    model = device_parity.random_model(small(family, n_positions=192, vocab_size=50257))
    tokens, targets = random_text(model.config, 2, 192)
    tokens[:, ::17] = END_OF_TEXT
    return model, tokens, targets, *exact(model, tokens, targets, by_document=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gpt2-124m", "modern-124m"])
def test_training_with_a_document_mask_against_fp64(family: str, dtype: torch.dtype) -> None:
    model, tokens, targets, exact_loss, expected = masked_case(family)
    tolerance = 2 * device_parity.GRADIENT_TOLERANCE[dtype]
    errors = {}
    for mask in (True, False):
        there = copy.deepcopy(model).to(DEVICE)
        loss = batch_loss(there, tokens, targets, ComputeConfig(DEVICE, dtype, 2, document_mask=mask))
        errors[mask] = relative_errors(loss_gradients(there, loss), expected)
        off = abs(loss.item() / exact_loss - 1)
        print(f"\n{family} {dtype}, mask {mask}: loss off by {off:.1e}, worst gradient {worst(errors[mask])}")
        assert off < device_parity.LOSS_TOLERANCE[dtype] or not mask
    assert worst(errors[True])[1] < tolerance
    assert worst(errors[False])[1] > 2 * tolerance  # otherwise a missing mask would not be detected
