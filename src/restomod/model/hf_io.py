"""Model folders in the Hugging Face layout: download, load and save.

Tensor names and shapes are in `restomod.model.hf_format`. Files contain the vocabulary without padding. Weights are
read from one safetensors file, from several with an index, or from pickles (`pytorch_model.bin`). Pickles are read with
`weights_only=True`, so that they cannot execute code. OpenAI's checkpoints may lack the prefix `transformer.`, contain
attention masks as buffers, and repeat the tied lm_head.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import TypedDict

from restomod.config.run import ModelConfig
from restomod.data.tokenizer import END_OF_TEXT, vocabulary_file
from restomod.model.gpt import GPT
from restomod.model.hf_format import FAMILIES, HEAD, UnsupportedModel, family_of
from restomod.utils.errors import UserError, one_line, shortened
from restomod.utils.hub import hub_file, quiet_client
from restomod.utils.json_files import file_name, read_json
from restomod.utils.locks import SAFE_OPEN

WEIGHTS = "model.safetensors"
WEIGHTS_NAMES = (WEIGHTS, "pytorch_model.bin")  # if a folder has both, the first one is read: it is the safe format
INDEX_SUFFIX = ".index.json"
MAX_HEADER = 8 * 2**20  # bytes of a safetensors header; 37,000 tensors (a mixture of experts, 94 layers) need 5 MB
OPENAI = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
VOCABULARIES = ("vocab.json", "tokenizer.json")
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
PREFIX = "transformer."
BARE = re.compile(r"(wte|wpe|ln_f|h\.\d+)\.")  # names without prefix, in files of a GPT2Model (no lm_head)
MASK_BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
ADAPTER = "a prefix of a LoRA adapter: merge the adapter into the model, then save the model"
WRAPPERS = {
    "._orig_mod.": "`_orig_mod.` is a prefix of torch.compile: save the original model, or remove the prefix",
    ".module.": "`module.` is a prefix of DistributedDataParallel: save its `module`, or remove the prefix",
    "._fsdp_wrapped_module.": "`_fsdp_wrapped_module.` is a prefix of FSDP: gather the full weights, then save them",
    "lora_": f"`lora_` is {ADAPTER}",
    ".base_layer.": f"`base_layer.` is {ADAPTER}",
    ".base_model.model.": f"`base_model.model.` is {ADAPTER}",
}
"""Explanations of tensor names that a wrapper changed, by a part of the name."""
FLOATING_POINT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Index(TypedDict):
    """Contents of an index file of weights in several files."""

    weight_map: Annotated[dict[str, Annotated[str, AfterValidator(file_name)]], Field(min_length=1)]


# --- the hub ---------------------------------------------------------------------------------------------------


def hub_name(name: str) -> str | None:
    """Return the hub repository ``owner/name`` of a model name.

    Args:
        name: repository, or one of OpenAI's short names: gpt2, gpt2-medium, gpt2-large, gpt2-xl.

    Returns:
        ``owner/name``; None if ``name`` cannot be a repository.
    """
    return OPENAI.get(name) or (name if REPOSITORY.fullmatch(name) else None)


def download_model(repository: str) -> Path:
    """Download a model from the Hugging Face hub, if it is not in the cache.

    All files belong to one commit, and their hashes are checked. Without a connection, the commit of the last complete
    download is used.

    Args:
        repository: ``owner/name``.

    Returns:
        Folder of the model in the cache.

    Raises:
        UserError: the hub has no such model, cannot be reached, or sends files with wrong hashes.
    """
    commit, obstacle = _newest_commit(repository)
    if commit is not None:
        config = hub_file(repository, "config.json", commit, cached_only=bool(obstacle))
        files = weights_files(lambda name: hub_file(repository, name, commit, cached_only=bool(obstacle)))
        if config is not None and files is not None:
            # the vocabulary shows whether the model uses GPT-2's tokens
            any(hub_file(repository, name, commit, cached_only=bool(obstacle)) for name in VOCABULARIES)
            if not obstacle:
                _remember(repository, commit)
            return config.parent
    if obstacle:
        raise UserError(
            f"{repository}: the Hugging Face hub cannot be reached ({obstacle}), and the model is not in the cache; "
            f"connect to the internet, or give the folder of a downloaded model"
        )
    raise UserError(f"{repository} on the hub has no weights: model.safetensors and pytorch_model.bin are missing")


def _remember(repository: str, commit: str) -> None:
    """Record in the cache that `main` is this commit. The client does so only for downloads of `main`."""
    import huggingface_hub as hub

    cached = hub.try_to_load_from_cache(repository, "config.json")
    if not isinstance(cached, str) or Path(cached).parent.name != commit:
        with contextlib.suppress(Exception), quiet_client():  # the record is needed only without a connection
            hub.hf_hub_download(repository, "config.json")


def _newest_commit(repository: str) -> tuple[str | None, str]:
    """Return the commit of `main` and "". If the hub cannot be reached, return the cached commit (or None) and why."""
    import huggingface_hub as hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        with quiet_client():
            commit = hub.get_hf_file_metadata(hub.hf_hub_url(repository, "config.json")).commit_hash
        if commit:
            return commit, ""
        obstacle = "its response has no commit hash"
    except RemoteEntryNotFoundError:
        raise UserError(f"{repository} on the hub has no config.json: it is not a `transformers` model") from None
    except GatedRepoError:
        raise UserError(
            f"{repository} on the hub is gated: accept its terms on the website, then run `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{repository}: no such local folder, and no such public model on the Hugging Face hub; "
            f"OpenAI's models are {', '.join(OPENAI)}"
        ) from None
    except Exception as e:  # httpx's errors, httpx2's errors and OSError have no common base class
        obstacle = one_line(e)
    cached = hub.try_to_load_from_cache(repository, "config.json")
    return (Path(cached).parent.name if isinstance(cached, str) else None), obstacle


# --- files of tensors ------------------------------------------------------------------------------------------


def weights_files(get: Callable[[str], Path | None]) -> list[Path] | None:
    """Find the weight files of a model.

    Args:
        get: function that returns the path of a file by its name in the folder, or None if there is no such file. It
            may download the file.

    Returns:
        Paths of the weight files; None if the model has none.

    Raises:
        UserError: an index is damaged, or a file listed in it is missing.
    """
    for name in WEIGHTS_NAMES:
        whole = get(name)
        if whole is not None:
            return [whole]
        index = get(name + INDEX_SUFFIX)
        if index is not None:
            found = {
                shard: get(shard)
                for shard in sorted({*read_json(index, "index of the weights", Index)["weight_map"].values()})
            }
            absent = [shard for shard, path in found.items() if path is None]
            if absent:
                raise UserError(f"{index} lists {absent[0]}, which is missing from the same folder")
            return [path for path in found.values() if path is not None]
    return None


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """Read all tensors of a model folder on the CPU, memory-mapped if the format allows it.

    Returns:
        Tensors by name, and the path for error messages about them.

    Raises:
        UserError: the weights are missing or damaged, or two files contain a tensor of the same name.
    """
    files = weights_files(lambda name: folder / name if (folder / name).is_file() else None)
    if files is None:
        raise UserError(f"{folder / WEIGHTS} is missing: {folder} is not a model folder")
    tensors: dict[str, Tensor] = {}
    for path in files:
        read = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
        twice = sorted(tensors.keys() & read.keys())
        if twice:
            raise UserError(f"{path} repeats {twice[0]}, which another file of {folder} contains too")
        tensors.update(read)
    return tensors, files[0] if len(files) == 1 else folder


def refuse_not_finite(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Check that all weights are finite.

    Args:
        tensors: weights by name.
        where: path for the message.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    bad = {name: n for name, value in tensors.items() if (n := int((~torch.isfinite(value)).sum()))}
    if bad:
        first, more = next(iter(bad)), f" and {len(bad) - 1:,} more tensors" if len(bad) > 1 else ""
        raise UserError(
            f"{where}: {sum(bad.values()):,} weights are NaN or infinite, in {first}{more}; use an earlier checkpoint"
        )


def require_short_header(path: Path) -> None:
    """Check the header length of a safetensors file, before a damaged header makes the reader allocate gigabytes.

    Raises:
        UserError: the header is longer than `MAX_HEADER`.
    """
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
    if size > MAX_HEADER:
        raise UserError(f"{path} is damaged, or has too many tensors: its header has {size:,} bytes")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        require_short_header(path)
        return load_file(path)
    except UserError:
        raise
    except Exception as e:  # safetensors, the system and torch raise different classes
        raise UserError(f"{path} is damaged: {one_line(e)}") from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise UserError(f"{path}: cannot read the weights: {e.strerror or e}") from None
    except Exception as e:  # damaged pickles raise many classes; torch's message suggests the unsafe mode
        foreign = re.search(r"GLOBAL (\S+)", str(e))
        if foreign:
            raise UserError(f"{path} is refused: it contains {foreign[1]}, which is not a tensor") from None
        raise UserError(f"{path} is damaged: it is not a complete pickle of tensors ({type(e).__name__})") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"{path} does not contain model weights: it must be a dictionary of tensors")
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested or value.is_meta:
            raise UserError(f"{path} does not contain model weights: {name} must be a dense tensor")
    return values


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a safetensors file.

    Args:
        tensors: contiguous tensors by name.
        path: new file, or one to overwrite.
        metadata: metadata of the file's header; None: no metadata.

    Raises:
        OSError: the file cannot be created.
        SafetensorError: the file cannot be written.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | SAFE_OPEN, 0o666)
    mode = os.fstat(fd).st_mode  # safetensors sets mode 0600; this one follows the user's umask
    os.close(fd)
    save_file(dict(tensors), path, metadata)
    path.chmod(stat.S_IMODE(mode))


# --- models ----------------------------------------------------------------------------------------------------


def read_model_config(folder: Path) -> ModelConfig:
    """Read the configuration of a model from ``config.json`` in its folder.

    Raises:
        UnsupportedModel: the model type is unknown, or the model has parts that this package lacks.
        UserError: `config.json` is missing or damaged.
    """
    path = folder / "config.json"
    values = read_json(path, "model's config", dict[str, Any])
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedModel(f"{path}: model_type is {shortened(repr(model_type))}; supported types: {known}")
    try:
        return FAMILIES[model_type].from_json(values)
    except UserError as e:
        raise type(e)(f"{path}: {e}") from None
    except TypeError as e:
        raise UserError(f"{path} is damaged: {e}") from None


@torch.no_grad()
def hf_tensors(model: GPT) -> dict[str, Tensor]:
    """Return the weights by `transformers`' names and in its shapes, fp32 on the CPU, without copies where possible."""
    views = family_of(model.config).views(model)
    return {name: view.detach().to("cpu", torch.float32) for name, view in views.items()}


