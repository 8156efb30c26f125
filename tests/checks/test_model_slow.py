"""`restomod check` finds faults, and passes correct models; only its last check changes the weights."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import restomod
from restomod.checks import model_slow as check_module
from restomod.checks.model_quick import QUICK, CheckedModel
from restomod.checks.model_slow import (
    SLOW,
    activations,
    check,
    compiled_agreement,
    initial_weights,
    memorises_batch,
    precision_agreement,
    residual_stds,
    source_tokens,
)
from restomod.cli import main
from restomod.config.presets import PRESETS
from restomod.config.run import ModelConfig, RunConfig
from restomod.data.tokenizer import gpt2_tokenizer
from restomod.engine.optimizer import build_optimizer
from restomod.engine.step import ComputeConfig
from restomod.model.flops import padded_parameters
from restomod.model.gpt import build_model
from restomod.model.hf_io import save_model
from restomod.utils.console import CheckResult, CheckStatus
from tests.checks.faults import QUICK_FAULTS, SLOW_FAULTS
from tests.models import CPU, to_transformers
from tests.trainee import assert_leaves_no_trace, make_subject, state_of

NAMES = [
    *("initial loss", "targets", "causality", "gradients", "tied lm_head", "kernel shapes"),
    *("initial weights", "activations", "bf16", "compiled", "NaN gradients", "overfit batch"),
]
WIDE = ModelConfig(n_layer=2, n_head=2, n_embd=96, n_positions=32, vocab_size=97)
cached_source = functools.cache(source_tokens)


@pytest.fixture(autouse=True)
def same_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizes the source code of the package once for all tests."""
    monkeypatch.setattr(check_module, "source_tokens", cached_source)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces torch.compile by eager mode."""
    monkeypatch.setattr("torch.compile", lambda module: module.forward)


Checked = Callable[..., dict[str, CheckResult]]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch, uncompiled: None) -> Checked:
    """Checks a preset of a given model, without compilation and with fewer tokens."""
    monkeypatch.setattr("restomod.checks.model_quick.INITIAL_LOSS_TOKENS", 512)

    def run(model: ModelConfig, seed: int = 1) -> dict[str, CheckResult]:
        T = model.n_positions
        monkeypatch.setitem(PRESETS, "mine", lambda: RunConfig(1, T, T, model))
        verdicts = list(check("mine", seed, "cpu", "fp32"))
        assert [v.check for v in verdicts] == NAMES
        return {v.check: v for v in verdicts}

    return run


def failures(verdicts: dict[str, CheckResult]) -> dict[str, str]:
    return {name: v.reason for name, v in verdicts.items() if v.status == "fail"}


# --- sound models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_a_sound_model_passes_all_checks_with_any_seed(seed: int, checked: Checked) -> None:
    model = ModelConfig(n_layer=2, n_head=2, n_embd=64, n_positions=64, vocab_size=499)
    assert {v.status for v in checked(model, seed).values()} == {"pass"}


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(2, 2, 32, 64),  # GPT-2's vocabulary
        ModelConfig(2, 2, 32, 16, 97),
        ModelConfig(1, 1, 8, 1, 97),
        ModelConfig(1, 1, 8, 2, 97),
        ModelConfig(2, 4, 20, 5, 211),
        ModelConfig(2, 3, 48, 33, 1000),
        ModelConfig(1, 1, 32, 16, 2),
        ModelConfig(2, 2, 32, 1500, 499),
        ModelConfig(12, 4, 128, 64, 499),
    ],
    ids=str,
)
def test_a_sound_model_of_an_odd_shape_does_not_fail(model: ModelConfig, checked: Checked) -> None:
    verdicts = checked(model)
    assert failures(verdicts) == {}
    slow = model.n_embd % 64 or model.n_positions % 64
    assert {name for name, v in verdicts.items() if v.status == "warn"} == ({"kernel shapes"} if slow else set())
    assert {name for name, v in verdicts.items() if v.status == "skip"} == (
        {"causality"} if model.n_positions == 1 else set()
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", [ModelConfig(2), ModelConfig(1, 12, 768, 64), ModelConfig(2, 6, 384)], ids=str)
def test_layers_of_real_width_pass_everything(model: ModelConfig, checked: Checked) -> None:
    assert {v.status for v in checked(model).values()} == {"pass"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "gpt2-124m"])
def test_the_presets_pass_everything(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    assert main(["check", name, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == ["pass"] * len(NAMES)
    assert lines[-1] == f"{name}: 12 passed"


def test_initial_weights_are_not_checked_in_a_saved_model(tmp_path: Path, uncompiled: None) -> None:
    model = build_model(WIDE, 1, CPU)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[:100] = -10.0  # dead units are common in trained models
    (tmp_path / "model").mkdir()
    save_model(model, tmp_path / "model")
    verdicts = {v.check: v for v in check(str(tmp_path / "model"), 1, "cpu", "fp32")}
    assert list(verdicts) == ["loss", *NAMES[1:]]
    assert failures(verdicts) == {}
    assert verdicts["initial weights"].status == "skip"
    assert f"; dead MLP units: {100 / (8 * 96):.1%}" in verdicts["activations"].reason


def test_nan_weights_fail_all_checks_that_use_them(monkeypatch: pytest.MonkeyPatch, uncompiled: None) -> None:
    model = build_model(WIDE, 1, CPU)
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[3, 3] = math.nan
    monkeypatch.setitem(PRESETS, "mine", lambda: RunConfig(1, 32, 32, WIDE))
    monkeypatch.setattr("restomod.runs.open_model.build_model", lambda *_: model.eval())
    failed = {v.check for v in check("mine", 1, "cpu", "fp32") if v.status == "fail"}
    expected = {"targets", "causality", "gradients", "activations", "bf16", "compiled", "overfit batch"}
    assert failed == expected | {"initial loss", "initial weights"}


def test_results_are_yielded_immediately(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    checked(WIDE)
    later: list[CheckedModel] = []
    monkeypatch.setattr(check_module, "SLOW", (later.append,))
    verdicts = check("mine", 1, "cpu", "fp32")
    assert [next(verdicts).check for _ in QUICK] == NAMES[: len(QUICK)]
    assert later == []


# --- planted faults -------------------------------------------------------------------------------------------


FOUND_BY_ONE_CHECK = {
    "a mask that hides nothing",
    "a head with its own weights",
    "a loader with targets 2 ahead",
    "a loss of targets 2 ahead",
    "a frozen matrix",
    "no residual scaling",
    "a residual stream that explodes",
    "another loss in bf16",
    "a compiler's other loss",
    "an optimizer that applies NaN",
    "an optimizer without updates",
}


@pytest.mark.parametrize("fault", [*QUICK_FAULTS, *SLOW_FAULTS])
def test_a_planted_fault_is_found(fault: str, checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, name, said = {**QUICK_FAULTS, **SLOW_FAULTS}[fault]
    plant(monkeypatch)
    monkeypatch.setattr(check_module, "OVERFIT_STEPS", 40)  # the sound model takes 20
    failed = failures(checked(WIDE))
    assert said in failed.get(name, "passed")
    if fault in FOUND_BY_ONE_CHECK:
        assert len(failed) == 1


# --- side effects ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", SLOW[:-1])
@pytest.mark.parametrize("training", [True, False])
def test_a_check_does_not_change_the_model(
    one: Callable[[CheckedModel], CheckResult], training: bool, uncompiled: None
) -> None:
    assert_leaves_no_trace(one, training)


def test_only_the_last_check_changes_the_weights() -> None:
    assert SLOW[-1] is memorises_batch
    subject = make_subject()
    before = state_of(subject.model)
    memorises_batch(subject)
    assert state_of(subject.model) != before


def test_hooks_are_removed_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = make_subject()
    before = state_of(subject.model)
    monkeypatch.setattr(F, "gelu", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        activations(subject)
    assert state_of(subject.model) == before


# --- the text -------------------------------------------------------------------------------------------------


def test_the_text_is_this_packages_source() -> None:
    files = sorted(Path(restomod.__file__).parent.rglob("*.py"))
    text = source_tokens(50257)
    assert len(files) > 20
    assert gpt2_tokenizer().decode(text.read(0, len(text)).tolist()) == "".join(
        f.read_text() for f in files if f.stat().st_size
    )


@pytest.mark.parametrize("V", [1, 97, 50256, 65_536, 70_000])
def test_the_text_fits_any_vocabulary(V: int) -> None:
    own, gpt2 = source_tokens(V), source_tokens(50257)
    assert np.array_equal(own.read(0, 5000), gpt2.read(0, 5000).astype(np.int64) % V)


@pytest.mark.parametrize(("n_positions", "T"), [(33, 33), (1024, 1024), (1025, 1024)])
def test_windows_are_as_long_as_the_model_allows_up_to_1024(
    n_positions: int, T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[CheckedModel] = []
    monkeypatch.setattr(check_module, "QUICK", (lambda subject: seen.append(subject),))
    monkeypatch.setitem(PRESETS, "mine", lambda: RunConfig(1, T, T, dataclasses.replace(WIDE, n_positions=n_positions)))
    next(check("mine", 7, "cpu", "bf16"))
    assert (seen[0].batches.T, seen[0].compute, seen[0].fresh) == (T, ComputeConfig(CPU, torch.bfloat16, 1), True)
    expected = build_model(dataclasses.replace(WIDE, n_positions=n_positions), 7, CPU)
    groups, theirs = (o.param_groups for o in (seen[0].optimizer, build_optimizer(expected, RunConfig(1, T, T).optim)))
    assert [len(group["params"]) for group in groups] == [len(group["params"]) for group in theirs]
    assert torch.equal(seen[0].model.transformer.wpe.weight, expected.transformer.wpe.weight)


# --- initial weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model", [ModelConfig(1, 1, 2, 1, 3), ModelConfig(2, 2, 8, 4, 17), WIDE, ModelConfig(6, 4, 64, 64, 997)]
)
def test_the_initialisation_is_within_chance(model: ModelConfig) -> None:
    for seed in range(30):
        subject = make_subject(model=model, seed=seed, sequence_length=1, text=np.zeros(9))
        assert initial_weights(subject).status == "pass", seed


@pytest.mark.parametrize(
    ("name", "by", "said"),
    [
        ("h.0.attn.c_attn.weight", 1.06, "transformer.h.0.attn.c_attn.weight has std 0.021"),
        ("h.1.mlp.c_proj.weight", 0.94, "transformer.h.1.mlp.c_proj.weight has std 0.009"),
        ("wpe.weight", 1.2, "transformer.wpe.weight has std 0.02"),
        ("ln_f.weight", 1.001, "transformer.ln_f.weight is not all 1"),
    ],
)
def test_a_tensor_slightly_off_is_named(name: str, by: float, said: str) -> None:
    subject = make_subject(model=WIDE)
    subject.model.transformer.get_parameter(name).data *= by
    verdict = initial_weights(subject)
    assert verdict.status == "fail"
    assert verdict.reason.startswith(said)
    assert "more" not in verdict.reason
    subject.model.transformer.ln_f.bias.data += 1
    assert initial_weights(subject).reason.endswith(" and 1 more")


def test_a_mean_slightly_off_is_named() -> None:
    subject = make_subject(model=WIDE)
    weight = subject.model.transformer.h[0].mlp.c_fc.weight
    weight.data += 0.002 - weight.mean()
    assert initial_weights(subject).reason == "transformer.h.0.mlp.c_fc.weight has mean 0.0020, expected 0"
    weight.data -= 0.004
    assert initial_weights(subject).reason == "transformer.h.0.mlp.c_fc.weight has mean -0.0020, expected 0"


def test_rows_that_pad_the_vocabulary_do_not_count() -> None:
    """A quarter of the 128 rows are 0."""
    subject = make_subject(model=WIDE)
    assert initial_weights(subject).status == "pass"
    assert initial_weights(subject).reason.startswith("std 0.02; 0.02 / √4 = 0.0100 for")


# --- activations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_residual_streams_std_is_that_of_transformers(scale: float) -> None:
    model = ModelConfig(n_layer=3, n_head=2, n_embd=96, n_positions=16, vocab_size=97)
    subject = make_subject(model=model)
    ours, _ = residual_stds(subject, scale)
    with torch.no_grad():
        for block in subject.model.transformer.h:
            block.attn.c_proj.weight *= scale
            block.mlp.c_proj.weight *= scale
    seen: list[Tensor] = []
    theirs = to_transformers(subject.model).transformer
    theirs.h[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for block in theirs.h:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        theirs(subject.few_tokens()[0])
    hidden = [x[0] if isinstance(x, tuple) else x for x in seen]
    assert len(ours) == 4
    assert ours == pytest.approx([x.std().item() for x in hidden], rel=1e-4)


def test_activations_report_the_std_without_residual_scaling() -> None:
    subject = make_subject(model=WIDE)
    stds = residual_stds(subject)[0]
    unscaled = residual_stds(subject, 2.0)[0]  # two layers: 1/√4
    reason = activations(subject).reason
    assert f": {stds[0]:.2g} {stds[1]:.2g} {stds[2]:.2g}; " in reason
    assert reason.endswith(f"; {unscaled[-1]:.2g} without 1/√4 scaling")
    assert unscaled[-1] > stds[-1]


@pytest.mark.parametrize(("n_layer", "shown"), [(1, 2), (6, 7), (11, 7), (12, 7), (13, 8), (24, 7), (36, 7), (48, 7)])
def test_some_layers_of_a_deep_model_are_shown_with_the_last(
    n_layer: int, shown: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stds = [0.1 + i / 1000 for i in range(n_layer + 1)]
    monkeypatch.setattr(check_module, "residual_stds", lambda *_, **__: (stds, 0.0))
    path = activations(make_subject()).reason.split(": ")[1].split(";")[0].split()
    assert len(path) == shown
    assert (path[0], path[-1]) == ("0.1", f"{stds[-1]:.2g}")


@pytest.mark.parametrize(
    ("stds", "dead", "fresh", "status", "said"),
    [
        ([0.03, 9.9], 0.0, True, "pass", "0.03 9.9"),
        ([0.03, 10.1], 0.0, True, "fail", "exploding: "),
        ([10.1, 0.03], 0.0, True, "fail", "exploding: "),
        ([0.0011, 0.03], 0.0, True, "pass", "0.0011 0.03"),
        ([0.03, 0.0009], 0.0, True, "fail", "dead: "),
        ([0.0009, 0.03], 0.0, True, "fail", "dead: "),
        ([0.03, 0.03], 0.009, True, "pass", "0.03 0.03"),
        ([0.03, 0.03], 0.011, True, "fail", "dead MLP units: 1.1%"),
        ([0.03, math.nan], 0.0, True, "fail", "not finite"),
        ([0.03, math.inf], 0.0, False, "fail", "not finite"),
        ([0.03, 500.0], 0.5, False, "pass", "dead MLP units: 50.0%"),
        ([0.03, 1e-7], 0.0, False, "fail", "0.03 1e-07"),
    ],
)
def test_activations_that_explode_or_die_fail(
    stds: list[float], dead: float, fresh: bool, status: CheckStatus, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_module, "residual_stds", lambda *_, **__: (stds, dead))
    verdict = activations(make_subject(fresh=fresh))
    assert verdict.status == status
    assert said in verdict.reason


def test_dead_units_are_counted_one_by_one() -> None:
    subject = make_subject(model=WIDE)
    assert residual_stds(subject)[1] == 0.0
    with torch.no_grad():
        subject.model.transformer.h[0].mlp.c_fc.bias[:7] = -20.0
        subject.model.transformer.h[1].mlp.c_fc.bias[5] = -20.0
    assert residual_stds(subject)[1] == pytest.approx(8 / (2 * 4 * 96))


# --- precision and compilation --------------------------------------------------------------------------------


@pytest.mark.parametrize(("apart", "status"), [(0.049, "pass"), (-0.049, "pass"), (0.051, "fail"), (-0.051, "fail")])
def test_bf16_may_differ_by_rounding(apart: float, status: CheckStatus, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(model: object, tokens: Tensor, targets: Tensor, compute: ComputeConfig) -> Tensor:
        return torch.tensor(3.0 + (apart if compute.dtype == torch.bfloat16 else 0.0))

    monkeypatch.setattr(check_module, "batch_loss", loss)
    verdict = precision_agreement(make_subject(dtype=torch.bfloat16))
    assert verdict.status == status
    assert verdict.reason.startswith(f"loss {3 + apart:.4f} in bf16, 3.0000 in fp32")


def test_a_compiled_model_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces and differentiates the model, but generates no code, which would take a minute."""
    torch._dynamo.reset()
    compiled, compile_ = [], torch.compile

    def recording(module: torch.nn.Module) -> torch.nn.Module:
        compiled.append(module)
        return compile_(module, backend="aot_eager")

    monkeypatch.setattr("torch.compile", recording)
    subject = make_subject()
    before = state_of(subject.model)
    verdict = compiled_agreement(subject)
    assert verdict.status == "pass", verdict.reason
    assert compiled == [subject.model.transformer]
    assert state_of(subject.model) == before
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("loss_by", "gradient_by", "status"),
    [
        (5e-5, 1.0, "pass"),
        (5e-4, 1.0, "fail"),
        (-5e-4, 1.0, "fail"),
        (0, 1.009, "pass"),
        (0, 1.02, "fail"),
        (0, 0.98, "fail"),
    ],
)
def test_a_compiled_model_may_differ_by_rounding(
    loss_by: float, gradient_by: float, status: CheckStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    cross_entropy, calls = check_module.linear_cross_entropy, []

    def loss(hidden: Tensor, *rest: Any, **how: Any) -> Tensor:
        calls.append(1)
        right = cross_entropy(hidden, *rest, **how)
        if len(calls) == 1:
            return right
        return right * gradient_by + (right * (1 - gradient_by) + loss_by).detach()

    monkeypatch.setattr("torch.compile", lambda module: module.forward)
    monkeypatch.setattr(check_module, "linear_cross_entropy", loss)
    assert compiled_agreement(make_subject()).status == status


def test_the_compiled_check_is_skipped_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(module: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        def fail(tokens: Tensor) -> Tensor:
            raise torch._dynamo.exc.TorchDynamoException("\n  InvalidCxxCompiler: no C++ compiler\n\nmore")

        return fail

    monkeypatch.setattr("torch.compile", compile_)
    verdict = compiled_agreement(make_subject())
    assert verdict.status == "skip"
    assert "fails on this machine (InvalidCxxCompiler: no C++ compiler)" in verdict.reason
    assert "\n" not in verdict.reason


# --- overfit batch --------------------------------------------------------------------------------------------


def steps(verdict: CheckResult) -> int:
    return int(verdict.reason.split(" in ")[1].split()[0])


def test_overfitting_stops_when_the_sequence_is_memorised() -> None:
    subject = make_subject()
    verdict = memorises_batch(subject)
    assert verdict.status == "pass"
    assert 10 < steps(verdict) < 60
    tokens, targets = (x[:1] for x in subject.few_tokens())
    logits = subject.model(tokens)
    assert F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item() <= 0.05
    assert logits.argmax(-1).equal(targets)


@pytest.mark.parametrize(("T", "n"), [(50, 50), (90, 64)])
def test_overfitting_takes_up_to_64_tokens_in_any_precision(T: int, n: int) -> None:
    model = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=T, vocab_size=97)
    subject = make_subject(model=model, sequence_length=T, batch_tokens=T, dtype=torch.bfloat16)
    verdict = memorises_batch(subject)
    assert verdict.reason.startswith(f"{n} tokens: loss 4.")
    assert verdict.status == "pass"


def test_windows_with_equal_starts_and_different_continuations_pass() -> None:
    """With two targets for one token, the minimum loss is ln(2)."""
    text = np.array([7, 1, 5, 7, 2])
    model = ModelConfig(n_layer=1, n_head=1, n_embd=8, n_positions=1, vocab_size=97)
    subject = make_subject(model=model, sequence_length=1, batch_tokens=1, text=text)
    assert [x.tolist() for x in subject.few_tokens()] == [[[7], [7]], [[1], [2]]]
    assert memorises_batch(subject).status == "pass"


def test_a_deep_and_narrow_model_passes() -> None:
    model = ModelConfig(n_layer=24, n_head=2, n_embd=64, n_positions=64, vocab_size=97)
    verdict = memorises_batch(make_subject(model=model, sequence_length=64, batch_tokens=64))
    assert verdict.status == "pass"
    assert steps(verdict) < 70


@pytest.mark.parametrize(
    ("free", "status"), [(9_000_000_000, "pass"), (8_999_999_999, "skip"), (8_000_000_000, "skip"), (None, "pass")]
)
def test_the_check_is_skipped_without_enough_memory(
    free: int | None, status: CheckStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = make_subject()
    weights = 4 * padded_parameters(subject.model.config)  # already in memory
    monkeypatch.setattr(check_module, "state_bytes", lambda config, optim: 9 * 10**9 + weights)
    monkeypatch.setattr(check_module, "available_bytes", lambda device: free)
    before = state_of(subject.model)
    verdict = memorises_batch(subject)
    assert verdict.status == status
    assert (state_of(subject.model) == before) == (status == "skip")
    assert ("needs 9.00 GB of memory" in verdict.reason) == (status == "skip")
