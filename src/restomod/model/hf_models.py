"""Causal language models of other architectures, loaded and run by `transformers`, with their tokenizers.

`config.json` and the tokenizer decide whether this package or `transformers` runs a model. A GPT-2 with another
activation, an untied lm_head or a vocabulary of 50,304 tokens is run by `transformers`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from restomod.config.model import LARGEST, VOCAB_SIZE
from restomod.data.tokenizer import END_OF_TEXT, vocabulary_file
from restomod.model.gpt import GPT
from restomod.model.hf_format import UnsupportedModel
from restomod.model.hf_io import (
    describe_mismatch,
    load_model,
    read_model_config,
    read_tensors,
    refuse_not_finite,
    require_size_of,
    save_tokenizer,
    wrapper_of,
)
from restomod.utils.errors import UserError, is_out_of_memory, one_line
from restomod.utils.json_files import checked, read_json
from restomod.utils.process_memory import available_bytes

DEFAULT_CONTEXT = 2048  # tokens, if the config has no context length; the default of lm-evaluation-harness
LARGEST_TOKENIZER = 256 * 2**20  # bytes of tokenizer.json; tokenizers of 256,000 tokens have 32 MB
MOST_PADDING = 1024  # padding rows allowed after GPT-2's vocabulary in a model without a tokenizer
Settings = list[tuple[tuple[str, ...], Any]]
"""Leaf values of a config, each with its path of keys."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt", "tekken.json")


@dataclass(frozen=True)
class TransformersModel:
    """Causal language model of `transformers`, with its tokenizer."""

    model: Any
    """Loaded `AutoModelForCausalLM`."""
    tokenizer: Any
    """`AutoTokenizer` of the model."""

    @property
    def vocab_size(self) -> int:
        """Vocabulary size V, the rows of lm_head including padding."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def max_length(self) -> int:
        """Maximum context length, in tokens."""
        config = self.model.config.get_text_config()
        names = ("n_positions", "max_position_embeddings", "n_ctx")
        found = next((getattr(config, name) for name in names if getattr(config, name, None)), DEFAULT_CONTEXT)
        where = f"{self.model.name_or_path}: config.json: context length"
        return int(checked(found, Annotated[int, Field(ge=1, le=LARGEST)], where))

    @property
    def prefix(self) -> int:
        """Token id that replaces an empty context: BOS, else EOS, else 0."""
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return int(next((token for token in (begin, end) if token is not None), 0))

    @property
    def reads_gpt2(self) -> bool:
        """Whether the first 50,257 tokens are GPT-2's, so that the model can score shards of GPT-2 tokens."""
        return self.vocab_size >= VOCAB_SIZE and is_gpt2_vocabulary(self.tokenizer.get_vocab())

    def encode(self, text: str, begin: bool = False) -> list[int]:
        """Encode a text into token ids.

        Args:
            text: text to encode.
            begin: put the BOS token first, if the tokenizer adds one. The result then has at least one token.

        Raises:
            UserError: a token id is not in the model's vocabulary.
        """
        ids = list(self.tokenizer.encode(text, add_special_tokens=False))
        if begin:
            first = self.tokenizer.encode(text)[:1]
            ids = [*first, *ids] if first == [self.tokenizer.bos_token_id] and ids[:1] != first else ids
            ids = ids or [self.prefix]
        if max(ids, default=0) >= self.vocab_size:
            raise UserError(
                f"the tokenizer does not fit the model: {text!r:.40} has token {max(ids):,}, but the model has "
                f"{self.vocab_size:,} tokens"
            )
        return ids

    def ends(self) -> set[int]:
        """Return the ids of the tokens that end a text (EOS)."""
        named = getattr(self.model.generation_config, "eos_token_id", None)
        named = self.tokenizer.eos_token_id if named is None else named
        checked(named, int | list[int] | None, f"{self.model.name_or_path}: generation_config: eos_token_id")
        return set(named) if isinstance(named, list) else {named}

    def text_tokens(self) -> Tensor:
        """Return a mask of the vocabulary, (V,) bool: True for tokens of the tokenizer, False for padding."""
        known = torch.tensor(sorted(self.tokenizer.get_vocab().values()))
        is_text = torch.zeros(self.vocab_size, dtype=torch.bool)
        is_text[known[known < self.vocab_size]] = True
        return is_text.to(self.model.device)


