"""Models of other architectures: scores and text equal those of `transformers`; unsuitable folders are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2LMHeadModel

from restomod.checks.device_parity import random_model
from restomod.config.run import ModelConfig, SamplingConfig
from restomod.data.tokenizer import gpt2_tokenizer
from restomod.evals.likelihood import Request, log_likelihoods
from restomod.evals.models import ScoredGPT, ScoredTransformers, open_language_model
from restomod.generate.decode import cache_is_exact
from restomod.generate.text import sample_texts, stream_texts
from restomod.model.hf_io import save_model, save_tokenizer
from restomod.model.hf_models import TransformersModel, open_causal_model
from restomod.runs.open_model import find_model
from restomod.utils.errors import UserError
from tests.models import CPU

FP32 = torch.float32
GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 24}
WIDTH = {"vocab_size": 50257, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 24}
HEADS = WIDTH | {"num_attention_heads": 2, "intermediate_size": 32}
ENDS = {"bos_token_id": 50256, "eos_token_id": 50256}
GREEDY = SamplingConfig(max_tokens=12, temperature=0)
OTHER_PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu": ("GPT2", {"activation_function": "gelu"}),
    "relu": ("GPT2", {"activation_function": "relu"}),
    "untied": ("GPT2", {"tie_word_embeddings": False}),
    "n_inner": ("GPT2", {"n_inner": 40}),
    "epsilon": ("GPT2", {"layer_norm_epsilon": 1e-2}),
    "scaled by layer": ("GPT2", {"scale_attn_by_inverse_layer_idx": True}),
    "not scaled": ("GPT2", {"scale_attn_weights": False}),
    "upcast": ("GPT2", {"reorder_and_upcast_attn": True}),
    "cross-attention": ("GPT2", {"add_cross_attention": True}),
    "50258": ("GPT2", {"vocab_size": 50258}),
    "50304": ("GPT2", {"vocab_size": 50304}),
    "grouped queries": ("Llama", HEADS | {"num_key_value_heads": 1}),
    "Llama's epsilon": ("Llama", HEADS | {"rms_norm_eps": 1e-2}),
    "Llama's biases": ("Llama", HEADS | {"attention_bias": True, "mlp_bias": True}),
    "scaled rope": ("Llama", HEADS | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "GPT-NeoX": ("GPTNeoX", HEADS),
    "OPT": ("OPT", WIDTH | {"num_attention_heads": 2, "ffn_dim": 32, "word_embed_proj_dim": 16, "pad_token_id": 1}),
    "Bloom": ("Bloom", {"vocab_size": 50257, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "Mamba": ("Mamba", {"vocab_size": 50257, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
}


def build(kind: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    base = GPT2 if kind == "GPT2" else {}
    config = getattr(transformers, f"{kind}Config")(**base | ENDS | settings)
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():  # larger weights, so that every part has a visible effect
        if parameter.ndim == 2 and "A_log" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def save(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def rows(seed: int = 1) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(50256, (n,), generator=generator).tolist()) for n in (4, 9, 16)]


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", OTHER_PARTS)
@torch.no_grad()
def test_log_likelihoods_match_transformers_logits(part: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save(build(*OTHER_PARTS[part]), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    opened = open_language_model(str(tmp_path), CPU, dtype)
    assert isinstance(opened, ScoredTransformers)
    for row in rows():
        (score,) = log_likelihoods(opened, [Request(row[:3], row[3:])])
        logits = theirs(torch.tensor([row[:-1]])).logits[0, 2:]
        expected = logits.float().log_softmax(-1)[torch.arange(len(row) - 3), torch.tensor(row[3:])].sum().item()
        assert score.log_likelihood == pytest.approx(expected, rel=1e-5 if dtype == FP32 else 1e-3)


@pytest.mark.parametrize("part", OTHER_PARTS)
def test_greedy_text_matches_transformers_generate(part: str, tmp_path: Path) -> None:
    model = save(build(*OTHER_PARTS[part]), tmp_path)
    padding = list(range(50257, model.config.vocab_size))
    for prompt in ("The cat", "x"):
        ids = gpt2_tokenizer().encode(prompt).tolist()
        made = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=GREEDY.max_tokens,
            do_sample=False,
            pad_token_id=50256,
            suppress_tokens=padding or None,
        )[0, len(ids) :].tolist()
        expected = gpt2_tokenizer().decode(made[: made.index(50256)] if 50256 in made else made)
        assert sample_texts(str(tmp_path), [prompt], 1, GREEDY, 0, "cpu", "fp32") == [[expected]]


def test_inexact_caches_are_detected() -> None:
    assert cache_is_exact(build("GPT2", {"activation_function": "gelu"}))
    assert cache_is_exact(build("Llama", HEADS))
    assert not cache_is_exact(build(*OTHER_PARTS["Mamba"]))
    wrong = build("GPT2", {})
    forward = wrong.forward
    wrong.forward = lambda input_ids, past_key_values=None, use_cache=None: forward(input_ids, use_cache=use_cache)
    assert not cache_is_exact(wrong), "this model ignores its cache"


def test_padding_tokens_are_never_sampled(tmp_path: Path) -> None:
    model = build("GPT2", {"vocab_size": 50304, "tie_word_embeddings": False})
    with torch.no_grad():
        model.lm_head.weight[50257:] *= 100  # by far the most likely tokens
    save(model, tmp_path)
    ids = torch.tensor([gpt2_tokenizer().encode("The").tolist()])
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 50256}
    assert (model.generate(ids, **how)[0] >= 50257).any()
    made = model.generate(ids, suppress_tokens=list(range(50257, 50304)), **how)[0, 1:].tolist()
    assert sample_texts(str(tmp_path), ["The"], 1, GREEDY, 0, "cpu", "fp32") == [[gpt2_tokenizer().decode(made)]]
    ((text,),) = sample_texts(str(tmp_path), ["The"], 1, SamplingConfig(max_tokens=20, top_k=0), 0, "cpu", "fp32")
    assert len(gpt2_tokenizer().encode(text)) >= 15, "padding tokens would decode to no text"


def test_text_continues_beyond_the_context_length(tmp_path: Path) -> None:
    save(build(*OTHER_PARTS["gelu"]), tmp_path)
    sampling = SamplingConfig(max_tokens=40, temperature=1.0)
    how: Any = (str(tmp_path), ["one two three " * 20, "", "The"], 2, sampling, 3, "cpu", "fp32")
    texts = sample_texts(*how)
    assert [len(part) for part in texts] == [2, 2, 2]
    assert texts == sample_texts(*how)
    assert texts[0][0] != texts[0][1]
    assert ["".join(text) for text in stream_texts(*how)] == [text for part in texts for text in part]


def test_sampling_is_equal_with_this_package_and_with_transformers(tmp_path: Path) -> None:
    """The same weights are loaded twice; a config value that only transformers supports selects transformers."""
    model = build("GPT2", {"activation_function": "gelu_new"})
    save(model, tmp_path / "ours")
    model.config.reorder_and_upcast_attn = True
    save(model, tmp_path / "theirs")
    assert not isinstance(open_causal_model("ours", tmp_path / "ours", CPU, FP32), TransformersModel)
    sampling = SamplingConfig(max_tokens=15, temperature=0.9, top_k=40, top_p=0.95)
    texts = [
        sample_texts(str(tmp_path / name), ["The", ""], 2, sampling, 7, "cpu", "fp32") for name in ("ours", "theirs")
    ]
    assert texts[0] == texts[1]


# --- tokenizers ----------------------------------------------------------------------------------------------


def words(folder: Path, vocab_size: int) -> None:
    """Save a tokenizer of whole words, w0 to w(n - 1)."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    whole = Tokenizer(WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    whole.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="w1").save_pretrained(folder)


