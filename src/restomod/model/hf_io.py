"""Model folders in the Hugging Face layout: downloaded from the hub, read, and written.

Names and shapes of tensors are in `restomod.model.hf_format`. Files hold the vocabulary without padding. Weights are
read from one safetensors file, several with an index, or the same as pickles (`pytorch_model.bin`), with
`weights_only=True`: a pickle can bring tensors and nothing that runs. OpenAI's own checkpoints may lack the prefix
`transformer.`, hold attention masks as buffers, and repeat the tied lm_head.
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
WEIGHTS_NAMES = (WEIGHTS, "pytorch_model.bin")  # the safe one first, where a folder holds both
INDEX_SUFFIX = ".index.json"
MAX_HEADER = 8 * 2**20  # bytes of a safetensors file's: one of 37,000 tensors, experts of 94 layers, has 5 MB
OPENAI = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
VOCABULARIES = ("vocab.json", "tokenizer.json")
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
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


class Index(TypedDict):
    """The index of weights in several files."""

    weight_map: Annotated[dict[str, Annotated[str, AfterValidator(file_name)]], Field(min_length=1)]


# --- the hub ---------------------------------------------------------------------------------------------------


def hub_name(name: str) -> str | None:
    """Return the hub's ``owner/name`` of ``name``, which may be one of OpenAI's four; None if it cannot be one."""
    return OPENAI.get(name) or (name if REPOSITORY.fullmatch(name) else None)


def download_model(repository: str) -> Path:
    """Return the cached folder of a model of the hub, after downloading what the cache lacks.

    All files are of one commit, and each has the hash that the hub gives for it. Without a connection the commit
    that was last downloaded whole is used.

    Raises:
        UserError: the hub has no such model, cannot be reached, or keeps sending something else.
    """
    commit, obstacle = _newest_commit(repository)
    if commit is not None:
        config = hub_file(repository, "config.json", commit, cached_only=bool(obstacle))
        files = weights_files(lambda name: hub_file(repository, name, commit, cached_only=bool(obstacle)))
        if config is not None and files is not None:
            # by which one knows whether GPT-2's tokens are the model's
            any(hub_file(repository, name, commit, cached_only=bool(obstacle)) for name in VOCABULARIES)
            if not obstacle:
                _remember(repository, commit)
            return config.parent
    if obstacle:
        raise UserError(
            f"{repository}: the Hugging Face hub cannot be reached ({obstacle}), and the model is not in its cache; "
            f"connect once, or give the folder of a downloaded model"
        )
    raise UserError(f"{repository} on the hub has no weights: no model.safetensors and no pytorch_model.bin")


def _remember(repository: str, commit: str) -> None:
    """Record in the cache that `main` is this commit, which the client does only when asked for `main`."""
    import huggingface_hub as hub

    cached = hub.try_to_load_from_cache(repository, "config.json")
    if not isinstance(cached, str) or Path(cached).parent.name != commit:
        with contextlib.suppress(Exception), quiet_client():  # all that is lost is going on without a connection
            hub.hf_hub_download(repository, "config.json")


def _newest_commit(repository: str) -> tuple[str | None, str]:
    """Return the commit of `main`, and ""; if the hub cannot be reached, the cached commit, and the reason."""
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
        obstacle = "its answer names no commit"
    except RemoteEntryNotFoundError:
        raise UserError(f"{repository} on the hub has no config.json: it is not a model for `transformers`") from None
    except GatedRepoError:
        raise UserError(f"{repository} on the hub is gated: accept its terms there, then `hf auth login`") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{repository}: no such folder here, and no such public model on the Hugging Face hub; "
            f"OpenAI's are {', '.join(OPENAI)}"
        ) from None
    except Exception as e:  # no common base: httpx's errors in one version, httpx2's in another, OSError
        obstacle = one_line(e)
    cached = hub.try_to_load_from_cache(repository, "config.json")
    return (Path(cached).parent.name if isinstance(cached, str) else None), obstacle


# --- files of tensors ------------------------------------------------------------------------------------------


def weights_files(get: Callable[[str], Path | None]) -> list[Path] | None:
    """Return the files that hold a model's tensors, or None where there are none.

    ``get`` gives the path of a file by its name in the folder (downloading it, if need be), or None if it is absent.

    Raises:
        UserError: an index is damaged, or a file that it names is absent.
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
                raise UserError(f"{index} names {absent[0]}, which is missing beside it")
            return [path for path in found.values() if path is not None]
    return None


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """Read all tensors of a model folder by name, on the CPU, memory-mapped where the format allows it.

    Returns:
        The tensors, and the path to name when something about them is wrong.

    Raises:
        UserError: the weights are missing or damaged, or two files hold a tensor of the same name.
    """
    files = weights_files(lambda name: folder / name if (folder / name).is_file() else None)
    if files is None:
        raise UserError(f"{folder / WEIGHTS} is missing: {folder} is not a model folder")
    tensors: dict[str, Tensor] = {}
    for path in files:
        read = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
        twice = sorted(tensors.keys() & read.keys())
        if twice:
            raise UserError(f"{path} repeats {twice[0]}, which another file of {folder} holds too")
        tensors.update(read)
    return tensors, files[0] if len(files) == 1 else folder