@functools.cache
def _gpt2_ids() -> dict[str, int]:
    return dict(json.loads(vocabulary_file("encoder.json")))


def is_gpt2_vocabulary(ids: Mapping[str, Any]) -> bool:
    """Return whether the first 50,257 tokens of a vocabulary (token to id) are GPT-2's."""
    return {token: id for token, id in ids.items() if isinstance(id, int) and id < VOCAB_SIZE} == _gpt2_ids()


def _another_tokenizer(folder: Path) -> bool:
    """Return whether a folder contains a tokenizer other than GPT-2's."""
    whole, simple = folder / "tokenizer.json", folder / "vocab.json"
    if not whole.exists() and not simple.exists():
        return any((folder / name).exists() for name in TOKENIZER_FILES)
    values = read_json(whole if whole.exists() else simple, "tokenizer", max_bytes=LARGEST_TOKENIZER)
    try:
        if whole.exists():
            added = {token["content"]: token["id"] for token in values.get("added_tokens") or []}
            values = values["model"]["vocab"] | added
        return not is_gpt2_vocabulary(values)
    except (TypeError, KeyError, AttributeError):  # other types of tokenizers store their vocabulary as a list
        return True


def _why_not_ours(name: str, folder: Path) -> str | None:
    """Return the reason why this package cannot compute the model of a folder; None if it can."""
    config = read_model_config(folder)
    if config.vocab_size != VOCAB_SIZE:
        if read_json(folder / "config.json", "model's config")["model_type"] == "restomod":
            raise UserError(
                f"{name} has a vocabulary of {config.vocab_size:,} tokens; text needs GPT-2's vocabulary of "
                f"{VOCAB_SIZE:,} tokens"
            )
        return f"{folder / 'config.json'}: vocab_size is {config.vocab_size}; GPT-2's is {VOCAB_SIZE}"
    return f"{folder} contains a tokenizer other than GPT-2's" if _another_tokenizer(folder) else None


def open_causal_model(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> GPT | TransformersModel:
    """Load a causal language model to score or generate text.

    A model that this package computes exactly is loaded as `GPT`, any other model by `transformers`.

    Args:
        name: name given by the user: ``folder`` or a hub repository.
        folder: folder of the model.
        device: device of the model.
        dtype: dtype of the weights in `transformers`; a `GPT` has fp32 weights.

    Raises:
        UserError: the model is damaged, `transformers` is required but missing or fails to load it, or the weights do
            not fit the model.
    """
    try:
        reason = _why_not_ours(name, folder)
        if reason is None:
            return load_model(folder, device)
    except UnsupportedModel as e:
        reason = str(e)
    try:
        import transformers as library
    except ImportError:
        raise UserError(f"{reason}; `transformers` may support it: pip install transformers") from None
    settings = list(_settings(read_json(folder / "config.json", "model's config")))
    _refuse_code(folder / "config.json", settings)
    transformers: Any = library
    with _quiet(transformers):
        try:
            _require_possible(transformers, folder, settings)
            model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
            )
        except Exception as e:  # the model's class in `transformers` may raise any error
            if isinstance(e, UserError) or is_out_of_memory(e):
                raise
            raise UserError(f"{reason}; transformers cannot load it either ({one_line(e)})") from None
        _refuse_misfit(folder, model, loaded)
        tokenizer = _tokenizer(transformers, name, folder, int(model.config.get_text_config().vocab_size))
    model = model.to(device).eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long, device=device))
    except Exception as e:
        if is_out_of_memory(e):
            raise
        raise UserError(f"{folder}: transformers cannot run this model ({one_line(e)})") from None
    return TransformersModel(model, tokenizer)


