"""Quick checks find faults of a model, pass a correct one, and change nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from restomod.checks import model_quick
from restomod.checks.model_quick import (
    QUICK,
    CheckedModel,
    causality,
    gradients,
    initial_loss,
    kernel_shapes,
    loss_gradients,
    next_token_targets,
    quick_checks,
    tied_lm_head,
)
from restomod.config.run import ModelConfig
from restomod.engine.step import ComputeConfig, batch_loss
from restomod.utils.console import CheckResult, CheckStatus
from tests.checks.faults import QUICK_FAULTS
from tests.models import CPU, to_transformers
from tests.trainee import assert_identical, assert_leaves_no_trace, make_subject, make_trainee

LN_V = math.log(97)
WIDE = ModelConfig(n_layer=2, n_head=2, n_embd=96, n_positions=16, vocab_size=97)


def shape(n_embd: int = 32, n_head: int = 2, n_positions: int = 16, vocab_size: int = 97) -> ModelConfig:
    return ModelConfig(n_layer=2, n_head=n_head, n_embd=n_embd, n_positions=n_positions, vocab_size=vocab_size)


def statuses(verdicts: list[CheckResult]) -> dict[str, CheckStatus]:
    return {verdict.check: verdict.status for verdict in verdicts}


def found(subject: CheckedModel, name: str) -> CheckResult:
    (verdict,) = [verdict for verdict in quick_checks(subject) if verdict.check == name]
    return verdict


# --- a sound model and planted faults -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(10))
def test_a_sound_model_passes_everything(seed: int, dtype: torch.dtype) -> None:
    verdicts = quick_checks(make_subject(seed=seed, dtype=dtype, model=shape(64), sequence_length=16))
    assert statuses(verdicts) == {
        "initial loss": "pass",
        "targets": "pass",
        "causality": "pass",
        "gradients": "pass",
        "tied lm_head": "pass",
        "kernel shapes": "warn",  # micro-batches of 32 tokens
    }


@pytest.mark.parametrize("T", [1, 2, 13])
@pytest.mark.parametrize("model", [shape(), shape(8, 1), shape(30, 3), shape(vocab_size=2), shape(vocab_size=128)])
def test_a_sound_model_of_an_odd_shape_does_not_fail(model: ModelConfig, T: int) -> None:
    text = np.random.default_rng(0).integers(model.vocab_size, size=512)
    verdicts = quick_checks(make_subject(model=model, sequence_length=T, batch_tokens=8 * T, text=text))
    assert [v for v in verdicts if v.status == "fail"] == []
    assert statuses(verdicts)["causality"] == ("skip" if T == 1 else "pass")


def test_a_text_of_one_window_suffices() -> None:
    verdicts = quick_checks(make_subject(text=np.random.default_rng(0).integers(97, size=17)))
    assert {v.status for v in verdicts[:-1]} == {"pass"}


@pytest.mark.parametrize("fault", QUICK_FAULTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_fault_is_found(fault: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, check, said = QUICK_FAULTS[fault]
    plant(monkeypatch)
    verdict = found(make_subject(seed=seed, model=WIDE), check)
    assert verdict.status == "fail"
    assert said in verdict.reason


def test_nan_weights_fail_all_checks_that_use_them() -> None:
    for fresh in (True, False):
        subject = make_subject(fresh=fresh)
        with torch.no_grad():
            subject.model.transformer.h[0].mlp.c_fc.weight[0, 0] = math.nan
        failed = {v.check for v in quick_checks(subject) if v.status == "fail"}
        assert failed == {"initial loss" if fresh else "loss", "targets", "causality", "gradients"}


@pytest.mark.parametrize("check", QUICK)
@pytest.mark.parametrize("training", [True, False])
def test_a_check_does_not_change_the_model(check: Callable[[CheckedModel], CheckResult], training: bool) -> None:
    assert_leaves_no_trace(check, training)


# --- initial loss ---------------------------------------------------------------------------------------------


@pytest.fixture
def loss_is(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the loss of every batch."""
    return lambda loss: monkeypatch.setattr(
        model_quick, "batch_loss", lambda *_: torch.tensor(loss, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("off", "status"),
    [
        (0.0, "pass"),
        (-0.29, "pass"),
        (-0.31, "warn"),
        (0.3 + 48 * 0.02**2 - 0.01, "pass"),  # 96 wide: the variance of the logits is 96 * 0.02^2
        (0.3 + 48 * 0.02**2 + 0.01, "warn"),
        (-1.49, "warn"),
        (-1.51, "fail"),
        (1.49, "warn"),
        (1.51, "fail"),
        (400.0, "fail"),
        (math.inf, "fail"),
        (math.nan, "fail"),
    ],
)
def test_random_weights_have_a_loss_near_that_of_a_uniform_prediction(
    off: float, status: CheckStatus, loss_is: Callable[[float], None]
) -> None:
    loss_is(LN_V + off)
    verdict = initial_loss(make_subject(model=WIDE))
    assert (verdict.check, verdict.status) == ("initial loss", status)
    assert f"{LN_V + off:.2f}" in verdict.reason
    assert "ln(97) = 4.57" in verdict.reason
    assert ("may be repetitive" in verdict.reason) == (status == "warn")
    assert ("the initialisation is wrong" in verdict.reason) == (status == "fail")


@pytest.mark.parametrize(
    ("loss", "status", "said"),
    [
        (3.0, "pass", "3.00 on the data, below ln(97) = 4.57 of a uniform prediction"),
        (
            LN_V + 0.01,
            "warn",
            "4.58 on the data, not below ln(97) = 4.57 of a uniform prediction: the model may have another tokenizer",
        ),
        (math.nan, "fail", "nan on the data"),
        (math.inf, "fail", "inf on the data"),
    ],
)
def test_trained_weights_have_a_lower_loss(
    loss: float, status: CheckStatus, said: str, loss_is: Callable[[float], None]
) -> None:
    loss_is(loss)
    verdict = initial_loss(make_subject(fresh=False))
    assert (verdict.check, verdict.status) == ("loss", status)
    assert said in verdict.reason


def test_the_initial_loss_is_that_of_transformers_over_the_whole_text() -> None:
    text = np.random.default_rng(0).integers(97, size=16 * 7 + 1)  # 7 windows: the last micro-batch is shorter
    subject = make_subject(text=text)
    tokens = torch.from_numpy(text[:-1]).view(7, 16)
    logits = to_transformers(subject.model)(tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(text[1:])).item()
    assert initial_loss(subject).reason.startswith(f"{loss:.2f},")
    subject.model.transformer.wte.weight.data *= 30  # a loss whose digits differ from those of other texts
    logits = to_transformers(subject.model)(tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(text[1:])).item()
    assert initial_loss(subject).reason.startswith(f"{loss:.2f},")


def test_4096_tokens_from_all_parts_of_a_long_text_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = make_subject(text=np.random.default_rng(0).integers(97, size=16 * 1000 + 1))
    load, seen = subject.batches.load, []
    monkeypatch.setattr(subject.batches, "load", lambda windows: (seen.extend(windows), load(windows))[1])
    initial_loss(subject)
    assert len(seen) == len(set(seen)) == 4096 // 16
    assert seen[0] == 0
    assert max(np.diff(seen)) <= 4  # 1000 / 256
    assert 990 <= seen[-1] < 1000


def test_a_text_that_repeats_one_word_is_a_warning() -> None:
    """With a tied lm_head, the most likely next token is the token itself."""
    wide = dataclasses.replace(WIDE, n_embd=384)
    verdict = initial_loss(make_subject(text=np.full(200, 7), model=wide))
    assert verdict.status == "warn"
    assert "may be repetitive" in verdict.reason


# --- targets --------------------------------------------------------------------------------------------------


def test_padding_in_the_softmax_is_found_even_in_gpt2s_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """47 of 50,304 rows raise the loss by 0.0009."""
    plant, check, said = QUICK_FAULTS["a loss over the padding"]
    plant(monkeypatch)
    verdict = next_token_targets(make_subject(model=shape(vocab_size=50257)))
    assert (verdict.check, verdict.status) == (check, "fail")
    assert said in verdict.reason


def test_no_shift_is_claimed_without_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """In windows of one token, a target two tokens ahead is outside the window."""
    QUICK_FAULTS["a loader with targets 2 ahead"][0](monkeypatch)
    verdict = next_token_targets(make_subject(sequence_length=1, batch_tokens=8, text=np.arange(60)))
    assert verdict.reason == "the targets of the first window are wrong: they differ from the text"


def test_few_tokens_are_the_start_of_the_first_and_the_last_window() -> None:
    text = np.random.default_rng(0).integers(97, size=16 * 5 + 9)
    tokens, targets = make_subject(text=text).few_tokens()
    assert tokens.tolist() == [text[:16].tolist(), text[64:80].tolist()]
    assert targets.tolist() == [text[1:17].tolist(), text[65:81].tolist()]
    long = make_subject(model=shape(n_positions=100), sequence_length=100, batch_tokens=100).few_tokens()
    assert [x.shape for x in long] == [(2, 64), (2, 64)]


# --- gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("earlier", [None, 1e6])
def test_the_gradient_norm_is_that_of_transformers(earlier: float | None) -> None:
    subject = make_subject()
    tokens, targets = subject.few_tokens()
    theirs = to_transformers(subject.model)
    F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten()).backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), math.inf).item()
    for p in subject.model.parameters():
        p.grad = None if earlier is None else torch.full_like(p, earlier)
    verdict = gradients(subject)
    assert verdict.reason == f"all {len(list(theirs.parameters()))} tensors have one, norm {norm:.2f}"


