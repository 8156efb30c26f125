"""Shared rows compared with one row per continuation in `transformers`, for any batch, order and number of ranks."""

from __future__ import annotations

import math
import random
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from restomod.checks.device_parity import random_model
from restomod.config.run import ModelConfig
from restomod.data.tokenizer import gpt2_tokenizer
from restomod.engine.distributed import join_processes
from restomod.engine.loss import linear_cross_entropy, log_probs_of
from restomod.evals.likelihood import Request, Score, encode_pair, gpt_log_probs, log_likelihoods
from restomod.evals.models import ScoredGPT
from restomod.model.gpt import GPT, build_model
from restomod.utils.errors import UserError
from tests.evals.plainly import SMALL, harness_split, plain_score
from tests.models import CPU, to_transformers
from tests.processes import results


def scored() -> ScoredGPT:
    return ScoredGPT(random_model(SMALL))


@pytest.fixture(scope="module")
def model() -> ScoredGPT:
    return scored()


@pytest.fixture(scope="module")
def theirs(model: ScoredGPT) -> Any:
    return to_transformers(model.model)


def some_requests(n: int = 60, seed: int = 0) -> list[Request]:
    """Return requests: contexts of 1 to 20 tokens, 1 to 5 continuations of 1 to 12 tokens, with repetitions."""
    chance = random.Random(seed)

    def tokens(longest: int) -> tuple[int, ...]:
        return tuple(chance.randrange(SMALL.vocab_size) for _ in range(chance.randint(1, longest)))

    contexts = [tokens(20) for _ in range(-(-n // 3))]
    requests = [Request(chance.choice(contexts), tokens(12)) for _ in range(n)]
    return [*requests, requests[0]]


def close(a: list[Score], b: list[Score]) -> bool:
    return [s.log_likelihood for s in a] == pytest.approx([s.log_likelihood for s in b], rel=1e-5, abs=1e-4)


def test_equals_a_row_for_every_continuation(model: ScoredGPT, theirs: Any) -> None:
    requests = some_requests()
    for request, score in zip(requests, log_likelihoods(model, requests), strict=True):
        expected, greedy = plain_score(theirs, request.context, request.continuation)
        assert score.log_likelihood == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert score.greedy == greedy
        assert (score.tokens, score.truncated) == (len(request.continuation), False)


@torch.no_grad()
def test_only_continuations_of_greedy_decoding_are_greedy(model: ScoredGPT, theirs: Any) -> None:
    context = (7, 8, 9)
    written = list(context)
    for _ in range(4):
        written.append(int(theirs(torch.tensor([written])).logits[0, -1].argmax()))
    end = tuple(written[3:])
    others = [end[:2], (*end[:3], (end[3] + 1) % SMALL.vocab_size), ((end[0] + 1) % SMALL.vocab_size, *end[1:])]
    scores = log_likelihoods(model, [Request(context, c) for c in [end, *others]])
    assert [score.greedy for score in scores] == [True, True, False, False]


@pytest.mark.parametrize("batch", [1, 8, 32, 1000])
def test_the_batch_changes_only_rounding(batch: int, model: ScoredGPT) -> None:
    requests = some_requests()
    default, other = log_likelihoods(model, requests), log_likelihoods(model, requests, batch)
    assert close(other, default)
    assert [s.greedy for s in other] == [s.greedy for s in default]


@pytest.mark.parametrize("batch", [None, 3])
def test_the_order_changes_no_bit(batch: int | None, model: ScoredGPT) -> None:
    requests = some_requests()
    order = random.Random(1).sample(range(len(requests)), len(requests))
    expected = log_likelihoods(model, requests, batch)
    assert log_likelihoods(model, [requests[i] for i in order], batch) == [expected[i] for i in order]


def shared_by_processes(n: int) -> list[Score]:
    with join_processes() as processes:
        return log_likelihoods(scored(), some_requests(n), 3, processes)


@pytest.mark.parametrize(("count", "n"), [(2, 60), (3, 60), (2, 1)])  # the last case has more ranks than rows
def test_the_number_of_processes_changes_no_bit(count: int, n: int, model: ScoredGPT) -> None:
    assert results(count, shared_by_processes, n) == [log_likelihoods(model, some_requests(n), 3)] * count


def test_each_context_goes_through_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = scored(), []
    forward = model.model.transformer.forward
    monkeypatch.setattr(
        model.model.transformer, "forward", lambda tokens, **k: seen.append(tokens) or forward(tokens, **k)
    )
    log_likelihoods(model, [Request((1, 2, 3, 4), (k, 5, 6)) for k in (7, 8, 9, 9)])
    (tokens,) = seen
    assert tokens.tolist() == [[1, 2, 3, 4, 7, 5, 8, 5, 9, 5]]  # the last token of a continuation is only a target


def test_only_positions_that_predict_go_through_the_head(model: ScoredGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "restomod.evals.models.gpt_log_probs",
        lambda model, hidden, which, targets, dtype: (
            asked.append(len(hidden)) or (torch.zeros(len(targets)), torch.ones(len(targets), dtype=torch.bool))
        ),
    )
    log_likelihoods(model, [Request((1, 2, 3, 4), (k, 5, 6)) for k in (7, 8, 9)])
    assert asked == [1 + 3 * 2]


def test_logits_in_several_chunks_are_the_same(model: ScoredGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = log_likelihoods(model, some_requests())
    monkeypatch.setattr("restomod.engine.loss.CHUNK_TOKENS", {"cpu": 5})
    monkeypatch.setattr("restomod.engine.loss.SOFTMAX_TOKENS", {"cpu": 2})
    assert close(log_likelihoods(model, some_requests()), expected)


def test_many_continuations_are_split_into_several_rows(model: ScoredGPT, theirs: Any) -> None:
    requests = [Request((1, 2, 3), (k, *range(k, k + 9))) for k in range(30)]  # 273 tokens in one row
    for request, score in zip(requests, log_likelihoods(model, requests), strict=True):
        assert score.log_likelihood == pytest.approx(
            plain_score(theirs, request.context, request.continuation)[0], 1e-5
        )


# --- 16 bits --------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@torch.no_grad()
def certain(scale: float, cap: float | None = None) -> tuple[GPT, torch.Tensor, torch.Tensor]:
    """Return a model, hidden states (40, D) and their most likely tokens; ``scale`` multiplies the logits."""
    config = ModelConfig(n_layer=1, n_head=2, n_embd=32, n_positions=48, vocab_size=97, softcap=cap)
    model = build_model(config, 1, CPU)
    model.head[97:] = 100.0  # padding, with the largest logits
    hidden = scale * torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    return model, hidden, (hidden @ model.head[:97].t()).argmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [None, 15.0])
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0, 1000.0])
def test_no_log_probability_is_above_0(
    scale: float, cap: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("restomod.engine.loss.CHUNK_TOKENS", {"cpu": 24})
    model, hidden, likeliest = certain(scale, cap)
    found, best = gpt_log_probs(model, hidden, torch.arange(40), likeliest, dtype)
    assert (found <= 0).all()
    logits = hidden.double() @ model.head[:97].double().t()
    exact = (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)[torch.arange(40), likeliest]
    rounding = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    size = min(logits.abs().max().item(), cap or math.inf)
    assert (found.double() - exact).abs().max() <= 2 * rounding * max(1.0, size)
    if dtype == torch.float32:
        assert best.all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_scoring_and_training_compute_one_cross_entropy(scale: float, dtype: torch.dtype) -> None:
    model, hidden, _ = certain(scale)
    targets = torch.arange(40)
    found, _ = gpt_log_probs(model, hidden, torch.arange(40), targets, dtype)
    loss = linear_cross_entropy(hidden, model.head, targets, 97, dtype)
    assert -found.double().mean().item() == pytest.approx(loss.item(), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_predicted_by_one_hidden_state_are_scored_independently(dtype: torch.dtype) -> None:
    model, hidden, _ = certain(100.0)
    which, targets = torch.tensor([3, 3, 0, 3, 0]), torch.tensor([5, 6, 7, 8, 9])
    found, best = gpt_log_probs(model, hidden[:4], which, targets, dtype)
    for i in range(5):
        alone, one = gpt_log_probs(model, hidden[which[i], None], torch.tensor([0]), targets[i, None], dtype)
        torch.testing.assert_close(found[i], alone[0], atol=1e-4, rtol=1e-5)
        assert best[i] == one[0]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probabilities_of_logits_are_those_of_torch(dtype: torch.dtype) -> None:
    _, hidden, _ = certain(1.0)
    logits = (20 * hidden).to(dtype)
    targets = torch.arange(40) % 32
    found, best = log_probs_of(lambda part: logits[part].clone(), targets)
    expected = logits.float().log_softmax(-1)[torch.arange(40), targets]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)
    assert (found <= 0).all()
    assert best.tolist() == (logits.argmax(-1) == targets).tolist()


# --- too long for the window --------------------------------------------------------------------------------


@pytest.mark.parametrize(("context", "continuation"), [(46, 3), (47, 3), (100, 3), (100, 48), (1, 48)])
def test_long_contexts_are_cut_as_in_the_harness(
    context: int, continuation: int, model: ScoredGPT, theirs: Any
) -> None:
    request = Request(tuple(range(100, 100 + context)), tuple(range(continuation)))
    window = (*request.context, *request.continuation)[
        -49:
    ]  # the input is (context + continuation)[-(max_length + 1):][:-1]
    (score,) = log_likelihoods(model, [request])
    assert score.log_likelihood == pytest.approx(
        plain_score(theirs, window[:-continuation], request.continuation)[0], rel=1e-5
    )
    assert score.truncated == (context + continuation > 49)


def test_endings_of_one_question_are_cut_independently(model: ScoredGPT, theirs: Any) -> None:
    context = tuple(range(100, 147))  # 47
    short, long = log_likelihoods(model, [Request(context, (1, 2)), Request(context, (1, 2, 3, 4))])
    assert (short.truncated, long.truncated) == (False, True)
    assert short.log_likelihood == pytest.approx(plain_score(theirs, context, (1, 2))[0], rel=1e-5)
    assert long.log_likelihood == pytest.approx(plain_score(theirs, context[2:], (1, 2, 3, 4))[0], rel=1e-5)


def test_a_continuation_longer_than_the_window_is_refused(model: ScoredGPT) -> None:
    with pytest.raises(UserError, match="a continuation of 49 tokens is longer than the model's context length of 48"):
        log_likelihoods(model, [Request((1,), tuple(range(49)))])


# --- text ----------------------------------------------------------------------------------------------------

TEXT = st.text(st.sampled_from("aA1 e.'s\n\té中 "), max_size=12)


@given(context=TEXT, continuation=TEXT.filter(bool))
def test_text_is_split_as_the_harness_splits_it(context: str, continuation: str) -> None:
    tokenizer = gpt2_tokenizer()
    before, after = harness_split(tokenizer, context, continuation)
    encode = lambda text: tokenizer.encode(text).tolist()  # noqa: E731
    if not after:  # the harness fails here with an assertion
        with pytest.raises(UserError, match="adds no token"):
            encode_pair(encode, 50256, context, continuation)
        return
    expected = (tuple(before) or (50256,), tuple(after))
    request = encode_pair(encode, 50256, context, continuation)
    assert (request.context, request.continuation) == expected


def test_an_empty_continuation_is_refused(model: ScoredGPT) -> None:
    with pytest.raises(UserError, match="a continuation is empty"):
        encode_pair(model.encode, model.prefix, "a", "")


def test_a_continuation_that_is_the_prefix_itself_is_the_context_of_the_rest() -> None:
    assert encode_pair(lambda text: [9, 1, 2], 9, "", "x") == Request((9,), (1, 2))


# --- harmless ------------------------------------------------------------------------------------------------


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("the compiled transformer was called")


@pytest.mark.parametrize("training", [True, False])
def test_scoring_does_not_change_the_model_or_compile_it(training: bool) -> None:
    gpt: GPT = random_model(SMALL).train(training)
    expected = log_likelihoods(ScoredGPT(random_model(SMALL)), some_requests())
    gpt.transformer._compiled_call_impl = refuse  # attribute that `compile()` sets
    before = {name: value.clone() for name, value in gpt.state_dict().items()}
    random_state = torch.get_rng_state()
    assert log_likelihoods(ScoredGPT(gpt), some_requests()) == expected
    assert all(torch.equal(value, gpt.state_dict()[name]) for name, value in before.items())
    assert all(module.training == training for module in gpt.modules())
    assert all(p.grad is None and p.requires_grad for p in gpt.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_bf16_matmuls_are_close(model: ScoredGPT) -> None:
    half = ScoredGPT(model.model, torch.bfloat16)
    exact, rounded = (log_likelihoods(m, some_requests()) for m in (model, half))
    for a, b in zip(exact, rounded, strict=True):
        assert b.log_likelihood == pytest.approx(a.log_likelihood, rel=0.02, abs=0.1)