def canonical_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a GPT-2 checkpoint to GPT2LMHeadModel's names, and drop saved attention masks."""
    tensors = {name: value for name, value in tensors.items() if not MASK_BUFFER.fullmatch(name)}
    return {PREFIX + name if BARE.match(name) else name: value for name, value in tensors.items()}


def wrapper_of(name: str) -> str | None:
    """Explain which wrapper (torch.compile, DDP, FSDP, LoRA) changed the name of a tensor; None if there is none."""
    return next((explanation for part, explanation in WRAPPERS.items() if part in f".{name}"), None)


def describe_mismatch(
    where: Path, missing: Iterable[str], unexpected: Iterable[str], others: Iterable[str] = ()
) -> str:
    """Describe why tensors do not fit a model, with at most three names of each kind and the likely cause.

    Args:
        where: path of the tensors.
        missing: names of tensors that the model needs.
        unexpected: names of tensors that the model does not have.
        others: other problems, as phrases.
    """
    unexpected = sorted(unexpected)
    kinds = (("missing ", sorted(missing), ", "), ("unexpected ", unexpected, ", "), ("", sorted(others), "; "))
    problems = [
        kind + separator.join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for kind, names, separator in kinds
        if names
    ]
    causes = list(dict.fromkeys(filter(None, map(wrapper_of, unexpected))))
    return f"{where} does not fit its config.json: {'; '.join([*problems, *causes])}"