def _settings(values: Any, *keys: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the leaf values of a config, each with its path of keys."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _settings(value, *keys, key)
    else:
        yield keys, values


def _require_possible(transformers: Any, folder: Path, settings: Settings) -> None:
    """Check that the size in a config fits the tensors and the memory, before `transformers` builds the model.

    Args:
        transformers: the module.
        folder: folder of the model.
        settings: leaf values of the config.

    Raises:
        UserError: there are more layers than tensors, too many parameters for the tensors, or too little memory.
    """
    tensors, where = read_tensors(folder)
    layers = [
        value
        for keys, value in settings
        if keys and "layer" in keys[-1] and not keys[-1].startswith("max_") and type(value) is int  # max_window_layers
    ]
    require_size_of(tensors, where, layers=max(layers, default=0))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    require_size_of(tensors, where, parameters=sum(parameter.numel() for parameter in model.parameters()))
    needed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    free = available_bytes(torch.device("cpu"))
    if free is not None and needed > free:
        raise UserError(f"{folder} needs {needed / 1e9:,.1f} GB of memory, but only {free / 1e9:,.1f} GB are free")


def _refuse_code(config: Path, settings: Settings) -> None:
    """Check that a config names no kernels on the hub, whose code `transformers` would download and run.

    Custom model code (`auto_map`) is disabled by ``trust_remote_code=False``.

    Raises:
        UserError: the config names such a kernel.
    """
    for keys, value in settings:
        key = next((key for key in keys if key.endswith("_implementation")), None)
        if key is not None and isinstance(value, str) and "/" in value:
            raise UserError(f"{config}: {key} {value!r} is code on the hub, and remote code is disabled; delete {key}")


def _refuse_misfit(folder: Path, model: Any, loaded: Mapping[str, Any]) -> None:
    """Check that `transformers` loaded all weights, for it only warns of missing and unused ones.

    Unused tensors of another head, such as a classifier, are allowed.

    Raises:
        UserError: weights are missing, unused, of a wrong shape, NaN or infinite.
    """
    run = {name for part in (model, model.base_model) for name, _ in part.named_children()}
    missing, unexpected = loaded["missing_keys"], loaded["unexpected_keys"]
    shapes = [f"{name} has shape {tuple(a)}, not {tuple(b)}" for name, a, b in loaded["mismatched_keys"]]
    if missing or shapes or any(name.partition(".")[0] in run or wrapper_of(name) for name in unexpected):
        raise UserError(describe_mismatch(folder, missing, unexpected, shapes))
    refuse_not_finite(dict(model.named_parameters()), folder)


def _tokenizer(transformers: Any, name: str, folder: Path, vocab_size: int) -> Any:
    """Load the tokenizer of a model.

    A model without a tokenizer gets GPT-2's if its vocabulary has GPT-2's size, with or without padding.

    Raises:
        UserError: the tokenizer cannot be loaded, is missing, or has more tokens than the model.
    """
    local, problem = Path(name).is_dir(), "it contains no tokenizer"
    if not local or any((folder / file).exists() for file in TOKENIZER_FILES):
        # the cached folder of a hub model has only config and weights
        where, commit = (folder, None) if local else (name, folder.name)
        try:
            found = transformers.AutoTokenizer.from_pretrained(where, revision=commit, trust_remote_code=False)
            if found.vocab_size > vocab_size:
                raise UserError(
                    f"{name}: the tokenizer does not fit the model: it has {found.vocab_size:,} tokens, but the model "
                    f"has {vocab_size:,}"
                )
            if len(found) > len(found.all_special_tokens):
                found.encode("a text")  # some damage causes errors only in use
                return found
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # a panic in the Rust code of `tokenizers` is a BaseException
            problem = f"transformers cannot load its tokenizer ({one_line(e)})"
            if local:
                raise UserError(f"{name}: {problem}") from None
    if not VOCAB_SIZE <= vocab_size <= VOCAB_SIZE + MOST_PADDING:
        raise UserError(
            f"{name}: {problem}, and GPT-2's does not fit: it has {VOCAB_SIZE:,} tokens, the model {vocab_size:,}"
        )
    with tempfile.TemporaryDirectory() as made:
        save_tokenizer(Path(made))
        gpt2 = transformers.AutoTokenizer.from_pretrained(made)
    assert gpt2.eos_token_id == END_OF_TEXT
    return gpt2


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence the progress bars and warnings of `transformers`; this package reports problems itself."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