def refuse_not_finite(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raise UserError where a weight is infinite or not a number."""
    bad = {name: n for name, value in tensors.items() if (n := int((~torch.isfinite(value)).sum()))}
    if bad:
        first, more = next(iter(bad)), f" and {len(bad) - 1:,} more tensors" if len(bad) > 1 else ""
        raise UserError(
            f"{where}: {sum(bad.values()):,} weights are not finite numbers, in {first}{more}; "
            f"use an earlier checkpoint"
        )


def require_short_header(path: Path) -> None:
    """Raise UserError where a safetensors header is so long that reading it could take a gigabyte."""
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
    except Exception as e:  # of safetensors, of the system, or of torch, for which a header may ask the impossible
        raise UserError(f"{path} is damaged: {one_line(e)}") from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused, or of no use to a reader
            values = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise UserError(f"{path}: cannot read the weights: {e.strerror or e}") from None
    except Exception as e:  # a damaged pickle fails in a dozen ways; torch's own words advise to trust it
        foreign = re.search(r"GLOBAL (\S+)", str(e))
        if foreign:
            raise UserError(f"{path} is refused: it holds {foreign[1]}, which is no tensor") from None
        raise UserError(f"{path} is damaged: it is not a whole pickle of tensors ({type(e).__name__})") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"{path} is not a model's weights: it should be a dictionary of tensors")
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested or value.is_meta:
            raise UserError(f"{path} is not a model's weights: {name} should be a plain tensor")
    return values


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write contiguous tensors into a safetensors file.

    Raises:
        OSError: it cannot be made.
        SafetensorError: it cannot be written.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | SAFE_OPEN, 0o666)
    mode = os.fstat(fd).st_mode  # of a new file as the user's umask wants it; safetensors makes one of 0600
    os.close(fd)
    save_file(dict(tensors), path, metadata)
    path.chmod(stat.S_IMODE(mode))


# --- models ----------------------------------------------------------------------------------------------------


def read_model_config(folder: Path) -> ModelConfig:
    """Read the config of the model in a folder.

    Raises:
        UnsupportedModel: its `config.json` describes an unknown model type.
        UserError: it is missing or damaged.
    """
    path = folder / "config.json"
    values = read_json(path, "model's config", dict[str, Any])
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedModel(f"{path}: model_type is {shortened(repr(model_type))}; the known types are {known}")
    try:
        return FAMILIES[model_type].from_json(values)
    except UserError as e:
        raise type(e)(f"{path}: {e}") from None
    except TypeError as e:
        raise UserError(f"{path} is damaged: {e}") from None


@torch.no_grad()
def hf_tensors(model: GPT) -> dict[str, Tensor]:
    """Return the weights under `transformers`' names and in its shapes, fp32 on the CPU; views where they are so."""
    views = family_of(model.config).views(model)
    return {name: view.detach().to("cpu", torch.float32) for name, view in views.items()}


def canonical_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of any GPT-2 checkpoint to GPT2LMHeadModel's names, and drop saved attention masks."""
    tensors = {name: value for name, value in tensors.items() if not MASK_BUFFER.fullmatch(name)}
    return {PREFIX + name if BARE.match(name) else name: value for name, value in tensors.items()}


def wrapper_of(name: str) -> str | None:
    """Explain which wrapper changed the name of a tensor, and how to undo it; None if no known one did."""
    return next((what for part, what in WRAPPERS.items() if part in f".{name}"), None)


def describe_mismatch(
    where: Path, missing: Iterable[str], unexpected: Iterable[str], others: Iterable[str] = ()
) -> str:
    """Describe what is wrong with the tensors of a file or folder: a few names of each kind, and the likely cause."""
    unexpected = sorted(unexpected)
    kinds = (("missing ", sorted(missing), ", "), ("unexpected ", unexpected, ", "), ("", sorted(others), "; "))
    told = [
        kind + between.join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for kind, names, between in kinds
        if names
    ]
    causes = list(dict.fromkeys(filter(None, map(wrapper_of, unexpected))))
    return f"{where} does not fit its config.json: {'; '.join([*told, *causes])}"


def _fitting(model: GPT, tensors: dict[str, Tensor], where: Path, finite: bool) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, checked to fit ``model``, which may be on the meta device."""
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
        raise UserError(describe_mismatch(where, missing, unexpected, [*problems, *another]))
    if unexpected or another:  # the model that is described, and something more
        raise UnsupportedModel(describe_mismatch(where, (), unexpected, another))
    if finite:
        refuse_not_finite(values, where)
    return values


def save_model(model: GPT, folder: Path) -> None:
    """Write ``model`` into an existing folder: weights, config and tokenizer, as `from_pretrained` expects them."""
    tensors = {name: value.contiguous() for name, value in hf_tensors(model).items()}
    write_tensors(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(family_of(model.config).to_json(model.config), indent=2) + "\n")
    generation = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(folder, model_max_length=model.config.n_positions)


def save_tokenizer(folder: Path, **settings: int) -> None:
    """Write GPT-2's tokenizer into a folder, as `AutoTokenizer` expects it."""
    (folder / "vocab.json").write_bytes(vocabulary_file("encoder.json"))
    (folder / "merges.txt").write_bytes(vocabulary_file("vocab.bpe"))
    tokenizer = {"tokenizer_class": "GPT2Tokenizer", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")


def require_size_of(tensors: Mapping[str, Tensor], where: Path, layers: int = 0, parameters: int = 0) -> None:
    """Raise UserError for tensors of a far smaller model than a config describes, before one of that size is built.

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


def load_model(folder: Path, device: torch.device, finite: bool = True) -> GPT:
    """Build the model of a folder, with its weights, on ``device``, ready to evaluate.

    Raises:
        UserError: it is no complete model of a known type, or with ``finite`` a weight is infinite or not a number.
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
        for name, view in family_of(config).views(model).items():
            view.copy_(values[name])
    return model.eval()
