"""Our weights as a Hugging Face model folder, and back: the same numbers, in `transformers`' names and layouts.

GPT2LMHeadModel keeps the linear weights of a block as (in, out); ours are nn.Linear's (out, in). The vocabulary is
padded in memory only: files hold 50257 rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from restomod.config import ModelConfig
from restomod.data.tokenizer import END_OF_TEXT, vocabulary_file
from restomod.errors import UserError
from restomod.files import read_json
from restomod.model.gpt import GPT

WEIGHTS = "model.safetensors"
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# what a GPT-2 config.json may also say, and the only values that this model computes
GPT2_ONLY: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "n_inner": (None,),
}


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same model."""
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


def model_config(values: dict[str, Any], where: Path) -> ModelConfig:
    """Read a GPT-2 `config.json`.

    Raises:
        UserError: it describes another kind of model, or lacks a field.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where} is damaged: it should be an object, not {values!r:.40}")
    if values.get("model_type") != "gpt2":
        raise UserError(f"{where}: model_type is {values.get('model_type')!r}; only 'gpt2' can be loaded")
    for key, allowed in GPT2_ONLY.items():
        if values.get(key, allowed[0]) not in allowed:
            raise UserError(f"{where}: {key} is {values[key]!r}; GPT-2 has {allowed[0]!r}, and so has this model")
    try:
        return ModelConfig(**{k: int(values[k]) for k in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")})
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{where}: the model's config is damaged ({e!r})") from None


def hf_tensors(model: GPT) -> dict[str, Tensor]:
    """The weights under `transformers`' names, shapes and layouts, on the CPU in fp32."""
    tensors = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().to("cpu", torch.float32)
        if name == "transformer.wte.weight":
            value = value[: model.config.vocab_size]
        tensors[name] = (value.t() if name.endswith(TRANSPOSED) else value).contiguous()
    return tensors


@torch.no_grad()
def load_tensors(model: GPT, tensors: dict[str, Tensor], where: Path) -> None:
    """Copy `hf_tensors` back into ``model``.

    Raises:
        UserError: tensors are missing, extra, or of another shape, named one by one.
    """
    parameters = dict(model.named_parameters())
    problems = [f"missing {name}" for name in parameters.keys() - tensors.keys()]
    problems += [f"unexpected {name}" for name in tensors.keys() - parameters.keys()]
    for name in parameters.keys() & tensors.keys():
        parameter, value = parameters[name], tensors[name]
        value = value.t() if name.endswith(TRANSPOSED) else value
        target = parameter[: model.config.vocab_size] if name == "transformer.wte.weight" else parameter
        if target.shape != value.shape:
            problems.append(f"{name} has shape {tuple(tensors[name].shape)}, which does not fit {tuple(target.shape)}")
        else:
            target.copy_(value)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{where} does not fit its config.json: {'; '.join(sorted(problems)[:3])}{more}")


def save_model(model: GPT, folder: Path) -> None:
    """Write ``model`` into an existing folder: weights, config and tokenizer, as `from_pretrained` wants them."""
    save_file(hf_tensors(model), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(model.config), indent=2) + "\n")
    generation = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (folder / "vocab.json").write_bytes(vocabulary_file("encoder.json"))
    (folder / "merges.txt").write_bytes(vocabulary_file("vocab.bpe"))
    tokenizer = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": model.config.n_positions}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")


def load_weights(model: GPT, folder: Path) -> None:
    """Read the weights of a model folder into ``model``.

    Raises:
        UserError: the file is missing, damaged, or does not fit.
    """
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {folder} is not a model folder") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged: {e}") from None
    load_tensors(model, tensors, path)


def load_model(folder: Path, device: torch.device) -> GPT:
    """Build the model of a folder written by `save_model`, with its weights, on ``device``, ready to evaluate."""
    path = folder / "config.json"
    config = model_config(read_json(path, "model's config"), path)
    with torch.device("meta"):
        model = GPT(config)
    model = model.to_empty(device=device)
    with torch.no_grad():
        model.head[config.vocab_size :] = 0.0
    load_weights(model, folder)
    return model.eval()
