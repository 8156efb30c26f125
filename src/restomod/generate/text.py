"""Texts that continue prompts: all at once in batches, or one piece by piece as it is made."""

from __future__ import annotations

import codecs
import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from restomod.config.run import Device, Precision, SamplingConfig
from restomod.data.tokenizer import END_OF_TEXT, Tokenizer, gpt2_tokenizer
from restomod.engine.device import choose_device, choose_dtype
from restomod.generate.decode import (
    Prompt,
    cache_is_exact,
    generate,
    generate_with_transformers,
    rows_at_once,
)
from restomod.model.gpt import GPT
from restomod.model.hf_format import OtherModel
from restomod.model.hf_io import read_model_config
from restomod.model.hf_models import TransformersModel, open_causal_model
from restomod.runs.open_model import find_model
from restomod.utils.errors import UserError, describe_os_error
from restomod.utils.files import read_limited

MAX_PROMPT_BYTES = 32 * 2**20  # of a file of prompts


def continuations(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    n_samples: int,
    sampling: SamplingConfig,
    seed: int,
    dtype: torch.dtype,
) -> list[list[str]]:
    """Continue each prompt ``n_samples`` times, each up to ``<|endoftext|>``.

    The texts of a prompt follow from the model, the prompt and the seed, whatever the other prompts are.

    Returns:
        A list per prompt.
    """
    requests = [Prompt(prompt_tokens(tokenizer, prompt), i) for prompt in prompts for i in range(n_samples)]
    longest = max((len(request.prompt) for request in requests), default=0)
    at_once = rows_at_once(model.config, longest, sampling.max_tokens, dtype)
    texts: list[list[int]] = [[] for _ in requests]
    for start in range(0, len(requests), at_once):
        for new in generate(model, requests[start : start + at_once], sampling, seed, dtype):
            for i, token in new.items():
                texts[start + i].append(token)
    decoded = [tokenizer.decode([token for token in text if token != END_OF_TEXT]) for text in texts]
    return [decoded[start : start + n_samples] for start in range(0, len(decoded), n_samples)]


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    number: int,
    sampling: SamplingConfig,
    seed: int,
    dtype: torch.dtype,
) -> Iterator[str]:
    """Sample ``number`` of a prompt in pieces, as soon as they are made; a character comes when its bytes are whole.

    Together the pieces are what `continuations` returns.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for new in generate(model, [Prompt(prompt_tokens(tokenizer, prompt), number)], sampling, seed, dtype):
        if new[0] != END_OF_TEXT:
            yield decoder.decode(tokenizer.decode_bytes([new[0]]))
    yield decoder.decode(b"", final=True)


def stream_with_transformers(
    opened: TransformersModel, prompt: str, number: int, sampling: SamplingConfig, seed: int, cached: bool
) -> Iterator[str]:
    """`stream` with a model that `transformers` runs; ``cached`` as for `generate_with_transformers`."""

    def text_of(ids: list[int]) -> str:
        return str(opened.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    context = opened.encode(prompt, begin=True)
    tokens = generate_with_transformers(opened, Prompt(context, number), sampling, seed, cached)
    ids = list(context)
    said = len(text_of(ids))
    for token in tokens:
        ids.append(token)
        text = text_of(ids)
        if not text.endswith("\ufffd"):
            yield text[said:]
            said = max(said, len(text))
    yield text_of(ids)[said:]


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a prompt; an empty one starts a new document, and so does ``<|endoftext|>`` in it."""
    return tokenizer.encode_special(prompt).tolist() or [END_OF_TEXT]


def choose_prompts(prompts: tuple[str, ...], file: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """The prompts that a command names: those given, or the lines of a file that are not blank, or ``default``.

    Raises:
        UserError: both are named, or the file is no regular one, cannot be read, is not UTF-8, or holds no prompt.
    """
    if file is None:
        return prompts or default
    if prompts:
        raise UserError("--prompt and --prompt-file both name prompts: give one of them")
    if not file:
        raise UserError("--prompt-file is empty; name a text file, a prompt per line")
    path = Path(file)
    try:
        content = read_limited(path, "file of prompts", MAX_PROMPT_BYTES)
        lines = re.split("\r\n|\n|\r", content.decode("utf-8-sig"))  # str.splitlines: at U+2028, too
    except UnicodeDecodeError as e:
        raise UserError(
            f"--prompt-file {path} is not UTF-8 text: byte 0x{e.object[e.start]:02x} at offset {e.start} ({e.reason})"
        ) from None
    except OSError as e:
        raise UserError(f"--prompt-file {describe_os_error(e)}; it should be a text file, a prompt per line") from None
    found = tuple(line for line in lines if line.strip())
    if not found:
        raise UserError(f"--prompt-file {path} holds no prompt: write one per line")
    return found


def find_writer(where: str) -> Path:
    """The folder of the model that ``where`` names: a run, a model folder, or a name on the hub.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = find_model(where)
    with contextlib.suppress(OtherModel):  # transformers may know it
        read_model_config(folder)
    return folder


def sample_texts(
    where: str,
    prompts: Sequence[str],
    n_samples: int,
    sampling: SamplingConfig,
    seed: int,
    device: Device = "auto",
    precision: Precision = "auto",
    folder: Path | None = None,
) -> list[list[str]]:
    """Continue each prompt ``n_samples`` times with the model that ``where`` names (see `find_writer`).

    Args:
        where: a run, a model folder, or a name on the hub.
        prompts: texts to continue; an empty one starts a new document.
        n_samples: how many times each.
        sampling: how many tokens, and how they are drawn.
        seed: at least 0.
        device, precision: see `restomod.engine.device`.
        folder: of the model, where `find_writer` has been asked already.

    Returns:
        A list of texts per prompt.
    """
    target = choose_device(device)
    dtype = choose_dtype(precision, target)
    model = open_causal_model(where, folder or find_writer(where), target, dtype)
    if isinstance(model, GPT):
        return continuations(model, gpt2_tokenizer(), prompts, n_samples, sampling, seed, dtype)
    texts = _streams(model, prompts, n_samples, sampling, seed, dtype)
    return [["".join(next(texts)) for _ in range(n_samples)] for _ in prompts]


def streamed(
    where: str,
    prompts: Sequence[str],
    n_samples: int,
    sampling: SamplingConfig,
    seed: int,
    device: Device = "auto",
    precision: Precision = "auto",
) -> Iterator[Iterator[str]]:
    """The texts of `sample_texts`, one after the other, each in the pieces of `stream`."""
    target = choose_device(device)
    dtype = choose_dtype(precision, target)
    model = open_causal_model(where, find_writer(where), target, dtype)
    yield from _streams(model, prompts, n_samples, sampling, seed, dtype)


def _streams(
    model: GPT | TransformersModel,
    prompts: Sequence[str],
    n_samples: int,
    sampling: SamplingConfig,
    seed: int,
    dtype: torch.dtype,
) -> Iterator[Iterator[str]]:
    cached = not isinstance(model, GPT) and cache_is_exact(model.model)
    for prompt in prompts:
        for number in range(n_samples):
            if isinstance(model, GPT):
                yield stream(model, gpt2_tokenizer(), prompt, number, sampling, seed, dtype)
            else:
                yield stream_with_transformers(model, prompt, number, sampling, seed, cached)
