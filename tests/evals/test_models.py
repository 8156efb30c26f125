"""Architectures of `transformers` in shared rows compared with one row per continuation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoTokenizer

from restomod.checks.device_parity import random_model
from restomod.config.run import ModelConfig
from restomod.evals.likelihood import log_likelihoods
from restomod.evals.models import ScoredGPT, ScoredTransformers, open_language_model
from restomod.model.hf_io import save_model
from restomod.utils.errors import UserError
from tests.evals.plainly import SMALL, plain_score
from tests.evals.test_likelihood import some_requests
from tests.models import CPU, to_transformers

WIDTH = {"vocab_size": 50257, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 48}
HEADS = WIDTH | {"num_attention_heads": 2, "intermediate_size": 64}
KEYS = HEADS | {"num_key_value_heads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt2")
    save_model(random_model(SMALL), path)
    return path


def of_kind(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))
    for parameter in model.parameters():  # with initial weights, the effect of a wrong mask is too small
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "settings", "shares"),
    [
        ("Llama", KEYS, True),
        ("Qwen3", KEYS | {"head_dim": 16}, True),
        ("GPTNeoX", HEADS, True),
        ("Mistral", KEYS | {"sliding_window": 8}, False),  # sliding-window attention
        ("Bloom", {"vocab_size": 50257, "hidden_size": 32, "n_layer": 2, "n_head": 2}, False),  # no position ids
        ("Mamba", {"vocab_size": 50257, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, False),
    ],
)
def test_any_causal_model_equals_a_row_for_every_continuation(
    kind: str, settings: dict[str, Any], shares: bool, folder: Path
) -> None:
    model = of_kind(kind, **settings)
    scored = ScoredTransformers(model, AutoTokenizer.from_pretrained(folder))
    assert scored.shares_contexts == shares
    requests = some_requests(30)
    for request, score in zip(requests, log_likelihoods(scored, requests, 4), strict=True):
        expected, greedy = plain_score(model, request.context, request.continuation)
        assert score.log_likelihood == pytest.approx(expected, rel=1e-4, abs=1e-3)
        assert score.greedy == greedy


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_gpt2_scores_as_ours(attention: str, folder: Path) -> None:
    ours = ScoredGPT(random_model(SMALL))
    theirs = to_transformers(ours.model)
    theirs.set_attn_implementation(attention)
    scored = ScoredTransformers(theirs, AutoTokenizer.from_pretrained(folder))
    assert scored.shares_contexts
    assert (scored.max_length, scored.prefix) == (48, 50256)
    for a, b in zip(log_likelihoods(ours, some_requests()), log_likelihoods(scored, some_requests()), strict=True):
        assert b.log_likelihood == pytest.approx(a.log_likelihood, rel=1e-5, abs=1e-4)


def test_a_model_that_ignores_the_mask_is_detected(folder: Path) -> None:
    theirs = to_transformers(random_model(SMALL))
    forward = theirs.forward

    def without_mask(input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **more: Any) -> Any:
        return forward(input_ids, position_ids=position_ids, **more)

    theirs.forward = without_mask
    assert not ScoredTransformers(theirs, AutoTokenizer.from_pretrained(folder)).shares_contexts


def test_the_folder_determines_the_model_class(folder: Path, tmp_path: Path) -> None:
    gpt2 = open_language_model(str(folder), CPU, torch.float32)
    assert isinstance(gpt2, ScoredGPT)
    model = of_kind("Llama", **KEYS)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    llama = open_language_model(str(tmp_path), CPU, torch.float32)
    assert isinstance(llama, ScoredTransformers)
    assert llama.encode(" a cat's") == gpt2.encode(" a cat's")
    request = some_requests(1)[0]
    (score,) = log_likelihoods(llama, [request])
    expected = plain_score(model, request.context, request.continuation)[0]
    assert score.log_likelihood == pytest.approx(expected, rel=1e-4)


def test_a_model_that_transformers_cannot_load_is_an_error_in_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="transformers cannot load it") as caught:
        open_language_model(str(tmp_path), CPU, torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [{"n_layer": 10**9}, {"n_layer": 300}, {"n_embd": 10**8}, {"vocab_size": 10**8}, {"n_positions": 10**9}],
)
def test_transformers_builds_no_model_that_does_not_fit_its_tensors(
    folder: Path, tmp_path: Path, values: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"activation_function": "relu"} | values))
    with pytest.raises(UserError, match=str(tmp_path)):
        open_language_model(str(tmp_path / "model"), CPU, torch.float32)


def test_another_vocabulary_is_refused() -> None:
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=97)
    with pytest.raises(UserError, match="vocabulary of 97 tokens"):
        ScoredGPT(random_model(config))