@pytest.mark.parametrize("vocab_size", [97, 50257])
def test_the_models_own_tokenizer_is_used(vocab_size: int, tmp_path: Path) -> None:
    """Also for a GPT-2 architecture with GPT-2's vocabulary size."""
    settings = {"vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 1}
    build("GPT2", settings).save_pretrained(tmp_path)
    words(tmp_path, vocab_size)
    opened = open_language_model(str(tmp_path), CPU, FP32)
    assert opened.encode("w5 w7 w96") == [5, 7, 96]
    assert isinstance(opened, ScoredTransformers)
    assert not opened.opened.reads_gpt2
    ((text,),) = sample_texts(str(tmp_path), ["w5 w7"], 1, GREEDY, 0, "cpu", "fp32")
    assert all(word.startswith("w") for word in text.split())


def test_a_padded_vocabulary_without_a_tokenizer_uses_gpt2s(tmp_path: Path) -> None:
    build("GPT2", {"vocab_size": 50304}).save_pretrained(tmp_path / "padded")
    opened = open_language_model(str(tmp_path / "padded"), CPU, FP32)
    assert opened.encode(" a cat's") == gpt2_tokenizer().encode(" a cat's").tolist()
    build("GPT2", {"vocab_size": 97} | dict.fromkeys(ENDS, 1)).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="it contains no tokenizer, and GPT-2's does not fit"):
        open_language_model(str(tmp_path / "small"), CPU, FP32)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    save(build("GPT2", {"vocab_size": 97} | dict.fromkeys(ENDS, 1)), tmp_path)
    with pytest.raises(UserError, match="tokenizer does not fit the model: it has 50,257 tokens, but the model has 97"):
        open_language_model(str(tmp_path), CPU, FP32)


