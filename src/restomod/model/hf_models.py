"""Causal language models of other architectures, loaded and run by `transformers`, with their tokenizers.

What decides is what a model's `config.json` and tokenizer say, not its name: a GPT-2 with another activation, an output
matrix of its own or a vocabulary of 50,304 tokens is one of these.
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

NOT_SAID = 2048  # the window of a model whose config names none, as in lm-evaluation-harness
LARGEST_TOKENIZER = 256 * 2**20  # bytes of its file; those of 256,000 tokens have 32 MB
MOST_PADDING = 1024  # rows of a vocabulary without a tokenizer that may be padding behind GPT-2's
Settings = list[tuple[tuple[str, ...], Any]]
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt", "tekken.json")


@dataclass(frozen=True)
class TransformersModel:
    """A model of `transformers`, loaded, with its tokenizer."""

    model: Any
    """An `AutoModelForCausalLM`, in its own dtype and on its own device."""
    tokenizer: Any
    """Its `AutoTokenizer`."""

    @property
    def vocab_size(self) -> int:
        """Rows of lm_head."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def max_length(self) -> int:
        """Maximum context length, in tokens."""
        config = self.model.config.get_text_config()
        names = ("n_positions", "max_position_embeddings", "n_ctx")
        found = next((getattr(config, name) for name in names if getattr(config, name, None)), NOT_SAID)
        where = f"{self.model.name_or_path}: config.json: its longest context"
        return int(checked(found, Annotated[int, Field(ge=1, le=LARGEST)], where))

    @property
    def prefix(self) -> int:
        """Token in place of an empty context."""
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return int(next((token for token in (begin, end) if token is not None), 0))

    @property
    def reads_gpt2(self) -> bool:
        """Whether its first tokens are GPT-2's, so that shards of GPT-2's tokens can be scored."""
        return self.vocab_size >= VOCAB_SIZE and is_gpt2_vocabulary(self.tokenizer.get_vocab())

    def encode(self, text: str, begin: bool = False) -> list[int]:
        """Encode a text; with ``begin`` after the BOS token, if the tokenizer adds one.

        Raises:
            UserError: a token is beyond the model's vocabulary.
        """
        ids = list(self.tokenizer.encode(text, add_special_tokens=False))
        if begin:
            first = self.tokenizer.encode(text)[:1]
            ids = [*first, *ids] if first == [self.tokenizer.bos_token_id] and ids[:1] != first else ids
            ids = ids or [self.prefix]
        if max(ids, default=0) >= self.vocab_size:
            raise UserError(
                f"the model has a vocabulary of {self.vocab_size:,} tokens, and its tokenizer gives token {max(ids):,} "
                f"for {text!r:.40}: it is the tokenizer of another model"
            )
        return ids

    def ends(self) -> set[int]:
        """Tokens that end a text."""
        named = getattr(self.model.generation_config, "eos_token_id", None)
        named = self.tokenizer.eos_token_id if named is None else named
        checked(named, int | list[int] | None, f"{self.model.name_or_path}: generation_config: eos_token_id")
        return set(named) if isinstance(named, list) else {named}

    def text_tokens(self) -> Tensor:
        """Mask of the rows of lm_head that are tokens of the tokenizer, (V,) bool; the others are padding."""
        known = torch.tensor(sorted(self.tokenizer.get_vocab().values()))
        is_text = torch.zeros(self.vocab_size, dtype=torch.bool)
        is_text[known[known < self.vocab_size]] = True
        return is_text.to(self.model.device)


@functools.cache
def _gpt2_ids() -> dict[str, int]:
    return dict(json.loads(vocabulary_file("encoder.json")))


def is_gpt2_vocabulary(ids: Mapping[str, Any]) -> bool:
    """Whether the first 50,257 tokens of a vocabulary are GPT-2's."""
    return {token: id for token, id in ids.items() if isinstance(id, int) and id < VOCAB_SIZE} == _gpt2_ids()


def _another_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer that is not GPT-2's."""
    whole, simple = folder / "tokenizer.json", folder / "vocab.json"
    if not whole.exists() and not simple.exists():
        return any((folder / name).exists() for name in TOKENIZER_FILES)
    values = read_json(whole if whole.exists() else simple, "tokenizer", max_bytes=LARGEST_TOKENIZER)
    try:
        if whole.exists():
            added = {token["content"]: token["id"] for token in values.get("added_tokens") or []}
            values = values["model"]["vocab"] | added
        return not is_gpt2_vocabulary(values)
    except (TypeError, KeyError, AttributeError):  # another kind of tokenizer: its vocabulary is a list
        return True


