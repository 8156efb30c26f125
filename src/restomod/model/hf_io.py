"""Our weights as a Hugging Face model folder, and back: the same numbers, in `transformers`' names and layouts.

What the kinds of model call their tensors is in `restomod.model.hf_format`. The vocabulary is padded in memory only:
files hold 50257 rows. What OpenAI's own checkpoints have besides is understood: names without the prefix
`transformer.`, the attention masks that were saved as buffers, the head beside the embedding it equals.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restomod.config.run import ModelConfig
from restomod.data.tokenizer import END_OF_TEXT, vocabulary_file
from restomod.model.gpt import GPT
from restomod.model.hf_format import FAMILIES, HEAD, OtherModel, family_of
from restomod.model.storage import WEIGHTS, read_tensors, refuse_not_finite, write_tensors
from restomod.utils.errors import UserError, shortened
from restomod.utils.json_files import read_json

PREFIX = "transformer."
BARE = re.compile(r"(wte|wpe|ln_f|h\.\d+)\.")  # names in the files of a GPT2Model, which has no head
MASK_BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
ADAPTER = "an adapter's (LoRA): merge it into the weights of its model and save that"
WRAPPERS = {
    "._orig_mod.": "`_orig_mod.` is torch.compile's: save the model that was compiled, or remove it from the names",
    ".module.": "`module.` is DistributedDataParallel's: save the model within it, or remove it from the names",
    "._fsdp_wrapped_module.": "`_fsdp_wrapped_module.` is FSDP's: gather the model's own weights and save them",
    "lora_": f"`lora_` is {ADAPTER}",
    ".base_layer.": f"`base_layer.` is {ADAPTER}",
    ".base_model.model.": f"`base_model.model.` is {ADAPTER}",
}
FLOATING_POINT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_model_config(folder: Path) -> ModelConfig:
    """The shape and the parts of the model in a folder.

    Raises:
        OtherModel: its `config.json` describes a kind of model that is not known here.
        UserError: it is missing or damaged.
    """
    path = folder / "config.json"
    values = read_json(path, "model's config", dict[str, Any])
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise OtherModel(f"{path}: model_type is {shortened(repr(model_type))}; those of this package are {known}")
    try:
        return FAMILIES[model_type].from_json(values)
    except UserError as e:
        raise type(e)(f"{path}: {e}") from None
    except TypeError as e:
        raise UserError(f"{path} is damaged: {e}") from None


@torch.no_grad()
def hf_tensors(model: GPT) -> dict[str, Tensor]:
    """The weights under `transformers`' names, shapes and layouts, in fp32 on the CPU; views of the model's there."""
    views = family_of(model.config).views(model)
    return {name: view.detach().to("cpu", torch.float32) for name, view in views.items()}


def canonical_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of any GPT-2 checkpoint under GPT2LMHeadModel's names, without the saved attention masks."""
    tensors = {name: value for name, value in tensors.items() if not MASK_BUFFER.fullmatch(name)}
    return {PREFIX + name if BARE.match(name) else name: value for name, value in tensors.items()}


def wrapper_of(name: str) -> str | None:
    """What has changed the name of a tensor, and how to undo it; None where nothing is known to have."""
    return next((what for part, what in WRAPPERS.items() if part in f".{name}"), None)


def describe_misfit(where: Path, missing: Iterable[str], unexpected: Iterable[str], others: Iterable[str] = ()) -> str:
    """What is wrong with the tensors of a file or folder: a few of each kind by name, and what may have caused it."""
    unexpected = sorted(unexpected)
    kinds = (("missing ", sorted(missing), ", "), ("unexpected ", unexpected, ", "), ("", sorted(others), "; "))
    told = [
        kind + between.join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for kind, names, between in kinds
        if names
    ]
    causes = list(dict.fromkeys(filter(None, map(wrapper_of, unexpected))))
    return f"{where} does not fit its config.json: {'; '.join([*told, *causes])}"


@torch.no_grad()
def load_tensors(model: GPT, tensors: dict[str, Tensor], where: Path) -> None:
    """Copy the tensors of a checkpoint into ``model``: all of them, or none if any is wrong.

    Raises:
        UserError: tensors are missing, extra, or of another shape or kind, or hold numbers that are not finite.
    """
    _fill(model, _fitting(model, tensors, where))