def test_an_added_token_that_the_model_lacks_is_refused_when_it_is_used(tmp_path: Path) -> None:
    save(build(*OTHER_PARTS["gelu"]), tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(tmp_path)
    opened = open_language_model(str(tmp_path), CPU, FP32)
    assert opened.encode(" a cat") == gpt2_tokenizer().encode(" a cat").tolist()
    with pytest.raises(UserError, match="has token 50,257, but the model has 50,257 tokens"):
        opened.encode(" a cat<|pad|>")


def test_gpt2s_tokenizer_is_recognised_in_every_layout(tmp_path: Path) -> None:
    for name in ("files", "whole", "none"):
        build("GPT2", {}).save_pretrained(tmp_path / name)
    save_tokenizer(tmp_path / "files")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "files").save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "tokenizer.json").exists()
    for name in ("files", "whole", "none"):
        assert isinstance(open_language_model(str(tmp_path / name), CPU, FP32), ScoredGPT)


# --- refused models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {f"_orig_mod.{n}": v for n, v in t.items()}, ("_orig_mod.transformer.", "torch.compile")),
        (lambda t: {f"module.{n}": v for n, v in t.items()}, ("module.transformer.", "DistributedDataParallel")),
        (
            lambda t: {f"student.{n}": v for n, v in t.items()},  # an unknown wrapper
            ("missing ", "transformer.h.0.attn.c_attn.", "; unexpected student.transformer.h.0.attn.c_attn."),
        ),
        (lambda t: {f"base_model.model.{n}": v for n, v in t.items()}, ("base_model.model.", "merge the adapter into")),
        (
            lambda t: t | {"transformer.h.0.attn.c_attn.lora_A.default.weight": torch.zeros(2, 16)},
            ("unexpected transformer.h.0.attn.c_attn.lora_A", "merge the adapter into"),
        ),
        (lambda t: t | {"transformer.h.2.ln_1.bias": torch.zeros(16)}, ("unexpected transformer.h.2.ln_1.bias",)),
        (
            lambda t: {n: v for n, v in t.items() if "h.1.mlp" not in n},
            ("missing transformer.h.1.mlp.c_fc.bias", "and 1 more"),
        ),
        (
            lambda t: t | {"transformer.ln_f.bias": torch.zeros(8)},
            ("transformer.ln_f.bias has shape (8,), not (16,)",),
        ),
        (
            lambda t: t | {"transformer.ln_f.bias": torch.full((16,), torch.nan)},
            ("16 weights are NaN or infinite, in transformer.ln_f.bias",),
        ),
        (
            lambda t: {n: torch.full_like(v, torch.inf) for n, v in t.items()},
            ("weights are NaN or infinite, in transformer.", "more tensors"),
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: tuple[str, ...], activation: str, tmp_path: Path
) -> None:
    """transformers would initialise or ignore such weights, with a warning only."""
    save(build("GPT2", {"activation_function": activation}), tmp_path)
    change_tensors(tmp_path, change)
    for use in (
        lambda: open_language_model(str(tmp_path), CPU, FP32),
        lambda: sample_texts(str(tmp_path), ["x"], 1, GREEDY, 0, "cpu", "fp32"),
    ):
        with pytest.raises(UserError) as e:
            use()
        assert "\n" not in str(e.value)
        assert all(part in str(e.value) for part in said)