def test_two_problems_are_named_and_more_are_counted() -> None:
    subject = make_subject()
    ln_f = subject.model.transformer.ln_f
    ln_f.weight.requires_grad_(False)
    ln_f.bias.requires_grad_(False)
    assert gradients(subject).reason == "transformer.ln_f.weight is frozen; transformer.ln_f.bias is frozen"
    subject.model.transformer.wpe.weight.requires_grad_(False)
    assert gradients(subject).reason.endswith("; transformer.ln_f.weight is frozen and 1 more")


def test_a_gradient_that_is_not_finite_is_named() -> None:
    subject = make_subject()
    subject.model.transformer.ln_f.bias.register_hook(lambda g: g * math.inf)
    assert gradients(subject).reason.startswith("transformer.ln_f.bias has gradient norm ")


def test_gradients_are_checked_in_the_precision_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ComputeConfig] = []
    monkeypatch.setattr(model_quick, "batch_loss", lambda *a: (seen.append(a[-1]), batch_loss(*a))[1])
    gradients(make_subject(dtype=torch.bfloat16))
    assert [compute.dtype for compute in seen] == [torch.bfloat16]


def test_only_the_check_of_gradients_computes_any() -> None:
    subject = make_subject()
    seen: set[str] = set()
    for check in QUICK:
        norm = subject.model.transformer.ln_f
        hook = norm.register_forward_hook(
            lambda *_, name=check.__name__: seen.add(name) if torch.is_grad_enabled() else None
        )
        check(subject)
        hook.remove()
    assert seen == {"gradients"}


