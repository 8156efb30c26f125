"""Model types of the Hugging Face layout: config.json, tensor names and tensor shapes.

A model is saved as the `transformers` type that computes the same function: GPT-2, Llama or Qwen3. If there is no such
type, for example because `transformers` lacks the norm, it is saved as type "restomod" with this package's parameter
names. Only this package loads that type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from restomod.config.model import LARGEST_OF_MODEL, require_size
from restomod.config.run import ModelConfig
from restomod.config.serialize import from_dict
from restomod.data.tokenizer import END_OF_TEXT
from restomod.model.gpt import GPT, NORM_EPS, stacked_matrices
from restomod.utils.errors import UserError

HEAD = "lm_head.weight"
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # in GPT-2's files
LLAMA_NAMES = {
    "transformer.wte.weight": ["model.embed_tokens.weight"],
    "transformer.ln_f.weight": ["model.norm.weight"],
    HEAD: [HEAD],
    "ln_1.weight": ["input_layernorm.weight"],
    "ln_2.weight": ["post_attention_layernorm.weight"],
    "attn.c_attn.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "attn.c_proj.weight": ["self_attn.o_proj.weight"],
    "attn.q_norm.weight": ["self_attn.q_norm.weight"],
    "attn.k_norm.weight": ["self_attn.k_norm.weight"],
    "mlp.c_fc.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.c_proj.weight": ["mlp.down_proj.weight"],
}
SHAPE = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
ROPE = {"rope_type", "rope_theta"}
QWEN3_HEAD = 128  # default head_dim in `transformers`
ABSENT = object()

Json = dict[str, Any]


class UnsupportedModel(UserError):
    """Error for a model folder that may be valid, but whose model this package cannot compute."""


@dataclass(frozen=True)
class Family:
    """Model type of the Hugging Face layout, with its conversions."""

    model_type: str
    """Value of `model_type` in `config.json`."""
    title: str
    """Name in printed text."""
    embedding: str
    """Tensor name of the token embedding."""
    has_parts_of: Callable[[ModelConfig], bool]
    """Function that returns whether the type can represent a model configuration."""
    to_json: Callable[[ModelConfig], Json]
    """Function that returns the values of `config.json` for a model configuration."""
    from_json: Callable[[Json], ModelConfig]
    """Function that returns the model configuration for the values of a `config.json`.

    Raises:
        UnsupportedModel: the model has parts that this package lacks.
        TypeError: a value has a wrong type.
    """
    views: Callable[[GPT], dict[str, Tensor]]
    """Function that returns views of a model's parameters by tensor name, in the shapes of the files, without padding.
    Copying into the views loads the model."""


def family_of(config: ModelConfig) -> Family:
    """Return the first type in `FAMILIES` that can represent a model configuration."""
    return next(family for family in FAMILIES.values() if family.has_parts_of(config))


def is_exportable(config: ModelConfig) -> bool:
    """Return whether `transformers` has a class that computes the model."""
    return family_of(config).model_type != "restomod"


def describe_shape(config: ModelConfig) -> str:
    """Describe a model in one line: ``GPT-2, 12 layers, 12 heads, width 768, context 1024``."""
    title = family_of(config).title
    return (
        f"{title}, {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context {config.n_positions}"
    )


def as_saved(config: ModelConfig) -> ModelConfig:
    """Return the configuration that results from saving and loading: initialisation reset, derived sizes explicit."""
    family = family_of(config)
    return family.from_json(family.to_json(config))


def named_views(model: GPT) -> dict[str, Tensor]:
    """Return the parameters by this package's names, without the padding of the vocabulary; views, not copies."""
    padded = {id(matrix) for matrix in model.vocabulary_matrices()}
    return {
        name: parameter[: model.config.vocab_size] if id(parameter) in padded else parameter
        for name, parameter in model.named_parameters()
    }


def _expect(values: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], kind: str) -> None:
    """Check values of a `config.json`.

    Args:
        values: values of the `config.json`.
        allowed: allowed values by key, the default of a missing key first.
        kind: model type for the message.

    Raises:
        UnsupportedModel: a value is not allowed.
    """
    for key, choices in allowed.items():
        if values.get(key, choices[0]) not in choices:
            raise UnsupportedModel(f"{key} is {values[key]!r}; this package supports only {choices[0]!r} for {kind}")


def _integer(values: Mapping[str, Any], key: str, default: Any = ABSENT) -> int:
    value = values.get(key) if default is ABSENT else values.get(key, default)
    if type(value) is not int:
        raise TypeError(f"{key} must be an integer, not {value!r:.40}")
    return value


def _gpt2_json(config: ModelConfig) -> Json:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",  # tanh-GELU
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.n_positions,
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "dtype": "float32",
    }


def _gpt2_config(values: Json) -> ModelConfig:
    width = values.get("n_embd")
    _expect(
        values,
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
            "add_cross_attention": (False,),
            "tie_word_embeddings": (True,),
            "n_inner": (None, 4 * width if isinstance(width, int) else None),
            "quantization_config": (None,),
        },
        "GPT-2",
    )
    shape = {key: _integer(values, key) for key in SHAPE}
    return ModelConfig(**shape)  # type: ignore[arg-type]


def _gpt2_views(model: GPT) -> dict[str, Tensor]:
    """Return the parameters with transposed linear weights, which are (in, out) in GPT-2's files and (out, in) here."""
    return {name: view.t() if name.endswith(TRANSPOSED) else view for name, view in named_views(model).items()}