@torch.no_grad()
def test_an_untied_lm_head_is_used_and_other_heads_are_ignored(tmp_path: Path) -> None:
    """The result must equal that of transformers."""
    save(build("GPT2", {}), tmp_path)
    head = torch.randn(50257, 16, generator=torch.Generator().manual_seed(3))
    change_tensors(tmp_path, lambda t: t | {"lm_head.weight": head, "score.weight": torch.zeros(2, 16)})
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    (score,) = log_likelihoods(open_language_model(str(tmp_path), CPU, FP32), [Request((1, 2, 3), (4,))])
    expected = theirs(torch.tensor([[1, 2, 3]])).logits[0, -1].log_softmax(-1)[4].item()
    assert score.log_likelihood == pytest.approx(expected, rel=1e-5)


def test_a_folder_with_an_adapter_is_refused(tmp_path: Path) -> None:
    save_model(random_model(ModelConfig(**GPT2)), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="contains an adapter"):
        find_model(str(tmp_path))


def test_custom_model_code_is_not_run(tmp_path: Path) -> None:
    save(build("GPT2", {}), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "mine.py").write_text("raise SystemExit('run')")
    with pytest.raises(UserError, match="transformers cannot load it"):
        open_language_model(str(tmp_path), CPU, FP32)


@pytest.mark.parametrize(
    "named",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"attn_implementation": {"text_config": "someone/kernel@main"}},
        {"text_config": {"experts_implementation": "someone/kernel:part"}},
    ],
)
def test_a_config_that_names_code_on_the_hub_is_refused(named: dict[str, Any], tmp_path: Path) -> None:
    save(build("GPT2", GPT2 | {"vocab_size": 50258}), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    with pytest.raises(UserError, match=r"config.json: \w*_implementation .* is code on the hub"):
        open_causal_model(str(tmp_path), tmp_path, CPU, FP32)


def test_qwen3_has_128_channels_per_head_by_default(tmp_path: Path) -> None:
    """Unlike Llama, whose default is width / heads."""
    from restomod.model.hf_io import read_model_config

    values = {"model_type": "qwen3", "num_attention_heads": 2, "num_hidden_layers": 1, "num_key_value_heads": 2}
    values |= {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 24, "vocab_size": 50257}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_model_config(tmp_path).head_size == transformers.AutoConfig.from_pretrained(tmp_path).head_dim == 128


def test_max_window_layers_does_not_count_as_a_number_of_layers(tmp_path: Path) -> None:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.Qwen2Config(vocab_size=50257, num_hidden_layers=1, max_position_embeddings=32, **shape)
    assert config.max_window_layers == 28
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    model = open_causal_model(str(tmp_path), tmp_path, torch.device("cpu"), torch.float32)
    assert isinstance(model, TransformersModel)