def test_loss_gradients_are_those_of_backward() -> None:
    trainee = make_trainee()
    tokens, targets = trainee.batches.load(np.array([0, 3]))
    compute = ComputeConfig(CPU, torch.float32, 2)
    trainee.model.transformer.wpe.weight.requires_grad_(False)
    ours = loss_gradients(trainee.model, batch_loss(trainee.model, tokens, targets, compute))
    batch_loss(trainee.model, tokens, targets, compute).backward()
    theirs = {name: p.grad for name, p in trainee.model.named_parameters() if p.grad is not None}
    assert_identical(ours, theirs)
    assert "transformer.wpe.weight" not in ours
    assert loss_gradients(trainee.model, torch.tensor(1.0)) == {}


# --- the other checks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 100])
def test_causality_is_checked_in_the_middle(n: int) -> None:
    subject = make_subject(model=shape(n_positions=n), sequence_length=n, batch_tokens=n)
    of = min(n, 64)
    assert causality(subject).reason == f"changing token {of // 2} of {of} leaves earlier logits unchanged"


def test_a_leak_through_a_narrow_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """At width 8, attention changes a logit by less than a thousandth of the change by the token itself."""
    QUICK_FAULTS["a mask that is off by one"][0](monkeypatch)
    model = ModelConfig(n_layer=12, n_head=1, n_embd=8, n_positions=64, vocab_size=97)
    assert causality(make_subject(model=model, sequence_length=64, batch_tokens=64)).status == "fail"


def test_the_last_token_of_a_vocabulary_is_changed_into_the_first() -> None:
    assert causality(make_subject(model=shape(vocab_size=128), text=np.full(100, 127))).status == "pass"


def test_nan_logits_are_not_reported_as_not_causal() -> None:
    subject = make_subject()
    subject.model.transformer.ln_f.bias.data[0] = math.nan
    assert causality(subject).reason == "the logits are not finite"


def test_the_tied_head_saves_the_embeddings_parameters() -> None:
    expected = sum(p.numel() for p in to_transformers(make_subject().model).parameters())
    assert tied_lm_head(make_subject()).reason == f"saves {97 * 32:,} of {expected + 97 * 32:,} parameters"


@pytest.mark.parametrize(
    ("model", "T", "said"),
    [
        (shape(64), 32, "multiples of 64: width 64, 128 embedding rows; head size 32"),
        (shape(48), 32, "n_embd 48 is not a multiple of 64: "),
        (shape(64), 33, "tokens of a micro-batch 66 is not a multiple of 64: "),
        (shape(64, n_head=16), 32, "head size 4 is not a multiple of 8: "),
        (
            shape(20),
            16,
            "n_embd 20 is not a multiple of 64; tokens of a micro-batch 32 is not a multiple of 64; head size",
        ),
    ],
)
def test_slow_shapes_are_a_warning(model: ModelConfig, T: int, said: str) -> None:
    model = dataclasses.replace(model, n_positions=T)
    verdict = kernel_shapes(make_subject(model=model, sequence_length=T, batch_tokens=T))
    assert verdict.status == ("pass" if said.startswith("multiples") else "warn")
    assert verdict.reason.startswith(said)


def test_unpadded_embedding_rows_are_a_warning() -> None:
    subject = make_subject(model=shape(64), sequence_length=16)
    subject.model.transformer.wte = torch.nn.Embedding(97, 64)
    assert "embedding rows 97 is not a multiple of 64" in kernel_shapes(subject).reason