def _fill(model: GPT, values: dict[str, Tensor]) -> None:
    for name, view in family_of(model.config).views(model).items():
        view.copy_(values[name])


def _fitting(model: GPT, tensors: dict[str, Tensor], where: Path, finite: bool = True) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names of its kind, found to fit ``model``, which may be on `meta`."""
    family = family_of(model.config)
    tensors = canonical_names(tensors) if family.model_type == "gpt2" else dict(tensors)
    views, problems, another = family.views(model), [], []
    head, embedding = tensors.get(HEAD), tensors.get(family.embedding)
    if model.config.tied and head is not None:
        del tensors[HEAD]
        if embedding is not None and not torch.equal(head, embedding):
            another.append(f"{HEAD} differs from {family.embedding}, to which the head is tied")
    missing, unexpected = views.keys() - tensors.keys(), tensors.keys() - views.keys()
    values = {name: value for name, value in tensors.items() if name in views}
    for name, value in values.items():
        if views[name].shape != value.shape:
            problems.append(f"{name} has shape {tuple(value.shape)} and not {tuple(views[name].shape)}")
        elif value.dtype not in FLOATING_POINT:
            problems.append(f"{name} holds {str(value.dtype).removeprefix('torch.')}, not floats of 16 bits or more")
    if missing or problems:
        raise UserError(describe_misfit(where, missing, unexpected, [*problems, *another]))
    if unexpected or another:  # the model that is described, and something more
        raise OtherModel(describe_misfit(where, (), unexpected, another))
    if finite:
        refuse_not_finite(values, where)
    return values


def save_model(model: GPT, folder: Path) -> None:
    """Write ``model`` into an existing folder: weights, config and tokenizer, as `from_pretrained` wants them."""
    tensors = {name: value.contiguous() for name, value in hf_tensors(model).items()}
    write_tensors(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(family_of(model.config).to_json(model.config), indent=2) + "\n")
    generation = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(folder, model_max_length=model.config.n_positions)


def save_tokenizer(folder: Path, **settings: int) -> None:
    """Write GPT-2's tokenizer into a folder, as `AutoTokenizer` wants it."""
    (folder / "vocab.json").write_bytes(vocabulary_file("encoder.json"))
    (folder / "merges.txt").write_bytes(vocabulary_file("vocab.bpe"))
    tokenizer = {"tokenizer_class": "GPT2Tokenizer", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")


def require_size_of(tensors: Mapping[str, Tensor], where: Path, layers: int = 0, parameters: int = 0) -> None:
    """Refuse tensors of a far smaller model than a config describes, before one of that size is built.

    Raises:
        UserError: there are more layers than tensors, or the parameters are more than 20 times the numbers in them (a
            number may hold 16 of two bits).
    """
    numbers = sum(tensor.numel() for tensor in tensors.values())
    if layers > len(tensors) or parameters > 20 * numbers:
        described = f"{layers:,} layers" if layers > len(tensors) else f"{parameters:,} parameters"
        raise UserError(
            f"{where} does not fit its config.json, which describes {described}: it has {len(tensors):,} tensors with "
            f"{numbers:,} numbers"
        )


def load_weights(model: GPT, folder: Path) -> None:
    """Read the weights of a model folder into ``model``.

    Raises:
        UserError: they are missing, damaged, or do not fit.
    """
    tensors, where = read_tensors(folder)
    load_tensors(model, tensors, where)


def load_model(folder: Path, device: torch.device, finite: bool = True) -> GPT:
    """Build the model of a folder, with its weights, on ``device``, ready to evaluate.

    Args:
        folder: a model folder.
        device: where to.
        finite: refuse weights that are infinite or not a number.

    Raises:
        UserError: the folder does not hold a whole model of a known kind.
    """
    config = read_model_config(folder)
    tensors, where = read_tensors(folder)
    require_size_of(tensors, where, layers=config.n_layer)
    with torch.device("meta"):
        model = GPT(config)
    require_size_of(tensors, where, parameters=sum(parameter.numel() for parameter in model.parameters()))
    values = _fitting(model, tensors, where, finite)  # before memory is taken: a config may say anything
    model = model.to_empty(device=device)
    with torch.no_grad():
        for matrix in model.vocabulary_matrices():
            matrix[config.vocab_size :] = 0.0
        _fill(model, values)
    return model.eval()
