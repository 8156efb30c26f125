"""Our weights as a Hugging Face model folder, and back: the same numbers, in `transformers`' names and layouts.

GPT2LMHeadModel keeps the linear weights of a block as (in, out); ours are nn.Linear's (out, in). The vocabulary is
padded in memory only: files hold 50257 rows. What OpenAI's own checkpoints have besides is understood: names without
the prefix `transformer.`, the attention masks that were saved as buffers, the head beside the embedding it equals.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from restomod.config import ModelConfig
from restomod.data.tokenizer import END_OF_TEXT, vocabulary_file
from restomod.errors import UserError
from restomod.files import read_json
from restomod.model.gpt import GPT
from restomod.model.storage import WEIGHTS, read_tensors

PREFIX = "transformer."
HEAD = "lm_head.weight"
MASK_BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
FLOATING_POINT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# what a GPT-2 config.json may also say, and the only values that this model computes
GPT2_ONLY: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
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


def read_model_config(folder: Path) -> ModelConfig:
    """The shape of the GPT-2 in a model folder.

    Raises:
        UserError: its `config.json` is missing or damaged, or describes another kind of model.
    """
    path = folder / "config.json"
    values = read_json(path, "model's config")
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it should be an object, not {values!r:.40}")
    if values.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type is {values.get('model_type')!r}; only 'gpt2' can be loaded")
    width = values.get("n_embd")
    allowed_values = GPT2_ONLY | {"n_inner": (None, 4 * width if isinstance(width, int) else None)}
    for key, allowed in allowed_values.items():
        if values.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path}: {key} is {values[key]!r}; GPT-2 has {allowed[0]!r}, and so has this model")
    shape: dict[str, Any] = {
        key: values.get(key) for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    }
    for key, value in shape.items():
        if type(value) is not int:
            raise UserError(f"{path} is damaged: {key} should be a whole number, not {value!r:.40}")
    try:
        return ModelConfig(**shape)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


@torch.no_grad()
def hf_tensors(model: GPT) -> dict[str, Tensor]:
    """The weights under `transformers`' names, shapes and layouts, in fp32 on the CPU; views of the model's there."""
    tensors = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().to("cpu", torch.float32)
        if name == "transformer.wte.weight":
            value = value[: model.config.vocab_size]
        tensors[name] = _our_layout(name, value)
    return tensors


def canonical_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of any GPT-2 checkpoint under GPT2LMHeadModel's names, without the saved attention masks."""
    tensors = {name: value for name, value in tensors.items() if not MASK_BUFFER.fullmatch(name)}
    if any(name.startswith(PREFIX) for name in tensors):
        return tensors
    return {name if name == HEAD else PREFIX + name: value for name, value in tensors.items()}


@torch.no_grad()
def load_tensors(model: GPT, tensors: dict[str, Tensor], where: Path) -> None:
    """Copy the tensors of a GPT-2 checkpoint into ``model``: all of them, or none if any is wrong.

    Raises:
        UserError: tensors are missing, extra, or of another shape or kind, named one by one.
    """
    _fill(model, _fitting(model, tensors, where))


def _fill(model: GPT, values: dict[str, Tensor]) -> None:
    for name, target in _targets(model).items():
        target.copy_(values[name])


def _targets(model: GPT) -> dict[str, Tensor]:
    """The parameters that a file fills, without the embedding's padding."""
    return {
        name: parameter[: model.config.vocab_size] if name == "transformer.wte.weight" else parameter
        for name, parameter in model.named_parameters()
    }


def _fitting(model: GPT, tensors: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """The tensors of a GPT-2 checkpoint in our names and layout, found to fit ``model``, which may be on `meta`."""
    tensors = canonical_names(tensors)
    problems = []
    head = tensors.pop(HEAD, None)
    embedding = tensors.get("transformer.wte.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        problems.append(f"{HEAD} differs from transformer.wte.weight, to which GPT-2's head is tied")
    targets = _targets(model)
    problems += [f"missing {name}" for name in targets.keys() - tensors.keys()]
    problems += [f"unexpected {name}" for name in tensors.keys() - targets.keys()]
    values = {name: _our_layout(name, value) for name, value in tensors.items() if name in targets}
    for name, value in values.items():
        if targets[name].shape != value.shape:
            expected = tuple(_our_layout(name, targets[name]).shape)
            problems.append(f"{name} has shape {tuple(tensors[name].shape)} and not {expected}")
        elif value.dtype not in FLOATING_POINT:
            problems.append(f"{name} holds {str(value.dtype).removeprefix('torch.')}, not floats of 16 bits or more")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{where} does not fit its config.json: {'; '.join(sorted(problems)[:3])}{more}")
    return values


def _our_layout(name: str, value: Tensor) -> Tensor:
    """A tensor of the file in our layout, or one of ours in the file's: transposing is its own inverse."""
    return value.t() if name.endswith(TRANSPOSED) and value.ndim == 2 else value


def save_model(model: GPT, folder: Path) -> None:
    """Write ``model`` into an existing folder: weights, config and tokenizer, as `from_pretrained` wants them."""
    tensors = {name: value.contiguous() for name, value in hf_tensors(model).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
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
        UserError: they are missing, damaged, or do not fit.
    """
    tensors, where = read_tensors(folder)
    load_tensors(model, tensors, where)


def load_model(folder: Path, device: torch.device) -> GPT:
    """Build the GPT-2 of a model folder, with its weights, on ``device``, ready to evaluate.

    Raises:
        UserError: the folder does not hold a whole GPT-2.
    """
    config = read_model_config(folder)
    with torch.device("meta"):
        model = GPT(config)
    tensors, where = read_tensors(folder)
    values = _fitting(model, tensors, where)  # before memory is taken: a config may say anything
    model = model.to_empty(device=device)
    with torch.no_grad():
        model.head[config.vocab_size :] = 0.0
        _fill(model, values)
    return model.eval()