def _has_skips_or_caps(config: ModelConfig) -> bool:
    return config.embedding_norm or config.embedding_skip or config.value_embedding or config.softcap is not None


def _is_gpt2(config: ModelConfig) -> bool:
    parts = config.norm, config.positions, config.mlp, config.bias, config.tied, config.qk_norm
    usual = config.inner_size == 4 * config.n_embd and config.head_size * config.n_head == config.n_embd
    return usual and not _has_skips_or_caps(config) and parts == ("layernorm", "learned", "gelu", True, True, False)


def _is_llama(config: ModelConfig) -> bool:
    parts = config.norm, config.positions, config.mlp, config.bias, config.qk_norm
    return not _has_skips_or_caps(config) and parts == ("rmsnorm", "rope", "swiglu", False, False)


def _is_qwen3(config: ModelConfig) -> bool:
    return config.qk_norm and _is_llama(dataclasses.replace(config, qk_norm=False))


def _llama_json(config: ModelConfig, model_type: str = "llama") -> Json:
    return {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[model_type]],
        "model_type": model_type,
        "hidden_size": config.n_embd,
        "intermediate_size": config.inner_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head,
        "head_dim": config.head_size,
        "max_position_embeddings": config.n_positions,
        "vocab_size": config.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        "rope_theta": config.rope_theta,  # read by transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # read by transformers 5
        "attention_bias": False,
        "attention_dropout": 0.0,
        **({"mlp_bias": False} if model_type == "llama" else {"use_sliding_window": False}),
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tied,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": None,
        "dtype": "float32",
    }


def _llama_config(values: Json, model_type: str = "llama") -> ModelConfig:
    heads, layers = _integer(values, "num_attention_heads"), _integer(values, "num_hidden_layers")
    require_size("num_hidden_layers", layers, most=LARGEST_OF_MODEL["n_layer"])
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise TypeError(f"rope_parameters must be an object, not {rope!r:.40}")
    _expect(
        values,
        {
            "hidden_act": ("silu",),
            "rms_norm_eps": (NORM_EPS,),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "use_sliding_window": (False,),
            "rope_scaling": (None,),
            "num_key_value_heads": (heads,),
            "layer_types": (None, ["full_attention"] * layers),
            "quantization_config": (None,),
        },
        f"{model_type} without grouped-query attention",
    )
    _expect(rope, {"rope_type": ("default",), **dict.fromkeys(rope.keys() - ROPE, (None,))}, model_type)
    theta: Any = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    if type(theta) not in (int, float):
        raise TypeError(f"rope_theta must be a number, not {theta!r:.40}")
    return ModelConfig(
        n_layer=layers,
        n_head=heads,
        n_embd=_integer(values, "hidden_size"),
        n_positions=_integer(values, "max_position_embeddings"),
        vocab_size=_integer(values, "vocab_size"),
        norm="rmsnorm",
        positions="rope",
        rope_theta=float(theta),
        mlp="swiglu",
        n_inner=_integer(values, "intermediate_size"),
        head_dim=_integer(
            values,
            "head_dim",
            QWEN3_HEAD if model_type == "qwen3" else _integer(values, "hidden_size") // max(1, heads),
        ),
        qk_norm=model_type == "qwen3",
        bias=False,
        tied=values.get("tie_word_embeddings", False) is True,
    )


def _llama_views(model: GPT) -> dict[str, Tensor]:
    """Return the parameters by Llama's names. Stacked weights (q, k, v; gate, up) are split into separate tensors."""
    views: dict[str, Tensor] = {}
    for name, view in named_views(model).items():
        prefix, inner = "", name
        if name.startswith("transformer.h."):
            layer, inner = name.removeprefix("transformer.h.").split(".", 1)
            prefix = f"model.layers.{layer}."
        theirs = LLAMA_NAMES[inner]
        assert len(theirs) == stacked_matrices(model.config, name)
        views |= {prefix + n: part for n, part in zip(theirs, view.chunk(len(theirs)), strict=True)}
    return views


def _own_json(config: ModelConfig) -> Json:
    return {"model_type": "restomod", **dataclasses.asdict(config)}


def _own_config(values: Json) -> ModelConfig:
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    given = {key: value for key, value in values.items() if key != "model_type"}
    unknown = given.keys() - fields
    if unknown:
        raise UserError(f"unknown keys: {', '.join(sorted(unknown))}; a newer restomod may have written them: upgrade")
    for key in SHAPE:
        _integer(values, key)
    config: ModelConfig = from_dict(given, ModelConfig, "the model")
    return config


FAMILIES = {
    family.model_type: family
    for family in (
        Family("gpt2", "GPT-2", "transformer.wte.weight", _is_gpt2, _gpt2_json, _gpt2_config, _gpt2_views),
        Family("llama", "Llama", "model.embed_tokens.weight", _is_llama, _llama_json, _llama_config, _llama_views),
        Family(
            "qwen3",
            "Qwen3",
            "model.embed_tokens.weight",
            _is_qwen3,
            lambda config: _llama_json(config, "qwen3"),
            lambda values: _llama_config(values, "qwen3"),
            _llama_views,
        ),
        Family(
            "restomod",
            "restomod architecture",
            "transformer.wte.weight",
            lambda config: True,
            _own_json,
            _own_config,
            named_views,
        ),
    )
}