def _fitting(model: GPT, tensors: dict[str, Tensor], where: Path, finite: bool) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint that ``model`` needs, after checking names, shapes and dtypes.

    Args:
        model: model to be loaded, possibly on the meta device.
        tensors: tensors of the checkpoint by name.
        where: path for messages.
        finite: whether NaN and infinite weights are errors.

    Raises:
        UserError: tensors are missing, have wrong shapes or dtypes, or are not finite.
        UnsupportedModel: the checkpoint has additional tensors, or an lm_head that differs from the tied embedding.
    """
    family = family_of(model.config)
    tensors = canonical_names(tensors) if family.model_type == "gpt2" else dict(tensors)
    views, problems, another = family.views(model), [], []
    head, embedding = tensors.get(HEAD), tensors.get(family.embedding)
    if model.config.tied and head is not None:
        del tensors[HEAD]
        if embedding is not None and not torch.equal(head, embedding):
            another.append(f"{HEAD} differs from {family.embedding}, although tie_word_embeddings is set")
    missing, unexpected = views.keys() - tensors.keys(), tensors.keys() - views.keys()
    values = {name: value for name, value in tensors.items() if name in views}
    for name, value in values.items():
        if views[name].shape != value.shape:
            problems.append(f"{name} has shape {tuple(value.shape)}, not {tuple(views[name].shape)}")
        elif value.dtype not in FLOATING_POINT:
            dtype = str(value.dtype).removeprefix("torch.")
            problems.append(f"{name} has dtype {dtype}, not float16, bfloat16, float32 or float64")
    if missing or problems:
        raise UserError(describe_mismatch(where, missing, unexpected, [*problems, *another]))
    if unexpected or another:  # `transformers` may have a class that uses the additional tensors
        raise UnsupportedModel(describe_mismatch(where, (), unexpected, another))
    if finite:
        refuse_not_finite(values, where)
    return values


def save_model(model: GPT, folder: Path) -> None:
    """Save a model in the format of `from_pretrained`: weights, configuration and tokenizer.

    Args:
        model: model with full (not sharded) weights.
        folder: existing folder.
    """
    tensors = {name: value.contiguous() for name, value in hf_tensors(model).items()}
    write_tensors(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(family_of(model.config).to_json(model.config), indent=2) + "\n")
    generation = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(folder, model_max_length=model.config.n_positions)


def save_tokenizer(folder: Path, **settings: int) -> None:
    """Save GPT-2's tokenizer in the format of `AutoTokenizer`.

    Args:
        folder: existing folder.
        settings: additional values of `tokenizer_config.json`.
    """
    (folder / "vocab.json").write_bytes(vocabulary_file("encoder.json"))
    (folder / "merges.txt").write_bytes(vocabulary_file("vocab.bpe"))
    tokenizer = {"tokenizer_class": "GPT2Tokenizer", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")


def require_size_of(tensors: Mapping[str, Tensor], where: Path, layers: int = 0, parameters: int = 0) -> None:
    """Check that the size in a `config.json` is plausible for the tensors, before a model of that size is built.

    Args:
        tensors: tensors by name.
        where: path for the message.
        layers: number of layers in the configuration.
        parameters: number of parameters in the configuration. Up to 20 times the number of tensor elements are allowed,
            because quantised weights have up to 16 in one element.

    Raises:
        UserError: there are more layers than tensors, or too many parameters for the tensors.
    """
    elements = sum(tensor.numel() for tensor in tensors.values())
    if layers > len(tensors) or parameters > 20 * elements:
        described = f"{layers:,} layers" if layers > len(tensors) else f"{parameters:,} parameters"
        raise UserError(
            f"{where} does not fit its config.json, which describes {described}: it has {len(tensors):,} tensors with "
            f"{elements:,} numbers"
        )


def load_model(folder: Path, device: torch.device, finite: bool = True) -> GPT:
    """Load a model from a folder in the Hugging Face layout.

    Args:
        folder: folder with `config.json` and weights.
        device: device of the model.
        finite: whether NaN and infinite weights are errors.

    Returns:
        Model with fp32 weights, in evaluation mode.

    Raises:
        UserError: a file is missing or damaged, or the weights do not fit `config.json`.
        UnsupportedModel: this package cannot compute the model.
    """
    config = read_model_config(folder)
    tensors, where = read_tensors(folder)
    require_size_of(tensors, where, layers=config.n_layer)
    with torch.device("meta"):
        model = GPT(config)
    require_size_of(tensors, where, parameters=sum(parameter.numel() for parameter in model.parameters()))
    values = _fitting(model, tensors, where, finite)  # before memory is allocated, as the config may be wrong
    model = model.to_empty(device=device)
    with torch.no_grad():
        for matrix in model.vocabulary_matrices():
            matrix[config.vocab_size :] = 0.0
        for name, view in family_of(config).views(model).items():
            view.copy_(values[name])
    return model.eval()