def _why_not_ours(name: str, folder: Path) -> str | None:
    """Return why this package cannot compute the model of a folder, or None if it can."""
    config = read_model_config(folder)
    if config.vocab_size != VOCAB_SIZE:
        if read_json(folder / "config.json", "model's config")["model_type"] == "restomod":
            raise UserError(
                f"{name} has a vocabulary of {config.vocab_size:,} tokens, and text is read and written with "
                f"GPT-2's {VOCAB_SIZE:,}"
            )
        return f"{folder / 'config.json'}: vocab_size is {config.vocab_size}; GPT-2's is {VOCAB_SIZE}"
    return f"{folder} holds a tokenizer that is not GPT-2's" if _another_tokenizer(folder) else None


def open_causal_model(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> GPT | TransformersModel:
    """Load a model to score or continue text: as ours if this package computes it exactly, else by `transformers`.

    ``name`` is what the user calls it: ``folder``, or a name on the hub. ``dtype`` is for `transformers`; ours has
    fp32 weights.

    Raises:
        UserError: it is damaged, or `transformers` is needed and missing or cannot load it, or it would run with other
            weights than its files hold.
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
        raise UserError(f"{reason}; transformers may run it: pip install transformers") from None
    settings = list(_settings(read_json(folder / "config.json", "model's config")))
    _refuse_code(folder / "config.json", settings)
    transformers: Any = library
    with _quiet(transformers):
        try:
            _require_possible(transformers, folder, settings)
            model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
            )
        except Exception as e:  # of any kind: the files say what is run
            if isinstance(e, UserError) or is_out_of_memory(e):
                raise
            raise UserError(f"{reason}; and transformers cannot load it ({one_line(e)})") from None
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
    """Compare a config with the tensors in its folder before `transformers` builds the model.

    Raises:
        UserError: it has more layers than there are tensors, far more parameters than they hold numbers, or more than
            memory has room for.
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
        raise UserError(f"{folder} needs {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free")


def _refuse_code(config: Path, settings: Settings) -> None:
    """Refuse a config that names kernels on the hub, whose code `transformers` would download and run.

    Its other way to code of a model's own, `auto_map`, is closed by ``trust_remote_code=False``.
    """
    for keys, value in settings:
        key = next((key for key in keys if key.endswith("_implementation")), None)
        if key is not None and isinstance(value, str) and "/" in value:
            raise UserError(f"{config}: {key} {value!r} is code on the hub, which is not run; delete {key}")


def _refuse_misfit(folder: Path, model: Any, loaded: Mapping[str, Any]) -> None:
    """Refuse a model with weights that `transformers` has initialised at random or left out, or that are not finite.

    It only warns of these. Tensors of another head, beside the one that is run, change nothing and are left out.
    """
    run = {name for part in (model, model.base_model) for name, _ in part.named_children()}
    missing, unexpected = loaded["missing_keys"], loaded["unexpected_keys"]
    shapes = [f"{name} has shape {tuple(a)} and not {tuple(b)}" for name, a, b in loaded["mismatched_keys"]]
    if missing or shapes or any(name.partition(".")[0] in run or wrapper_of(name) for name in unexpected):
        raise UserError(describe_mismatch(folder, missing, unexpected, shapes))
    refuse_not_finite(dict(model.named_parameters()), folder)


def _tokenizer(transformers: Any, name: str, folder: Path, vocab_size: int) -> Any:
    """Load the model's tokenizer; GPT-2's if it has none and a vocabulary of GPT-2's size, with or without padding."""
    local, problem = Path(name).is_dir(), "it holds no tokenizer"
    if not local or any((folder / file).exists() for file in TOKENIZER_FILES):
        # of a model of the hub only config and weights are here
        where, commit = (folder, None) if local else (name, folder.name)
        try:
            found = transformers.AutoTokenizer.from_pretrained(where, revision=commit, trust_remote_code=False)
            if found.vocab_size > vocab_size:
                raise UserError(
                    f"{name} has a vocabulary of {vocab_size:,} tokens, and its tokenizer one of {found.vocab_size:,}: "
                    f"it is the tokenizer of another model"
                )
            if len(found) > len(found.all_special_tokens):
                found.encode("a text")  # damage shows only then
                return found
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # a panic of tokenizers, which is written in Rust, is no Exception
            problem = f"transformers cannot load its tokenizer ({one_line(e)})"
            if local:
                raise UserError(f"{name}: {problem}") from None
    if not VOCAB_SIZE <= vocab_size <= VOCAB_SIZE + MOST_PADDING:
        raise UserError(f"{name}: {problem}, and a vocabulary of {vocab_size:,} tokens is not GPT-2's {VOCAB_SIZE:,}")
    with tempfile.TemporaryDirectory() as made:
        save_tokenizer(Path(made))
        gpt2 = transformers.AutoTokenizer.from_pretrained(made)
    assert gpt2.eos_token_id == END_OF_TEXT
    return gpt2


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence `transformers`' progress bars, and its warnings of what this package reports itself."""
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
